"""The study (arXiv 2604.12500) as 17 jobs, one for each model, in place of 216 runs.

  python -m rlsafety.study.run --study=configs/studies/paper.py:qwen1.5-7b-chat

A chat model's 18 cells are 3 environments and 3 steps of the published chain, with 3 seeds each; a
base model has the 3 seeds of therapy_talk. The argument is a key of MODELS or BASE_MODELS in
configs/paper.py. `python -m rlsafety.tools.plan --config=configs/paper.py:model=M --device=H100
--cells=18` says what fits; launch/studies.sh starts one job for each model.
"""

import importlib.util
import pathlib

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.flags import did_you_mean
from rlsafety.study.design import Question, Study

PAPER = str(pathlib.Path(__file__).parents[1] / "paper.py")


def get_study(model: str = "qwen1.5-7b-chat"):
  spec = importlib.util.spec_from_file_location("paper", PAPER)
  paper = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(paper)
  if model not in paper.MODELS | paper.BASE_MODELS:
    hint = did_you_mean(model, paper.MODELS | paper.BASE_MODELS)
    raise UserError(f"--study=configs/studies/paper.py:{model}: no such model{hint}")
  cells = {}
  for arguments in paper.cells():
    of = dict(pair.split("=", 1) for pair in arguments.split(","))
    if of["model"] == model:
      where = of["env"] if of["variant"] == "main" else of["variant"]
      cells[f"{where}-{of['seed']}"] = recipes.frozen(paper.get_config(arguments))

  def seeds(where: str) -> tuple[str, ...]:
    return tuple(name for name in cells if name.rpartition("-")[0] == where)

  rises = ["therapy_talk"] if model in paper.BASE_MODELS else list(paper.ENVIRONMENTS[:3])
  questions = [Question(f"{w}: gap rises", seeds(w), (), "hex_gap", "greater") for w in rises]
  if model in paper.MODELS:
    before = "action_advice"
    for step in paper.CHAIN:
      name = f"{step} against {before}"
      questions.append(Question(name, seeds(step), seeds(before), "hex_gap"))
      before = step
  return Study(f"paper-{model}", cells, tuple(questions))
