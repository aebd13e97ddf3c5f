"""On-policy rollouts: prefill each prompt once, then decode its whole group together.

The network is the learner's own (`models.transformer`) with the same weights: there is no
second engine and nothing to synchronise. Shapes are static, so that one compilation
serves a run; a `while_loop` leaves early when every row has stopped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlsafety.config import Sampler
from rlsafety.errors import UserError
from rlsafety.models import int8, lora, transformer
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.int8 import Int8
from rlsafety.models.lora import Adapter
from rlsafety.sharding import constrain
from rlsafety.types import Prompts, Rollouts


def truncated(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """logits [..., V] with everything outside top-k and the top-p nucleus at -inf.

  The nucleus is the smallest set of most likely tokens whose mass reaches top_p; its
  first token always stays. Ties at the boundary stay too.
  """
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  return nucleus(logits, top_p) if top_p < 1.0 else logits


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """`truncated` by top_p alone, which is one number or [..., 1]; rows at 1 stay whole."""
  ordered = jnp.sort(logits, axis=-1)[..., ::-1]
  probs = jax.nn.softmax(ordered, axis=-1)
  inside = (jnp.cumsum(probs, -1) - probs < top_p) | (jnp.asarray(top_p) >= 1.0)
  least = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)


LEVELS = 3  # random numbers of a token: its group of blocks, its block, its place
BLOCK, SUPERBLOCK = 32, 64  # tokens; blocks: two sizes that divide any shard of a vocabulary


def inverse_cdf(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
  """logits [..., V] and LEVELS numbers in [0, 1) each -> token [...] and log of the sum of exp.

  A group of blocks is drawn by its share of the sum, a block by its share of the group and a
  token by its share of the block: an exact draw from the softmax for three random numbers
  instead of V, and nothing of size V is written but the logits. One number for all three would
  round the probability of a rare token to a multiple of float32's 2^-24.
  """
  V = logits.shape[-1]
  top = jnp.max(logits, -1, keepdims=True)
  blocks = _split(logits, BLOCK, -jnp.inf)  # [..., V / 32, 32]
  sums = jnp.sum(jnp.exp(blocks - top[..., None]), -1)
  groups = _split(sums, SUPERBLOCK, 0.0)
  totals = jnp.sum(groups, -1)
  total = jnp.sum(totals, -1)
  group = _locate(totals, uniform[..., 0])
  block = group * SUPERBLOCK + _locate(_take(groups, group), uniform[..., 1])
  inside = _take(blocks, block)
  inside = jnp.exp(inside - jnp.max(inside, -1, keepdims=True))
  token = jnp.minimum(block * BLOCK + _locate(inside, uniform[..., 2]), V - 1)
  return token.astype(jnp.int32), jnp.log(total) + top[..., 0]


def _split(x: jax.Array, size: int, fill: float) -> jax.Array:
  """[..., n] -> [..., n / size, size], the end filled up."""
  missing = -x.shape[-1] % size
  if missing:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)
  return x.reshape(*x.shape[:-1], -1, size)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [..., n, m] at index [...] -> [..., m]."""
  return jnp.take_along_axis(x, index[..., None, None], axis=-2)[..., 0, :]


