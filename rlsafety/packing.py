"""Ragged rows of token ids and padded arrays: the one place that knows where padding lies."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety.types import Array


def mask_from_lengths(lengths: Array, slots: int) -> jax.Array:
  """[...] int lengths -> [..., slots] bool, true on the first `length` slots."""
  return jnp.arange(slots) < lengths[..., None]


def pad(rows: Sequence[Sequence[int]], multiple: int = 64) -> tuple[np.ndarray, np.ndarray]:
  """Id lists -> tokens [N, S] padded with 0, S a multiple of `multiple`, and lengths [N]."""
  lengths = np.array([len(r) for r in rows], np.int32)
  slots = -(-max(1, int(lengths.max(initial=0))) // multiple) * multiple
  tokens = np.zeros((len(rows), slots), np.int32)
  for row, ids in zip(tokens, rows, strict=True):
    row[: len(ids)] = ids
  return tokens, lengths
