"""The compilers of TPUs and NVIDIA GPUs, run where there is neither: what they make of a program.

  pip install 'rlsafety[compilers-tpu]'    # 137 MB
  pip install 'rlsafety[cuda]'             # 4.4 GB
  python -m rlsafety.tools.compilers --device=v5e-8 --model=qwen1.5-7b-chat
  python -m rlsafety.tools.compilers --device=H100 --model=qwen1.5-7b-chat --layers=4
  python -m rlsafety.tools.compilers --device=H100 --model=qwen1.5-7b-chat --cells=18

Compiles a run's sampler, judge and update for the device as the device itself would, and prints
for each: seconds of compilation, GiB of arguments and of work space per chip, the largest array
that a decode step copies (a weight that is not read where it lies), and the largest that is
gathered. With --cells: what a decode step of one cell moves through a chip's memory and what one
of that many cells together does. docs/compilers.md holds what came out.

The TPU compiler's own limit: one process at a time. The GPU's does not tune its products without
a device: structure and memory are exact, speed is not.
"""

import collections
import dataclasses
import sys

import jax

from rlsafety import flags
from rlsafety.config import Config, Mesh, Model, Sampler
from rlsafety.errors import run_main
from rlsafety.models import presets
from rlsafety.models.architecture import ModelConfig
from rlsafety.tools import hlo, meshes, plan
from rlsafety.tools.devices import GIB, Device, device
from rlsafety.tools.topologies import devices, installed


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


KINDS = ("weights", "cache", "adapters", "logits", "rest")


def decode_step(config: Config, policy: ModelConfig, target: Device, cells: int) -> dict:
  """What one decode step of `cells` cells moves through a chip's memory, as compiled.

  Bytes by KINDS; rest: attention's logits, states, parts of sums. times: how often the least and
  the most read matrix of the base is read. used: bytes of the base that are read, wherever they
  lie: a chip may keep what is small. arguments, temp: bytes of the program per chip.
  """
  made = plan.compile_programs(
    config, policy, None, target, devices(target), cells, only=("sampler",)
  )
  compiled, _ = made["programs"]["sampler"]
  memory, known = compiled.memory_analysis(), made["shapes"]
  plain = lambda shape: tuple(sorted(n for n in shape if n > 1))  # noqa: E731
  weights = set(map(plain, known["weights"]))
  layer = {plain(shape[1:]) for shape in known["adapters"]}
  tensor = made["mesh"]["tensor"]
  heads = policy.n_kv_heads // (1 if policy.n_kv_heads % tensor else tensor)
  slots = (config.max_prompt_tokens, config.sampler.max_tokens)
  words = policy.vocab_size // tensor

  def kind(move: hlo.Move) -> str:
    shape = move.shape[1]
    if move.carried is None:
      return "logits" if words in shape else "rest"
    if plain(shape) in weights:
      return "weights"
    is_cache = len(shape) > 3 and shape[-3] in slots and shape[-2] == heads
    whole = plain(shape) in layer or plain(shape[1:]) in layer
    return "cache" if is_cache else "adapters" if whole else "rest"

  moves = hlo.decode_moves(compiled.as_text())
  moved, used, sizes = collections.Counter(), collections.Counter(), {}
  for move in moves:
    moved[kind(move)] += move.moved
    if kind(move) == "weights" and len(plain(move.shape[1])) > 1:
      sizes[move.carried] = move.size
      used[move.carried] += move.used
  times = [used[i] / size for i, size in sizes.items() if used[i] > 0.1 * size]  # looked up: less
  return {name: moved[name] for name in KINDS} | {
    "times": (min(times), max(times)),
    "used": sum(used.values()),
    "arguments": memory.argument_size_in_bytes,
    "temp": memory.temp_size_in_bytes,
    "seconds": made["compile seconds"]["sampler"],
  }


def show_decode(config: Config, policy: ModelConfig, target: Device, counts: list[int]) -> None:
  """Prints `decode_step` for each number of cells."""
  print("cells" + "".join(f"{name:>10}" for name in (*KINDS, "all GB", "of first"))
        + "  a weight is read  arguments, temp GiB, compile s")  # fmt: skip
  first = 0.0
  for cells in counts:
    found = decode_step(config, policy, target, cells)
    total = sum(found[name] for name in KINDS)
    first = first or total
    sizes = "".join(f"{x / 1e9:10.2f}" for x in (*(found[name] for name in KINDS), total))
    least, most = (f"{x:.2f}" for x in found["times"])
    read = f"{least} times" if least == most else f"{least} to {most} times"
    needs = f"{found['arguments'] / GIB:.2f}, {found['temp'] / GIB:.2f}, {found['seconds']:.0f}"
    print(f"{cells:5}{sizes}{total / first:10.2f}  {read:16}  {needs}", flush=True)


def main(argv: list[str]) -> None:
  parser = flags.parser(__doc__, "tools.compilers")
  parser.add_argument("--device", default="v5e-8", help="v5e-8, v6e-8, H100 ...")
  parser.add_argument("--model", default="qwen1.5-7b-chat", help="shapes: a name in models.presets")
  parser.add_argument("--layers", type=int, default=0, help="0: all that the model has")
  parser.add_argument("--cells", type=int, default=0, help="bytes of a decode step of 1 and of N")
  parser.add_argument("--cache", default="", choices=("", "int8"), help="sampler.cache of a run")
  args = flags.parse(parser, argv)
  jax.config.update("jax_platforms", "cpu")  # plugins find no device of theirs and would complain
  target, policy = device(args.device), presets.preset(args.model)
  if args.layers:
    local = policy.local_layers[: args.layers]
    policy = dataclasses.replace(policy, n_layers=args.layers, local_layers=local)
  # The study's step, judged by its own base.
  config = Config(model=Model(preset=args.model), sampler=Sampler(cache=args.cache))
  mesh = meshes.automatic_mesh(config, policy, None, target)
  config = dataclasses.replace(config, mesh=Mesh(**mesh))
  print(f"{args.model}, {policy.n_layers} layers, {target.name} as {mesh}: {installed(target)}")
  if args.cells:
    show_decode(config, policy, target, [1, args.cells])
    return
  print("program     compile s  arguments GiB  temp GiB  largest copy in decode, largest gather")
  for name, found in measure(config, policy, target).items():
    sizes = f"{found['arguments'] / GIB:13.2f} {found['temp'] / GIB:9.2f}"
    moved = f"{found['copied'][0]}, {found['gathered'][0]}"
    print(f"{name:10} {found['seconds']:10.0f} {sizes}  {moved}")


if __name__ == "__main__":
  run_main(main, sys.argv)