def _locate(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """The first place where the running sum of weights [..., n] passes uniform [...] times their
  sum. Never a place of weight 0: rounding may bring the product up to the sum itself."""
  place = jnp.arange(weights.shape[-1])
  upto = jnp.sum(jnp.where(place <= place[:, None], weights[..., None, :], 0.0), -1)
  at = upto[..., -1:] * jnp.minimum(uniform, 1 - 2**-22)[..., None]
  return jnp.sum(upto <= at, -1)


def init_cache(
  config: ModelConfig, P: int, G: int, T: int, dtype: Any
) -> transformer.CompletionCache:
  """An empty cache; dtype jnp.int8 makes one of Int8 with a scale per slot and head."""
  shape = (P, G, T, config.n_kv_heads, config.head_dim)

  def empty():
    zeros = constrain(jnp.zeros(shape, dtype), "prompt", None, None, "kv_heads", None)
    if zeros.dtype != jnp.int8:
      return zeros
    scale = jnp.zeros((*shape[:-1], 1), jnp.float32)
    return Int8(zeros, constrain(scale, "prompt", None, None, "kv_heads", None))

  k, v = (tuple(empty() for _ in range(config.n_layers)) for _ in "kv")
  return transformer.CompletionCache(k, v)


def quantise_cache(cache: transformer.PromptCache) -> transformer.PromptCache:
  return cache.replace(k=int8.quantise(cache.k, -1), v=int8.quantise(cache.v, -1))


def by_layer(cache: transformer.PromptCache) -> transformer.PromptCache:
  """The same cache with one array per layer: what `decode` reads, made once and not in its loop."""
  layers = jax.tree.leaves(cache.k)[0].shape[0]
  split = lambda x: tuple(jax.tree.map(lambda a, i=i: a[i], x) for i in range(layers))  # noqa: E731
  return cache.replace(k=split(cache.k), v=split(cache.v))


@jax.jit
def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """One key for each of the rows [P], which are numbers; equal numbers get equal keys."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def uniforms(keys: jax.Array, G: int, T: int) -> jax.Array:
  """[T, P, G, LEVELS] numbers in [0, 1), from each row's key [P] folded with (sample, slot)."""

  def one(slot, key, sample):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), slot), (LEVELS,))

  over_samples = jax.vmap(one, (None, None, 0))
  over_rows = jax.vmap(over_samples, (None, 0, None))
  return jax.vmap(over_rows, (0, None, None))(jnp.arange(T), keys, jnp.arange(G))


def sample(
  params: dict,
  adapter: Adapter | None,
  config: ModelConfig,
  prompts: Prompts,
  keys: jax.Array,
  settings: Sampler,
  stop_ids: tuple[int, ...] = (),
) -> Rollouts:
  """Draws settings.group completions of every prompt; each of stop_ids ends one, as its part.

  top_k and top_p cut the draw off the policy's own distribution: log-probs are reported under
  the full vocabulary all the same.

  Row p draws with numbers of its own key keys[p] (`row_keys`) alone, so that neither the mesh nor
  who else is in the batch changes a single token.
  """
  P = prompts.tokens.shape[0]
  G, T, temperature = settings.group, settings.max_tokens, settings.temperature
  prompt, hidden = transformer.prefill(params, adapter, config, prompts)
  dtype = hidden.dtype
  if settings.cache == "int8":
    prompt, dtype = quantise_cache(prompt), jnp.int8
  prompt, own = by_layer(prompt), lora.unstacked(adapter, config.n_layers, hidden.dtype)
  cache = init_cache(config, P, G, T, dtype)
  hidden = transformer.last_hidden(hidden, prompts.lengths)
  hidden = jnp.broadcast_to(hidden[:, None], (P, G, hidden.shape[-1]))
  stops = jnp.asarray(stop_ids, jnp.int32).reshape(-1)
  numbers = uniforms(keys, G, T)

  def draw(hidden, slot):
    """hidden [P, G, D] -> tokens [P, G] and their full-vocabulary log-probs [P, G]."""
    logits = transformer.unembed(params, config, hidden)
    logits = logits / (temperature or 1.0)
    if temperature == 0.0:
      tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      normaliser = jax.nn.logsumexp(logits, axis=-1)
    else:
      kept = truncated(logits, settings.top_k, settings.top_p)
      tokens, normaliser = inverse_cdf(kept, numbers[slot])
      if kept is not logits:
        normaliser = jax.nn.logsumexp(logits, axis=-1)
    return tokens, jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - normaliser

  def unfinished(carry):
    slot, _, _, rollouts, _ = carry
    return (slot < T) & ~jnp.all(rollouts.finished)

  def step(carry):
    slot, _, hidden, r, cache = carry
    tokens, logprobs = draw(hidden, slot)
    live = ~r.finished
    stopped = jnp.any(tokens[..., None] == stops, axis=-1)
    put = lambda a, b: jax.lax.dynamic_update_index_in_dim(  # noqa: E731
      a, jnp.where(live, b, 0).astype(a.dtype), slot, axis=2
    )
    r = Rollouts(
      tokens=put(r.tokens, tokens),
      logprobs=put(r.logprobs, logprobs),
      lengths=r.lengths + live,
      finished=r.finished | stopped,
    )
    hidden, cache = transformer.decode(params, own, config, prompt, cache, tokens, slot)
    return slot + 1, tokens, hidden, r, cache

  start = Rollouts(
    tokens=jnp.zeros((P, G, T), jnp.int32),
    logprobs=jnp.zeros((P, G, T), jnp.float32),
    lengths=jnp.zeros((P, G), jnp.int32),
    finished=jnp.zeros((P, G), bool),
  )
  carry = (jnp.zeros((), jnp.int32), start.tokens[..., 0], hidden, start, cache)
  return jax.lax.while_loop(unfinished, step, carry)[3]


