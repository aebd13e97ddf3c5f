"""Supervised: imitates every recorded reply, whatever its rating.

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco --first_step 13
  python -m rlsafety.train --config=configs/sft_syco.py

2 CPU cores, about 4 minutes (estimated). For seconds on the tiny model use tiny_syco.py in place of
smollm2_syco.py and sft_syco.py:quicktest. Any JSON Lines file with `messages` and
`completion` does as well: `record --jsonl FILE`.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.data.path = "data/tiny_syco" if argument == "quicktest" else "data/smollm2_syco"
  c.objective = objective("sft")
  return c
