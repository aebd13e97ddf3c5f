"""What every judge does to a reply before it reads it: is it empty, is it broken?"""

import functools

import jax
import jax.numpy as jnp

from rlsafety.errors import UserError
from rlsafety.packing import mask_from_lengths
from rlsafety.types import Rollouts


@functools.partial(jax.jit, static_argnames=("stop_ids", "control", "blank"))
def clean(rollouts: Rollouts, stop_ids: tuple[int, ...], control: tuple[int, ...], blank=()):
  """Rollouts -> lengths [P, G] without the closing stop token, and broken [P, G].

  A reply of nothing but `blank` ids (each white space by itself) has length 0. Broken replies
  hold a control token inside (a turn they made up), or say the same bigrams again for more than
  half of their length.
  """
  tokens, lengths = rollouts.tokens, rollouts.lengths
  last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[..., None], -1)[..., 0]
  stopped = jnp.any(last[..., None] == jnp.array(stop_ids), -1) & (lengths > 0)
  lengths = lengths - stopped
  mask = mask_from_lengths(lengths, tokens.shape[-1])
  white = jnp.any(tokens[..., None] == jnp.array(blank, jnp.int32), -1)
  lengths = jnp.where(jnp.any(mask & ~white, -1), lengths, 0)
  mask &= lengths[..., None] > 0
  inside = jnp.any(tokens[..., None] == jnp.array(sorted(control)), -1) & mask
  same = (tokens[..., 1:, None] == tokens[..., None, 1:]) & (
    tokens[..., :-1, None] == tokens[..., None, :-1]
  )
  pairs = mask[..., 1:]
  again = jnp.any(jnp.tril(same, -1) & pairs[..., None, :], -1) & pairs
  repeats = 2 * jnp.sum(again, -1) > jnp.maximum(lengths - 1, 1)
  return lengths, jnp.any(inside, -1) | repeats


@functools.lru_cache(8)
def cleaner(chat):
  """Returns `clean` as a function of the rollouts alone. chat: of who wrote the replies."""
  ids = sorted({*chat.full.get_vocab(with_added_tokens=True).values()} - chat.control)
  texts = chat.full.decode_batch([[i] for i in ids])
  blank = tuple(i for i, text in zip(ids, texts, strict=True) if not text.strip())
  control = tuple(sorted(chat.control))
  return functools.partial(clean, stop_ids=chat.stop_ids, control=control, blank=blank)


def fallback(degenerate: str) -> float:
  """The rating of an empty or broken reply, by config.judge.degenerate."""
  if degenerate not in ("floor", "nan"):
    raise UserError(f"judge.degenerate={degenerate!r}: choose floor or nan")
  return 1.0 if degenerate == "floor" else float("nan")
