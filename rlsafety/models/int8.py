"""Optional int8 storage for the sampler: the frozen base's linears and the KV cache.

Symmetric, one float32 scale per output channel (weights) or per slot and head (cache). Only
the sampler reads them: the learner keeps full precision, and the difference that they make
to log-probs is in every step's `logprob_diff_max` and in the importance ratios.
"""

import jax
import jax.numpy as jnp
from flax import struct

from rlsafety.config import TARGETS
from rlsafety.models.products import product


@struct.dataclass
class Int8:
  """values int8; scale float32, size 1 along the axis that shares it."""

  values: jax.Array
  scale: jax.Array


def quantise(x: jax.Array, axis: int) -> Int8:
  """Rounds x to 255 levels along `axis`; the largest magnitude is exact."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis, keepdims=True), 1e-12) / 127.0
  return Int8(jnp.round(x / scale).astype(jnp.int8), scale)


def quantise_base(params: dict) -> dict:
  """params with each layer's linears [in, out] as Int8, a scale per output channel."""
  layers = tuple(
    {name: quantise(w, 0) if name in TARGETS else w for name, w in layer.items()}
    for layer in params["layers"]
  )
  return {**params, "layers": layers}


def matmul(x: jax.Array, w: Int8) -> jax.Array:
  """x [..., in] @ w [in, out]; the scale is applied to the product."""
  return product(x, w.values.astype(x.dtype)) * w.scale.astype(x.dtype)
