"""Which scenarios an update trains on: a pure function of (seed, step), so resuming is exact."""

import math
from collections.abc import Sequence

import numpy as np

from rlsafety.errors import UserError


def at(scenarios: Sequence, seed: int, step: int, n: int, fraction: float | None = None):
  """Indices [n] into `scenarios` for update `step` (counted from 0).

  Gameable and non-gameable users are two streams; each is walked in a fresh permutation per
  epoch, so no scenario repeats before its stream is used up. `fraction` of the prompts is
  gameable, exactly in the long run and within one prompt in every step; by default their
  share among `scenarios`.

  Raises:
    UserError: the fraction asks for users that `scenarios` does not have.
  """
  flags = np.array([bool(s.is_gameable) for s in scenarios], bool)
  streams = np.flatnonzero(flags), np.flatnonzero(~flags)
  if fraction is None:
    fraction = len(streams[0]) / max(len(flags), 1)
  if not 0.0 <= fraction <= 1.0:
    raise UserError(f"gameable fraction {fraction} must lie in [0, 1]")
  for stream, share, kind in zip(streams, (fraction, 1 - fraction), ("", "non-"), strict=True):
    if share > 0 and not len(stream):
      raise UserError(f"no {kind}gameable scenario, but a share of {share:g} is asked for")
  before, after = (math.floor(k * n * fraction + 1e-9) for k in (step, step + 1))
  gameable = [_pick(streams[0], seed, 0, k) for k in range(before, after)]
  others = [_pick(streams[1], seed, 1, k) for k in range(step * n - before, (step + 1) * n - after)]
  order = np.random.default_rng([seed, 2, step]).permutation(n)
  return np.array(gameable + others, np.int64)[order]


def _pick(stream, seed, kind, position):
  epoch, index = divmod(position, len(stream))
  return stream[np.random.default_rng([seed, kind, epoch]).permutation(len(stream))[index]]
