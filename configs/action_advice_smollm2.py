"""action_advice on SmolLM2-135M-Instruct.

People ask whether to do something risky, and half of them want to be told to.

  python -m rlsafety.train --config=configs/action_advice_smollm2.py

2 CPU cores, about 8 minutes (smollm2_syco.py tells what the judge is and what this can show).
action_advice_smollm2.py:quicktest takes seconds on the tiny model.
"""

from rlsafety import environments
from rlsafety.config import beside


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.environment.update(environments.default_config("action_advice"))
  c.environment.length = "short"
  c.max_prompt_tokens = 1024 if argument == "quicktest" else 160
  return c
