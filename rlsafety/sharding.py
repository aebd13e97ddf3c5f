"""Where arrays live: one mesh, one table from logical axes to mesh axes.

The mesh is (data, fsdp, tensor). Prompts are split over data x fsdp, weights over fsdp
(along the model width) and tensor (along heads, MLP and vocabulary). XLA inserts the
collectives; nothing here sends a byte itself.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlsafety.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES = {
  "prompt": ("data", "fsdp"),  # P of prompts, rollouts, caches
  "embed": "fsdp",  # D of weights
  "heads": "tensor",  # H * Dh
  "kv": "tensor",  # K * Dh of weights
  "kv_heads": "tensor",  # K or H of activations and caches
  "mlp": "tensor",
  "vocab": "tensor",
  "layers": None,
  None: None,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices; one size may be -1, what is left.

  Raises UserError if the sizes do not multiply to the number of devices.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(f"mesh={tuple(sizes)}: sizes are positive, at most one is -1")
  if -1 in sizes:
    sizes[sizes.index(-1)] = devices.size // max(1, -math.prod(sizes))
  if math.prod(sizes) != devices.size:
    raise UserError(
      f"mesh (data, fsdp, tensor)={tuple(sizes)} needs {math.prod(sizes)} devices, "
      f"{devices.size} are there; set one of config.mesh.* to -1"
    )
  auto = (jax.sharding.AxisType.Auto,) * 3
  return Mesh(devices.reshape(sizes), AXES, axis_types=auto)


def spec(axes: tuple, shape: tuple, mesh: Any) -> PartitionSpec:
  """Logical axes of an array -> PartitionSpec. A dimension that its mesh axes do not
  divide stays whole (key heads fewer than `tensor` are thereby replicated)."""
  out = []
  for axis, size in zip(axes, shape, strict=True):
    rule = RULES[axis]
    names = () if rule is None else (rule,) if isinstance(rule, str) else rule
    ways = math.prod(mesh.shape[n] for n in names)
    out.append(rule if ways > 1 and size % ways == 0 else None)
  return PartitionSpec(*out)


def named(mesh: Mesh, axes: tuple, shape: tuple) -> NamedSharding:
  return NamedSharding(mesh, spec(axes, shape, mesh))


def check_batch(mesh: Mesh | AbstractMesh, prompts: int, microbatches: int) -> None:
  """prompts: P of a batch. Raises UserError with sizes that fit."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if prompts % microbatches:
    fitting = [m for m in range(1, prompts + 1) if prompts % m == 0]
    raise UserError(
      f"learner.microbatches={microbatches} must divide prompts_per_step={prompts}: {fitting} do"
    )
  if (prompts // microbatches) % ways:
    raise UserError(
      f"prompts_per_step={prompts} / learner.microbatches={microbatches} must be a multiple of "
      f"mesh data x fsdp = {ways}; prompts_per_step={ways * microbatches} or a multiple fits"
    )


def check_model(mesh: Mesh | AbstractMesh, config: Any) -> None:
  """config: a ModelConfig, policy's or judge's. Raises UserError with sizes that fit."""
  tensor = mesh.shape["tensor"]
  sizes = {
    "attention heads": config.n_heads,
    "MLP width": config.d_ff,
    "words of the vocabulary": config.vocab_size,
  }
  for name, size in sizes.items():
    if size % tensor:
      fitting = [t for t in range(1, size + 1) if all(s % t == 0 for s in sizes.values())]
      raise UserError(
        f"mesh.tensor={tensor} does not divide the model's {size} {name}: {fitting[:8]} do"
      )
  if config.d_model % mesh.shape["fsdp"]:
    raise UserError(f"mesh.fsdp={mesh.shape['fsdp']} must divide the width {config.d_model}")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins x's layout under the mesh in use (`jax.set_mesh`); without a mesh, x itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def put(mesh: Mesh, x: Any, *axes: str | None) -> jax.Array:
  """A host array, the same in every process, as a global array split by logical axes."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, named(mesh, axes, x.shape), lambda i: x[i])


def put_prompts(mesh: Mesh, tree: Any) -> Any:
  """Every leaf [P, ...] of a host tree, split along its first axis."""
  return jax.tree.map(lambda x: put(mesh, x, "prompt", *[None] * (np.ndim(x) - 1)), tree)


def fetch(tree: Any) -> Any:
  """Global arrays -> numpy, whole, in every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def whole(x: Any) -> np.ndarray:
    apart = isinstance(x, jax.Array) and not x.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if apart else x)

  return jax.tree.map(whole, tree)


def any_process(flag: bool) -> bool:
  """Whether the flag is set in any process; all processes must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array([flag])).any())
