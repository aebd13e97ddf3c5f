"""Rotary positions (RoFormer, arXiv:2104.09864), plain or stretched as the families do it."""

import math

import jax
import jax.numpy as jnp

from rlsafety.models.architecture import Rope


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
  """[Dh / 2] float32 radians per position."""
  if rope.kind == "none":
    return jnp.zeros(head_dim // 2, jnp.float32)
  freq = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if rope.kind == "default":
    return freq
  if rope.kind == "linear":
    return freq / rope.factor
  if rope.kind == "yarn":
    low, high = (_turning(rope, beta, head_dim) for beta in (rope.beta_fast, rope.beta_slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
    ramp = jnp.clip((jnp.arange(head_dim // 2) - low) / ((high - low) or 1e-3), 0.0, 1.0)
    return (1 - ramp) * freq + ramp * freq / rope.factor
  wavelength = 2 * math.pi / freq
  low, high = rope.low_freq_factor, rope.high_freq_factor
  ramp = jnp.clip((rope.original_positions / wavelength - low) / (high - low), 0.0, 1.0)
  return (1 - ramp) * freq / rope.factor + ramp * freq


def _turning(rope: Rope, turns: float, head_dim: int) -> float:
  """Index, not rounded, of the frequency that turns so often in the original positions (YaRN,
  arXiv:2309.00071)."""
  wavelength = rope.original_positions / (2 * math.pi * turns)
  return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def cos_sin(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """positions [...] int -> cos, sin [..., Dh/2] float32."""
  angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
  return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """x [..., heads, Dh], cos and sin [..., Dh/2]; pairs are (i, i + Dh/2)."""
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)
