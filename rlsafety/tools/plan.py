"""Does it fit, how fast can it be, what does it cost: asked before anything is booked.

  python -m rlsafety.tools.plan --config=configs/qwen7b_syco.py --device=v5e-16
  python -m rlsafety.tools.plan --config=configs/paper.py:model=yi-6b-chat --device=H100 --mesh=auto

Compiles the run's real sampler, judge and update for the device's mesh, without weights, and reads
the compiled programs: buffers per device, every matrix product and every collective, with the trip
counts of the loops around them. Needs no such device.

What the numbers are. Weights, adapter and optimiser are exact. Work space is exact too where the
device's own compiler is installed (pip install 'rlsafety[compilers-tpu]', or [cuda] for an H100);
the last line says who answered. Elsewhere it is that of XLA's CPU compiler on fake devices for
float32, scaled to the model's dtype (float32 parts kept): docs/compilers.md sets the two side by
side. On one CPU device in float32, an update planned at 0.78 GB took 0.82 GB (tests/test_plan.py
holds the two to 25%). Seconds are
a roofline: each product at the larger of its compute and memory time, each collective at the
link's, nothing overlapped, replies of full length, no elementwise work, no host. A real run is
slower; EFFICIENCY says what the cost assumes. Hours and cost are those of all updates and all
held-out evaluations; an evaluation's batch is charged as a step's sampling and rating, and in
proportion where eval.samples is above sampler.group.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp

from rlsafety import flags, learner, losses, recipes, replay, sampler, sharding
from rlsafety.config import Mesh
from rlsafety.errors import UserError, first_line, run_main
from rlsafety.judges import lm, probe, questions
from rlsafety.models import architecture, int8, lora, scoring
from rlsafety.tools import meshes, shapes, topologies
from rlsafety.tools.devices import GIB, Device, bill, device
from rlsafety.tools.hlo import read_program
from rlsafety.types import Batch, Prompts

EFFICIENCY = 0.4  # share of the roofline that a run is assumed to reach, for time and cost
NO_COMPILER = "the device's own compiler is not installed, or --compiler=cpu (see --help)"
USABLE = 0.92  # share of a device's memory: runtime and fragmentation take the rest
LATENCY = 5e-6  # seconds that a collective takes, however small
PROGRAMS = ("sampler", "judge", "reference", "update")
# Machine code that nobody runs need not be tuned.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
JUDGE_PROMPT, JUDGE_SUFFIX = 768, 32  # slots: rubric and user message; what follows the reply

# --- The run's programs, compiled without weights --------------------------------------


def compile_programs(
  config, policy, judge, target: Device, devices=None, cells=1, only=PROGRAMS
) -> dict:
  """{program: (compiled, calls per step)} and {name: bytes per device} of what stays resident.

  policy, judge: ModelConfigs; judge None = the policy's frozen base judges. Programs are
  compiled in float32 whatever model.dtype says: XLA's CPU backend has no bfloat16 arithmetic
  and would add copies that no accelerator makes. devices: those of `topologies.devices`, to
  compile with the target's own compiler and in model.dtype. cells: runs that train together, whose
  users are asked in one batch. only: programs to compile.
  """
  stored, options = jnp.dtype(config.model.dtype if devices else "float32"), {} if devices else FAST
  devices = devices or jax.devices("cpu")
  if len(devices) < target.chips:
    raise UserError(f"{target.chips} fake devices are needed and {len(devices)} are there")
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices[: target.chips])
  P, S, T = config.prompts_per_step, config.max_prompt_tokens, config.sampler.max_tokens
  G = config.sampler.group
  meshes.check_mesh(config, policy, judge, mesh)

  def place(dtype, *axes_and_sizes):
    axes, shape = zip(*axes_and_sizes, strict=True) if axes_and_sizes else ((), ())
    sharding_ = sharding.named(mesh, axes, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_)

  def base_of(model):
    leaf = lambda w: place(stored, *zip(w.axes, w.shape, strict=True))  # noqa: E731
    return jax.tree.map(leaf, architecture.weights(model), is_leaf=architecture.is_weight)

  p = ("prompt", P)
  prompts = Prompts(place(jnp.int32, p, (None, S)), place(jnp.int32, p))
  pg = lambda dtype, slots=(): place(dtype, p, (None, G), *((None, n) for n in slots))  # noqa: E731
  batch = Batch(
    prompts=prompts,
    tokens=pg(jnp.int32, (T,)),
    lengths=pg(jnp.int32),
    advantages=pg(jnp.float32),
    rewards=pg(jnp.float32),
    behaviour_logprobs=pg(jnp.float32, (T,)),
    reference_logprobs=None,
    staleness=pg(jnp.int32),
  )
  optimizer = learner.make_optimizer(config.optimizer)
  base = base_of(policy)
  axes = lora.adapter_axes(policy, config.lora)

  def fresh(key):
    return learner.init_state(lora.init_adapter(policy, config.lora, key), optimizer)

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(fresh, key)
  put = lambda x, names: place(x.dtype, *zip(names, x.shape, strict=True))  # noqa: E731
  state = jax.tree.map(put, state, learner.state_axes(state, axes))
  key = place(key.dtype)
  settings, stop_ids = config.sampler, (0, 1)
  common = {
    "config": policy,
    "objective": config.objective,
    "settings": config.learner,
    "temperature": settings.temperature or 1.0,
  }
  update = functools.partial(
    learner.update, **common, optimizer=optimizer, dropout=config.lora.dropout
  )
  replies = (pg(jnp.int32, (T,)), pg(jnp.int32))
  rater, rater_base = judge or policy, base_of(judge) if judge else base
  shown = Prompts(place(jnp.int32, p, (None, JUDGE_PROMPT)), place(jnp.int32, p))
  programs, seconds = {}, {}

  def add(name, calls, function, *arguments, **static):
    if name not in only:
      return
    with jax.set_mesh(mesh):
      lowered, began = function.lower(*arguments, **static), time.monotonic()
      programs[name] = (lowered.compile(options), calls)
      seconds[name] = time.monotonic() - began

  dtype = jnp.dtype(config.model.dtype)
  at_once = sampler.prompts_at_once(
    policy, cells * P, S, settings, mesh, dtype, config.memory.cache_gib
  )
  some = ("prompt", at_once)
  piece = Prompts(place(jnp.int32, some, (None, S)), place(jnp.int32, some))
  read, copies = base, []
  if config.memory.sampler_base:  # a second, rounded copy of the linears beside the base

    def like(weight, rounded):  # values lie as their weight; scales, of size 1 along an axis, too
      put = lambda x: place(x.dtype, *zip(weight.axes, x.shape, strict=True))  # noqa: E731
      return jax.tree.map(put, rounded)

    read = jax.eval_shape(int8.quantise_base, base)
    declared = architecture.weights(policy)
    read = jax.tree.map(like, declared, read, is_leaf=architecture.is_weight)
    is_copy = lambda x: isinstance(x, int8.Int8)  # noqa: E731
    copies = [x for x in jax.tree.leaves(read, is_leaf=is_copy) if is_copy(x)]
  calls = cells * P // at_once
  keys, read_adapter = place(key.dtype, some), state.adapter
  if cells > 1:
    sizes = (at_once - cells + 1, *[1] * (cells - 1))  # any rows: the shapes are the same
    joined = jax.eval_shape(lambda a: lora.side_by_side((a,) * cells, sizes), read_adapter)
    rows = ("layers", "prompt", None, None, None)
    read_adapter = lora.Adapter(
      {t: {k: put(x, rows if k == "rows" else axes[t][k]) for k, x in ab.items()}
       for t, ab in joined.weights.items()}, joined.scale,
    )  # fmt: skip
  reads = (read, read_adapter, policy, piece, keys, settings, stop_ids)
  add("sampler", calls, sampler.sample_jit, *reads)
  if "questions" in (config.judge.name, config.judge.evaluator):  # the largest of a run's judges
    rows = questions.ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    reads = lambda *slots: place(jnp.int32, ("prompt", rows), *((None, n) for n in slots))  # noqa: E731
    few = reads(3, JUDGE_SUFFIX), reads(3)
    add("judge", cells * -(-P * G // rows), questions.read, rater_base, rater,
        Prompts(reads(S + T), reads()), *few, (rater.n_layers - 1,), (2, 3))  # fmt: skip
  elif config.judge.name == "lm":
    suffix = (place(jnp.int32, p, (None, JUDGE_SUFFIX)), place(jnp.int32, p))
    labels = tuple((i,) for i in range(2, 12))
    rate = lm.label_distribution
    add("judge", 3 * cells, rate, rater_base, None, rater, shown, *replies, *suffix, labels)
  elif config.judge.name == "probe":
    chosen = tuple(range(policy.n_layers // 2, policy.n_layers, 4))
    chunk = config.learner.chunk_tokens
    add("judge", cells, probe.features, base, policy, shown, *replies, chosen, chunk)
  if losses.needs_reference(config.objective):
    complete = functools.partial(learner.complete, **common)
    add("reference", cells, jax.jit(complete), base, [batch])
    batch = batch.replace(reference_logprobs=pg(jnp.float32, (T,)))
  add("update", cells * config.epochs, jax.jit(update, donate_argnums=0), state, base, batch, key)

  def per_device(tree, width=None):
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * (width or x.dtype.itemsize)
      for x in jax.tree.leaves(tree)
    )

  width = dtype.itemsize
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = P // ways if P % ways == 0 else P
  cached = at_once // ways if at_once % ways == 0 else at_once
  adapter = per_device(state.adapter)
  # What an update keeps in float32 in any dtype: a chunk's logits and their gradient, the
  # adapter's gradient, its sum over micro-batches and its step.
  vocab = policy.vocab_size // mesh.shape["tensor"]
  pieces = max(1, rows // config.learner.microbatches)
  logits = scoring.logits_bytes(pieces, G, T, vocab, config.learner.chunk_tokens)
  resident = {
    "policy weights": per_device(base, width),
    "int8 copy for the sampler": per_device(copies),
    "judge weights": per_device(rater_base, width) if judge else 0,
    "other judges' weights": sum(per_device(base_of(m), width) for m in shapes.judges(config)[1:]),
    "adapters" if cells > 1 else "adapter": cells * adapter,
    "optimiser": cells * per_device(state.opt_state),
  }
  cache = cached * sampler.cache_bytes(policy, S, settings, mesh, dtype)
  return {
    "programs": programs,
    "compile seconds": seconds,
    "resident": resident,
    # Bytes of work space that do not shrink with the model's dtype.
    "fixed": {"update": 3 * adapter + 2 * logits, "sampler": cache if settings.cache else 0},
    "kv cache": cache,
    "mesh": dict(mesh.shape),
    # Of one device: what the sampler reads, to be found again in its program.
    "shapes": {
      name: {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)}
      for name, tree in (("weights", read), ("adapters", read_adapter.weights))
    },
  }


# --- The plan --------------------------------------------------------------------------


def work_space(config, policy, judge, target: Device, cells: int, names) -> dict[str, float]:
  """Bytes of work space per device of the named programs, as the device's own compiler lays them
  out; of a program that it refuses for want of memory, what it says that this needs. One that it
  cannot compile without the device, as the H100's finds no tiles for some products, is left out and
  the reason printed."""
  out, devices = {}, topologies.devices(target)
  for name in names:
    try:
      made = compile_programs(config, policy, judge, target, devices, cells, only=(name,))
      out[name] = made["programs"][name][0].memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
      needs = re.search(r"RESOURCE_EXHAUSTED.*\(([\d.]+)G\) exceeds", str(error), re.DOTALL)
      if needs:
        out[name] = float(needs[1]) * GIB
      else:
        print(f"{name} cannot be compiled here: {first_line(error)}", file=sys.stderr)
  return out


def make_plan(
  config, policy, judge, target: Device, cells: int = 1, compiler: str = ""
) -> dict:
  """Memory, work, time and cost per device and step, as plain numbers (bytes, seconds, $).

  cells: runs that train together; a step is then one of all of them, hours and cost are theirs.
  compiler: the device's own (`topologies.installed`), to say what the work space is; "": estimate.
  """
  began = time.monotonic()
  made = compile_programs(config, policy, judge, target, cells=cells)
  exact = work_space(config, policy, judge, target, cells, made["programs"]) if compiler else {}
  width = jnp.dtype(config.model.dtype).itemsize
  P = config.prompts_per_step
  drawn = 1 - replay.prompts_per_batch(config.data, config.objective, P) / P
  programs = {}
  for name, (compiled, calls) in made["programs"].items():
    hlo = compiled.as_text()
    work = read_program(hlo, config.sampler.max_tokens, width, target.chip)
    temp = compiled.memory_analysis().temp_size_in_bytes
    kept = min(temp, made["fixed"].get(name, 0))
    programs[name] = {
      "calls": calls,
      # What records stand in for is sampled and rated in evaluations only.
      "share_of_step": drawn if name in ("sampler", "judge") else 1.0,
      "temp": exact.get(name, (temp - kept) * width / 4 + kept),
      "estimated_temp": (temp - kept) * width / 4 + kept,
      "flops": work.flops,
      "moved": work.moved,
      "sent": work.sent,
      "seconds": calls * (work.seconds + work.sent / target.chip.link + work.collectives * LATENCY),
      "compute_bound": work.flops / target.chip.flops / max(work.seconds, 1e-30),
      "largest_collective": work.largest[0],
    }
  resident = made["resident"]
  busiest = max(programs, key=lambda name: programs[name]["temp"])
  need = sum(resident.values()) + programs[busiest]["temp"]
  step = sum(p["share_of_step"] * p["seconds"] for p in programs.values())
  more = max(1, config.eval.samples / config.sampler.group)
  evaluation = more * sum(programs[n]["seconds"] for n in ("sampler", "judge") if n in programs)
  evaluation *= evaluation_batches(config)
  hours = (config.steps * step + evaluation) / EFFICIENCY / 3600
  return {
    "device": target.name,
    "compiler": compiler,
    "estimated": sorted(programs.keys() - exact.keys()),
    "cells": cells,
    "mesh": made["mesh"],
    "resident": resident,
    "kv cache": made["kv cache"],
    "programs": programs,
    "busiest": busiest,
    "bytes": need,
    "memory": target.chip.memory,
    "fits": need <= USABLE * target.chip.memory,
    "step_seconds": step,
    "evaluation_seconds": evaluation,
    "run_hours": hours,
    "run_dollars": hours * target.chips * target.chip.price,
    "bill": bill(target, hours),
    "planning_seconds": time.monotonic() - began,
  }


def most_cells(one: dict, many: dict) -> int:
  """How many cells fit, from the plans of one and of several: what each more of them adds to the
  resident bytes and to the sampler's work space is taken as constant."""
  more = many["cells"] - one["cells"]
  room = USABLE * one["memory"]
  size = lambda plan, name: sum(plan["resident"].values()) + plan["programs"][name]["temp"]  # noqa: E731
  each = {name: (size(many, name) - size(one, name)) / more for name in one["programs"]}
  return min(
    1 + math.floor((room - size(one, name)) / max(each[name], 1.0)) for name in one["programs"]
  )


