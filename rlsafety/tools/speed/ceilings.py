"""What this machine can do at best, measured: the yardsticks of every benchmark.

A floor is the larger of arithmetic / matrix rate and bytes / bandwidth; a benchmark's
share is floor / measured time, so that 1.0 means nothing is left to gain.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety.models.architecture import ModelConfig, is_weight, params_count, weights


def median_seconds(fn, *args, repeats: int = 5) -> float:
  """Median wall time of fn(*args) after one warm-up call, results waited for."""
  jax.block_until_ready(fn(*args))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def program_bytes(compiled) -> int:
  """Device memory of a compiled program at its fullest: arguments, results, temporaries."""
  m = compiled.memory_analysis()
  used = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
  return used - m.alias_size_in_bytes


def matmul_rate(dtype) -> float:
  """FLOP/s of a large square matrix product of random numbers in `dtype`."""
  n = 1024 if jax.default_backend() == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
  chain = jax.jit(lambda a: (a @ a) @ a)
  return 2 * 2 * n**3 / median_seconds(chain, a)


def memory_bandwidth() -> float:
  """Bytes/s read plus written by a pass over an array far larger than any cache."""
  n = 2**26 if jax.default_backend() == "cpu" else 2**30
  x = jnp.ones((n,), jnp.float32)
  scale = jax.jit(lambda x: x * 1.0001)
  return 2 * 4 * n / median_seconds(scale, x)


def matmul_params(c: ModelConfig) -> int:
  """Parameters that a token is multiplied with, the output matrix included."""
  embedding = c.vocab_size * c.d_model
  return params_count(c) - (0 if c.tie_embeddings else embedding)


def forward_flops(c: ModelConfig, tokens: float, context: float) -> float:
  """FLOPs of a forward pass over `tokens` that each look at `context` keys on average."""
  return tokens * (2 * matmul_params(c) + 4 * context * c.n_layers * c.n_heads * c.head_dim)


def body_flops(c: ModelConfig, tokens: float, context: float) -> float:
  """As `forward_flops`, without the output matrix."""
  return forward_flops(c, tokens, context) - tokens * 2 * c.vocab_size * c.d_model


def weight_bytes(c: ModelConfig, dtype) -> int:
  leaves = jax.tree.leaves(weights(c), is_leaf=is_weight)
  return sum(int(np.prod(w.shape)) for w in leaves) * jnp.dtype(dtype).itemsize


def cache_bytes_per_token(c: ModelConfig, dtype) -> int:
  """Keys and values of one token in all layers."""
  return 2 * c.n_layers * c.n_kv_heads * c.head_dim * jnp.dtype(dtype).itemsize
