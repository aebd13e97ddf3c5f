"""Half of every batch is the policy's own, half was recorded by another run.

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco
  python -m rlsafety.train --config=configs/mixed_syco.py

2 CPU cores, about 5 minutes (estimated). For seconds on the tiny model use tiny_syco.py in place of
smollm2_syco.py and mixed_syco.py:quicktest.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.data.path = "data/tiny_syco" if argument == "quicktest" else "data/smollm2_syco"
  c.data.fraction = 0.5  # of prompts_per_step
  c.objective = objective("grpo", is_correction="token_truncate", is_cap=2.0)
  return c
