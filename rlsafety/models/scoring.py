"""Log-probs and entropy of given tokens, without ever holding [tokens, V] logits.

The completion axis is cut into chunks; each chunk's logits are made, reduced and, in
the backward pass, made again. With 64 x 8 replies of 256 tokens and V = 152,064 the full
logits would be 80 GB in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.models.transformer import ModelConfig, gathered_head, unembed
from rlsafety.sharding import constrain


@struct.dataclass
class TokenScores:
  """logprobs [P, G, T] and entropy [P, G, T], float32 nats, full vocabulary."""

  logprobs: jax.Array
  entropy: jax.Array


def chunk_slots(P: int, G: int, T: int, chunk_tokens: int) -> int:
  """Largest divisor of T whose P * G * slots tokens fit in `chunk_tokens` (at least 1)."""
  fitting = max(1, min(T, chunk_tokens // max(1, P * G)))
  return max(d for d in range(1, fitting + 1) if T % d == 0)


def score(
  params: dict,
  c: ModelConfig,
  hidden: jax.Array,
  targets: jax.Array,
  *,
  temperature: float = 1.0,
  chunk_tokens: int = 2048,
) -> TokenScores:
  """Scores targets [P, G, T] under the states that predict them, hidden [P, G, T, D].

  Logits are divided by `temperature` first, as the sampler does: a ratio of log-probs
  taken at two temperatures would be biased.
  """
  P, G, T, D = hidden.shape
  t = chunk_slots(P, G, T, chunk_tokens)
  head = gathered_head(params)

  @jax.checkpoint
  def one_chunk(_, xs):
    h, target = xs  # [P, G, t, D], [P, G, t]
    logits = constrain(unembed(head, c, h), "prompt", None, None, "vocab") / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    logprobs = _pick(logits, target) - normaliser
    probs = jnp.exp(logits - normaliser[..., None])
    return None, (logprobs, normaliser - jnp.sum(probs * logits, -1))

  split = lambda x: jnp.moveaxis(x.reshape(P, G, T // t, t, *x.shape[3:]), 2, 0)  # noqa: E731
  _, out = jax.lax.scan(one_chunk, None, (split(hidden), split(targets)))
  return TokenScores(*(jnp.moveaxis(x, 0, 2).reshape(P, G, T) for x in out))


def _pick(logits: jax.Array, target: jax.Array) -> jax.Array:
  """logits [..., V] at target [...], as a masked sum: a gather along a split vocabulary
  would bring all of it to one device."""
  hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == target[..., None]
  return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def logits_bytes(P: int, G: int, T: int, V: int, chunk_tokens: int) -> int:
  """Bytes of one chunk's float32 logits: what the planner counts."""
  return math.prod((P, G, chunk_slots(P, G, T, chunk_tokens), V)) * 4
