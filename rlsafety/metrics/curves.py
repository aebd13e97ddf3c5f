"""Smoothed curves: what a run's page and a study both need.

NaN means no verdict and is left out of every mean.
"""

import numpy as np

WINDOW = 50  # steps; every stored number of the study uses it


def rolling_mean(values: np.ndarray, window: int, full_only: bool = False) -> np.ndarray:
  """Centred rolling mean over the last axis, NaN skipped; NaN where nothing is left.

  Slot i covers i - window//2 ... i + (window-1)//2, as pandas' centred window does.
  Slots near an end use what lies inside; with full_only they are NaN instead.
  """
  values = np.asarray(values, float)
  count = values.shape[-1]
  if window < 1:
    raise ValueError(f"window must be at least 1, not {window}")
  known = np.isfinite(values)
  zero = np.zeros((*values.shape[:-1], 1))
  total = np.concatenate([zero, np.cumsum(np.where(known, values, 0), -1)], -1)
  number = np.concatenate([zero, np.cumsum(known, -1)], -1)
  low = np.arange(count) - window // 2
  high = low + window
  inside = (low >= 0) & (high <= count)
  low, high = np.clip(low, 0, count), np.clip(high, 0, count)
  size = number[..., high] - number[..., low]
  usable = (size > 0) & (inside | (not full_only))
  mean = (total[..., high] - total[..., low]) / np.maximum(size, 1)
  return np.where(usable, mean, np.nan)
