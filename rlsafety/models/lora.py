"""LoRA adapters: the only weights that a run trains (Hu et al., arXiv 2106.09685).

y = x w + scale * drop(x) a b, with a [in, R] drawn like PEFT draws it and b [R, out]
zero, so that a fresh adapter leaves the base untouched. rsLoRA (arXiv 2312.03732) uses
scale = alpha / sqrt(R) in place of alpha / R: the step size then does not shrink with R.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.config import TARGETS, Lora
from rlsafety.models import architecture
from rlsafety.models.architecture import ModelConfig


@struct.dataclass
class Adapter:
  """weights {target: {"a" [L, in, R], "b" [L, R, out]}} float32; scale is static.

  All layers in one array, unlike the base: the optimiser then works on 14 arrays, and what
  `per_layer` copies out of them is small.
  """

  weights: Any  # that dict, or a tuple of one for each layer: `unstacked`
  scale: float = struct.field(pytree_node=False)


class Dropout(struct.PyTreeNode):
  """Inverted dropout on adapter inputs (`drop_mask`). layer: whose, a scalar. rate: static."""

  key: jax.Array
  rate: float = struct.field(pytree_node=False)
  layer: jax.Array | int = 0


def drop_mask(dropout: Dropout, target: str, shape: tuple[int, ...]) -> jax.Array:
  """Which inputs of a layer's adapter at `target` stay, bool of `shape`: each with probability
  1 - rate, by two rounds of a 32-bit hash of its row, column, target, layer and dropout.key.

  Neither the mesh nor its neighbours change an element. jax.random's threefry takes 20 rounds for
  each of 7 inputs, forward and backward: two thirds of what a TPU's compiler needed of an update.
  """
  *rows, D = shape
  words = jax.random.key_data(dropout.key).reshape(-1)
  row = jnp.ones(rows, jnp.uint32)  # so that a prompt's first row is not that of its replies
  for axis, size in enumerate(rows):
    row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, tuple(rows), axis)
  column = jnp.arange(D, dtype=jnp.uint32) + jnp.asarray(dropout.layer, jnp.uint32) * jnp.uint32(D)
  column = column * jnp.uint32(len(TARGETS)) + jnp.uint32(TARGETS.index(target))
  column = _mixed(_mixed(column) ^ words[-1])
  bits = _mixed(_mixed(_mixed(row) ^ words[0])[..., None] + column)
  return bits >= jnp.uint32(min(round(dropout.rate * 2**32), 2**32 - 1))


def _mixed(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit words that changes half of the bits where one of x changes: shifts and
  multipliers of least bias, found by C. Wellons ("Prospecting for hash functions", 2018)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def init_adapter(c: ModelConfig, lora: Lora, key: jax.Array) -> Adapter:
  """A fresh adapter for a model of c's shapes."""
  declared, weights = architecture.weights(c)["layers"][0], {}
  for i, name in enumerate(lora.targets):
    d_in, d_out = declared[name].shape
    bound = 1.0 / math.sqrt(d_in)  # PEFT: kaiming_uniform(a=sqrt(5))
    a = jax.random.uniform(
      jax.random.fold_in(key, i), (c.n_layers, d_in, lora.rank), jnp.float32, -bound, bound
    )
    weights[name] = {"a": a, "b": jnp.zeros((c.n_layers, lora.rank, d_out), jnp.float32)}
  return Adapter(weights=weights, scale=lora.scale)


def adapter_axes(c: ModelConfig, lora: Lora) -> dict:
  """Logical axes of each adapter weight: as the base, the rank axis is never split."""
  declared = architecture.weights(c)["layers"][0]
  return {
    name: {
      "a": ("layers", declared[name].axes[0], None),
      "b": ("layers", None, declared[name].axes[1]),
    }
    for name in lora.targets
  }


def unstacked(adapter: Adapter | None, layers: int, dtype: Any) -> Adapter | None:
  """The adapter for a loop that reads it in every turn: a dict per layer (`per_layer`) in the
  dtype of its products, made once. XLA for GPUs would cut and round the stack in every turn."""
  if adapter is None:
    return None
  cast = jax.tree.map(lambda x: x.astype(dtype), adapter.weights)
  return Adapter(tuple(per_layer(Adapter(cast, adapter.scale), layers)), adapter.scale)


def per_layer(adapter: Adapter | None, layers: int) -> Sequence[dict]:
  """[{target: {"a" [in, R], "b" [R, out]}}] of each layer; empty dicts where there is none."""
  if adapter is None:
    return [{}] * layers
  if isinstance(adapter.weights, tuple):
    return adapter.weights
  split = jax.tree.map(lambda x: jax.lax.split(x, (1,) * layers), adapter.weights)
  is_split = lambda x: isinstance(x, (list, tuple))  # noqa: E731
  return [jax.tree.map(lambda x, i=i: x[i][0], split, is_leaf=is_split) for i in range(layers)]


def by_row(weights: dict, ranks: jax.Array, scale: float = 1.0) -> Adapter:
  """Adapters side by side as one in which row p weighs rank r by ranks [P, R].

  weights: as an Adapter's, with the ranks of all of them along R.
  """
  layers = jax.tree.leaves(weights)[0].shape[0]
  rows = jnp.broadcast_to(ranks[:, None, None], (layers, ranks.shape[0], 1, 1, ranks.shape[1]))
  return Adapter({name: {**ab, "rows": rows} for name, ab in weights.items()}, scale)


@functools.partial(jax.jit, static_argnames="prompts")
def side_by_side(adapters: Sequence[Adapter], prompts: tuple[int, ...]) -> Adapter:
  """Adapters of one shape as one for a batch: the first prompts[0] rows have the first, and so on.

  A row's products with ranks that are not its own are multiplied by 0: each weight of the base is
  then read once for the rows of all of them.
  """
  C, R = len(adapters), jax.tree.leaves(adapters[0].weights)[0].shape[-1]
  owner = jnp.repeat(jnp.arange(C), jnp.array(prompts), total_repeat_length=sum(prompts))
  ranks = jnp.repeat(owner[:, None] == jnp.arange(C), R, axis=1).astype(jnp.float32)
  each = [adapter.weights for adapter in adapters]
  weights = {
    name: {
      "a": jnp.concatenate([w[name]["a"] for w in each], axis=2),
      "b": jnp.concatenate([w[name]["b"] for w in each], axis=1),
    }
    for name in each[0]
  }
  return by_row(weights, ranks, adapters[0].scale)


def rows_between(adapter: Adapter | None, start: int, stop: int) -> Adapter | None:
  """The adapter for rows start to stop of its batch: itself, unless rows have their own."""
  if adapter is None:
    return None
  cut = lambda ab: {k: x[:, start:stop] if k == "rows" else x for k, x in ab.items()}  # noqa: E731
  return Adapter({name: cut(ab) for name, ab in adapter.weights.items()}, adapter.scale)


def merged(base: dict, adapter: Adapter) -> dict:
  """Base params with the adapter added in float32, then cast back to the base's dtype."""
  layers = []
  for layer, pairs in zip(base["layers"], per_layer(adapter, len(base["layers"])), strict=True):
    layer = dict(layer)
    for name, ab in pairs.items():
      delta = (ab["a"] @ ab["b"]) * adapter.scale
      layer[name] = (layer[name].astype(jnp.float32) + delta).astype(layer[name].dtype)
    layers.append(layer)
  return {**base, "layers": tuple(layers)}
