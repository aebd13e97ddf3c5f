"""The arrays of a server: rows that join and leave a running batch, each with its own settings.

A row is one reply being written. All rows share one cache of B rows and C slots, in which a
row's prompt and reply lie one after the other, so that a long prompt leaves room for a short reply
and the other way round. `begin` runs prompts on themselves, `insert` puts one of them into a row,
`advance` draws a few tokens for all rows at once, whichever adapter each of them has. Shapes are
few and known beforehand: a warm server compiles nothing. A call of `advance` computes the first
rows alone, as many as it is given, so that one chat does not pay for a full house.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlsafety import sampler, sharding
from rlsafety.models import architecture, lora, transformer
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter
from rlsafety.types import Prompts

TOPS = 20  # alternatives that are told at a place, at most
CHUNK = 8  # tokens of a row between two looks at what has come and gone


@struct.dataclass
class Stack:
  """A places for adapters, side by side along the rank axis: weights {target: {"a" [L, in, A * R],
  "b" [L, A * R, out]}} float32, scales [A]. A place that is empty is zero."""

  weights: dict
  scales: jax.Array


@struct.dataclass
class Cache:
  """k, v: per layer [B, C, K, Dh]. hidden [B, D]: the state that predicts each row's next token."""

  k: tuple
  v: tuple
  hidden: jax.Array


@struct.dataclass
class Rows:
  """What each of the B rows is doing, on the host between two calls.

  live [B] bool. length [B]: slots of the cache that are filled. drawn [B]: tokens drawn so far, of
  at most limit [B]. place [B]: of its adapter, -1 = none. temperature, top_p [B] float32, seed
  [B] uint32. tops [B] bool: whether alternatives are wanted.
  """

  live: Any
  length: Any
  drawn: Any
  limit: Any
  place: Any
  temperature: Any
  top_p: Any
  seed: Any
  tops: Any


@struct.dataclass
class Drawn:
  """tokens, logprobs [N, B] of a chunk, of which row b has the first counts [b]; top_ids,
  top_logprobs [N, B, TOPS] where they were wanted. stopped [B]: the last one ends the reply."""

  tokens: jax.Array
  logprobs: jax.Array
  top_ids: jax.Array
  top_logprobs: jax.Array
  counts: jax.Array
  stopped: jax.Array


# --- Empty arrays -------------------------------------------------------------------------


def empty_rows(B: int) -> Rows:
  zeros = lambda dtype: np.zeros(B, dtype)  # noqa: E731
  return Rows(
    live=zeros(bool), length=zeros(np.int32), drawn=zeros(np.int32), limit=zeros(np.int32),
    place=np.full(B, -1, np.int32), temperature=zeros(np.float32), top_p=np.ones(B, np.float32),
    seed=zeros(np.uint32), tops=zeros(bool),
  )  # fmt: skip


def empty_cache(config: ModelConfig, B: int, C: int, dtype: Any, mesh: Mesh) -> Cache:
  axes = ("prompt", None, "kv_heads", None)
  shape = (B, C, config.n_kv_heads, config.head_dim)

  def zeros(shape: tuple, axes: tuple) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding.named(mesh, axes, shape))

  k, v = (tuple(zeros(shape, axes) for _ in range(config.n_layers)) for _ in "kv")
  return Cache(k, v, zeros((B, config.d_model), ("prompt", None)))


def empty_stack(
  config: ModelConfig, places: int, rank: int, targets: tuple[str, ...], mesh: Mesh
) -> Stack:
  """Room for `places` adapters of at most `rank`."""
  declared, L, R = architecture.weights(config)["layers"][0], config.n_layers, places * rank

  def zeros(*shape: int) -> jax.Array:
    return sharding.put(mesh, np.zeros(shape, np.float32), *[None] * len(shape))

  weights = {
    name: {"a": zeros(L, declared[name].shape[0], R), "b": zeros(L, R, declared[name].shape[1])}
    for name in targets
  }
  return Stack(weights, zeros(places))


# --- Adapters -----------------------------------------------------------------------------


def padded(adapter: Adapter, like: Stack) -> dict:
  """The adapter's weights with every target and the rank of `like`, what it lacks as zeros."""
  rank = next(iter(like.weights.values()))["a"].shape[-1] // like.scales.shape[0]
  out = {}
  for name, ab in like.weights.items():
    a = np.zeros((*ab["a"].shape[:2], rank), np.float32)
    b = np.zeros((ab["b"].shape[0], rank, ab["b"].shape[2]), np.float32)
    if name in adapter.weights:
      own = adapter.weights[name]
      a[:, :, : own["a"].shape[-1]], b[:, : own["b"].shape[1]] = own["a"], own["b"]
    out[name] = {"a": a, "b": b}
  return out


