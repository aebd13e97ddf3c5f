"""Eight fake CPU devices for the mesh tests, and the tiny models that tests share.

NPROC must be twice the devices, set before jax is imported: with fewer threads than
devices, XLA's CPU collectives wait for each other for ever.
"""

import atexit
import fcntl
import gc
import importlib.metadata
import math
import os
import pathlib
import shutil
import sys
import tempfile

# Imports and tracing make many objects, and Python would walk through all of torch's and jax's for
# each handful: up to a fifth of the time.
gc.set_threshold(50_000, 20, 100)
# Containers often forbid to keep compiled Python: each program that a test starts would compile
# jax and what hangs on it anew, 3 s of CPU.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tests compile far longer than they compute: generating the code takes two thirds less time so.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:3])) <= (0, 11, 0):
  # Later ones die of the first flag; one piece of code per program takes a tenth less than many.
  FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    FAST_COMPILE,
  ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One folder for all workers and the programs that tests start: what one has compiled none
# compiles again.
if "RLSAFETY_TESTS" not in os.environ:
  os.environ["RLSAFETY_TESTS"] = tempfile.mkdtemp(prefix="rlsafety_tests_")
  atexit.register(shutil.rmtree, os.environ["RLSAFETY_TESTS"], ignore_errors=True)
SHARED = pathlib.Path(os.environ["RLSAFETY_TESTS"])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(SHARED / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from rlsafety import sharding  # noqa: E402
from rlsafety.config import TARGETS, Objective  # noqa: E402
from rlsafety.models import architecture, lora  # noqa: E402
from rlsafety.models.architecture import Rope  # noqa: E402
from rlsafety.types import Prompts  # noqa: E402

# Two layers each, Gemma's a local and a global one: every layer is compiled by itself, and a third
# adds nothing but time.
LLAMA = architecture.ModelConfig(
  vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48
)
QWEN = architecture.ModelConfig(
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
GEMMA = architecture.ModelConfig(
  vocab_size=96,
  d_model=32,
  n_layers=2,
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
  local_layers=(True, False),
)
CONFIGS = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA}


def make_model(config, seed=0, rank=4):
  """(params, adapter) with every weight random and large enough to matter."""
  rng = np.random.default_rng(seed)  # numpy: jax would compile a generator for each shape
  fill = lambda shape, size: jnp.asarray(size * rng.standard_normal(shape), jnp.float32)  # noqa: E731
  declared = architecture.weights(config)
  params = jax.tree.map(
    lambda w: fill(w.shape, 0.15) + (w.init == "ones"), declared, is_leaf=architecture.is_weight
  )
  weights = {
    name: {
      "a": fill((config.n_layers, w.shape[0], rank), 0.1),
      "b": fill((config.n_layers, rank, w.shape[1]), 0.05),
    }
    for name, w in declared["layers"][0].items()
    if name in TARGETS
  }
  return params, lora.Adapter(weights, scale=2.0)


def objective_of(name, **changes):
  """The method `name` with its usual settings, changed."""
  return Objective.of({"name": name, **changes})


def make_prompts(config, lengths, slots, seed=0):
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), slots))
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))


MAKE_MESH = sharding.make_mesh


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
  """Of the eight devices as few as the given sizes need: a program that leaves all of them alone is
  compiled for one device, which is far less work."""
  sizes = data, fsdp, tensor
  needed = -math.prod(sizes)
  if devices is None and sizes.count(-1) == 1 and needed > 0 and 8 % needed == 0:
    devices = jax.devices()[:needed]
  return MAKE_MESH(*sizes, devices=devices)


sharding.make_mesh = make_mesh


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request):
  """(config, params, adapter) of each kind of decoder."""
  config = CONFIGS[request.param]
  return config, *make_model(config)


@pytest.fixture(scope="session")
def whole():
  """(directory, what it said) of tiny_syco, uninterrupted: one run for all files and workers."""
  from test_train import finish, start

  workdir, said = SHARED / "whole", SHARED / "whole.txt"
  with (SHARED / "whole.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not said.exists():
      code, output = finish(start(workdir))
      assert code == 0, output
      said.write_text(output)
  return workdir, said.read_text()


# The longest files, longest first: begun last, they would leave two workers idle at the end.
LONG = (
  *("cells", "mesh", "processes", "slurm", "families", "judges_probe", "train"),
  *("recorded_runs", "objectives_learn", "gguf", "sampler", "environment_recipes"),
  *("notebooks", "sweep"),
)


def pytest_collection_finish():
  gc.freeze()  # what was imported stays: nothing to look for there


def pytest_collection_modifyitems(items):
  def place(item):
    name = item.path.stem.removeprefix("test_")
    return LONG.index(name) if name in LONG else len(LONG)

  items.sort(key=place)
