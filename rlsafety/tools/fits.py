"""Can these flags run on that machine? Asked by the launchers before it is booked.

  python -m rlsafety.tools.fits --device=v5e-16 --config=configs/qwen7b_syco.py --config.seed=5

Takes the flags of rlsafety.train and finds a mistyped field, a mesh that does not cover the
machine and a batch that it cannot split, in seconds and without weights. Whether the run fits in
memory is a question for tools.plan.
"""

import math
import sys
from collections.abc import Sequence

from jax.sharding import AbstractMesh

from rlsafety import flags, recipes, sharding
from rlsafety.config import Config
from rlsafety.errors import UserError, run_main
from rlsafety.tools.devices import Device, device


def check(config: Config, target: Device) -> None:
  """Raises UserError where config.mesh cannot cover the machine, or the batch cannot be split."""
  names = ("data", "fsdp", "tensor")
  sizes = [getattr(config.mesh, name) for name in names]
  known = math.prod(size for size in sizes if size > 0)
  if target.chips % known or (-1 not in sizes and known != target.chips):
    raise UserError(
      f"config.mesh (data, fsdp, tensor)={tuple(sizes)} does not cover {target.name} "
      f"({target.chips} devices); set one of config.mesh.* to -1"
    )
  mesh = AbstractMesh(tuple(s if s > 0 else target.chips // known for s in sizes), names)
  try:
    sharding.check_batch(mesh, config.prompts_per_step, config.learner.microbatches)
  except UserError as error:
    raise UserError(
      f"{target.name}: {error}; or raise config.mesh.tensor (python -m rlsafety.tools.plan "
      f"--device={target.name} --mesh=auto finds a mesh)"
    ) from None


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.fits")
  parser.add_argument("--device", default="", help="v5e-16, H100-8, ...")
  parser.add_argument("--workdir", help="as rlsafety.train has it; not looked at")
  config, args = recipes.from_flags(parser, argv)
  check(config, device(args.device))


if __name__ == "__main__":
  run_main(main, sys.argv)
