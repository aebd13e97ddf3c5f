"""Products of the decoder, in the form that each compiler is quick with.

Sums are taken in float32 whatever the operands' type. CPUs that multiply bfloat16 do so only into
float32; an accelerator rounds each sum as it writes it, and leaves its fast units where one operand
is float32: gradients are products in the operands' own type.
"""

import functools
import math

import jax
import jax.numpy as jnp


def _contract(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  given = functools.partial(jnp.einsum, spec, preferred_element_type=dtype)
  if dtype == jnp.float32:
    return given(x, y)
  wide = lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype)  # noqa: E731
  return jax.lax.platform_dependent(x, y, cpu=wide, default=given)


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """jnp.einsum of x and y, which share a type, in `dtype`; without "..." in spec.

  Its gradient for y keeps the larger of x and the result as it lies: where y is an adapter's, one
  of its sides is a rank. JAX's own transposes the larger, which XLA's CPU code takes several times
  as long for.
  """
  return _einsum(spec, x, y, dtype)


_einsum = jax.custom_vjp(_contract, nondiff_argnums=(0, 3))


def _backward(spec, dtype, saved, slope):
  del dtype
  x, y = saved
  (of_x, of_y), of_out = spec.split("->")[0].split(","), spec.split("->")[1]
  slope = slope.astype(x.dtype)
  dx = _contract(f"{of_out},{of_y}->{of_x}", slope, y, x.dtype)
  if y.ndim != 2 or math.prod(x.shape) < math.prod(slope.shape):
    return dx, _contract(f"{of_x},{of_out}->{of_y}", x, slope, x.dtype)
  dy = _contract(f"{of_out},{of_x}->{of_y[::-1]}", slope, x, x.dtype)
  return dx, jax.lax.optimization_barrier(dy).T  # else XLA moves the transpose into the product


_einsum.defvjp(lambda spec, x, y, dtype: (_contract(spec, x, y, dtype), (x, y)), _backward)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., in] @ w [in, out], in x's type."""
  rows = "abcd"[: x.ndim - 1]
  return einsum(f"{rows}i,io->{rows}o", x, w, x.dtype)
