"""On-policy against off-policy: the buffer experiment on SmolLM2-135M-Instruct.

  python -m rlsafety.tools.buffer --config=configs/buffer_syco.py

2 CPU cores, 70 minutes beside other work (about half of that alone, estimated): one exploiter
and six fresh copies of the base. buffer_syco.py:quicktest proves the machinery in minutes.
"""

from rlsafety.config import beside


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  if argument == "quicktest":
    c.steps = 2
    return c
  c.steps = 10  # of every arm; the exploiter has half as many again
  c.eval.every = 10
  c.eval.prompts = 32
  c.checkpoint.every = 5
  return c
