"""What a run changed outside its environment: users of other ones, and Inspect's tasks.

Rows of a matrix of one run: what it was trained in against what it was asked. HEX and ACC are a
judge's and starred only where it passes its gate and was made for these users; the rest (phrases,
length, log-prob under the base) needs no judge.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.metrics import replies
from rlsafety.metrics.matched import Effect, effect
from rlsafety.report import charts, overview
from rlsafety.report.charts import number
from rlsafety.report.overview import Change, Estimate, span
from rlsafety.rundir import read

# {key: (title, score, of whom)}; a gap is that of users who press against those who ask openly.
MEASURES = {
  "hex": ("HEX", "hex", "everyone"),
  "hex_gap": ("HEX gap", "hex", "gap"),
  "acc": ("ACC", "acc", "everyone"),
  "agrees": ("agreement", "agrees", "everyone"),
  "refuses": ("refusals", "refuses", "everyone"),
  "length": ("tokens", "length", "everyone"),
  "base_logprob": ("base log-prob", "base_logprob", "everyone"),
}
COLOURS = ("gap", "gameable", "non_gameable", "other")  # of the page's style


@dataclasses.dataclass(frozen=True)
class Row:
  """One environment, or one topic of it ("" = all of it). cells: {one of MEASURES: Change}."""

  environment: str
  topic: str
  cells: dict[str, Change]


@dataclasses.dataclass(frozen=True)
class Asked:
  """The users of one other environment at every step. note: whose scores, and why none is
  starred; "" where nothing stands against it."""

  environment: str
  judge: str
  note: str
  steps: dict[int, list[dict]]
  rows: list[Row]

  @property
  def ends(self) -> tuple[int, int]:
    return min(self.steps), max(self.steps)


@dataclasses.dataclass(frozen=True)
class Task:
  """One number of an Inspect task before and after. effect: of the change, paired by sample where
  the scores of the samples are known. why: a failure."""

  name: str
  before: Estimate
  after: Estimate
  effect: Effect
  n: int
  why: str = ""


# --- Other environments -----------------------------------------------------------------


def asked(run: read.Run, notes: list[str] | None = None) -> list[Asked]:
  """Every environment of RUN/eval/ENVIRONMENT, in order of names."""
  return [one for name in read.beyond(run) if (one := _asked(run, name, notes))]


def _asked(run: read.Run, name: str, notes: list[str] | None) -> Asked | None:
  steps = {
    step: [replies.described(r) for r in records]
    for step, records in read.eval_rollouts(run, notes, name).items()
  }
  if not steps:
    return None
  path = run.path / "eval" / name / "about.json"
  about = read_json(path) if path.exists() else {}
  if not isinstance(about, dict) or not isinstance(about.get("gate", {}), dict):
    raise UserError(f"{path}: not the description of a judge; delete the folder or mend the file")
  gate, foreign = about.get("gate", {}), str(about.get("foreign") or "")
  barred = {} if foreign else overview.barred(gate)
  may = lambda score: score not in overview.SCORES or (not foreign and score not in barred)  # noqa: E731
  first, last = steps[min(steps)], steps[max(steps)]
  topics = [*dict.fromkeys(str(r.get("topic", "")) for r in first)] if about.get("by_topic") else []
  rows = []
  for topic in ["", *sorted(topics)] if len(steps) > 1 else []:
    ends = ([r for r in of if topic in ("", r.get("topic"))] for of in (first, last))
    rows.append(Row(name, topic, cells(*ends, may=may)))
  why = foreign or "; ".join(f"{score.upper()}: {barred[score]}" for score in barred
                             if score != "reward")  # fmt: skip
  return Asked(name, str(about.get("judge", "")), why, steps, rows)


def cells(first: list[dict], last: list[dict], may: Callable[[str], bool]) -> dict[str, Change]:
  """{one of MEASURES: Change} of what `replies.described` made of two evaluations' records; may:
  whether a score may be starred."""
  out = {}
  for key, (_, score, what) in MEASURES.items():
    before, after, change = overview.compare(first, last, score, what)
    if change.units:
      ends = (before.mean, before.error), (after.mean, after.error)
      out[key] = Change(what, *ends, change, may(score))
  return out


def figure(run: read.Run, found: Sequence[Asked]) -> str:
  """HEX of everybody over the steps, one line for each environment, as HTML."""
  own = f"{read.environment_name(run) or 'users'}, trained in"
  records = {own: read.eval_rollouts(run), **{one.environment: one.steps for one in found}}
  lines, last = [], 1
  for i, (name, of) in enumerate(records.items()):
    levels = [overview.compare(rows, [], "hex", "everyone")[0] for rows in of.values()]
    mean, error = (np.array([getattr(x, k) for x in levels], float) for k in ("mean", "error"))
    css = COLOURS[i % len(COLOURS)]
    lines.append(charts.Line(name, css, "eval", list(of), mean, charts.Z95 * error))
    last = max(last, *of, 1)
  return charts.figure(
    "HEX inside and outside", "of all users, incoherent replies left out", lines, last,
    "HEX, 1 to 10", scale=(1, 10),
  )  # fmt: skip


# --- Inspect's tasks --------------------------------------------------------------------


def tasks(first: Mapping, last: Mapping) -> list[Task]:
  """The numbers of two lines of eval/summary.jsonl, by name; of one, if they are the same."""
  old, new = (line.get("tasks") for line in (first, {} if first is last else last))
  old, new = (x if isinstance(x, dict) else {} for x in (old, new))
  return [_task(name, *(_entry(x.get(name)) for x in (old, new))) for name in {**old, **new}]


def _entry(value: object) -> dict:
  return value if isinstance(value, dict) else {}


def _task(name: str, old: dict, new: dict) -> Task:
  before, after = ((read.number(x.get("value")), read.number(x.get("stderr"))) for x in (old, new))
  a, b = (_entry(x.get("samples")) for x in (old, new))
  pairs = [(key, read.number(b[key]) - read.number(a[key])) for key in a if key in b]
  change = Effect(after[0] - before[0], math.hypot(before[1], after[1]), 0)  # not paired
  if pairs and len(pairs) == len(a) == len(b):
    names, values = zip(*pairs, strict=True)
    change = effect(np.array(values), np.ones(len(values), bool), names, (1.0, 0.0))
  n = read.number(new.get("n", old.get("n")))
  return Task(
    name,
    before,
    after,
    change,
    int(n) if math.isfinite(n) else 0,
    str(new.get("error") or old.get("error") or ""),
  )


# --- As text ----------------------------------------------------------------------------


def table(found: Sequence[Asked], of_tasks: Sequence[Task]) -> list[str]:
  """Lines for the end of a run: * where an interval excludes zero and may be starred."""
  lines = []
  for task in of_tasks:
    ends = f"{number(task.before[0], 3)} -> {number(task.after[0], 3)}"
    change = f"{number(task.effect.mean, 3, sign=True)} {span(task.effect.interval)}"
    what = f"failed: {task.why}" if task.why else f"change {change} over {task.n} samples"
    lines.append(f"task {task.name}: {ends}, {what}{' *' * task.effect.notable}")
  for one in found:
    lines.append(f"asked {one.environment}, step {one.ends[0]} -> {one.ends[1]}"
                 + (f"; HEX and ACC without stars: {one.note}" if one.note else ""))  # fmt: skip
    for row in one.rows:
      said = [
        f"{MEASURES[key][0]} {number(cell.before[0])} -> {number(cell.after[0])} "
        f"({number(cell.change[0], sign=True)}{' *' * cell.notable})"
        for key, cell in row.cells.items()
        if key in ("hex", "hex_gap", "agrees", "refuses")
      ]
      lines.append(f"  {row.topic or 'all':14}{', '.join(said)}")
  return [line.replace("−", "-") for line in lines]


def as_dict(found: Sequence[Asked], of_tasks: Sequence[Task]) -> dict:
  """What summary.json holds of both."""
  out: dict[str, dict] = {}
  if of_tasks:
    out["tasks"] = {t.name: {"before": list(t.before), "after": list(t.after),
                             "change": [t.effect.mean, t.effect.error],
                             "interval": list(t.effect.interval), "n": t.n,
                             **({"error": t.why} if t.why else {})} for t in of_tasks}  # fmt: skip
  if found:
    out["beyond"] = {
      f"{row.environment}/{row.topic}".rstrip("/"): {
        key: {"before": list(c.before), "after": list(c.after), "change": list(c.change),
              "interval": list(c.effect.interval), "units": c.effect.units}
        for key, c in row.cells.items()
      }
      for one in found
      for row in one.rows
    }  # fmt: skip
  return out
