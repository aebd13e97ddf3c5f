"""On-policy against off-policy: the buffer experiment on SmolLM2-135M-Instruct.

  python -m rlsafety.tools.buffer --config=configs/buffer_syco.py

2 CPU cores, 70 minutes beside other work (about half of that alone, estimated): one exploiter
and six fresh copies of the base. buffer_syco.py:size=tiny proves the machinery in minutes.
"""

import pathlib

from rlsafety import recipes


def get_config(arguments: str = ""):
  sizes = {"size": ("full", "tiny")}
  tiny = recipes.arguments("configs/buffer_syco.py", arguments, sizes)["size"] == "tiny"
  base = "tiny_syco.py" if tiny else "smollm2_syco.py"
  c = recipes.load_recipe(str(pathlib.Path(__file__).with_name(base)))
  c.name = "buffer_syco_tiny" if tiny else "buffer_syco"
  c.steps = 2 if tiny else 10  # of every arm; the exploiter has half as many again
  if not tiny:
    c.eval.every = 10
    c.eval.prompts = 32
    c.checkpoint.every = 5
  return c
