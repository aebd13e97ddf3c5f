"""One decoder for every family that we train, as pure functions on a dict of arrays.

A family is data (`ModelConfig`), never code. Each weight is declared once, in `weights`:
shape, logical axes (see `sharding.RULES`) and initialiser; loading, sharding, random
initialisation and LoRA all read that declaration. Layers are stacked and scanned.

  prefill   the prompt on itself             -> PromptCache, last hidden state
  extend    completions on prompt + self     -> hidden states    (learner, judges)
  decode    one more token per completion    -> hidden, cache    (sampler)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.errors import UserError
from rlsafety.models import attention, int8
from rlsafety.models.attention import Rope
from rlsafety.models.int8 import Int8
from rlsafety.models.lora import Adapter, Dropout, linear
from rlsafety.packing import mask_from_lengths
from rlsafety.sharding import constrain
from rlsafety.types import Prompts


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The numbers that make one architecture. Hashable, so it is a static jit argument."""

  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  activation: str = "silu"  # silu | gelu_tanh | gelu, of the gated MLP
  norm_eps: float = 1e-6
  norm_offset: bool = False  # Gemma multiplies by (1 + w)
  embed_scale: float = 1.0  # Gemma: sqrt(d_model)
  query_scale: float = 0.0  # 0 = head_dim ** -0.5
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False  # Gemma-2/3 also normalise each block's output
  tie_embeddings: bool = False
  attn_softcap: float | None = None
  final_softcap: float | None = None
  rope: Rope = Rope()
  local_rope: Rope | None = None  # Gemma-3 gives its local layers another base
  window: int | None = None  # a local layer sees the last `window` positions
  local_layers: tuple[bool, ...] = ()  # per layer; () = every layer is global
  max_positions: int = 2048


