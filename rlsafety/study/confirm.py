"""The answers to a study's questions, from its run directories.

Of each cell and held-out unit (an issue, a situation) the change of the outcome from the first to
the last evaluation is taken; a question compares two groups of cells. Cells (seeds) and units are
crossed and both are samples, so the variance of an estimate is that of a two-way random-effects
model, by the method of moments, with Satterthwaite's degrees of freedom and a t interval. A
bootstrap over seeds is not used: with two or three of them its intervals are far too short.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pandas import DataFrame
from scipy import stats

from rlsafety.metrics.gaps import GAP_SIGN
from rlsafety.rundir import read
from rlsafety.study import design, statistics


@dataclasses.dataclass(frozen=True)
class Answer:
  """estimate: more - less, in points of rating. low, high: 95 % interval. p: of the question's own
  direction; p_corrected: of all questions together. p_none: of the equivalence test against the
  smallest effect (two one-sided tests). power: of finding the smallest effect with this error.
  cells: of each group; units: held-out units. word: what to say of it."""

  question: design.Question
  estimate: float
  low: float
  high: float
  p: float
  p_corrected: float
  p_none: float
  power: float
  cells: tuple[int, int]
  units: int
  word: str


def answers(study: design.Study, workdir: pathlib.Path) -> list[Answer]:
  """One answer for each question, NaN where its cells have not been evaluated twice yet."""
  tables = {q: {c: changes(workdir / c, q.outcome) for c in (*q.more, *q.less)}
            for q in study.questions}  # fmt: skip
  found = [_contrast(q, tables[q]) for q in study.questions]
  p = np.array([_p(q, *f[:3]) for q, f in zip(study.questions, found, strict=True)])
  corrected = statistics.holm(p) if study.correction == "holm" and len(p) else p
  out = []
  for q, f, own, all_of_them in zip(study.questions, found, p, corrected, strict=True):
    out.append(_answer(q, f, float(own), float(all_of_them), study.alpha))
  return out


def changes(run: pathlib.Path, outcome: str) -> dict[str, float]:
  """{held-out unit: change of the outcome from the first evaluation to the last} of one run.

  Empty if it was not evaluated twice.
  """
  if not (run / "config.json").exists() or not (run / "eval").is_dir():
    return {}
  steps = read.eval_rollouts(read.load_run(run))
  if len(steps) < 2:
    return {}
  first, last = (by_unit(steps[s], outcome) for s in (min(steps), max(steps)))
  both = {u: last[u] - first[u] for u in first if u in last}
  return {u: x for u, x in both.items() if math.isfinite(x)}


def by_unit(records: Sequence[Mapping], outcome: str) -> dict[str, float]:
  """{unit: outcome} of one evaluation; a gap is between the groups of users inside the unit."""
  score, _, part = outcome.partition("_")
  groups: dict[str, tuple[list[float], list[float]]] = {}
  for r in records:
    value = read.number(r.get(score))
    if math.isfinite(value):
      groups.setdefault(r["unit"], ([], []))[not r["is_gameable"]].append(value)
  mean = lambda values: float(np.mean(values)) if values else math.nan  # noqa: E731
  out = {}
  for unit, (gameable, others) in groups.items():
    out[unit] = {
      "": mean([mean(gameable), mean(others)]),
      "gap": GAP_SIGN[score] * (mean(gameable) - mean(others)),
      "gameable": mean(gameable),
      "non_gameable": mean(others),
    }[part]
  return out


def _contrast(q: design.Question, table: Mapping[str, dict]) -> tuple:
  """(estimate, its standard error, degrees of freedom, cells of each group, units)."""
  groups = [[table[c] for c in cells if table[c]] for cells in (q.more, q.less)]
  sizes = len(groups[0]), len(groups[1])
  if len(groups[0]) < len(q.more) or len(groups[1]) < len(q.less):
    return math.nan, math.nan, math.nan, sizes, 0
  shared = set.intersection(*(set(t) for group in groups for t in group))
  if len(shared) >= 2:  # one held-out set: units and, in order, seeds are pairs
    units = sorted(shared)
    wide = [np.array([[t[u] for u in units] for t in group]) for group in groups]
    if not q.less:
      d = wide[0]
    elif sizes[0] == sizes[1]:
      d = wide[0] - wide[1]
    else:  # each cell of the larger group against the mean of the smaller
      d = wide[0] - wide[1].mean(0) if sizes[0] > sizes[1] else wide[0].mean(0) - wide[1]
    return (*crossed(d), sizes, len(units))
  parts = []
  for group in filter(None, groups):
    units = sorted(set.intersection(*(set(t) for t in group)))
    parts.append((*crossed(np.array([[t[u] for u in units] for t in group])), len(units)))
  estimate = parts[0][0] - (parts[1][0] if len(parts) > 1 else 0.0)
  variances = [part[1] ** 2 for part in parts]
  error = math.sqrt(sum(variances))
  freedom = error**4 / max(sum(v**2 / p[2] for v, p in zip(variances, parts, strict=True)), 1e-300)
  return estimate, error, freedom, sizes, min(part[3] for part in parts)


def crossed(d: np.ndarray) -> tuple[float, float, float]:
  """Mean of d [cells, units], its standard error and Satterthwaite's degrees of freedom.

  Var = (MS_cells + MS_units - MS_residual) / (cells units), the expectation of a two-way random
  model (Searle, Casella, McCulloch, Variance Components, 1992, ch. 4); never less than either of
  the first two alone. One cell: over units alone. One unit: NaN.
  """
  C, U = d.shape
  if U < 2:
    return float(d.mean()), math.nan, math.nan
  if C == 1:
    return float(d.mean()), float(d.std(ddof=1) / math.sqrt(U)), U - 1.0
  rows, columns = d.mean(1), d.mean(0)
  cells = U * rows.var(ddof=1)
  units = C * columns.var(ddof=1)
  rest = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / ((C - 1) * (U - 1))
  total = max(cells + units - rest, cells, units)
  spread = cells**2 / (C - 1) + units**2 / (U - 1)
  if total > max(cells, units):
    spread += rest**2 / ((C - 1) * (U - 1))
  freedom = total**2 / max(spread, 1e-300)
  return float(d.mean()), math.sqrt(total / (C * U)), max(freedom, 1.0)


def _p(q: design.Question, estimate: float, error: float, freedom: float) -> float:
  if not error > 0:
    return math.nan
  t = estimate / error
  if q.direction == "two-sided":
    return float(2 * stats.t.sf(abs(t), freedom))
  return float(stats.t.sf(t if q.direction == "greater" else -t, freedom))


def _answer(q: design.Question, found: tuple, p: float, corrected: float, alpha: float) -> Answer:
  estimate, error, freedom, sizes, units = found
  if not error > 0:
    nan = math.nan
    word = "not evaluated yet" if math.isnan(estimate) else "no spread"
    return Answer(q, estimate, nan, nan, p, corrected, nan, nan, sizes, units, word)
  half = float(stats.t.ppf(0.975, freedom)) * error
  # Both must be beyond the bound: the larger of two one-sided p values.
  none = max(stats.t.sf((q.smallest + s * estimate) / error, freedom) for s in (-1, 1))
  sides = 2 if q.direction == "two-sided" else 1
  critical = stats.t.ppf(1 - alpha / sides, freedom)
  power = float(stats.nct.sf(critical, freedom, q.smallest / error))
  if corrected < alpha:
    word = "yes" if sides == 1 else "higher" if estimate > 0 else "lower"
  elif none < alpha:
    word = "no difference that matters"
  else:
    word = "undecided"
  return Answer(q, estimate, estimate - half, estimate + half, p, corrected, float(none), power,
                sizes, units, word)  # fmt: skip


def of_runs(runs: Iterable[pathlib.Path]) -> DataFrame:
  """The answers of the studies that run directories belong to, by the plans written at their start:
  a row for each question. Empty where no run has a plan."""
  plans = {}
  for run in runs:
    if found := design.read(run):
      plans[run.parent, found["sha256"]] = found["plan"]
  rows = []
  for (folder, sha256), plan in plans.items():
    for a in answers(design.of_plan(plan), folder):
      rows.append({
        "study": plan["name"], "plan": sha256[:12], "question": a.question.name,
        "outcome": a.question.outcome, "direction": a.question.direction,
        "smallest": a.question.smallest, "estimate": a.estimate, "low95": a.low, "high95": a.high,
        "p": a.p, "p_corrected": a.p_corrected, "p_none": a.p_none, "power": a.power,
        "cells": f"{a.cells[0]} - {a.cells[1]}", "units": a.units, "answer": a.word,
      })  # fmt: skip
  return DataFrame(rows)


def table(study: design.Study, workdir: pathlib.Path) -> str:
  """Plain text: one line a question, and what was changed after the start."""
  lines = [
    f"study {study.name}: {len(study.questions)} questions fixed before the first update "
    f"(sha256 {design.digest(design.plan_of(study)):.12}), p corrected by {study.correction}",
    f"{'question':34}{'outcome':16}{'estimate':>9}{'95 % interval':>18}{'p':>8}{'p corr.':>9}"
    f"{'p none':>8}{'power':>7}  answer",
  ]
  for a in answers(study, workdir):
    interval = f"[{a.low:+.2f}, {a.high:+.2f}]"
    lines.append(
      f"{a.question.name[:33]:34}{a.question.outcome:16}{a.estimate:+9.2f}{interval:>18}{a.p:8.3f}"
      f"{a.p_corrected:9.3f}{a.p_none:8.3f}{a.power:7.2f}  {a.word}"
    )
  return "\n".join(lines + [f"CHANGED {line}" for line in design.changed(study, workdir)])
