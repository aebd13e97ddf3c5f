"""Which meshes of a device's chips a run can take, and the one to plan with."""

from jax.sharding import AbstractMesh

from rlsafety import sharding
from rlsafety.errors import UserError
from rlsafety.models import architecture
from rlsafety.tools import shapes
from rlsafety.tools.devices import Device


def check_mesh(config, policy, judge, mesh) -> None:
  """Refuses what rlsafety.train would refuse, and names the meshes of as many chips that fit."""
  try:
    check_sizes(config, policy, judge, mesh)
  except UserError as error:
    meshes = fitting_meshes(config, policy, judge, mesh.size)
    fits = (f"data={m['data']} tensor={m['tensor']}" for m in meshes)
    raise UserError(
      f"{error}; meshes of {mesh.size} devices that fit: {', '.join(fits) or 'none'}"
    ) from None


def check_sizes(config, policy, judge, mesh, prompts: int = 0) -> None:
  """Raises UserError where the mesh splits the batch, the policy or its judge unevenly."""
  sharding.check_batch(mesh, prompts or config.prompts_per_step, config.learner.microbatches)
  for model in filter(None, (policy, judge)):
    sharding.check_model(mesh, model)


def fitting_meshes(config, policy, judge, chips: int, prompts: int = 0) -> list[dict]:
  """The meshes of (data, tensor) that rlsafety.train accepts, least tensor parallelism first.

  prompts: to ask with another batch than config.prompts_per_step.
  """
  out = []
  for tensor in (n for n in range(1, chips + 1) if chips % n == 0):
    sizes = {"data": chips // tensor, "fsdp": 1, "tensor": tensor}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    try:
      check_sizes(config, policy, judge, mesh, prompts)
    except UserError:
      continue
    out.append(sizes)
  return out


def automatic_mesh(config, policy, judge, target: Device) -> dict:
  """Of the meshes that train accepts the one of least tensor parallelism whose weights leave
  half of the memory free; where none does, that of most."""
  meshes = fitting_meshes(config, policy, judge, target.chips)
  if not meshes:
    pieces = config.learner.microbatches
    widest = fitting_meshes(config, policy, judge, target.chips, target.chips * pieces)[-1]
    raise UserError(
      f"--device={target.name}: no mesh of {target.chips} chips fits prompts_per_step="
      f"{config.prompts_per_step}, learner.microbatches={pieces} and {policy.n_heads} attention "
      f"heads; take fewer chips, or with --config.mesh.tensor={widest['tensor']} set "
      f"--config.prompts_per_step to a multiple of {widest['data'] * pieces}"
    )
  width = 2 if config.model.dtype != "float32" else 4
  judges = [judge, *shapes.judges(config)[1:]] if judge else []
  weights = width * sum(architecture.params_count(m) for m in (policy, *judges))
  roomy = (m for m in meshes if weights / m["tensor"] <= 0.5 * target.chip.memory)
  return next(roomy, meshes[-1])