@dataclasses.dataclass(frozen=True)
class Weight:
  """shape, logical axis names (one per dimension) and init: "normal", "ones" or "zeros"."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: str = "normal"


def weights(c: ModelConfig) -> dict:
  """The declaration of every array of the model. Linears are input-major: y = x @ w."""
  L, D, F = c.n_layers, c.d_model, c.d_ff
  heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  norm = Weight((L, D), ("layers", None), "zeros" if c.norm_offset else "ones")
  layers = {
    "attn_norm": norm,
    "q": Weight((L, D, heads), ("layers", "embed", "heads")),
    "k": Weight((L, D, kv), ("layers", "embed", "kv")),
    "v": Weight((L, D, kv), ("layers", "embed", "kv")),
    "o": Weight((L, heads, D), ("layers", "heads", "embed")),
    "mlp_norm": norm,
    "gate": Weight((L, D, F), ("layers", "embed", "mlp")),
    "up": Weight((L, D, F), ("layers", "embed", "mlp")),
    "down": Weight((L, F, D), ("layers", "mlp", "embed")),
  }
  if c.qkv_bias:
    layers["q_bias"] = Weight((L, heads), ("layers", "heads"), "zeros")
    layers["k_bias"] = Weight((L, kv), ("layers", "kv"), "zeros")
    layers["v_bias"] = Weight((L, kv), ("layers", "kv"), "zeros")
  if c.qk_norm:
    layers["q_norm"] = layers["k_norm"] = Weight((L, c.head_dim), ("layers", None), norm.init)
  if c.post_norms:
    layers["post_attn_norm"] = layers["post_mlp_norm"] = norm
  model = {
    "embed": Weight((c.vocab_size, D), ("vocab", "embed")),
    "layers": layers,
    "final_norm": Weight((D,), (None,), norm.init),
  }
  if not c.tie_embeddings:
    model["head"] = Weight((D, c.vocab_size), ("embed", "vocab"))
  return model


def is_weight(x) -> bool:
  return isinstance(x, Weight)


def init_params(c: ModelConfig, key: jax.Array, dtype=jnp.float32) -> dict:
  """Random params in the layout of `weights`: normal with deviation 0.02."""
  leaves, tree = jax.tree.flatten(weights(c), is_leaf=is_weight)
  fixed = {"ones": jnp.ones, "zeros": jnp.zeros}
  arrays = [
    fixed[w.init](w.shape, dtype)
    if w.init in fixed
    else (0.02 * jax.random.normal(jax.random.fold_in(key, i), w.shape)).astype(dtype)
    for i, w in enumerate(leaves)
  ]
  return jax.tree.unflatten(tree, arrays)


@struct.dataclass
class PromptCache:
  """Keys and values of the prompts: k, v [L, P, S, K, Dh], arrays or Int8; lengths [P]."""

  k: jax.Array | Int8
  v: jax.Array | Int8
  lengths: jax.Array


@struct.dataclass
class CompletionCache:
  """Keys and values of the completions so far: k, v [L, P, G, T, K, Dh], arrays or Int8."""

  k: jax.Array | Int8
  v: jax.Array | Int8


def init_cache(c: ModelConfig, P: int, G: int, T: int, dtype) -> CompletionCache:
  """An empty cache; dtype jnp.int8 makes one of Int8 with a scale per slot and head."""
  shape = (c.n_layers, P, G, T, c.n_kv_heads, c.head_dim)
  pin = lambda x: constrain(x, None, "prompt", None, None, "kv_heads", None)  # noqa: E731
  zeros = pin(jnp.zeros(shape, dtype))
  if zeros.dtype == jnp.int8:
    zeros = Int8(zeros, pin(jnp.zeros((*shape[:-1], 1), jnp.float32)))
  return CompletionCache(zeros, zeros)


def quantise_cache(cache: PromptCache) -> PromptCache:
  return cache.replace(k=int8.quantise(cache.k, -1), v=int8.quantise(cache.v, -1))


# --- One layer ------------------------------------------------------------------------


def _norm(x, w, c: ModelConfig):
  """RMSNorm over the last axis, in float32."""
  h = x.astype(jnp.float32)
  h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + c.norm_eps)
  return (h * (w.astype(jnp.float32) + float(c.norm_offset))).astype(x.dtype)


_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _layer(c: ModelConfig, x, w, ab, scale, dropout, rotation, keys_seen, fused=False):
  """x [P, G, t, D] -> x, after attention and MLP.

  fused: a prompt on itself, through cuDNN.
  w, ab: this layer's weights and adapter. rotation: cos, sin [P, G, t, Dh/2].
  keys_seen(k, v) takes the new keys [P, G, t, K, Dh] and returns (own, prompt) for
  `attention.attend` plus whatever must be kept of them.
  """
  P, G, t, _ = x.shape

  def project(h, name):
    bias = w.get(f"{name}_bias")
    return linear(h, w[name], bias, ab.get(name), scale, dropout, name)

  def heads(h, name, count):
    return project(h, name).reshape(P, G, t, count, c.head_dim)

  h = _norm(x, w["attn_norm"], c)
  q, k = heads(h, "q", c.n_heads), heads(h, "k", c.n_kv_heads)
  v = heads(h, "v", c.n_kv_heads)
  if c.qk_norm:
    q, k = _norm(q, w["q_norm"], c), _norm(k, w["k_norm"], c)
  q = constrain(attention.rotate(q, *rotation), "prompt", None, None, "kv_heads", None)
  k = attention.rotate(k, *rotation)
  own, prompt, kept = keys_seen(k, v)
  query_scale = c.query_scale or c.head_dim**-0.5
  if fused:
    h = attention.attend_prompt(q, k, v, scale=query_scale)
  else:
    h = attention.attend(q, own, prompt, scale=query_scale, softcap=c.attn_softcap)
  h = project(h, "o")
  x = x + (_norm(h, w["post_attn_norm"], c) if c.post_norms else h)
  h = _norm(x, w["mlp_norm"], c)
  h = _ACTIVATIONS[c.activation](project(h, "gate")) * project(h, "up")
  h = project(constrain(h, "prompt", None, None, "mlp"), "down")
  x = x + (_norm(h, w["post_mlp_norm"], c) if c.post_norms else h)
  return constrain(x, "prompt", None, None, None), kept


# --- The stack ------------------------------------------------------------------------

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _stack(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  tokens: jax.Array,
  offset: jax.Array | int,
  prompt: PromptCache | None,
  cache: CompletionCache | None,
  pool: jax.Array | None,
  dropout: Dropout | None,
  remat: str,
  fused: bool = False,
):
  """tokens [P, G, t], whose first slot is `offset` of their segment, through all layers.

  Returns hidden [P, G, t, D] after the last layer (before the final norm), the cache
  (updated, or the new keys and values [L, P, G, t, K, Dh] if none was given) and the
  pooled states [L, P, G, D] if `pool` [P, G, t] bool was given.
  """
  P, G, t = tokens.shape
  # Rows first whole (an fsdp gather of the table), then looked up: split both ways, the lookup
  # would gather every prompt's states instead.
  x = jnp.take(constrain(params["embed"], "vocab", None), tokens, axis=0, mode="clip")
  x = x * jnp.asarray(c.embed_scale, x.dtype)  # Gemma rounds the scale to the model's dtype
  x = constrain(x, "prompt", None, None, None)
  slot = offset + jnp.arange(t)  # index of each query in its own segment
  start = 0 if prompt is None else prompt.lengths[:, None, None]
  position = jnp.broadcast_to(start + slot, (P, G, t))
  own_slots = jnp.arange(t if cache is None else jax.tree.leaves(cache)[0].shape[-3])
  own_mask = slot[:, None] >= own_slots  # causal; slots not written yet are in the future
  prompt_mask = None
  if prompt is not None:
    S = jax.tree.leaves(prompt.k)[0].shape[-3]
    prompt_mask = mask_from_lengths(prompt.lengths, S)[:, None, None]  # [P, 1, 1, S]
  ropes = [attention.rotation(attention.rope_frequencies(c.rope, c.head_dim), position)]
  local = jnp.asarray(c.local_layers or (False,) * c.n_layers)
  has_local = any(c.local_layers) and c.window is not None
  if has_local:
    local_freq = attention.rope_frequencies(c.local_rope or c.rope, c.head_dim)
    ropes.append(attention.rotation(local_freq, position))
    own_near = own_mask & (slot[:, None] - own_slots < c.window)
    if prompt is not None:
      prompt_near = prompt_mask & (position[..., None] - jnp.arange(S) < c.window)

  def body(carry, xs):
    x, cache = carry
    layer, w, ab, prompt_kv, is_local = xs
    rotation, mask_own, mask_prompt = ropes[0], own_mask, prompt_mask
    if has_local:
      rotation = jax.tree.map(lambda a, b: jnp.where(is_local, b, a), ropes[0], ropes[1])
      mask_own = jnp.where(is_local, own_near, own_mask)
      if prompt is not None:
        mask_prompt = jnp.where(is_local, prompt_near, prompt_mask)

    def keys_seen(k, v):
      if cache is None:
        own, kept = (k, v, mask_own), (k, v)
      else:  # The cache is carried, not scanned over: xs -> ys would copy all of it.
        new = CompletionCache(k, v)
        if isinstance(cache.k, Int8):
          new = CompletionCache(int8.quantise(k, -1), int8.quantise(v, -1))
        at = (layer, 0, 0, offset, 0, 0)
        kept = jax.tree.map(
          lambda a, b: jax.lax.dynamic_update_slice(a, b[None].astype(a.dtype), at), cache, new
        )
        read = lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)  # noqa: E731
        layer_kv = jax.tree.map(read, kept)
        own = (*(int8.dequantise(a, k.dtype) for a in (layer_kv.k, layer_kv.v)), mask_own)
      if prompt is None:
        return own, None, kept
      return own, (*(int8.dequantise(a, k.dtype) for a in prompt_kv), mask_prompt), kept

    scale = 0.0 if adapter is None else adapter.scale
    drop = dropout and dropout.replace(key=jax.random.fold_in(dropout.key, layer))
    x, kept = _layer(c, x, w, ab, scale, drop, rotation, keys_seen, fused)
    pooled = None
    if pool is not None:
      count = jnp.maximum(jnp.sum(pool, -1), 1)[..., None]
      pooled = jnp.einsum("pgtd,pgt->pgd", x.astype(jnp.float32), pool.astype(jnp.float32)) / count
    if cache is None:
      return (x, None), (kept, pooled)
    return (x, kept), (None, pooled)

  if remat not in REMAT:
    raise ValueError(f"remat={remat!r}: choose from {', '.join(REMAT)}")
  if remat != "none":
    body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
  xs = (
    jnp.arange(c.n_layers),
    params["layers"],
    {} if adapter is None else adapter.weights,
    None if prompt is None else (prompt.k, prompt.v),
    local,
  )
  if isinstance(cache, list):
    return *_unrolled(body, x, cache, xs), None
  (x, cache), (kept, pooled) = jax.lax.scan(body, (x, cache), xs)
  return x, cache or kept, pooled


def _unrolled(body, x, caches: list[CompletionCache], xs):
  """The same layers without a scan, on lists of per-layer arrays (see `unstack`)."""
  _, params, ab, prompt_kv, local = xs
  out = []
  for i, cache in enumerate(caches):
    kv = None if prompt_kv is None else tuple(a[i] for a in prompt_kv)
    (x, cache), _ = body((x, cache), (0, params[i], ab and ab[i], kv, local[i]))
    out.append(cache)
  return x, out


def unstack(tree, layers: int) -> list:
  """A tree of arrays [L, ...] -> a list of L trees, copied once, outside of any loop."""
  return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(layers)]


def _finish(params: dict, c: ModelConfig, x: jax.Array) -> jax.Array:
  return _norm(x, params["final_norm"], c)


# --- The three ways to run it ----------------------------------------------------------


def prefill(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  prompts: Prompts,
  *,
  dropout: Dropout | None = None,
  remat: str = "none",
  attention: str = "einsum",
) -> tuple[PromptCache, jax.Array]:
  """Runs each prompt on itself, once per group.

  attention: einsum, or cudnn for the fused kernel on NVIDIA GPUs. Returns the cache and
  hidden [P, S, D] (after the final norm); padding slots hold values that nothing valid
  depends on.
  """
  if attention not in ("einsum", "cudnn"):
    raise UserError(f"attention={attention!r}: choose einsum or cudnn")
  fused = attention == "cudnn"
  if fused and (c.attn_softcap or any(c.local_layers)):
    raise UserError("attention=cudnn: this model caps or windows its attention; use einsum")
  tokens = prompts.tokens[:, None]
  x, (k, v), _ = _stack(params, adapter, c, tokens, 0, None, None, None, dropout, remat, fused)
  cache = PromptCache(k=k[:, :, 0], v=v[:, :, 0], lengths=prompts.lengths)
  return cache, _finish(params, c, x)[:, 0]


def last_hidden(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
  """hidden [P, S, D], lengths [P] -> the state of each prompt's last token, [P, D]."""
  return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def extend(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  prompt: PromptCache,
  tokens: jax.Array,
  *,
  pool: jax.Array | None = None,
  dropout: Dropout | None = None,
  remat: str = "none",
) -> tuple[jax.Array, jax.Array | None]:
  """Teacher-forced completions: tokens [P, G, T] on their group's prompt and themselves.

  Returns hidden [P, G, T, D] (after the final norm; slot i predicts token i + 1) and,
  if `pool` [P, G, T] bool is given, pooled [L, P, G, D] float32: the mean over the
  pooled slots of the state after each layer.
  """
  x, _, pooled = _stack(params, adapter, c, tokens, 0, prompt, None, pool, dropout, remat)
  return _finish(params, c, x), pooled


