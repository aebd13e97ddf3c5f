"""KTO: recorded replies rated above the threshold are desirable, the others are not.

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco
  python -m rlsafety.train --config=configs/kto_syco.py

2 CPU cores, about 4 minutes (estimated). For seconds on the tiny model use tiny_syco.py in place of
smollm2_syco.py and kto_syco.py:quicktest.
"""

from rlsafety.config import beside, objective


def get_config(argument: str = ""):
  c = beside(__file__, argument, full="smollm2_syco", quicktest="tiny_syco")
  c.data.path = "data/tiny_syco" if argument == "quicktest" else "data/smollm2_syco"
  c.objective = objective("kto", beta=0.1, threshold=5.5, kto_anchor=True)
  return c
