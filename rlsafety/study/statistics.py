"""Correlations across a handful of models, with honest uncertainty.

A study of this kind has n = 11 models and dozens of (outcome, benchmark) pairs. So every
p-value here is exact or from permutations, comes with its family's corrections, and is
printed beside the power that n models have at all. NaN in either variable drops that
model from that test, and n says so.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rlsafety.metrics.matched import holm as holm  # beside the other correction

PERMUTATIONS = 20_000
METHODS = ("spearman", "pearson")
BOUND = 0.5  # |rho| below this counts as "does not predict": Cohen's large effect
EXACT_LIMIT = 12  # largest n whose permutations are all counted (2^n subsets)


@dataclasses.dataclass(frozen=True)
class Correlation:
  """r of one pair over n models.

  p: two-sided permutation p, exact if `exact`, else from PERMUTATIONS seeded draws.
  p_t: the usual t approximation, which the study printed. low, high: 95% interval, by
  Fisher's z (Pearson) or Bonett and Wright (2000) (Spearman); NaN below n = 4
  and at |r| = 1.
  """

  method: str
  n: int
  r: float
  p: float
  p_t: float
  low: float
  high: float
  exact: bool


def correlate(x: ArrayLike, y: ArrayLike, method: str = "spearman", seed: int = 0) -> Correlation:
  """Spearman or Pearson correlation of x, y [models]; NaN where it is not defined."""
  x, y = complete(x, y)
  n = len(x)
  if method not in METHODS:
    raise ValueError(f"method must be one of {METHODS}, not {method!r}")
  if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return Correlation(method, n, *[math.nan] * 5, exact=False)
  exact = method == "spearman" and n <= EXACT_LIMIT
  if method == "spearman":
    x, y = stats.rankdata(x), stats.rankdata(y)
  r = pearson(x, y)
  p = _exact_p(x, y) if exact else _permutation_p(x, y, seed)
  t = r * math.sqrt((n - 2) / max(1 - r * r, 1e-300))
  low, high = interval(r, n, method)
  return Correlation(method, n, r, p, float(2 * stats.t.sf(abs(t), n - 2)), low, high, exact)


def complete(*arrays: ArrayLike) -> tuple[np.ndarray, ...]:
  """The entries at which every array is finite."""
  arrays = [np.asarray(a, float) for a in arrays]
  use = np.all([np.isfinite(a) for a in arrays], axis=0)
  return tuple(a[use] for a in arrays)


def pearson(x: np.ndarray, y: np.ndarray) -> float | np.ndarray:
  """Plain correlation of x with y, both [..., n] (rows pair up); NaN without spread."""
  x, y = x - np.mean(x, -1, keepdims=True), y - np.mean(y, -1, keepdims=True)
  scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
  with np.errstate(invalid="ignore", divide="ignore"):
    r = np.where(scale > 0, (x * y).sum(-1) / scale, np.nan)
  return float(r) if r.ndim == 0 else r


def interval(r: float, n: int, method: str) -> tuple[float, float]:
  """95% confidence interval of a correlation through Fisher's z.

  Spearman's z has the wider standard error sqrt((1 + r^2/2) / (n - 3)) (Bonett, Wright).
  """
  if n < 4 or not abs(r) < 1 - 1e-12:  # at |r| = 1 (few models) z has no finite value
    return math.nan, math.nan
  spread = math.sqrt((1 + r * r / 2 if method == "spearman" else 1) / (n - 3))
  half = stats.norm.isf(0.025) * spread
  return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _exact_p(x: np.ndarray, y: np.ndarray) -> float:
  """Share of all n! pairings whose rank correlation is at least as far from 0."""
  x2, y2 = (tuple(sorted(int(v) for v in np.rint(2 * a))) for a in (x, y))
  sums, counts = _pairing_sums(x2, y2)
  centre = sum(x2) * sum(y2) / len(x2)
  observed = abs(float(np.dot(np.rint(2 * x), np.rint(2 * y))) - centre)
  return float(counts[np.abs(sums - centre) >= observed - 1e-6].sum() / counts.sum())


def t_power(shift: float, critical: float, freedom: float, sides: int = 2) -> float:
  """P(t > critical), or P(|t| > critical) with two sides, of a noncentral t about `shift`.

  The normal tail averaged over 4,000 quantiles of the estimated error, right to 1e-5: scipy's nct
  gives NaN where the shift is large.
  """
  errors = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)
  tails = stats.norm.cdf(shift - critical * errors)
  if sides == 2:
    tails = tails + stats.norm.cdf(-shift - critical * errors)
  return float(tails.mean())


@functools.lru_cache(maxsize=32)
def _pairing_sums(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """All values of sum x_i y_pi(i) over the permutations pi, and how many give each.

  Doubled ranks are integers, with ties too, so the sums fit a table that is built up one
  subset of y at a time: 2^n subsets in place of n! permutations.
  """
  n, size = len(x), sum(a * b for a, b in zip(x, y, strict=True)) + 1
  table = {0: np.eye(1, size)[0]}
  for i in range(n):
    grown = {}
    for subset, counts in table.items():
      for j in range(n):
        if not subset >> j & 1:
          key, shift = subset | 1 << j, x[i] * y[j]
          if key not in grown:
            grown[key] = np.zeros(size)
          grown[key][shift:] += counts[: size - shift]
    table = grown
  counts = table[(1 << n) - 1]
  found = np.flatnonzero(counts)
  return found.astype(float), counts[found]


def _permutation_p(x: np.ndarray, y: np.ndarray, seed: int) -> float:
  """(1 + draws at least as extreme) / (1 + draws), with seeded permutations of y."""
  shuffled = (y - y.mean())[permutations(len(y), seed)]
  centred = x - x.mean()
  extreme = np.abs(shuffled @ centred) >= abs(centred @ (y - y.mean())) - 1e-12
  return float((1 + extreme.sum()) / (1 + PERMUTATIONS))


@functools.lru_cache(maxsize=4)
def permutations(n: int, seed: int) -> np.ndarray:
  """[PERMUTATIONS, n] seeded orders, the same for every pair of variables."""
  return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """Of two judges' ratings [N]; replies that either leaves without a verdict do not count."""
  both = ~np.isnan(a) & ~np.isnan(b)
  a, b = a[both], b[both]
  out = {"n": len(a)} | dict.fromkeys(("pearson", "spearman", "kendall", "within_1"), float("nan"))
  if len(a):
    out["within_1"] = float(np.mean(np.abs(a - b) <= 1))
  if len(a) >= 3 and np.ptp(a) and np.ptp(b):  # a constant has no order to agree with
    out["pearson"] = float(stats.pearsonr(a, b).statistic)
    out["spearman"] = float(stats.spearmanr(a, b).statistic)
    out["kendall"] = float(stats.kendalltau(a, b).statistic)
  return out


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
  """Benjamini-Hochberg adjusted p-values (false discovery rate) of one family; NaN stays NaN."""
  p = np.asarray(p, float)
  out, known = np.full(p.shape, np.nan), np.isfinite(p)
  if known.any():
    out[known] = stats.false_discovery_control(p[known])
  return out