def decode(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  prompt: PromptCache,
  cache: CompletionCache,
  tokens: jax.Array,
  offset: jax.Array,
) -> tuple[jax.Array, CompletionCache]:
  """One token per completion: tokens [P, G], written to slot `offset` of the cache.

  Returns hidden [P, G, D] (after the final norm) and the updated cache.
  """
  x, cache, _ = _stack(
    params, adapter, c, tokens[..., None], offset, prompt, cache, None, None, "none"
  )
  return _finish(params, c, x)[:, :, 0], cache


def head_matrix(params: dict) -> tuple[jax.Array, str]:
  """The output matrix and its einsum subscript: [D, V] or, tied, the embedding [V, D]."""
  return (params["head"], "dv") if "head" in params else (params["embed"], "vd")


def gathered_head(params: dict) -> dict:
  """The output matrix alone, whole along the model width: gathered over fsdp here and not in
  every turn of a loop that multiplies with it."""
  matrix, axes = head_matrix(params)
  names = ("vocab", None) if axes == "vd" else (None, "vocab")
  return {"embed" if axes == "vd" else "head": constrain(matrix, *names)}


def unembed(params: dict, c: ModelConfig, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> logits [..., V] float32. For few positions: see `logprobs.score`."""
  matrix, axes = head_matrix(params)
  logits = jnp.einsum(f"...d,{axes}->...v", hidden, matrix, preferred_element_type=jnp.float32)
  if c.final_softcap is not None:
    logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
  return logits


def params_count(c: ModelConfig) -> int:
  """Number of base parameters."""
  import math

  leaves: list[Any] = jax.tree.leaves(weights(c), is_leaf=is_weight)
  return sum(math.prod(w.shape) for w in leaves)
