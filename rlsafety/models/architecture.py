"""What a model is made of, as data: one decoder serves every family, no family is code.

`ModelConfig` holds the numbers of an architecture. `weights` declares each array once: shape,
logical axes (see `sharding.RULES`) and initialiser; loading, sharding, random initialisation and
LoRA all read that declaration. `transformer` runs it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding (arXiv 2104.09864). kind: default, linear (positions / factor), llama3 or
  yarn (low frequencies / factor, high ones kept, a ramp between) or none (no rotation)."""

  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192
  beta_fast: float = 32.0  # YaRN: turns within original_positions from which a frequency is kept
  beta_slow: float = 1.0  # and below which it is divided
  attention_factor: float = 1.0  # YaRN: of turned queries and keys


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
  qk_norm_whole: bool = False  # OLMo-2 normalises queries over all heads together, keys likewise
  pre_norms: bool = True  # OLMo-2 has none in front of its blocks
  post_norms: bool = False  # Gemma-2/3 also normalise each block's output, OLMo-2 only that
  tie_embeddings: bool = False
  attn_softcap: float | None = None
  final_softcap: float | None = None
  rope: Rope = Rope()
  local_rope: Rope | None = None  # Gemma-3 gives its local layers another base, SmolLM3 no rope
  window: int | None = None  # a local layer sees the last `window` positions
  local_layers: tuple[bool, ...] = ()  # per layer: `window` and `local_rope`; () = none has them
  max_positions: int = 2048


@dataclasses.dataclass(frozen=True)
class Weight:
  """shape, logical axis names (one per dimension) and init: "normal", "ones" or "zeros"."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: str = "normal"


def weights(c: ModelConfig) -> dict:
  """The declaration of every array of the model: "embed", "final_norm", "head" unless it is tied,
  and "layers", a tuple of one dict per layer. Linears are input-major: y = x @ w.

  Layers are apart and not stacked, so that decoding reads each weight where it lies: a slice of
  a stack would be copied in every step.
  """
  D, F = c.d_model, c.d_ff
  heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  norm = Weight((D,), (None,), "zeros" if c.norm_offset else "ones")
  layer = {
    "attn_norm": norm,
    "q": Weight((D, heads), ("embed", "heads")),
    "k": Weight((D, kv), ("embed", "kv")),
    "v": Weight((D, kv), ("embed", "kv")),
    "o": Weight((heads, D), ("heads", "embed")),
    "mlp_norm": norm,
    "gate": Weight((D, F), ("embed", "mlp")),
    "up": Weight((D, F), ("embed", "mlp")),
    "down": Weight((F, D), ("mlp", "embed")),
  }
  if c.qkv_bias:
    layer["q_bias"] = Weight((heads,), ("heads",), "zeros")
    layer["k_bias"] = layer["v_bias"] = Weight((kv,), ("kv",), "zeros")
  if c.qk_norm:
    layer["q_norm"] = layer["k_norm"] = Weight((c.head_dim,), (None,), norm.init)
  if c.qk_norm_whole:
    layer["q_norm"] = Weight((heads,), ("heads",), norm.init)
    layer["k_norm"] = Weight((kv,), ("kv",), norm.init)
  if not c.pre_norms:
    del layer["attn_norm"], layer["mlp_norm"]
  if c.post_norms:
    layer["post_attn_norm"] = layer["post_mlp_norm"] = norm
  model = {
    "embed": Weight((c.vocab_size, D), ("vocab", "embed")),
    "layers": (layer,) * c.n_layers,
    "final_norm": norm,
  }
  if not c.tie_embeddings:
    model["head"] = Weight((D, c.vocab_size), ("embed", "vocab"))
  return model


def is_weight(x: Any) -> bool:
  return isinstance(x, Weight)


def init_params(c: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict:
  """Random params in the layout of `weights`: normal with deviation 0.02, one draw per name."""
  model = weights(c)
  fixed = {"ones": jnp.ones, "zeros": jnp.zeros}

  def draw(index: int, weight: Weight, *layers: int) -> jax.Array:
    shape = (*layers, *weight.shape)
    if weight.init in fixed:
      return fixed[weight.init](shape, dtype)
    return (0.02 * jax.random.normal(jax.random.fold_in(key, index), shape)).astype(dtype)

  outer = sorted(name for name in model if name != "layers")
  params = {name: draw(i, model[name]) for i, name in enumerate(outer)}
  layers = [{} for _ in model["layers"]]
  for i, (name, weight) in enumerate(sorted(model["layers"][0].items()), len(outer)):
    for layer, x in zip(layers, draw(i, weight, c.n_layers), strict=True):
      layer[name] = x
  return params | {"layers": tuple(layers)}


def params_count(c: ModelConfig) -> int:
  """Number of base parameters."""
  leaves = jax.tree.leaves(weights(c), is_leaf=is_weight)
  return sum(math.prod(w.shape) for w in leaves)
