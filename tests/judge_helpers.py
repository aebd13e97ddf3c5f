"""Rollouts made of given replies, for the tests of judges."""

import numpy as np

from rlsafety import rollout
from rlsafety.types import Replies


def padded(chat, rows, slots=64) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, lengths) of P lists of G replies each, as texts or lists of token ids."""
  ids = [[r if isinstance(r, list) else chat.encode_text(r) for r in row] for row in rows]
  tokens = np.zeros((len(ids), len(ids[0]), slots), np.int32)
  lengths = np.array([[len(r) for r in row] for row in ids], np.int32)
  for p, row in enumerate(ids):
    for g, r in enumerate(row):
      tokens[p, g, : len(r)] = r
  return tokens, lengths


def replies(chat, rows, slots=64) -> Replies:
  """The same as judges read them."""
  return rollout.cleaner(chat)(*padded(chat, rows, slots))
