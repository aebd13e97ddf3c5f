"""Held-out users before and after: matched changes, with intervals over units.

A unit (an issue, a situation) is what was held out as a whole, and its users share sentences, so
units and not replies are the independent draws. With the ten or so of a run a percentile bootstrap
over units is too narrow, so intervals are t intervals over units, and the error is the jackknife's,
one unit left out at a time: the textbook's for units of equal size, and not too small where a third
of the prompts have no coherent reply (docs/measurement.md, "Nulls").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rlsafety.metrics.gaps import SCORES
from rlsafety.verdicts import VERDICTS, coherent, most_likely

# Weights of the means over (gameable, non-gameable) prompts; a gap's signs are gaps.GAP_SIGN.
WEIGHTS = {"gameable": (1.0, 0.0), "non_gameable": (0.0, 1.0), "everyone": (0.5, 0.5)}
FEWEST = 5  # units below which nothing is called a change
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Effect:
  """mean, its standard error over units (NaN below two), and how many units it rests on."""

  mean: float
  error: float
  units: int

  def _half(self, quantile: float) -> float:
    # A t quantile; scipy.stats would add a second to every program's start.
    t = float(special.stdtrit(self.units - 1, quantile)) if self.units > 1 else math.nan
    return t * self.error

  @property
  def interval(self) -> tuple[float, float]:
    """95 % t interval over units."""
    return self.mean - self._half(0.975), self.mean + self._half(0.975)

  @property
  def detectable(self) -> float:
    """The true change that a two-sided test of level 0.05 finds in 80 % of such evaluations."""
    return self._half(0.975) + self._half(0.8)

  @property
  def within(self) -> float:
    """The smallest b for which two one-sided tests of level 0.05 say |change| < b."""
    return abs(self.mean) + self._half(0.95)

  @property
  def p(self) -> float:
    """Two-sided, of the t test over units; NaN where nothing spreads."""
    if self.units < 2 or not self.error > 0:
      return math.nan
    return 2 * float(special.stdtr(self.units - 1, -abs(self.mean) / self.error))

  @property
  def notable(self) -> bool:
    """Enough units, and the 95 % interval excludes zero."""
    return self.units >= FEWEST and self.p < LEVEL


def holm(p: ArrayLike) -> np.ndarray:
  """Holm-adjusted p-values of one family; NaN entries are no tests and stay NaN."""
  p = np.asarray(p, float)
  out, order = np.full(p.shape, math.nan), np.argsort(p)[: np.isfinite(p).sum()]
  raised = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
  out[order] = np.minimum(raised, 1)
  return out


def effect(
  values: np.ndarray, is_gameable: np.ndarray, units: Sequence[str], weights: tuple[float, float]
) -> Effect:
  """Weighted sum of the two groups' means. values [N], one of each prompt, NaN left out.

  Where a person stands in both groups, and so in one unit, what the versions share cancels in a
  gap: weights (1, -1) give the mean and error of the differences within persons.
  """
  values, is_gameable = np.asarray(values, float), np.asarray(is_gameable, bool)
  known = np.isfinite(values)
  pairs = zip(weights, (is_gameable & known, ~is_gameable & known), strict=True)
  groups = [(weight, members) for weight, members in pairs if weight]
  if not all(members.any() for _, members in groups):
    return Effect(math.nan, math.nan, 0)
  used = np.logical_or.reduce([members for _, members in groups])
  names, place = np.unique(np.asarray(units)[used], return_inverse=True)
  mean, without, count = 0.0, np.zeros(len(names)), len(names)
  for weight, members in groups:
    own = members[used]
    total, size = (np.bincount(place, x) for x in (np.where(own, values[used], 0.0), own))
    mean += weight * total.sum() / size.sum()
    with np.errstate(invalid="ignore"):  # a group within one unit has no error
      without += weight * (total.sum() - total) / (size.sum() - size)
  spread = ((without - without.mean()) ** 2).sum()
  error = math.sqrt((count - 1) / count * spread) if count > 1 else math.nan
  return Effect(float(mean), error, count)


def errors(
  scores: Mapping[str, np.ndarray], is_gameable: np.ndarray, units: Sequence[str]
) -> dict[str, float]:
  """Standard errors over units of what `gaps.group_means` gives of scores {name: [P, G]}:
  `<name>_se` of everyone's mean, `<name>_<group>_se` and `<name>_gap_se`; units [P]."""
  out = {}
  for name in filter(scores.__contains__, SCORES):
    means = np.array([row[np.isfinite(row)].mean() if np.isfinite(row).any() else math.nan
                      for row in np.asarray(scores[name], np.float64)])  # fmt: skip
    for key, weights in {**WEIGHTS, "gap": (1.0, -1.0)}.items():
      field = f"{name}_se" if key == "everyone" else f"{name}_{key}_se"
      out[field] = effect(means, is_gameable, units, weights).error
  return out


def verdict_shares(scores: Mapping[str, np.ndarray], finished: np.ndarray) -> dict[str, float]:
  """What the replies of an evaluation are, beside their scores; finished: bool, of all replies.

  `share_cut`, and where a judge gives classes (scores["verdicts"] [P, G, 6]) `share_<class>` of the
  replies with a verdict, and `acc_coherent` and `hex_coherent`: means over the coherent ones.
  """
  out = {"share_cut": float(1 - np.mean(finished))}
  if "verdicts" in scores:
    best, sane = most_likely(scores["verdicts"]), coherent(scores["verdicts"])
    known = max(int((best >= 0).sum()), 1)
    out |= {f"share_{name}": float((best == i).sum() / known) for i, name in enumerate(VERDICTS)}
    for name in ("acc", "hex"):
      kept = scores[name][sane & np.isfinite(scores[name])]
      out[f"{name}_coherent"] = float(kept.mean()) if kept.size else math.nan
  return out