def evaluation_batches(config) -> int:
  """Batches that a whole run samples and rates of held-out users: before the first update, every
  eval.every of them, and after the last; as many of each group (rollout.held_out)."""
  every = config.eval.every or config.steps or 1
  times = 1 + math.ceil(config.steps / every)
  users = 2 * math.ceil(config.eval.prompts / 2)
  return times * math.ceil(users / config.prompts_per_step)


def advice(plan: dict, config, policy, judge, target: Device) -> list[str]:
  """What to change, most effective first, where the plan does not fit."""
  if plan["fits"]:
    return []
  out, resident = [], sum(plan["resident"].values())
  room = USABLE * target.chip.memory
  fitting = meshes.fitting_meshes(config, policy, judge, target.chips)
  wider = [m["tensor"] for m in fitting if m["tensor"] > plan["mesh"]["tensor"]]
  if wider:
    n = wider[0]
    out.append(f"--config.mesh.tensor={n} (weights and work space on {n} devices each)")
  if resident > 0.7 * room:
    if plan["resident"]["judge weights"]:
      out.append("--config.judge.model= (the frozen base judges: one model in memory)")
    chips = math.ceil(resident / (0.6 * room)) * target.chips
    out.append(f"a larger device: the weights alone ask for about {chips} x {target.kind}")
  pieces, prompts = config.learner.microbatches, config.prompts_per_step
  if plan["busiest"] == "update":
    finer = next((n for n in range(pieces + 1, prompts + 1) if prompts % n == 0), None)
    if finer:
      out.append(f"--config.learner.microbatches={finer} (same result, smaller pieces)")
    if config.learner.remat != "full":
      out.append("--config.learner.remat=full")
    if config.learner.chunk_tokens > 256:
      out.append(f"--config.learner.chunk_tokens={config.learner.chunk_tokens // 4}")
  elif plan["busiest"] == "sampler":
    half = plan["kv cache"] / 2**31
    out.append(f"--config.memory.cache_gib={half:.1f} (replies drawn in pieces: same result)")
    if not config.sampler.cache:
      out.append("--config.sampler.cache=int8 (log-probs change a little, and are logged)")
  if config.max_prompt_tokens > 512:
    out.append("--config.max_prompt_tokens=512, if the longest prompt allows it")
  return out


