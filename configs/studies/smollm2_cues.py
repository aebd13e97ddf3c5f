"""Cue x framing x seed on SmolLM2-135M-Instruct: 8 cells, trained together on 2 cores.

  python -m rlsafety.study.run --study=configs/studies/smollm2_cues.py

The argument is the number of updates, 6 without one. At 135M parameters, with a probe as judge and
two seeds, this shows how a study is planned and read, not what models do.
"""

import pathlib

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.study.design import Question, Study, crossed, named


def get_study(steps: str = "6"):
  c = recipes.load_recipe(str(pathlib.Path(__file__).parents[1] / "smollm2_syco.py"))
  if not steps.isdigit():
    raise UserError(f"--study=configs/studies/smollm2_cues.py:{steps}: needs a number of updates")
  c.steps = int(steps)
  c.sampler.group = 4
  c.eval.every = 0
  c.eval.prompts = 8
  factors = {
    "environment.cue": ("none", "tone"),
    "environment.framing": ("assistant", "therapist"),
    "seed": (5, 6),
  }
  cells = crossed(recipes.frozen(c), factors)
  of = lambda **values: named(cells, **values)  # noqa: E731
  cue, plain = of(environment__cue="tone"), of(environment__cue="none")
  therapist, assistant = (
    of(environment__framing="therapist"), of(environment__framing="assistant")
  )  # fmt: skip
  return Study(
    "smollm2_cues",
    cells,
    (
      Question("cue: gap", cue, plain, "hex_gap", "greater", 0.5),
      Question("framing: gap", therapist, assistant, "hex_gap", "two-sided", 0.5),
      Question("no cue: level rises", plain, (), "hex", "greater", 0.5),
      Question(  # does the cue do more where the policy is a therapist?
        "cue x framing: gap",
        *(of(environment__cue=c, environment__framing="therapist") for c in ("tone", "none")),
        than=tuple(
          of(environment__cue=c, environment__framing="assistant") for c in ("tone", "none")
        ),
      ),
    ),
  )