def cache_bytes(
  config: ModelConfig, slots: int, settings: Sampler, mesh: Mesh, dtype: Any
) -> float:
  """Bytes per device of the KV cache of one prompt of `slots` tokens and its replies."""
  tensor = mesh.shape["tensor"] if config.n_kv_heads % mesh.shape["tensor"] == 0 else 1
  per_head = config.head_dim + 4 if settings.cache else config.head_dim * jnp.dtype(dtype).itemsize
  per_token = 2 * config.n_layers * config.n_kv_heads * per_head / tensor
  return (slots + settings.group * settings.max_tokens) * per_token


def prompts_at_once(
  config: ModelConfig,
  prompts: int,
  slots: int,
  settings: Sampler,
  mesh: Mesh,
  dtype: Any,
  gib: float,
) -> int:
  """How many of a batch's prompts to sample in one call, from a byte budget.

  The largest divisor of `prompts` that the mesh can split and whose KV cache, prompts of
  `slots` tokens included, takes at most `gib` GiB per device (0: no limit). A model without
  grouped heads needs 512 KiB of cache per token at 7B: rows alone are no measure.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  ways = ways if prompts % ways == 0 else 1  # `sharding.spec` keeps such a batch whole too
  per_prompt = cache_bytes(config, slots, settings, mesh, dtype)
  fitting = [
    d
    for d in range(1, prompts + 1)
    if prompts % d == 0 and d % ways == 0 and (not gib or d / ways * per_prompt <= gib * 2**30)
  ]
  if not fitting:
    raise UserError(
      f"memory.cache_gib={gib}: one prompt per device with its {settings.group} replies needs "
      f"{per_prompt / 2**30:.2f} GiB of KV cache; raise it, set sampler.cache=int8, or take "
      "fewer or shorter replies"
    )
  return max(fitting)


sample_jit = jax.jit(
  sample,
  static_argnames=("config", "settings", "stop_ids"),
  # XLA for GPUs would join each weight and its adapter's in one array, in every decode step.
  compiler_options={"xla_gpu_dot_merger_threshold_mb": 0},
)


def sample_all(
  params: dict,
  adapter: Adapter | None,
  config: ModelConfig,
  prompts: Prompts,
  keys: jax.Array,
  settings: Sampler,
  stop_ids: tuple[int, ...],
  mesh: Mesh,
  cache_gib: float = 0.0,
) -> Rollouts:
  """`sample` on a whole batch, in as many calls as a KV cache of cache_gib per device takes."""
  P, S = prompts.tokens.shape
  dtype = params["embed"].dtype
  size = prompts_at_once(config, P, S, settings, mesh, dtype, cache_gib)
  pieces = []
  for i in range(0, P, size):
    own, piece, piece_keys = adapter, prompts, keys
    if size < P:
      piece, piece_keys = jax.tree.map(lambda x, i=i: x[i : i + size], (prompts, keys))
      own = lora.rows_between(adapter, i, i + size)
    pieces.append(sample_jit(params, own, config, piece, piece_keys, settings, stop_ids))
  return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
