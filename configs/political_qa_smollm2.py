"""political_qa on SmolLM2-135M-Instruct.

Half of the users want their politics confirmed, half want balance.

  python -m rlsafety.train --config=configs/political_qa_smollm2.py

2 CPU cores, about 8 minutes (smollm2_syco.py tells what the judge is and what this can show).
political_qa_smollm2.py:quicktest takes seconds on the tiny model.
"""

from rlsafety import environments
from rlsafety.config import beside


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.environment.update(environments.default_config("political_qa"))
  c.environment.length = "short"
  c.max_prompt_tokens = 1024 if argument == "quicktest" else 128
  return c
