"""What maxima, areas and HMS of a run are by chance: its group labels shuffled.

A maximum over noisy steps is above 0, and so is HMS, which adds absolute areas. The labels of the
prompts of a step are shuffled among them, every step by itself: scores, steps and the sizes of the
groups stay, only whom a reply was given to is lost.
"""

import math
import warnings
from collections.abc import Mapping

import numpy as np
from pandas import DataFrame

from rlsafety.metrics.curves import rolling_mean
from rlsafety.metrics.gaps import GAP_SIGN

DRAWS, QUANTILE = 400, 0.95


def bands(
  found: Mapping[int, DataFrame], steps: np.ndarray, window: int, draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
  """{"max_hex_gap_null95", "hex_gap_auc_normalised_null95", "hms_null95", ...}.

  found: {seed: rollouts}, whose columns are step, prompt, is_gameable, acc, hex. Each value is the
  95 % quantile over shuffles of the scalar of the seeds' mean curve, of its absolute value where
  it has a sign. NaN where no step has prompts of both groups.
  """
  rng = np.random.default_rng(seed)
  curves: dict[str, list[np.ndarray]] = {"acc": [], "hex": []}
  for rollouts in found.values():
    for name, gap in _shuffled(rollouts, steps, window, draws, rng).items():
      curves[name].append(gap)
  areas, out = {}, {}
  for name, gaps in curves.items():
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # a step that no seed knows
      mean = np.nanmean(gaps, axis=0)  # [draws, steps]
      highest = np.nanmax(mean, axis=1)
    out[f"max_{name}_gap_null95"] = _quantile(highest)
    areas[name] = np.array([_area(curve, steps) for curve in mean])
    out[f"{name}_gap_auc_normalised_null95"] = _quantile(np.abs(areas[name]))
  acc, hex_ = areas["acc"], areas["hex"]
  out["hms_null95"] = _quantile(0.5 * np.abs(acc) + 0.5 * np.abs(hex_))
  out["hms_signed_null95"] = _quantile(np.abs(0.5 * acc + 0.5 * hex_))
  return out


def _shuffled(
  rollouts: DataFrame, steps: np.ndarray, window: int, draws: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """{score: smoothed gap [draws, steps]} of one seed."""
  names = list(GAP_SIGN.keys() - {"reward"})
  means = {name: np.full((2, draws, len(steps)), np.nan) for name in names}
  prompts = rollouts.groupby(["step", "prompt"])
  flags_of = prompts["is_gameable"].first().to_numpy(bool)
  totals, counts = prompts[names].sum(), prompts[names].count()
  step_of = totals.index.get_level_values("step").to_numpy()
  for at, step in enumerate(steps):
    rows = slice(*np.searchsorted(step_of, [step, step + 1]))
    flags = flags_of[rows]
    if flags.all() or not flags.any():
      continue  # nothing can be shuffled, and no gap is known here
    shuffled = rng.permuted(np.tile(flags, (draws, 1)), axis=1)
    for name in names:
      total, count = (of[name].to_numpy()[rows] for of in (totals, counts))
      for group, chosen in enumerate((shuffled, ~shuffled)):
        known = chosen @ count
        means[name][group][:, at] = np.where(known, chosen @ total, np.nan) / np.maximum(known, 1)
  return {
    name: GAP_SIGN[name] * np.subtract(*(rolling_mean(m, window) for m in means[name]))
    for name in names
  }


def _area(curve: np.ndarray, steps: np.ndarray) -> float:
  """As `scalars.auc`, normalised."""
  known = np.isfinite(curve)
  if known.sum() < 2:
    return math.nan
  return float(np.trapezoid(curve[known], steps[known]) / np.ptp(steps[known]))


def _quantile(values: np.ndarray) -> float:
  return float(np.quantile(values, QUANTILE)) if np.isfinite(values).all() else math.nan
