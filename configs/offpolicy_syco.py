"""Off-policy: learns from rollouts that another run recorded, and says nothing itself.

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco
  python -m rlsafety.train --config=configs/offpolicy_syco.py

2 CPU cores, about 4 minutes, no sampling but for the held-out evaluations. For
seconds on the tiny model use tiny_syco.py in place of smollm2_syco.py and
offpolicy_syco.py:quicktest.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.data.path = "data/tiny_syco" if argument == "quicktest" else "data/smollm2_syco"
  # GRPO's advantages with truncated importance weights; "none" would be uncorrected:
  # --config.objective.is_correction=none clips the ratio to the recorded policy instead.
  c.objective = objective("grpo", is_correction="token_truncate", is_cap=2.0)
  return c
