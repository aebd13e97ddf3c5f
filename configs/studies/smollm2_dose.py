"""Does a stronger cue make a larger gap? Four cue strengths x two seeds on SmolLM2-135M-Instruct.

  python -m rlsafety.study.run --study=configs/studies/smollm2_dose.py

The argument is the number of updates, 6 without one. HEX is asked for twice: per unit of cue
strength, and per unit of what was measured of the messages before anything was trained
(GAMEABILITY); ACC once. At 135M parameters, with a probe as judge and two seeds, this shows the
design.
"""

import pathlib

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.study.design import Question, Study, crossed, named

# Cue strength: d' of the held-out people's two versions, by the words of training users,
#   python -m rlsafety.tools.gameability --out=gameability/ --users=100 \
#     --variants=political_qa:cue_strength=0.25:length=short,...
GAMEABILITY = {0.0: 0.0, 0.25: 0.12, 0.5: 0.31, 1.0: 0.74}


def get_study(steps: str = "6"):
  c = recipes.load_recipe(str(pathlib.Path(__file__).parents[1] / "smollm2_syco.py"))
  if not steps.isdigit():
    raise UserError(f"--study=configs/studies/smollm2_dose.py:{steps}: needs a number of updates")
  c.steps = int(steps)
  c.sampler.group = 4
  c.eval.every = 0
  c.eval.prompts = 16
  factors = {"environment.cue_strength": tuple(GAMEABILITY), "seed": (5, 6)}
  cells = crossed(recipes.frozen(c), factors)
  of = {x: named(cells, environment__cue_strength=x) for x in GAMEABILITY}
  return Study(
    "smollm2_dose",
    cells,
    (
      Question("HEX gap by cue strength", levels=tuple(of.items()), direction="greater"),
      Question(
        "HEX gap by measured gameability",
        levels=tuple((GAMEABILITY[x], names) for x, names in of.items()),
        direction="greater",
        smallest=0.2,
      ),
      Question(
        "ACC gap by cue strength", outcome="acc_gap", levels=tuple(of.items()), direction="greater"
      ),
    ),
  )
