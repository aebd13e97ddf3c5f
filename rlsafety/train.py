"""Trains one model in one environment: `python -m rlsafety.train --config=configs/x.py`.

`run_on` is the whole program, read from top to bottom. One step is
  users -> own replies and their scores (rollout.roll_out), recorded replies (replay.batch_at)
  -> a batch with advantages (learner.complete) -> an update of the adapter (learner.update),
with every random key derived from (seed, step): a killed run, started again with the same
command, ends in the same bits.

Several runs of one base train together as *cells* (`run_together`, `rlsafety.study.run`): their
users are asked in one batch, so that each weight is read once for all of them; updates follow one
by one. A run by itself is one cell, through the same loop.
"""

import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rlsafety import (
  cells,
  errors,
  evaluation,
  flags,
  recipes,
  replay,
  rollout,
  runtime,
  sampler,
  sharding,
  stopping,
)
from rlsafety.cells import Cell
from rlsafety.config import Config
from rlsafety.errors import UserError
from rlsafety.models import architecture, int8, sources
from rlsafety.models.model import Model
from rlsafety.rollout import Experience
from rlsafety.rundir.write import StepLog


def run(config: Config, workdir: str) -> dict:
  """Trains as `config` says, in `workdir`; returns the summary that summary.json holds.

  Raises UserError for what the user can mend. After SIGTERM it saves and exits with
  runtime.PREEMPTED.
  """
  return run_together({"": config}, {"": workdir})[""]


def run_together(
  configs: Mapping[str, Config],
  folders: Mapping[str, str],
  show: Callable[[], None] = lambda: None,
) -> dict[str, dict]:
  """`run` of several cells by name, in one program. show: called when there is news on disk.

  A cell whose update is not finite stops and is named at the end; the others go on.
  """
  common = cells.check_shared(configs)
  runtime.check_platform(common.platform)
  mesh = sharding.make_mesh(common.mesh.data, common.mesh.fsdp, common.mesh.tensor)
  # The caller's own mesh and signal handlers, if any, are back afterwards.
  with jax.set_mesh(mesh), runtime.stop_signals() as told, stopping.kept() as live:
    summary_of = run_on(mesh, common, configs, folders, live, told, show)
  if told.signal == signal.SIGINT:
    sys.exit(told.exit_code)  # all is complete, but what starts the next run must hear of it
  return summary_of


def run_on(
  mesh: Mesh,
  common: Config,
  configs: Mapping[str, Config],
  folders: Mapping[str, str],
  live: list[Cell],
  told: runtime.Told,
  show: Callable[[], None],
) -> dict[str, dict]:
  """`run_together` on the mesh in use: the whole program. common: what the configs share. live:
  empty; holds the cells that go on, for whoever has to save them (`stopping.kept`)."""
  # --- Run directories; a base, and of each cell users, judge and learner state ----------
  log = runtime.progress()
  runs, summary_of, stopped = cells.open_runs(configs, folders)
  P = common.prompts_per_step
  sharding.check_batch(mesh, P, common.learner.microbatches)
  if runs:
    ask_tasks = evaluation.tasks_of(common.eval)  # before the weights: a fault is said at once
    for name in runs:
      cells.check_inputs(configs[name])
    policy = sources.open_model(common.model, mesh)
    parameters = architecture.params_count(policy.config)
    log.info("model %s: %.1f M parameters", policy.source, parameters / 1e6)
    if common.model.path:  # random weights are the seed's, and rounded as the device does
      policy = sources.identified(policy)
    tokens = P * (common.max_prompt_tokens + common.sampler.group * common.sampler.max_tokens)
    runtime.warn_of_cpu(parameters, len(runs) * tokens, common.steps)
    read_by_sampler = policy
    if common.memory.sampler_base:
      rounded = jax.jit(int8.quantise_base)(policy.params)
      read_by_sampler = dataclasses.replace(policy, params=rounded)
    roll_out = functools.partial(
      rollout.roll_out, read_by_sampler, cache_gib=common.memory.cache_gib, mesh=mesh
    )
    models: dict[str, Model] = {}  # of judges, loaded once for all cells
    opened = [cells.open_cell(n, configs[n], run, policy, mesh, models) for n, run in runs.items()]
    cells.tell({cell.name: cell.notes for cell in opened})
    cells.resume(opened)
    live += opened
    evaluate = functools.partial(
      cells.evaluate, roll_out=roll_out, policy=policy, mesh=mesh, told=told, ask_tasks=ask_tasks
    )

  # --- The loop -----------------------------------------------------------------------
  if new := [cell for cell in live if cell.step < 0]:
    for cell in new:
      cell.step = 0
    if not evaluate(new):
      stopping.leave(live, told)
    cells.save(new, wait=False)
    show()
  for step in sorted({cell.step for cell in live if cell.again}):
    again = [cell for cell in live if cell.again and cell.step == step]
    cells.tell({c.name: [f"the evaluation at step {step} is missing: made now"] for c in again})
    if not evaluate(again):
      stopping.leave(live, told)
  if live and sharding.any_process(told.signal > 0):
    stopping.leave(live, told)
  while going := [cell for cell in live if not cell.is_last]:
    # All of them, unless a lost checkpoint left some behind.
    now = [cell for cell in going if cell.step == min(c.step for c in going)]
    own = experience(now, roll_out, common)
    well, rows, failed = [], [], []
    for cell in now:
      made = learn(cell, own.get(cell.name), policy, mesh)
      if made.metrics["nonfinite"]:
        failed.append((cell, made))
      else:
        cell.step = made.step
        well.append(cell)
        rows.append(cells.log_step(cell, made, policy))
    if well:
      log.info("%s", cells.step_line(well, rows))

    stop, step, whole = sharding.any_process(told.signal > 0), made.step, True
    ended = [cell for cell in live if cell.is_last]
    due = [c for c in well if c.is_last or common.eval.every and step % common.eval.every == 0]
    saving = common.checkpoint.every and step % common.checkpoint.every == 0
    if stop or failed or ended or due or saving:
      whole = not due or evaluate(due)
      stop = stop or not whole
      cells.save(well, wait=bool(stop or failed or ended))
    for cell, made in failed:
      stopped[cell.name] = cells.stop(cell, made)
      log.info("%sstopped: %s", cell.title, stopped[cell.name])
    live[:] = [cell for cell in live if cell.name not in stopped]
    if stop and (len(ended) < len(live) or not whole):
      stopping.leave(live, told)
    for cell in ended:
      summary_of[cell.name] = cells.finish(cell, policy)
      live.remove(cell)
    if due or failed:
      show()
  for cell in live:  # with no update left to make
    summary_of[cell.name] = cells.finish(cell, policy)
  live.clear()
  show()
  if stopped:
    raise UserError("; ".join(f"{name}: {why}" if name else why for name, why in stopped.items()))
  return summary_of