@functools.partial(jax.jit, donate_argnums=0)
def put_adapter(stack: Stack, weights: dict, scale: jax.Array, place: jax.Array) -> Stack:
  """The stack with `padded` weights at one place."""

  def put(whole: dict, own: dict) -> dict:
    at = place * own["a"].shape[-1]
    into = jax.lax.dynamic_update_slice_in_dim
    return {"a": into(whole["a"], own["a"], at, 2), "b": into(whole["b"], own["b"], at, 1)}

  new = {name: put(ab, weights[name]) for name, ab in stack.weights.items()}
  return Stack(new, stack.scales.at[place].set(scale))


def of_rows(stack: Stack | None, place: jax.Array) -> tuple[dict, jax.Array]:
  """The weights that rows with their adapters at `place` [P] read, ranks side by side, and
  ranks [P, K * R]: each row's own adapter's scale at its ranks, else 0.

  Where rows are fewer than places, K = P and row p reads the p-th adapter alone; else K = A.
  """
  P = place.shape[0]
  if stack is None:
    return {}, jnp.zeros((P, 0))
  A, weights, scales = stack.scales.shape[0], stack.weights, stack.scales
  R, own = next(iter(weights.values()))["a"].shape[-1] // A, jnp.arange(A) == place[:, None]
  if P < A:
    at = jnp.maximum(place, 0)

    def pick(x: jax.Array, axis: int) -> jax.Array:
      apart = x.reshape(*x.shape[:axis], A, R, *x.shape[axis + 1 :])
      return jnp.take(apart, at, axis).reshape(*x.shape[:axis], P * R, *x.shape[axis + 1 :])

    weights = {name: {"a": pick(ab["a"], 2), "b": pick(ab["b"], 1)} for name, ab in weights.items()}
    scales, own = scales[at], jnp.eye(P, dtype=bool) & (place >= 0)
  return weights, jnp.repeat(jnp.where(own, scales, 0.0), R, axis=1)


def by_row(weights: dict, ranks: jax.Array) -> Adapter | None:
  """`of_rows` as one adapter; None without any."""
  return lora.by_row(weights, ranks) if weights else None


# --- Prompts ------------------------------------------------------------------------------


def prompts_of(tokens: Any, lengths: Any) -> Prompts:
  """Host arrays [P, S], [P] as they are: the call that takes them puts them on the device."""
  return Prompts(tokens, lengths)


@functools.partial(jax.jit, static_argnames="config")
def begin(
  params: dict, stack: Stack | None, config: ModelConfig, prompts: Prompts, place: jax.Array
) -> tuple[transformer.PromptCache, jax.Array]:
  """Prompts [P, S] with their adapters' places [P] -> their cache and hidden states [P, S, D]."""
  return transformer.prefill(params, by_row(*of_rows(stack, place)), config, prompts)


@functools.partial(jax.jit, donate_argnums=0)
def insert(
  cache: Cache, begun: transformer.PromptCache, hidden: jax.Array, p: jax.Array, row: jax.Array
) -> Cache:
  """The cache with prompt p of `begin` in a row; what lies behind its length is never seen."""
  into = jax.lax.dynamic_update_slice

  def put(whole: tuple, new: Any) -> tuple:
    own = jax.lax.dynamic_index_in_dim(new, p, 1)  # [L, 1, S, K, Dh]
    return tuple(into(w, own[i].astype(w.dtype), (row, 0, 0, 0)) for i, w in enumerate(whole))

  last = jax.lax.dynamic_index_in_dim(transformer.last_hidden(hidden, begun.lengths), p, 0)
  state = into(cache.hidden, last.astype(cache.hidden.dtype), (row, 0))
  return Cache(put(cache.k, begun.k), put(cache.v, begun.v), state)


@functools.partial(jax.jit, static_argnames="config")
def prompt_scores(
  params: dict, config: ModelConfig, hidden: jax.Array, tokens: jax.Array, tops: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """hidden [P, S, D], tokens [P, S] -> for each token after the first its log-prob [P, S - 1] and
  the likeliest tokens there, ids and log-probs [P, S - 1, TOPS]: TOPS of them, or without `tops`
  the first alone. Logits exist for one slot of all rows at a time."""
  xs = jnp.moveaxis(hidden[:, :-1], 1, 0), tokens[:, 1:].T

  def one_slot(xs: tuple) -> tuple:
    state, target = xs
    logprobs = jax.nn.log_softmax(transformer.unembed(params, config, state), axis=-1)
    return _at(logprobs, target), *_likeliest(logprobs, tops)

  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.lax.map(one_slot, xs))


def _at(logprobs: jax.Array, token: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logprobs, token[..., None], -1)[..., 0]


