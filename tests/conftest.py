"""Eight fake CPU devices for the mesh tests, and the tiny models that tests share.

NPROC must be twice the devices, set before jax is imported: with fewer threads than
devices, XLA's CPU collectives wait for each other for ever.
"""

import os

os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from rlsafety.models import lora, transformer  # noqa: E402
from rlsafety.models.attention import Rope  # noqa: E402
from rlsafety.types import Prompts  # noqa: E402

LLAMA = transformer.ModelConfig(
  vocab_size=96, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48
)
QWEN = transformer.ModelConfig(
  vocab_size=96,
  d_model=32,
  n_layers=2,
  n_heads=4,
  n_kv_heads=4,
  head_dim=8,
  d_ff=48,
  qkv_bias=True,
  tie_embeddings=True,
)
GEMMA = transformer.ModelConfig(
  vocab_size=96,
  d_model=32,
  n_layers=4,
  n_heads=4,
  n_kv_heads=1,
  head_dim=16,
  d_ff=48,
  activation="gelu_tanh",
  norm_offset=True,
  embed_scale=32**0.5,
  qk_norm=True,
  post_norms=True,
  tie_embeddings=True,
  attn_softcap=20.0,
  final_softcap=15.0,
  local_rope=Rope(theta=1000.0),
  window=4,
  local_layers=(True, True, False, True),
)
CONFIGS = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA}


def make_model(config, seed=0, rank=4):
  """(params, adapter) with every weight random and large enough to matter."""
  params = transformer.init_params(config, jax.random.key(seed))
  params = jax.tree.map(
    lambda x: x + 0.15 * jax.random.normal(jax.random.key(x.size), x.shape), params
  )
  layers = transformer.weights(config)["layers"]
  adapter = lora.init_adapter(layers, lora.LoraConfig(rank=rank, alpha=4.0), jax.random.key(1))
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size + 1), x.shape)  # noqa: E731
  return params, jax.tree.map(noise, adapter)


def make_prompts(config, lengths, slots, seed=0):
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), slots))
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request):
  """(config, params, adapter) of each kind of decoder."""
  config = CONFIGS[request.param]
  return config, *make_model(config)
