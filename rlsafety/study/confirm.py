"""The answers to a study's questions, from its run directories.

Of each cell and held-out unit (an issue, a situation) the change of the outcome from the first to
the last evaluation is taken; a question compares two groups of cells, or two such differences.
Cells (seeds) and units are crossed and both are samples, so the variance of an estimate is that of
a two-way random-effects model, by the method of moments, with Satterthwaite's degrees of freedom
and a t interval. A bootstrap over seeds is not used: with two or three of them its intervals are
far too short.
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
  """estimate: of what is asked, in points of rating. low, high: 95 % interval. p: of the question's
  own direction; p_corrected: of all questions together. p_none: of the equivalence test against
  the smallest effect (two one-sided tests). power: of finding the smallest effect with this error.
  cells: of each group; units: held-out units. word: what to say of it."""

  question: design.Question
  estimate: float
  low: float
  high: float
  p: float
  p_corrected: float
  p_none: float
  power: float
  cells: tuple[int, ...]
  units: int
  word: str


def answers(study: design.Study, workdir: pathlib.Path) -> list[Answer]:
  """One answer for each question, NaN where its cells have not been evaluated twice yet."""
  tables = {
    q: {c: changes(workdir / c, q.outcome, study.scores) for group in q.groups for c in group}
    for q in study.questions
  }
  found = [_contrast(q, tables[q]) for q in study.questions]
  p = np.array([_p(q, *f[:3]) for q, f in zip(study.questions, found, strict=True)])
  corrected = statistics.holm(p) if study.correction == "holm" and len(p) else p
  out = []
  for q, f, own, all_of_them in zip(study.questions, found, p, corrected, strict=True):
    out.append(_answer(q, f, float(own), float(all_of_them), study.alpha))
  return out


def changes(run: pathlib.Path, outcome: str, scores: str = "") -> dict[str, float]:
  """{held-out unit: change of the outcome from the first evaluation to the last} of one run.

  scores: a re-scoring that gives ACC and HEX. Empty if the run was not evaluated twice, or if one
  of these two evaluations was not scored whole under that name.
  """
  return change(*ends(run, outcome, scores), outcome)


def ends(run: pathlib.Path, outcome: str, scores: str = "") -> tuple[list[dict], list[dict]]:
  """The held-out records of a run's first and last evaluation; both empty as in `changes`."""
  if not (run / "config.json").exists() or not (run / "eval").is_dir():
    return [], []
  opened = read.load_run(run)
  steps = read.eval_rollouts(opened)
  if len(steps) < 2:
    return [], []
  first, last = steps[min(steps)], steps[max(steps)]
  if scores and not outcome.startswith("reward"):
    scored = [read.rescored(opened, records, scores, "heldout") for records in (first, last)]
    return (scored[0], scored[1]) if [*map(len, scored)] == [len(first), len(last)] else ([], [])
  return first, last


def change(before: Sequence[Mapping], after: Sequence[Mapping], outcome: str) -> dict[str, float]:
  """{unit: change of the outcome} between two evaluations, where it is known in both."""
  first, last = by_unit(before, outcome), by_unit(after, outcome)
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
  groups = [[table[c] for c in cells if table[c]] for cells in q.groups]
  sizes = tuple(map(len, groups))
  if sizes != tuple(map(len, q.groups)):
    return math.nan, math.nan, math.nan, sizes, 0
  parts = [(*crossed(*wide), wide[0][0].shape[1]) for wide in _of_common_units(groups, q.signs)]
  variances = [part[1] ** 2 for part in parts]
  spread = sum(v**2 / part[2] for v, part in zip(variances, parts, strict=True))
  freedom = sum(variances) ** 2 / max(spread, 1e-300)
  estimate, units = sum(part[0] for part in parts), min(part[3] for part in parts)
  return estimate, math.sqrt(sum(variances)), freedom, sizes, units


def _of_common_units(
  groups: Sequence[Sequence[dict]], signs_of: Sequence[float]
) -> list[tuple[list, list]]:
  """The groups of a question as arguments of `crossed`, one for each held-out set. In one set,
  groups of one size are pairs: one group of differences, so that what pairs share goes out."""
  sets: list[tuple[set, list[int]]] = []  # units, numbers of groups
  for i, group in enumerate(groups):
    own = set.intersection(*map(set, group))
    found = next((j for j, (units, _) in enumerate(sets) if len(units & own) > 1), None)
    if found is None:
      sets.append((own, [i]))
    else:
      sets[found] = sets[found][0] & own, [*sets[found][1], i]
  out = []
  for shared, members in sets:
    units, signs = sorted(shared), [signs_of[i] for i in members]
    wide = [np.array([[t[u] for u in units] for t in groups[i]]) for i in members]
    if len({len(w) for w in wide}) == 1:
      wide, signs = [sum(s * w for s, w in zip(signs, wide, strict=True))], [1]
    out.append((wide, signs))
  return out


def crossed(
  groups: Sequence[np.ndarray], signs: Sequence[float] = (1,)
) -> tuple[float, float, float]:
  """The sum of the means of groups [cells, units], each times its sign, the standard error and
  Satterthwaite's degrees of freedom. The units are the same in all groups, the cells are not.

  Var = (that of the cells' means) + (of the units' sums) - (of the residual, which is in both), the
  expectation of a two-way random model (Searle, Casella, McCulloch, Variance Components, 1992,
  ch. 4), variances of cells and of the residual pooled over groups; never less than either of the
  first two alone. One cell in each group: over units alone. One unit: NaN.
  """
  U = groups[0].shape[1]
  columns = sum(s * d.mean(0) for s, d in zip(signs, groups, strict=True))
  estimate = float(columns.mean())
  if U < 2:
    return estimate, math.nan, math.nan
  units, free = columns.var(ddof=1) / U, sum(len(d) - 1 for d in groups)
  if not free:
    return estimate, math.sqrt(units), U - 1.0
  means = [(d.mean(1, keepdims=True), d.mean(0), d.mean()) for d in groups]
  share = sum(s * s / len(d) for s, d in zip(signs, groups, strict=True)) / free
  cells = share * sum(((rows - all_) ** 2).sum() for rows, _, all_ in means)
  left = [d - rows - own + all_ for d, (rows, own, all_) in zip(groups, means, strict=True)]
  rest = share * sum((x**2).sum() for x in left) / (U * (U - 1))
  total = max(cells + units - rest, cells, units)
  spread = cells**2 / free + units**2 / (U - 1)
  if total > max(cells, units):
    spread += rest**2 / (free * (U - 1))
  freedom = total**2 / max(spread, 1e-300)
  return estimate, math.sqrt(total), max(freedom, 1.0)


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
  power = statistics.t_power(q.smallest / error, critical, freedom, sides=1)
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
        "cells": " - ".join(map(str, a.cells)), "units": a.units, "answer": a.word,
      })  # fmt: skip
  return DataFrame(rows)


def table(study: design.Study, workdir: pathlib.Path) -> str:
  """Plain text: one line a question, and what was changed after the start."""
  lines = [
    f"study {study.name}: {len(study.questions)} questions fixed before the first update "
    f"(sha256 {design.digest(design.plan_of(study)):.12}), p corrected by {study.correction}"
    + (f"; ACC and HEX of the re-scoring {study.scores}" if study.scores else ""),
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
