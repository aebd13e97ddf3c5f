"""Rotary positions and attention over two key segments with one softmax.

The prompt's keys exist once per group, [P, S, K, Dh]; each completion's own keys are
[P, G, T, K, Dh]. Queries of prefill, decode (t = 1) and learning (t = T) all pass here,
so the sampler and the learner cannot disagree about what a token may see.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding (arXiv 2104.09864). kind: default, linear (positions / factor) or
  llama3 (low frequencies / factor, high ones kept, a ramp between)."""

  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
  """[Dh / 2] float32 radians per position."""
  freq = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if rope.kind == "default":
    return freq
  if rope.kind == "linear":
    return freq / rope.factor
  wavelength = 2 * math.pi / freq
  low, high = rope.low_freq_factor, rope.high_freq_factor
  ramp = jnp.clip((rope.original_positions / wavelength - low) / (high - low), 0.0, 1.0)
  return (1 - ramp) * freq / rope.factor + ramp * freq


def rotation(freq: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """freq [Dh/2], positions [...] int -> cos, sin [..., Dh/2] float32."""
  angles = positions[..., None].astype(jnp.float32) * freq
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """x [..., heads, Dh], cos and sin [..., Dh/2]; pairs are (i, i + Dh/2)."""
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def attend(q, own, prompt, *, scale: float, softcap: float | None) -> jax.Array:
  """One softmax over the prompt's keys and the row's own keys.

  q [P, G, t, H, Dh].
  own: (k [P, G, T, K, Dh], v, mask broadcastable to [P, G, t, T]).
  prompt: (k [P, S, K, Dh], v, mask broadcastable to [P, G, t, S]) or None.
  Query head h reads key head h // (H / K). Returns [P, G, t, H * Dh] in q's dtype;
  logits and softmax are float32.
  """
  P, G, t, H, Dh = q.shape
  K = own[0].shape[-2]
  q = q.reshape(P, G, t, K, H // K, Dh)
  segments = [("pgskd", own)] if prompt is None else [("pskd", prompt), ("pgskd", own)]
  logits = []
  for keys, (k, _, mask) in segments:
    part = jnp.einsum(f"pgtkmd,{keys}->pgkmts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
      part = softcap * jnp.tanh(part / softcap)
    mask = jnp.broadcast_to(mask, (P, G, t, k.shape[-3]))
    logits.append(jnp.where(mask[:, :, None, None], part, -jnp.inf))
  weights = jax.nn.softmax(jnp.concatenate(logits, -1), axis=-1).astype(q.dtype)
  out, start = 0.0, 0
  for keys, (_, v, _) in segments:
    slots = v.shape[-3]
    out += jnp.einsum(f"pgkmts,{keys}->pgtkmd", weights[..., start : start + slots], v)
    start += slots
  return out.reshape(P, G, t, H * Dh)


def attend_prompt(q, k, v, *, scale: float) -> jax.Array:
  """Causal self-attention of the prompt segment through cuDNN's fused kernel.

  q [P, 1, S, H, Dh], k and v [P, 1, S, K, Dh] -> [P, 1, S, H * Dh]. bfloat16 or float16 on
  an NVIDIA GPU; no softcap, no window. It never holds the [S, S] logits.
  """
  P, _, S, H, Dh = q.shape
  out = jax.nn.dot_product_attention(
    q[:, 0], k[:, 0], v[:, 0], scale=scale, is_causal=True, implementation="cudnn"
  )
  return out.reshape(P, 1, S, H * Dh)
