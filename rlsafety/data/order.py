"""Which scenarios an update trains on, a pure function of (seed, step) so that resuming is exact;
which are held out; and what the policy sees of them, as tokens."""

import math
from collections.abc import Sequence

import numpy as np

from rlsafety.environments import policy_messages
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


def held_out(scenarios, count: int) -> list:
  """The first count / 2 held-out users of each group, in the environment's order."""
  users = [s for s in scenarios if s.split == "heldout"]
  groups = [[s for s in users if s.is_gameable == flag] for flag in (True, False)]
  chosen = [s for group in groups for s in group[: (count + 1) // 2]]
  if not chosen:
    raise UserError("the environment has no held-out users: environment.heldout_fraction > 0")
  return chosen


def encode(chat, slots: int, users) -> tuple[np.ndarray, np.ndarray]:
  """tokens [N, slots] int32 padded on the right, lengths [N]. Too long is an error."""
  tokens, lengths = np.full((len(users), slots), chat.pad_id, np.int32), []
  for i, user in enumerate(users):
    ids = chat.encode(policy_messages(user))
    if len(ids) > slots:
      raise UserError(
        f"prompt of scenario {user.id} has {len(ids)} tokens, the limit is {slots}: raise "
        "--config.max_prompt_tokens (prompts are never cut)"
      )
    tokens[i, : len(ids)] = ids
    lengths.append(len(ids))
  return tokens, np.array(lengths, np.int32)
