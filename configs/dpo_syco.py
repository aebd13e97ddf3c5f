"""DPO on the best and the worst recorded reply to each prompt.

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco
  python -m rlsafety.train --config=configs/dpo_syco.py

2 CPU cores, about 3 minutes (estimated). For seconds on the tiny model use tiny_syco.py in place of
smollm2_syco.py and dpo_syco.py:quicktest. JSON Lines with `chosen` and `rejected` do as well.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.data.path = "data/tiny_syco" if argument == "quicktest" else "data/smollm2_syco"
  c.objective = objective("dpo", beta=0.1)
  return c