# --- Pieces of `run_on` -----------------------------------------------------------------


def experience(
  now: Sequence[Cell], roll_out: Callable[..., list[Experience]], common: Config
) -> dict[str, Experience]:
  """The own replies of each cell's next update by its name, asked in one batch."""
  asking = [cell for cell in now if cell.own_prompts]
  if not asking:
    return {}
  asked, keys = [], []
  for cell in asking:
    n, config = cell.own_prompts, cell.config
    asked.append(cell.users.take(rollout.order(cell.users.is_gameable, config.seed, cell.step, n)))
    keys.append(sampler.row_keys(jax.random.fold_in(cell.step_key, 0), np.arange(n)))
  got = roll_out(
    [cell.state.adapter for cell in asking],
    asked,
    keys,
    judges=[cell.judge for cell in asking],
    settings=common.sampler,
  )
  return {cell.name: own for cell, own in zip(asking, got, strict=True)}


def learn(cell: Cell, own: Experience | None, policy: Model, mesh: Mesh) -> StepLog:
  """One update of a cell from its own replies, if any, and its records, if any."""
  began, config = time.monotonic(), cell.config
  pieces, replayed = [rollout.as_batch(own)] if own else [], {}
  if cell.records:
    recorded, replayed = replay.batch_at(cell.records, config.seed, cell.step, cell.from_records)
    pieces.append(sharding.put_prompts(mesh, recorded))
  batch = cell.programs.complete(policy.params, pieces)
  state, metrics = cell.state, {}
  for epoch in range(config.epochs):
    if epoch:
      batch = batch.replace(staleness=batch.staleness + 1)
    key = jax.random.fold_in(cell.step_key, 1 + epoch)
    state, metrics = cell.programs.update(state, policy.params, batch, key)
  cell.state = jax.block_until_ready(state)
  seconds = {"learn_s": time.monotonic() - began}
  return StepLog(cell.step + 1, own, replayed, batch.lengths, metrics, seconds)


def main(argv: list[str]) -> None:
  parser = flags.parser(__doc__, "train")
  parser.add_argument("--workdir", default="", help="run directory; default runs/<config name>")
  runtime.add_arguments(parser)
  config, args = recipes.from_flags(parser, argv)
  runtime.start(args)  # on pods, under SLURM, or where a coordinator is named
  runtime.compilation_cache()
  run(config, args.workdir or f"runs/{config.name}")


if __name__ == "__main__":
  errors.run_main(main, sys.argv)
