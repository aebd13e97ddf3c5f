"""The compilers of TPUs and NVIDIA GPUs, run where there is neither: what they make of a program.

  pip install 'rlsafety[compilers-tpu]'    # 137 MB
  pip install 'rlsafety[cuda]'             # 4.4 GB
  python -m rlsafety.tools.compilers --device=v5e-8 --model=qwen1.5-7b-chat
  python -m rlsafety.tools.compilers --device=H100 --model=qwen1.5-7b-chat --layers=4

Compiles a run's sampler, judge and update for the device as the device itself would, and prints
for each: seconds of compilation, GiB of arguments and of work space per chip, the largest array
that a decode step copies (a weight that is not read where it lies), and the largest that is
gathered. docs/compilers.md holds what came out.

The TPU compiler's own limit: one process at a time. The GPU's does not tune its products without
a device: structure and memory are exact, speed is not.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

from rlsafety import flags
from rlsafety.config import Config, Mesh, Model
from rlsafety.errors import UserError, run_main
from rlsafety.models import presets
from rlsafety.models.architecture import ModelConfig
from rlsafety.tools import hlo, meshes, plan
from rlsafety.tools.devices import GIB, Device, device

DATA = pathlib.Path(__file__).parent / "data"
TOPOLOGY = {"v4": "v4", "v5e": "v5e", "v5p": "v5", "v6e": "v6e"}  # as the TPU compiler says it


def installed(target: Device) -> str:
  """The compiler of `target` where it is installed, with its version, else ""."""
  if target.is_tpu:
    names = ("libtpu",)
  elif target.kind == "H100":
    names = ("jax_cuda13_plugin", "jax_cuda12_plugin")
  else:
    return ""
  found = [name for name in names if importlib.util.find_spec(name)]
  if not found:
    return ""
  return f"{found[0]} {importlib.metadata.version(found[0].replace('_', '-'))}"


def devices(target: Device) -> list:
  """Devices of `target` that compile and do not run. Raises UserError saying what to install."""
  if not installed(target):
    extra = "compilers-tpu" if target.is_tpu else "cuda"
    raise UserError(f"--device={target.name}: no compiler; run: pip install 'rlsafety[{extra}]'")
  from jax.experimental import topologies  # after the caller has set JAX_PLATFORMS

  if not target.is_tpu:
    described = topologies.get_topology_desc(
      platform="cuda",
      topology_name="h100",
      target_config=(DATA / "h100.txtpb").read_text(),
      topology=f"1x1x{target.chips}",
    )
    return described.devices
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # no machine to be asked about
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": target.accelerator_type,
    "TPU_WORKER_HOSTNAMES": "localhost",
  }
  more = {"chip_config_name": "megacore"} if target.kind in ("v4", "v5p") else {}
  name = f"{TOPOLOGY[target.kind]}:{target.topology}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def measure(config: Config, policy: ModelConfig, target: Device) -> dict[str, dict]:
  """{program: what the compiler of `target` makes of it}; the policy's frozen base judges.

  seconds of compilation; arguments and temp in bytes per chip; copied and gathered: (shape,
  elements) of the largest array that a decode step copies, that any all-gather makes.
  """
  made = plan.compile_programs(config, policy, None, target, devices(target))
  out = {}
  for name, (compiled, _) in made["programs"].items():
    memory, text = compiled.memory_analysis(), compiled.as_text()
    out[name] = {
      "seconds": made["compile seconds"][name],
      "arguments": memory.argument_size_in_bytes,
      "temp": memory.temp_size_in_bytes,
      "copied": hlo.largest_copy_in_decode(text),
      "gathered": hlo.largest_gather(text),
    }
  return out


def main(argv: list[str]) -> None:
  parser = flags.parser(__doc__, "tools.compilers")
  parser.add_argument("--device", default="v5e-8", help="v5e-8, v6e-8, H100 ...")
  parser.add_argument("--model", default="qwen1.5-7b-chat", help="shapes: a name in models.presets")
  parser.add_argument("--layers", type=int, default=0, help="0: all that the model has")
  args = flags.parse(parser, argv)
  target, policy = device(args.device), presets.preset(args.model)
  if args.layers:
    local = policy.local_layers[: args.layers]
    policy = dataclasses.replace(policy, n_layers=args.layers, local_layers=local)
  config = Config(model=Model(preset=args.model))  # the study's step, judged by its own base
  mesh = meshes.automatic_mesh(config, policy, None, target)
  config = dataclasses.replace(config, mesh=Mesh(**mesh))
  print(f"{args.model}, {policy.n_layers} layers, {target.name} as {mesh}: {installed(target)}")
  print("program     compile s  arguments GiB  temp GiB  largest copy in decode, largest gather")
  for name, found in measure(config, policy, target).items():
    sizes = f"{found['arguments'] / GIB:13.2f} {found['temp'] / GIB:9.2f}"
    moved = f"{found['copied'][0]}, {found['gathered'][0]}"
    print(f"{name:10} {found['seconds']:10.0f} {sizes}  {moved}")


if __name__ == "__main__":
  run_main(main, sys.argv)
