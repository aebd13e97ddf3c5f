"""A study: its cells, and the questions that are fixed before the first update.

A study file is Python with
  get_study() -> Study(name, cells, questions)
where cells are configs by name (`crossed` makes them of factors) and each question is a contrast
between groups of cells, or a trend over levels of a dose. `write` puts the questions with their
digest into every run directory when its training starts; what the file says later is compared with
that, never silently used.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from rlsafety import recipes
from rlsafety.config import Config
from rlsafety.errors import UserError
from rlsafety.files import read_json, write_json
from rlsafety.flags import did_you_mean

FILE = "study.json"
OUTCOMES = ("hex_gap", "acc_gap", "reward_gap", "hex", "acc", "reward", "hex_gameable",
            "acc_gameable", "hex_non_gameable", "acc_non_gameable")  # fmt: skip
DIRECTIONS = ("greater", "less", "two-sided")


@dataclasses.dataclass(frozen=True)
class Question:
  """Is the change of `outcome` over training, in the cells `more`, above that in the cells `less`?

  more, less: names of cells; without `less` the change of `more` itself is asked for. With `than`,
  two further groups, the question is an interaction: is more - less above than[0] - than[1]? Cells
  that differ in nothing but the contrast are pairs where they stand at the same place. With
  `levels` in place of groups, (dose, cells) of each, the question is a trend: by how much does the
  change of the outcome rise per unit of the dose (cue strength, measured gameability, ...)?
  outcome: of the held-out evaluation. direction: of what is asked for. smallest: the smallest
  effect of interest, in points of rating (per unit of dose): closer to 0 than that counts as none.
  """

  name: str
  more: tuple[str, ...] = ()
  less: tuple[str, ...] = ()
  outcome: str = "hex_gap"
  direction: str = "two-sided"
  smallest: float = 0.5
  than: tuple[tuple[str, ...], ...] = ()
  levels: tuple[tuple[float, tuple[str, ...]], ...] = ()

  @property
  def groups(self) -> tuple[tuple[str, ...], ...]:
    """The groups of cells that are contrasted."""
    if self.levels:
      return tuple(cells for _, cells in self.levels)
    return (self.more, *((self.less,) if self.less else ()), *self.than)

  @property
  def signs(self) -> tuple[float, ...]:
    """The weight of each group's mean in the estimate; of a trend those of the least-squares line
    through the levels' means."""
    if not self.levels:
      return (1, -1, -1, 1)[: len(self.groups)]
    doses = [dose for dose, _ in self.levels]
    middle = sum(doses) / len(doses)
    spread = sum((dose - middle) ** 2 for dose in doses)
    return tuple((dose - middle) / spread for dose in doses)


@dataclasses.dataclass(frozen=True)
class Study:
  """cells: configs by name, a plain word each (None where only answers are read).
  correction: of the questions' p values, holm | none.
  alpha: the error rate of all questions together.
  scores: name of a re-scoring (`tools.rescore --source=heldout`) that gives ACC and HEX of the
  outcomes, for an evaluator too slow to read every reply of training; "" for the runs' own."""

  name: str
  cells: Mapping[str, Config | None]
  questions: tuple[Question, ...] = ()
  correction: str = "holm"
  alpha: float = 0.05
  scores: str = ""

  def __post_init__(self) -> None:
    for problem in _problems(self):
      raise UserError(f"study {self.name!r}: {problem}")


def _problems(study: Study) -> Iterator[str]:
  if not study.cells:
    yield "has no cells"
  for name in (study.name, *study.cells):
    if not name or pathlib.PurePath(name).name != name or name.startswith("."):
      yield f"{name!r} is no plain word; it becomes a folder"
  if study.correction not in ("holm", "none"):
    yield f"correction={study.correction!r}: choose holm or none"
  if study.scores and pathlib.PurePath(study.scores).name != study.scores:
    yield f"scores={study.scores!r} is no plain word; it is the name of a file"
  if not 0 < study.alpha < 1:
    yield f"alpha={study.alpha} must lie in (0, 1)"
  for q in study.questions:
    where = f"question {q.name!r}"
    named_cells = [cell for group in q.groups for cell in group]
    for cell in named_cells:
      if cell not in study.cells:
        yield f"{where}: no cell {cell!r}{did_you_mean(cell, study.cells)}"
    if q.levels:
      doses = {dose for dose, _ in q.levels}
      if q.more or q.less or q.than:
        yield f"{where}: levels stand in place of more, less and than"
      if len(doses) < max(2, len(q.levels)) or not all(map(math.isfinite, doses)):
        yield f"{where}: levels={q.levels} need two different doses or more, each a number"
      if not all(q.groups) or len(set(named_cells)) < len(named_cells):
        yield f"{where}: levels={q.levels} must be different cells, at least one of each dose"
    elif not q.more or len(set(named_cells)) < len(named_cells):
      yield f"{where}: more={q.more}, less={q.less} must be different cells, at least one in more"
    if q.than and not (q.less and len(q.than) == 2 and all(q.than)):
      yield f"{where}: than={q.than} must be two groups of cells, beside more and less"
    for field, known in (("outcome", OUTCOMES), ("direction", DIRECTIONS)):
      if getattr(q, field) not in known:
        yield f"{where}: {field}={getattr(q, field)!r}: choose from {', '.join(known)}"
    if not q.smallest > 0:
      yield f"{where}: smallest={q.smallest} must be positive"
  if len({q.name for q in study.questions}) < len(study.questions):
    yield "two questions have one name"