def _likeliest(logprobs: jax.Array, tops: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[P, V] -> ids and log-probs [P, TOPS]; without `tops` of the first alone, which costs less."""

  def all_of_them(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, ids = jax.lax.top_k(x, TOPS)
    return ids.astype(jnp.int32), values

  def first(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids, values = jnp.argmax(x, -1).astype(jnp.int32)[:, None], jnp.max(x, -1)[:, None]
    return tuple(jnp.broadcast_to(a, (x.shape[0], TOPS)) for a in (ids, values))  # type: ignore

  return jax.lax.cond(tops, all_of_them, first, logprobs)


# --- Replies ------------------------------------------------------------------------------


def draw(logits: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """logits [B, V] -> each row's next token [B] and the log-probs [B, V] at temperature 1.

  A row's random numbers come from its seed and the number of its token alone: who else is in the
  batch, and when the row joined it, changes nothing.
  """
  logprobs = jax.nn.log_softmax(logits, -1)
  scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
  cut = jnp.any(rows.live & (rows.top_p < 1.0))  # sorting a vocabulary is slow: only if asked for
  kept = jax.lax.cond(cut, sampler.nucleus, lambda x, _: x, scaled, rows.top_p[:, None])

  def numbers(seed: jax.Array, drawn: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), drawn), (sampler.LEVELS,))

  sampled, _ = sampler.inverse_cdf(kept, jax.vmap(numbers)(rows.seed, rows.drawn))
  greedy = jnp.argmax(logits, -1).astype(jnp.int32)
  return jnp.where(rows.temperature > 0, sampled, greedy), logprobs


@functools.partial(jax.jit, static_argnames=("config", "stop_ids", "view"), donate_argnums=3)
def advance(
  params: dict,
  stack: Stack | None,
  config: ModelConfig,
  cache: Cache,
  rows: Rows,
  stop_ids: tuple[int, ...],
  view: int,
) -> tuple[Cache, Drawn]:
  """Up to CHUNK tokens for every live row of `rows` [B], the cache's first.

  view: slots of the cache that the longest of them needs.
  """
  B, stops = rows.live.shape[0], jnp.asarray(stop_ids, jnp.int32)
  weights, ranks = of_rows(stack, rows.place)
  wanted = jnp.any(rows.live & rows.tops)
  # A prompt segment of no token: the row's own cache holds the prompt too.
  nothing = jnp.zeros((1, 1, config.n_kv_heads, config.head_dim), cache.hidden.dtype)
  none = (nothing,) * config.n_layers
  prompt = transformer.PromptCache(none, none, jnp.zeros(1, jnp.int32))

  def one(k: tuple, v: tuple, token: jax.Array, length: jax.Array, ranks: jax.Array) -> tuple:
    """A row by itself, [1, 1, C, K, Dh] its cache: rows are at different slots."""
    k, v = jax.tree.map(lambda x: x[None, None], (k, v))
    own = transformer.CompletionCache(k, v)
    adapter = by_row(weights, ranks[None])
    hidden, own = transformer.decode(
      params, adapter, config, prompt, own, token[None, None], length
    )
    return hidden[0, 0], *jax.tree.map(lambda x: x[0, 0], (own.k, own.v))

  def going(carry: tuple) -> jax.Array:
    n, rows, _, _ = carry
    return (n < CHUNK) & jnp.any(rows.live)

  def step(carry: tuple) -> tuple:
    n, rows, cache, out = carry
    token, logprobs = draw(transformer.unembed(params, config, cache.hidden), rows)
    ids, values = _likeliest(logprobs, wanted)
    stopped = rows.live & jnp.any(token[:, None] == stops, -1)
    put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, n, 0)  # noqa: E731
    out = Drawn(
      tokens=put(out.tokens, token),
      logprobs=put(out.logprobs, _at(logprobs, token)),
      top_ids=put(out.top_ids, ids),
      top_logprobs=put(out.top_logprobs, values),
      counts=out.counts + rows.live,
      stopped=out.stopped | stopped,
    )
    hidden, k, v = jax.vmap(one)(cache.k, cache.v, token, rows.length, ranks)
    drawn, length = rows.drawn + rows.live, rows.length + rows.live
    live = rows.live & ~stopped & (drawn < rows.limit)
    return n + 1, rows.replace(live=live, drawn=drawn, length=length), Cache(k, v, hidden), out

  out = Drawn(
    tokens=jnp.zeros((CHUNK, B), jnp.int32),
    logprobs=jnp.zeros((CHUNK, B), jnp.float32),
    top_ids=jnp.zeros((CHUNK, B, TOPS), jnp.int32),
    top_logprobs=jnp.zeros((CHUNK, B, TOPS), jnp.float32),
    counts=jnp.zeros(B, jnp.int32),
    stopped=jnp.zeros(B, bool),
  )
  k, v = jax.tree.map(lambda x: x[:B, :view], (cache.k, cache.v))
  part = Cache(k, v, cache.hidden[:B])
  _, _, part, out = jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), rows, part, out))
  into = lambda whole, new: jax.lax.dynamic_update_slice(whole, new, (0,) * whole.ndim)  # noqa: E731
  return jax.tree.map(into, cache, part), out
