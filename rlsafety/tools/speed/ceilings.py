"""What this machine can do at best, measured: the yardsticks of every benchmark.

A floor is the larger of arithmetic / matrix rate and bytes / bandwidth; a benchmark's
share is floor / measured time, so that 1.0 means nothing is left to gain.
"""

import concurrent.futures
import os
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


def least_seconds(fn, *args, repeats: int = 7) -> float:
  """Shortest wall time of fn(*args) after one warm-up call: what a ceiling is made of."""
  jax.block_until_ready(fn(*args))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - began)
  return min(times)


def program_bytes(compiled) -> int:
  """Device memory of a compiled program at its fullest: arguments, results, temporaries."""
  m = compiled.memory_analysis()
  used = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
  return used - m.alias_size_in_bytes


def matmul_rate(dtype) -> float:
  """FLOP/s of a product of random numbers in `dtype`, at the best of some large shapes."""
  n = 1024 if jax.default_backend() == "cpu" else 8192
  product = jax.jit(lambda a, b: a @ b)

  def rate(rows: int, inner: int, columns: int) -> float:
    a = jax.random.normal(jax.random.key(0), (rows, inner)).astype(dtype)
    b = jax.random.normal(jax.random.key(1), (inner, columns)).astype(dtype)
    return 2 * rows * inner * columns / least_seconds(product, a, b)

  return max(rate(n, n, n), rate(2 * n, n, n), rate(n, n // 2, 2 * n), rate(2 * n, 2 * n, 2 * n))


def memory_bandwidth() -> float:
  """Bytes/s of reading, by all threads, an array that is in memory already and far larger than any
  cache. Nothing is written: a copy into fresh memory would measure the system's page faults."""
  if jax.default_backend() == "cpu":
    return _host_bandwidth()
  x = jnp.ones((2**30,), jnp.float32)
  return x.nbytes / least_seconds(jax.jit(jnp.sum), x)


def _host_bandwidth(size: int = 2**27, sweeps: int = 3) -> float:
  """numpy on one part per core: XLA sums one array on one thread."""
  threads = len(os.sched_getaffinity(0))
  parts = [np.ones(size // threads, np.float32) for _ in range(threads)]  # 512 MiB in all

  def sweep(part: np.ndarray) -> None:
    for _ in range(sweeps):
      part.max()

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    read = lambda: list(pool.map(sweep, parts))  # noqa: E731
    return sweeps * sum(part.nbytes for part in parts) / least_seconds(read)


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
