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


@struct.dataclass
class Adapter:
  """weights {target: {"a" [L, in, R], "b" [L, R, out]}} float32; scale is static."""

  weights: dict
  scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Dropout:
  """Inverted dropout on adapter inputs. key: folded with layer and target. rate: static."""

  key: jax.Array
  rate: float = struct.field(pytree_node=False)


def init_adapter(base_weights: dict, lora: Lora, key: jax.Array) -> Adapter:
  """base_weights: the layer part of `architecture.weights(config)` (shapes [L, in, out])."""
  weights = {}
  for i, name in enumerate(lora.targets):
    layers, d_in, d_out = base_weights[name].shape
    bound = 1.0 / math.sqrt(d_in)  # PEFT: kaiming_uniform(a=sqrt(5))
    a = jax.random.uniform(
      jax.random.fold_in(key, i), (layers, d_in, lora.rank), jnp.float32, -bound, bound
    )
    weights[name] = {"a": a, "b": jnp.zeros((layers, lora.rank, d_out), jnp.float32)}
  return Adapter(weights=weights, scale=lora.scale)


def adapter_axes(base_weights: dict, lora: Lora) -> dict:
  """Logical axes of each adapter weight: as the base, the rank axis is never split."""
  return {
    name: {
      "a": ("layers", base_weights[name].axes[1], None),
      "b": ("layers", None, base_weights[name].axes[2]),
    }
    for name in lora.targets
  }


def merged(base: dict, adapter: Adapter) -> dict:
  """Base params with the adapter added in float32, then cast back to the base's dtype."""
  layers = dict(base["layers"])
  for name, ab in adapter.weights.items():
    delta = jnp.einsum("lir,lro->lio", ab["a"], ab["b"]) * adapter.scale
    layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
  return {**base, "layers": layers}
