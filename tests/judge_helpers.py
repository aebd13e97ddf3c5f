"""Rollouts made of given replies, for the tests of judges."""

import jax.numpy as jnp
import numpy as np

from rlsafety import rollout
from rlsafety.types import Replies, Rollouts


def rollouts(chat, rows, slots=64) -> Rollouts:
  """rows: P lists of G replies each, as texts or lists of token ids."""
  ids = [[r if isinstance(r, list) else chat.encode_text(r) for r in row] for row in rows]
  tokens = np.zeros((len(ids), len(ids[0]), slots), np.int32)
  lengths = np.array([[len(r) for r in row] for row in ids], np.int32)
  for p, row in enumerate(ids):
    for g, r in enumerate(row):
      tokens[p, g, : len(r)] = r
  zeros = jnp.zeros(tokens.shape, jnp.float32)
  return Rollouts(jnp.asarray(tokens), zeros, jnp.asarray(lengths), jnp.asarray(lengths < 0))


def replies(chat, rows, slots=64) -> Replies:
  """The same as judges read them."""
  return rollout.cleaner(chat)(rollouts(chat, rows, slots))
