"""Does a relation with size, or a benchmark, differ between treatments?

Correlations printed side by side are no test of their difference. This is one.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pandas import DataFrame
from scipy import stats

from rlsafety.study import statistics, tables
from rlsafety.study.gather import Cell, Cells, slug


def difference(x: ArrayLike, a: ArrayLike, b: ArrayLike, seed: int = 0) -> tuple[float, float]:
  """(rho(x, a) - rho(x, b), two-sided permutation p) over models that have all three [models].

  Without ties that difference is proportional to sum x (a - b) over ranks, so permuting x tests
  that it is unrelated to the *difference* of ranks; what a and b have in common plays no part.
  """
  x, a, b = map(stats.rankdata, statistics.complete(x, a, b))
  if len(x) < 4 or not np.ptp(x) or not np.ptp(a) or not np.ptp(b):
    return math.nan, math.nan
  unit = [(v - v.mean()) / np.linalg.norm(v - v.mean()) for v in (x, a, b)]
  change = unit[1] - unit[2]
  found = float(unit[0] @ change)
  drawn = change[statistics.permutations(len(x), seed)] @ unit[0]
  extreme = np.sum(np.abs(drawn) >= abs(found) - 1e-12)
  return found, float((1 + extreme) / (1 + len(drawn)))


def table(cells: Cells, benchmarks: DataFrame, outcomes: Sequence[str]) -> DataFrame:
  """One row for each outcome, benchmark and pair of treatments (environment, variant).

  p_holm is over the rows of one benchmark. Pairs share their models; fewer than 4 give no row.
  """
  rows = []
  pairs = list(itertools.combinations(tables.treatments(cells), 2))
  for outcome, ((one, ours), (other, theirs)) in itertools.product(outcomes, pairs):
    both = _shared(ours, theirs, outcome)
    scores = tables.covariates([c for c, _ in both], benchmarks)
    a, b = (np.array([pair[i].value(outcome) for pair in both]) for i in (0, 1))
    for benchmark, x in scores.items():
      found, p = difference(x, a, b)
      if math.isfinite(p):
        n = len(statistics.complete(x, a, b)[0])
        about = {"outcome": outcome, "benchmark": benchmark, "first": " / ".join(one)}
        rows.append(about | {"second": " / ".join(other), "n": n, "difference": found, "p": p})
  out = DataFrame(rows)
  if len(out):
    out["p_holm"] = out.groupby("benchmark")["p"].transform(statistics.holm)
  return out


def _shared(ours: Sequence[Cell], theirs: Sequence[Cell], outcome: str) -> list[tuple[Cell, Cell]]:
  known = {slug(c.model): c for c in theirs if math.isfinite(c.value(outcome))}
  return [(c, known[slug(c.model)]) for c in ours
          if math.isfinite(c.value(outcome)) and slug(c.model) in known]  # fmt: skip
