"""The decoder of every family, as pure functions on a dict of arrays (see `architecture`).

  prefill   the prompt on itself             -> PromptCache, last hidden state
  extend    completions on prompt + self     -> hidden states    (learner, judges)
  decode    one more token per completion    -> hidden, cache    (sampler)

Attention has two key segments under one softmax: the prompt's keys exist once per group,
[P, S, K, Dh]; each completion's own keys are [P, G, T, K, Dh]. Queries of prefill, decode (t = 1)
and learning (t = T) all pass here, so the sampler and the learner cannot disagree about what a
token may see.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from rlsafety.errors import UserError
from rlsafety.models import int8
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter, Dropout, drop_mask, per_layer
from rlsafety.models.products import einsum, product
from rlsafety.models.rotary import cos_sin, rotate
from rlsafety.packing import mask_from_lengths
from rlsafety.sharding import constrain
from rlsafety.types import Array, Prompts


class PromptCache(struct.PyTreeNode):
  """Keys and values of the prompts: k, v [L, P, S, K, Dh], arrays or Int8; lengths [P].

  `decode` reads them layer by layer: tuples of L arrays [P, S, K, Dh] (`sampler.by_layer`).
  """

  k: Any
  v: Any
  lengths: Array


@struct.dataclass
class CompletionCache:
  """Keys and values of the completions so far: per layer k, v [P, G, T, K, Dh], arrays or Int8."""

  k: tuple
  v: tuple


# --- Attention ------------------------------------------------------------------------

LOGITS = 2**24  # attention logits that exist at once, in float32: 64 MiB


def attend(
  q: jax.Array, own: tuple, prompt: tuple | None, *, scale: float, softcap: float | None
) -> jax.Array:
  """One softmax over the prompt's keys and the row's own keys.

  q [P, G, t, H, Dh]. Keys and values are arrays or Int8.
  own: (k [P, G, T, K, Dh], v, mask broadcastable to [P, G, t, T]).
  prompt: (k [P, S, K, Dh], v, mask broadcastable to [P, G, t, S]) or None.
  Query head h reads key head h // (H / K). Returns [P, G, t, H * Dh] in q's dtype;
  logits and softmax are float32.

  Where the logits of all queries would be more than LOGITS, queries go block by block, and the
  backward pass makes each block's logits again: nothing of size [.., t, S + T] is kept.
  """
  P, G, t, H, Dh = q.shape
  masks = [jnp.broadcast_to(m, (P, G, t, _slots(k))) for k, _, m in filter(None, (prompt, own))]
  per_query = P * G * H * sum(m.shape[-1] for m in masks)
  block = max(d for d in range(1, t + 1) if t % d == 0 and (d == 1 or d * per_query <= LOGITS))
  if block == t:
    return _attend(q, own, prompt, scale, softcap)

  @jax.checkpoint
  def one_block(xs):
    queries, *masks = xs
    shown = prompt and (*prompt[:2], masks[0])
    return _attend(queries, (*own[:2], masks[-1]), shown, scale, softcap)

  split = lambda x: jnp.moveaxis(x.reshape(P, G, t // block, block, *x.shape[3:]), 2, 0)  # noqa: E731
  out = jax.lax.map(one_block, [split(x) for x in (q, *masks)])
  return jnp.moveaxis(out, 0, 2).reshape(P, G, t, H * Dh)


def _attend(q, own, prompt, scale, softcap):
  """`attend` for all queries at once."""
  P, G, t, H, Dh = q.shape
  K = jax.tree.leaves(own[0])[0].shape[-2]
  q = q.reshape(P, G, t, K, H // K, Dh)
  segments = [("pgskd", own)] if prompt is None else [("pskd", prompt), ("pgskd", own)]
  logits = []
  for keys, (k, _, mask) in segments:
    values, of_slot = _factors(k, q.dtype)
    part = einsum(f"pgtkmd,{keys}->pgkmts", q, values, jnp.float32)
    part = part * (scale if of_slot is None else scale * of_slot)
    if softcap is not None:
      part = softcap * jnp.tanh(part / softcap)
    mask = jnp.broadcast_to(mask, (P, G, t, _slots(k)))
    logits.append(jnp.where(mask[:, :, None, None], part, -jnp.inf))
  # Each segment keeps its own array; they share the largest logit and the sum.
  top = functools.reduce(jnp.maximum, (jnp.max(part, -1, keepdims=True) for part in logits))
  weights = [jnp.exp(part - jax.lax.stop_gradient(top)) for part in logits]
  total = sum(jnp.sum(part, -1) for part in weights)  # [P, G, K, M, t]
  out = 0.0
  for part, (keys, (_, v, _)) in zip(weights, segments, strict=True):
    values, of_slot = _factors(v, q.dtype)
    part = part if of_slot is None else part * of_slot
    out = out + einsum(f"pgkmts,{keys}->pgtkmd", part.astype(q.dtype), values, q.dtype)
  out = out / jnp.moveaxis(total, -1, 2)[..., None]
  return out.astype(q.dtype).reshape(P, G, t, H * Dh)


def _slots(k: jax.Array | int8.Int8) -> int:
  return jax.tree.leaves(k)[0].shape[-3]


def _factors(x: jax.Array | int8.Int8, dtype) -> tuple[jax.Array, jax.Array | None]:
  """Keys or values as what is multiplied, in dtype, and a factor per slot, shaped for logits
  [P, G, K, M, t, s], if there is one: no dequantised cache is ever written."""
  if not isinstance(x, int8.Int8):
    return x, None
  factor = jnp.moveaxis(x.scale[..., 0], -1, -2)[..., None, None, :]  # [P, (G,) K, 1, 1, s]
  return x.values.astype(dtype), factor if factor.ndim == 6 else factor[:, None]


def attend_prompt(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
  """Causal self-attention of the prompt segment through cuDNN's fused kernel.

  q [P, 1, S, H, Dh], k and v [P, 1, S, K, Dh] -> [P, 1, S, H * Dh]. bfloat16 or float16 on
  an NVIDIA GPU; no softcap, no window. It never holds the [S, S] logits.
  """
  P, _, S, H, Dh = q.shape
  out = jax.nn.dot_product_attention(
    q[:, 0], k[:, 0], v[:, 0], scale=scale, is_causal=True, implementation="cudnn"
  )
  return out.reshape(P, 1, S, H * Dh)


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


def linear(
  x: jax.Array,
  w: jax.Array | int8.Int8,
  bias: jax.Array | None,
  ab: dict | None,
  scale: float | jax.Array,
  dropout: Dropout | None,
  target: str,
) -> jax.Array:
  """x [..., in] @ w [in, out] (+ bias) + the adapter's part, in x's dtype.

  ab: {"a" [in, R], "b" [R, out]} of this layer, or None where there is no adapter. With "rows"
  too, which weighs the ranks row by row: adapters side by side, each row with its own.
  """
  y = int8.matmul(x, w) if isinstance(w, int8.Int8) else product(x, w)
  if bias is not None:
    y = y + bias
  if ab is None:
    return checkpoint_name(y, "linear")
  h = x
  if dropout is not None and dropout.rate > 0.0:
    keep = drop_mask(dropout, target, x.shape)
    h = jnp.where(keep, x / (1.0 - dropout.rate), 0.0).astype(x.dtype)
  h = product(h, ab["a"].astype(x.dtype))
  if "rows" in ab:  # [P, 1, 1, R]: which ranks a row uses, where each row has its own adapter
    h = h * ab["rows"].astype(x.dtype)
  delta = product(h, ab["b"].astype(x.dtype))
  return checkpoint_name(y + delta * jnp.asarray(scale, x.dtype), "linear")


@struct.dataclass
class _View:
  """Where a layer's queries are and what they may see: rotation (cos, sin) [P, G, t, Dh/2]; masks
  broadcastable to [P, G, t, T] of the own segment and [P, G, t, S] of the prompt, if there is one.
  """

  rotation: tuple
  own: jax.Array
  prompt: jax.Array | None


def _views(c: ModelConfig, prompt, slots: int, offset, P: int, G: int, t: int) -> list[_View]:
  """What a global layer sees and, in models that have them, what a local layer sees."""
  slot = offset + jnp.arange(t)  # index of each query in its own segment
  start = 0 if prompt is None else prompt.lengths[:, None, None]
  position = jnp.broadcast_to(start + slot, (P, G, t))
  own_slots = jnp.arange(slots)
  own = slot[:, None] >= own_slots  # causal; slots not written yet are in the future
  shown = None
  if prompt is not None:
    S = jax.tree.leaves(prompt.k)[0].shape[-3]
    shown = mask_from_lengths(prompt.lengths, S)[:, None, None]  # [P, 1, 1, S]
  views = [_View(cos_sin(c.rope, c.head_dim, position), own, shown)]
  if any(c.local_layers):
    if c.window is not None:
      own = own & (slot[:, None] - own_slots < c.window)
    if shown is not None and c.window is not None:
      shown = shown & (position[..., None] - jnp.arange(S) < c.window)
    turn = cos_sin(c.local_rope or c.rope, c.head_dim, position)
    views.append(_View(turn, own, shown))
  return views


def _layer(c: ModelConfig, fused: bool, x, w, ab, scale, dropout, view, offset, prompt, cache):
  """x [P, G, t, D] -> x, after attention and MLP, and this layer's keys and values.

  fused: a prompt on itself, through cuDNN. w, ab: this layer's weights and adapter.
  prompt: the prompt's (k, v) [P, S, K, Dh] or None. cache: (k, v) [P, G, T, K, Dh] of which slots
  `offset` on are written and returned, or None: then the new keys and values [P, G, t, K, Dh] are.
  """
  P, G, t, _ = x.shape

  def project(h, name):
    bias = w.get(f"{name}_bias")
    return linear(h, w[name], bias, ab.get(name), scale, dropout, name)

  def heads(h, name, count):
    h = project(h, name)
    if c.qk_norm_whole and name != "v":
      h = _norm(h, w[f"{name}_norm"], c)
    return h.reshape(P, G, t, count, c.head_dim)

  h = _norm(x, w["attn_norm"], c) if c.pre_norms else x
  q, k = heads(h, "q", c.n_heads), heads(h, "k", c.n_kv_heads)
  v = heads(h, "v", c.n_kv_heads)
  if c.qk_norm:
    q, k = _norm(q, w["q_norm"], c), _norm(k, w["k_norm"], c)
  q = constrain(rotate(q, *view.rotation), "prompt", None, None, "kv_heads", None)
  k = rotate(k, *view.rotation)
  kept = (k, v)
  if cache is not None:
    kept = _written(cache[0], k, offset), _written(cache[1], v, offset)
  query_scale = c.query_scale or c.head_dim**-0.5
  if fused:
    h = attend_prompt(q, k, v, scale=query_scale)
  else:
    shown = prompt and (*prompt, view.prompt)
    h = attend(q, (*kept, view.own), shown, scale=query_scale, softcap=c.attn_softcap)
  h = project(checkpoint_name(h, "attended"), "o")
  x = x + (_norm(h, w["post_attn_norm"], c) if c.post_norms else h)
  h = _norm(x, w["mlp_norm"], c) if c.pre_norms else x
  h = _ACTIVATIONS[c.activation](project(h, "gate")) * project(h, "up")
  h = project(constrain(h, "prompt", None, None, "mlp"), "down")
  x = x + (_norm(h, w["post_mlp_norm"], c) if c.post_norms else h)
  return constrain(x, "prompt", None, None, None), kept


def _written(cache, new, offset):
  """cache [P, G, T, K, Dh] with `new` [P, G, t, K, Dh] from slot `offset` on."""
  if isinstance(cache, int8.Int8):
    new = int8.quantise(new, -1)
  put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), offset, 2)  # noqa: E731
  return jax.tree.map(put, cache, new)


# --- All layers ------------------------------------------------------------------------

REMAT = {  # what the backward pass keeps of a layer; "none": all but the copies of weights
  "none": lambda primitive, *_, **__: primitive.name not in ("cond", "name"),
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_only_these_names("linear", "attended"),
}


def _embed(params: dict, c: ModelConfig, tokens: Array) -> jax.Array:
  # Rows first whole (an fsdp gather of the table), then looked up: split both ways, the lookup
  # would gather every prompt's states instead.
  x = jnp.take(constrain(params["embed"], "vocab", None), tokens, axis=0, mode="clip")
  x = x * jnp.asarray(c.embed_scale, x.dtype)  # Gemma rounds the scale to the model's dtype
  return constrain(x, "prompt", None, None, None)


def _through_layers(
  params: dict,
  adapter: Adapter | None,
  c: ModelConfig,
  tokens: Array,
  prompt: PromptCache | None,
  pool: jax.Array | None,
  dropout: Dropout | None,
  remat: str,
  fused: bool = False,
):
  """tokens [P, G, t] of a segment from its first slot on, through all layers.

  Returns hidden [P, G, t, D] after the last layer (before the final norm), the keys and values
  [L, P, G, t, K, Dh], and the pooled states [L, P, G, D] if `pool` [P, G, t] bool was given.

  One loop for all layers, so that one layer is compiled. Each turn copies its layer's weights out
  of the separate arrays: little beside the products of many tokens.
  """
  if remat not in REMAT:
    raise ValueError(f"remat={remat!r}: choose from {', '.join(REMAT)}")
  P, G, t = tokens.shape
  views = _views(c, prompt, t, 0, P, G, t)
  scale = 0.0 if adapter is None else adapter.scale
  choices = [lambda w=w: w for w in params["layers"]]

  def body(x, xs):
    layer, ab, prompt_kv, is_local = xs
    w = jax.lax.switch(layer, choices)
    view = views[0]
    if len(views) > 1:
      view = jax.tree.map(lambda a, b: jnp.where(is_local, b, a), *views)
    drop = dropout and dropout.replace(layer=layer)
    x, kept = _layer(c, fused, x, w, ab, scale, drop, view, 0, prompt_kv, None)
    pooled = None
    if pool is not None:
      count = jnp.maximum(jnp.sum(pool, -1), 1)[..., None]
      pooled = jnp.einsum("pgtd,pgt->pgd", x.astype(jnp.float32), pool.astype(jnp.float32)) / count
    return x, (kept, pooled)

  body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
  xs = (
    jnp.arange(c.n_layers),
    {} if adapter is None else adapter.weights,
    prompt and (prompt.k, prompt.v),
    jnp.asarray(c.local_layers or (False,) * c.n_layers),
  )
  x, (kept, pooled) = jax.lax.scan(body, _embed(params, c, tokens), xs)
  return x, kept, pooled


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
  x, (k, v), _ = _through_layers(params, adapter, c, tokens, None, None, dropout, remat, fused)
  cache = PromptCache(k=k[:, :, 0], v=v[:, :, 0], lengths=prompts.lengths)
  return cache, _finish(params, c, x)[:, 0]


def last_hidden(hidden: jax.Array, lengths: Array) -> jax.Array:
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
  x, _, pooled = _through_layers(params, adapter, c, tokens, prompt, pool, dropout, remat)
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
  (P, G), T = tokens.shape, jax.tree.leaves(cache)[0].shape[-3]
  views = _views(c, prompt, T, offset, P, G, 1)
  scale = 0.0 if adapter is None else adapter.scale
  run = jax.jit(functools.partial(_layer, c, False))  # traced once for all layers that look alike
  x, kept = _embed(params, c, tokens[..., None]), []
  for i, ab in enumerate(per_layer(adapter, c.n_layers)):
    view = views[-1] if c.local_layers and c.local_layers[i] else views[0]
    prompt_kv, own_kv = (prompt.k[i], prompt.v[i]), (cache.k[i], cache.v[i])
    x, kv = run(x, params["layers"][i], ab, scale, None, view, offset, prompt_kv, own_kv)
    kept.append(kv)
  return _finish(params, c, x)[:, :, 0], CompletionCache(*zip(*kept, strict=True))


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
  """hidden [..., D] -> logits [..., V] float32. For few positions: see `scoring.score`."""
  matrix, axes = head_matrix(params)
  rows = "pgt"[: hidden.ndim - 1]
  logits = einsum(f"{rows}d,{axes}->{rows}v", hidden, matrix, jnp.float32)
  if c.final_softcap is not None:
    logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
  return logits