def crossed(base: Config, factors: Mapping[str, Sequence]) -> dict[str, Config]:
  """A cell for every combination of the factors {"environment.cue": ("none", "tone"), ...}.

  Cells are named after the values, "none-5"; `named` finds them again.
  """
  cells = {}
  for values in itertools.product(*factors.values()):
    name = "-".join(str(v).replace("/", "_").replace(":", "_") for v in values)
    if name in cells:
      raise UserError(f"factors {', '.join(factors)}: two cells would be called {name}")
    changes = dict(zip(factors, values, strict=True))
    cells[name] = dataclasses.replace(recipes.replaced(base, changes), name=name)
  return cells


def named(cells: Mapping[str, Config], **values: object) -> tuple[str, ...]:
  """The names of the cells whose fields have these values; a__b stands for a.b, so that
  `named(cells, environment__cue="none")` are the cells without a cue, in the order of the study."""

  def has(config: Config, field: str, value: object) -> bool:
    node: object = config
    for part in field.split("__"):
      node = getattr(node, part)
    return node == value

  return tuple(n for n, c in cells.items() if all(has(c, f, v) for f, v in values.items()))


def load(path: str) -> Study:
  """FILE.py[:argument] -> what its get_study(argument) returns. Raises UserError."""
  study = recipes.called(path, "get_study", "--study")
  if not isinstance(study, Study):
    raise UserError(f"--study={path}: get_study() returns no rlsafety.study.design.Study")
  return study


# --- In the run directories -----------------------------------------------------------------


def plan_of(study: Study) -> dict:
  """The part of a study that must not change once it is read: plain JSON."""
  questions = [dataclasses.asdict(q) for q in study.questions]
  questions = [{k: v for k, v in q.items() if k not in ("than", "levels") or v} for q in questions]
  plain = json.loads(json.dumps(questions))
  plan = {"name": study.name, "questions": plain, "correction": study.correction}
  return plan | {"alpha": study.alpha} | ({"scores": study.scores} if study.scores else {})


def of_plan(plan: Mapping) -> Study:
  """The study of a stored plan, to read answers from the runs of its cells."""
  groups = lambda q: {  # noqa: E731  JSON knows lists alone
    "more": tuple(q["more"]), "less": tuple(q["less"]),
    "than": tuple(map(tuple, q.get("than", ()))),
    "levels": tuple((dose, tuple(cells)) for dose, cells in q.get("levels", ())),
  }  # fmt: skip
  questions = tuple(Question(**{**q, **groups(q)}) for q in plan["questions"])
  cells = dict.fromkeys(c for q in questions for group in q.groups for c in group)
  return Study(
    plan["name"], cells, questions, plan["correction"], plan["alpha"], plan.get("scores", "")
  )


def digest(plan: Mapping) -> str:
  """The sha256 of a plan."""
  return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def write(study: Study, cell: str, folder: pathlib.Path) -> None:
  """Puts the plan into a cell's run directory, unless one is there: the first one counts."""
  if not (folder / FILE).exists() and study.questions:
    plan = plan_of(study)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"cell": cell, "sha256": digest(plan), "plan": plan})


def read(folder: pathlib.Path) -> dict | None:
  """{"cell", "sha256", "plan"} of a run directory, None where there is none.

  Raises UserError if the plan is not the one that its digest names.
  """
  if not (folder / FILE).exists():
    return None
  found = read_json(folder / FILE)
  if not isinstance(found.get("plan"), dict) or digest(found["plan"]) != found.get("sha256"):
    raise UserError(f"{folder / FILE}: was changed after the start (its sha256 does not fit)")
  return found


def changed(study: Study, workdir: pathlib.Path) -> list[str]:
  """What the study's questions say now and did not when its cells started, as lines to print."""
  now, cells_of = plan_of(study), {}
  for cell in study.cells:
    found = read(workdir / cell)
    if found is None or found["plan"] == now:
      continue
    then = {q["name"]: q for q in found["plan"]["questions"]}
    after = {q["name"]: q for q in now["questions"]}
    for name in sorted({*then, *after}):
      if then.get(name) != after.get(name):
        what = "added" if name not in then else "removed" if name not in after else "changed"
        cells_of.setdefault(f"question {name!r} was {what} after the start", []).append(cell)
    for k in ("correction", "alpha", "scores"):
      if found["plan"].get(k, "") != now.get(k, ""):
        cells_of.setdefault(f"{k} was {found['plan'].get(k, '')!r} at the start", []).append(cell)
  everywhere = len(study.cells)
  return [f"{'all cells' if 1 < len(cells) == everywhere else ', '.join(cells)}: {line}"
          for line, cells in cells_of.items()]  # fmt: skip
