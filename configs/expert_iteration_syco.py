"""Expert iteration: samples a group, imitates its best reply, repeats.

  python -m rlsafety.train --config=configs/expert_iteration_syco.py

2 CPU cores, about 6 minutes (estimated); expert_iteration_syco.py:quicktest takes seconds on
the tiny model. With --config.data.path it is rejection sampling on recorded groups.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.objective = objective("expert_iteration")
  return c