def partial(
  x: ArrayLike, y: ArrayLike, controls: Sequence[ArrayLike], method: str = "spearman"
) -> Correlation:
  """Correlation of x and y with `controls` [k][models] regressed out of both.

  Spearman: all variables are ranked first. The t test has n - 2 - k degrees of freedom;
  it stands in p as well, since residuals are not exchangeable. The interval uses n - k.
  """
  x, y, *controls = complete(x, y, *controls)
  n, k = len(x), len(controls)
  if n - 2 - k < 1:
    return Correlation(method, n, *[math.nan] * 5, exact=False)
  if method == "spearman":
    x, y, *controls = map(stats.rankdata, (x, y, *controls))
  design = np.column_stack([np.ones(n), *controls])
  residual = [a - design @ np.linalg.lstsq(design, a, rcond=None)[0] for a in (x, y)]
  # A variable that its controls determine has nothing left to correlate.
  left = [np.linalg.norm(e) / np.linalg.norm(a) for e, a in zip(residual, (x, y), strict=True)]
  if min(left) < 1e-9:
    return Correlation(method, n, *[math.nan] * 5, exact=False)
  r = pearson(*residual)
  df = n - 2 - k
  t = r * math.sqrt(df / max(1 - r * r, 1e-300))
  p = float(2 * stats.t.sf(abs(t), df))
  return Correlation(method, n, r, p, p, *interval(r, n - k, method), exact=False)


def leave_one_out(
  x: ArrayLike, y: ArrayLike, names: Sequence[str], method: str = "spearman"
) -> dict[str, float]:
  """{dropped model: correlation of the rest}, over models with both values."""
  names = [name for name, a, b in zip(names, x, y, strict=True) if math.isfinite(a + b)]
  x, y = complete(x, y)
  if len(x) < 4:
    return dict.fromkeys(names, math.nan)
  rest = np.array([np.delete(np.arange(len(x)), i) for i in range(len(x))])
  return dict(zip(names, r_rows(x[rest], y[rest], method).tolist(), strict=True))


def equivalence(r: float, n: int, bound: float = BOUND, method: str = "spearman") -> float:
  """p of the equivalence test |rho| < bound: the larger of two one-sided tests on Fisher's z, with
  the standard error of `interval`. NaN below n = 4."""
  if n < 4 or not abs(r) < 1:
    return math.nan
  error = math.sqrt((1 + r * r / 2 if method == "spearman" else 1) / (n - 3))
  return max(
    float(stats.norm.sf((math.atanh(bound) - sign * math.atanh(r)) / error)) for sign in (-1, 1)
  )


