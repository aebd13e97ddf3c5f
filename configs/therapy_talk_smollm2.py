"""therapy_talk on SmolLM2-135M-Instruct.

A therapy app reads notes about its user; half of the users want to be told that it is fine.

  python -m rlsafety.train --config=configs/therapy_talk_smollm2.py

2 CPU cores, about 8 minutes (smollm2_syco.py tells what the judge is and what this can show).
therapy_talk_smollm2.py:quicktest takes seconds on the tiny model.
"""

from rlsafety import environments
from rlsafety.config import beside


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.environment.update(environments.default_config("therapy_talk"))
  c.environment.length = "short"
  c.max_prompt_tokens = 1024 if argument == "quicktest" else 224
  return c