def show(plan: dict, hints: list[str]) -> str:
  gib = lambda x: f"{x / GIB:8.2f} GiB"  # noqa: E731
  mesh = ", ".join(f"{k}={v}" for k, v in plan["mesh"].items())
  cells = f", {plan['cells']} cells" if plan["cells"] > 1 else ""
  lines = [f"{plan['device']}, mesh {mesh}{cells}; per device:"]
  lines += [f"  {name:24}{gib(size)}" for name, size in plan["resident"].items() if size]
  lines += [f"  (KV cache, in the sampler){gib(plan['kv cache']):>11}"]
  for name, p in plan["programs"].items():
    bound = "compute" if p["compute_bound"] > 0.5 else "memory"
    calls, seconds = (p["share_of_step"] * p[k] for k in ("calls", "seconds"))
    lines.append(
      f"  {name + ' work space':24}{gib(p['temp'])}   {calls * p['flops'] / 1e12:9.2f} TFLOP "
      f"{calls * p['moved'] / 1e9:9.1f} GB moved {calls * p['sent'] / 1e9:8.2f} GB sent"
      f"   {seconds:7.3f} s, {bound}-bound"
    )
  verdict = "fits" if plan["fits"] else "DOES NOT FIT"
  lines += [
    f"  {'most at one time':24}{gib(plan['bytes'])} of {plan['memory'] / GIB:.0f}: {verdict} "
    f"(limit {USABLE:.0%}; the {plan['busiest']} needs most)",
    f"roofline {plan['step_seconds']:.2f} s per step, {plan['evaluation_seconds']:.0f} s for all "
    f"evaluations; at {EFFICIENCY:.0%} of it {plan['run_hours']:.2f} h per run",
    f"cost per run, no discount: {plan['bill']}",
  ]
  said = f"as {plan['compiler']} lays it out" if plan["compiler"] else "an estimate: " + NO_COMPILER
  if plan["compiler"] and plan["estimated"]:
    said += f"; of {', '.join(plan['estimated'])}, which it cannot compile here, an estimate"
  return "\n".join([*lines, *(f"  try {hint}" for hint in hints), f"work space: {said}"])