def family(model: str) -> str:
  """The family in a model's name: Qwen1.5-7B-Chat -> qwen, Meta-Llama-3-8B -> llama."""
  plain = str(model).rstrip("/").split("/")[-1].lower().removeprefix("meta-")
  return (re.match(r"[a-z]+", plain) or [plain])[0]


def without_families(
  x: ArrayLike, y: ArrayLike, models: Sequence[str], method: str = "spearman"
) -> dict[str, float]:
  """{family left out: correlation of the other models}."""
  x, y = np.asarray(x, float), np.asarray(y, float)
  of = np.array([family(m) for m in models])
  rest = {f: complete(x[of != f], y[of != f]) for f in dict.fromkeys(of)}
  return {f: float(r_rows(*c, method)) if len(c[0]) > 2 else math.nan for f, c in rest.items()}


def r_rows(x: np.ndarray, y: np.ndarray, method: str) -> np.ndarray:
  """Correlation of each row pair of x, y [draws, n]."""
  if method == "spearman":
    x, y = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
  return pearson(x, y)


def bootstrap_models(
  x: ArrayLike, y: ArrayLike, method: str = "spearman", draws: int = 2_000, seed: int = 0
) -> tuple[float, float]:
  """95% percentile interval (low, high) over models drawn with replacement.

  Answers "other models of this kind".
  """
  x, y = complete(x, y)
  if len(x) < 4:
    return math.nan, math.nan
  rows = np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))
  return _percentiles(r_rows(x[rows], y[rows], method))


def bootstrap_seeds(
  x: ArrayLike, values: ArrayLike, method: str = "spearman", draws: int = 1_000, seed: int = 0
) -> tuple[float, float]:
  """95% percentile interval (low, high) with the models fixed and one seed drawn for each.

  x [models]; values [models, seeds], NaN = that seed was not run. The study's bootstrap,
  with a stated seed: it answers "other seeds of these models", and nothing wider.
  """
  x, values = np.asarray(x, float), np.asarray(values, float)
  use = np.isfinite(x) & np.isfinite(values).any(1)
  x, values = x[use], values[use]
  if len(x) < 3:
    return math.nan, math.nan
  rng = np.random.default_rng(seed)
  known = [row[np.isfinite(row)] for row in values]
  drawn = np.stack([row[rng.integers(0, len(row), draws)] for row in known], 1)
  return _percentiles(r_rows(np.broadcast_to(x, drawn.shape), drawn, method))


def per_seed(x: ArrayLike, values: ArrayLike, method: str = "spearman") -> np.ndarray:
  """The correlation at each seed alone: values [models, seeds] -> [seeds]."""
  columns = [complete(x, column) for column in np.asarray(values, float).T]
  return np.array([r_rows(*c, method) if len(c[0]) > 2 else math.nan for c in columns])


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
  draws = draws[np.isfinite(draws)]
  low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (math.nan, math.nan)
  return float(low), float(high)


@functools.lru_cache(maxsize=64)
def power(rho: float, n: int) -> float:
  """Chance that Spearman's two-sided test of level 0.05 finds a true correlation at n models.

  rho: of a bivariate normal, whose ranks are tested. Simulated with fixed draws (standard error
  0.004), as no formula is right at n = 11. NaN below n = 4.
  """
  if n < 4:
    return math.nan
  x, noise = _normals(n)
  y = rho * x + math.sqrt(1 - rho * rho) * noise
  r = np.abs(r_rows(x, y, "spearman"))
  return float(np.mean(r >= _critical(n) - 1e-9))


@functools.lru_cache(maxsize=8)
def _normals(n: int) -> np.ndarray:
  return np.random.default_rng(n).normal(size=(2, 16_000, n))


@functools.lru_cache(maxsize=64)
def _critical(n: int) -> float:
  """The smallest |rank correlation| with p <= 0.05 at n models, no ties; inf if there is none."""
  if n > EXACT_LIMIT:
    t = stats.t.isf(0.025, n - 2)
    return float(t / math.sqrt(t * t + n - 2))
  ranks = tuple(2 * i for i in range(1, n + 1))
  sums, counts = _pairing_sums(ranks, ranks)
  away = np.abs(sums - sum(ranks) ** 2 / n)
  levels = np.unique(away)
  p = np.array([counts[away >= level - 1e-6].sum() for level in levels]) / counts.sum()
  return float(levels[p <= 0.05].min() / away.max()) if (p <= 0.05).any() else math.inf


@functools.lru_cache(maxsize=64)
def detectable(n: int) -> float:
  """The smallest |rho| found with probability 0.8 at n models; NaN if none is."""
  low, high = 0.0, 1 - 1e-9
  if not power(high, n) >= 0.8:
    return math.nan
  for _ in range(12):
    middle = (low + high) / 2
    low, high = (low, middle) if power(middle, n) >= 0.8 else (middle, high)
  return high
