"""LoRA adapters: the only weights that a run trains (Hu et al., arXiv 2106.09685).

y = x w + scale * drop(x) a b, with a [in, R] drawn like PEFT draws it and b [R, out]
zero, so that a fresh adapter leaves the base untouched. rsLoRA (arXiv 2312.03732) uses
scale = alpha / sqrt(R) in place of alpha / R: the step size then does not shrink with R.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.config import Lora
from rlsafety.models import architecture
from rlsafety.models.architecture import ModelConfig


@struct.dataclass
class Adapter:
  """weights {target: {"a" [L, in, R], "b" [L, R, out]}} float32; scale is static.

  All layers in one array, unlike the base: the optimiser then works on 14 arrays, and what
  `per_layer` copies out of them is small.
  """

  weights: dict
  scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Dropout:
  """Inverted dropout on adapter inputs. key: folded with layer and target. rate: static."""

  key: jax.Array
  rate: float = struct.field(pytree_node=False)


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


def per_layer(adapter: Adapter | None, layers: int) -> list[dict]:
  """[{target: {"a" [in, R], "b" [R, out]}}] of each layer; empty dicts where there is none."""
  if adapter is None:
    return [{}] * layers
  split = jax.tree.map(lambda x: jax.lax.split(x, (1,) * layers), adapter.weights)
  is_split = lambda x: isinstance(x, (list, tuple))  # noqa: E731
  return [jax.tree.map(lambda x, i=i: x[i][0], split, is_leaf=is_split) for i in range(layers)]


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