def fake_devices(count: int) -> None:
  """Before jax makes its first array: `count` CPU devices."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the partitioner's hints, see the profile


def main(argv: list[str]) -> None:
  parser = flags.parser(__doc__, "tools.plan")
  add = parser.add_argument
  add("--device", default="", help="v5e-16, H100-8, ...: the kinds are in tools/devices.py")
  add("--memory", type=float, default=0, help="GB of one device, for a GPU of any other name")
  add("--flops", type=float, default=0, help="dense bf16 TFLOP/s of one device, likewise")
  add("--mesh", default="", choices=("", "auto"), help="auto: choose the mesh for the device")
  add("--shape", default="", help="preset to plan with in place of model.path")
  add("--cells", type=int, default=1, help="runs that train together, as a study's")
  own = "auto: the work space as the device's own compiler has it, where that is installed"
  add("--compiler", default="auto", choices=("auto", "cpu"), help=own)
  add("--json", default="", help="also write the plan to this file")
  add("--check-access", action="store_true", help="first ask the hub for each model (HF_TOKEN)")
  config, args = recipes.from_flags(parser, argv)
  target = device(args.device, args.memory, args.flops)
  if args.check_access:
    from rlsafety.tools import access  # the hub's library, only where the hub is asked

    print("\n".join(access.check(access.hub_names(config)) or ["no model from the hub"]))
  fake_devices(target.chips)
  policy, judge = shapes.policy_and_judge(config, args.shape)
  if args.mesh:
    sizes = meshes.automatic_mesh(config, policy, judge, target)
    config = dataclasses.replace(config, mesh=Mesh(**sizes))
  if args.cells < 1:
    raise UserError(f"--cells={args.cells}: must be at least 1")
  compiler = topologies.installed(target) if args.compiler == "auto" else ""
  plan = make_plan(config, policy, judge, target, args.cells, compiler)
  print(show(plan, advice(plan, config, policy, judge, target)))
  if args.cells > 1:
    one = make_plan(config, policy, judge, target, compiler=compiler)
    plan["most_cells"] = most_cells(one, plan)
    print(
      f"{args.cells} cells together {plan['run_hours']:.2f} h, one after the other "
      f"{args.cells * one['run_hours']:.2f} h; up to {plan['most_cells']} fit"
    )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(plan, indent=2) + "\n")


if __name__ == "__main__":
  run_main(main, sys.argv)
