"""Log-probs and entropy of given tokens, without ever holding [tokens, V] logits.

What predicts a token is the state before it: the prompt's last for a reply's first token, that of
token i - 1 for token i. `predicting_states` is the one place that says so. The completion axis
is cut into chunks; each chunk's logits are made once and reduced, in learning to their slope too.
With 64 x 8 replies of 256 tokens and V = 152,064 the full logits would be 80 GB in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter, Dropout
from rlsafety.models.transformer import extend, gathered_head, last_hidden, prefill, unembed
from rlsafety.packing import mask_from_lengths
from rlsafety.sharding import constrain
from rlsafety.types import Prompts


@struct.dataclass
class TokenScores:
  """logprobs [P, G, T] and entropy [P, G, T], float32 nats, full vocabulary."""

  logprobs: jax.Array
  entropy: jax.Array


def predicting_states(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  prompts: Prompts,
  tokens: jax.Array,
  *,
  pool: jax.Array | None = None,
  dropout: Dropout | None = None,
  remat: str = "none",
  attention: str = "einsum",
) -> tuple[jax.Array, jax.Array | None]:
  """Prompts and their completions, tokens [P, G, T], through the model once.

  Returns hidden [P, G, T, D], whose slot i predicts token i, and `pooled` of
  `transformer.extend`.
  """
  prompt, hidden = prefill(
    params, adapter, c, prompts, dropout=dropout, remat=remat, attention=attention
  )
  first = last_hidden(hidden, jnp.asarray(prompts.lengths))[:, None, None]
  states, pooled = extend(
    params, adapter, c, prompt, tokens, pool=pool, dropout=dropout, remat=remat
  )
  first = jnp.broadcast_to(first, states[:, :, :1].shape)
  return jnp.concatenate([first, states[:, :, :-1]], axis=2), pooled


def token_scores(
  params: dict,
  adapter: Adapter | None,
  config: ModelConfig,
  prompts: Prompts,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  temperature: float = 1.0,
  chunk_tokens: int = 2048,
  remat: str = "none",
  dropout: Dropout | None = None,
  attention: str = "einsum",
  learn_entropy: bool = False,
) -> TokenScores:
  """Log-prob and entropy of each completion token: tokens [P, G, T], 0 after `lengths`.

  adapter=None scores under the reference, which is the base alone. learn_entropy: see `score`.
  """
  hidden, _ = predicting_states(
    params, adapter, config, prompts, tokens, dropout=dropout, remat=remat, attention=attention
  )
  out = score(
    params,
    config,
    hidden,
    tokens,
    temperature=temperature,
    chunk_tokens=chunk_tokens,
    learn_entropy=learn_entropy,
  )
  mask = mask_from_lengths(lengths, tokens.shape[-1])
  return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), out)


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
  learn_entropy: bool = False,
) -> TokenScores:
  """Scores targets [P, G, T] under the states that predict them, hidden [P, G, T, D].

  Logits are divided by `temperature` first, as the sampler does: a ratio of log-probs
  taken at two temperatures would be biased. The log-probs have a gradient with respect to
  hidden, the entropy has one with learn_entropy, which costs another product with the head;
  the head itself is frozen and gets none.
  """
  P, G, T, D = hidden.shape
  t = chunk_slots(P, G, T, chunk_tokens)
  head = gathered_head(params)

  def one_chunk(_, xs):  # [P, G, t, D], [P, G, t]
    return None, _reduced(c, temperature, learn_entropy, head, *xs)

  split = lambda x: jnp.moveaxis(x.reshape(P, G, T // t, t, *x.shape[3:]), 2, 0)  # noqa: E731
  _, out = jax.lax.scan(one_chunk, None, (split(hidden), split(targets)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(P, G, T), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _reduced(c, temperature: float, learn_entropy: bool, head, h, target) -> TokenScores:
  """Logits of states h [P, G, t, D], reduced to the scores of target [P, G, t].

  Each score is of one state alone, so its slope with respect to it, [P, G, t, D], says all that
  the backward pass needs: it is made while the logits are there, which are not made again.
  """
  return _with_slopes(c, temperature, learn_entropy, head, h, target)[0]


def _with_slopes(c, temperature, learn_entropy, head, h, target):
  def logits_of(h):
    return constrain(unembed(head, c, h), "prompt", None, None, "vocab") / temperature

  logits, back = jax.vjp(logits_of, h)
  normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  probs = jnp.exp(logits - normaliser)
  # A masked sum: a gather along a split vocabulary would bring all of it to one device.
  hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == target[..., None]
  logprobs = jnp.sum(jnp.where(hit, logits, 0.0), -1, keepdims=True) - normaliser
  entropy = normaliser - jnp.sum(probs * logits, -1, keepdims=True)
  slopes = [back(hit - probs)[0]]
  if learn_entropy:
    slopes += [back(probs * (normaliser - logits - entropy))[0]]
  return TokenScores(logprobs[..., 0], entropy[..., 0]), slopes


def _backward(c, temperature, learn_entropy, slopes, wanted: TokenScores):
  total = wanted.logprobs[..., None] * slopes[0]
  if learn_entropy:
    total += wanted.entropy[..., None] * slopes[1]
  return None, total.astype(slopes[0].dtype), None


_reduced.defvjp(_with_slopes, _backward)


def logits_bytes(P: int, G: int, T: int, V: int, chunk_tokens: int) -> int:
  """Bytes of one chunk's float32 logits: what the planner counts."""
  return math.prod((P, G, chunk_slots(P, G, T, chunk_tokens), V)) * 4
