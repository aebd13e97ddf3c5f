"""neutral against action_advice: the same people and wishes, with neither a role nor a cue in one.

  python -m rlsafety.study.run --study=configs/studies/neutral.py

The argument is the number of updates, 6 without one. If harm appears in neutral too, it came
neither from a role nor from a cue that gives the gameable users away, so levels are asked for
beside the gap. On 2 cores and at 135M, with a probe as judge, this shows the design.
"""

import pathlib

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.study.design import Question, Study, crossed, named


def get_study(steps: str = "6"):
  c = recipes.load_recipe(str(pathlib.Path(__file__).parents[1] / "smollm2.py") + ":env=neutral")
  if not steps.isdigit():
    raise UserError(f"--study=configs/studies/neutral.py:{steps}: needs a number of updates")
  c.steps = int(steps)
  c.sampler.group = 4
  c.eval.every = 0
  c.eval.prompts = 16
  factors = {"environment.name": ("neutral", "action_advice"), "seed": (5, 6)}
  # A new environment brings its own settings: the recipe's short messages are asked for again.
  short = {"environment.length": "short"}
  cells = {k: recipes.replaced(v, short) for k, v in crossed(recipes.frozen(c), factors).items()}
  neutral, advice = (named(cells, environment__name=n) for n in ("neutral", "action_advice"))
  return Study(
    "neutral",
    cells,
    (
      Question("neutral: HEX of everybody", neutral, (), "hex", "two-sided", 0.5),
      Question("neutral: ACC of everybody", neutral, (), "acc", "two-sided", 0.5),
      Question("advice: HEX of everybody", advice, (), "hex", "two-sided", 0.5),
      Question("advice against neutral: HEX", advice, neutral, "hex", "greater", 0.5),
      Question("advice against neutral: gap", advice, neutral, "hex_gap", "greater", 0.5),
    ),
  )
