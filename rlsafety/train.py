"""Trains one model in one environment: `python -m rlsafety.train --config=configs/x.py`.

`run_on` is the whole program, read from top to bottom. One step is
  users -> own replies and their scores (rollout.roll_out), recorded replies (replay.batch_at)
  -> a batch with advantages (learner.complete) -> an update of the adapter (learner.update),
with every random key derived from (seed, step): a killed run, started again with the same
command, ends in the same bits.
"""

import dataclasses
import functools
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh

from rlsafety import (
  checkpoints,
  environments,
  errors,
  evaluation,
  flags,
  judges,
  learner,
  recipes,
  replay,
  rollout,
  runtime,
  sampler,
  sharding,
)
from rlsafety.config import Config
from rlsafety.environments import scenario
from rlsafety.errors import UserError
from rlsafety.metrics import gaps
from rlsafety.models import architecture, hf, int8, sources
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.report import summary as summaries
from rlsafety.rundir import write
from rlsafety.rundir.write import RunDir, StepLog


def run(config: Config, workdir: str) -> dict:
  """Trains as `config` says, in `workdir`; returns the summary that summary.json holds.

  Raises UserError for what the user can mend. After SIGTERM it saves and exits with
  runtime.PREEMPTED.
  """
  runtime.check_platform(config.platform)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  # The caller's own mesh and signal handlers, if any, are back afterwards.
  with jax.set_mesh(mesh), runtime.stop_signals() as told:
    return run_on(mesh, config, workdir, told)


def run_on(mesh: Mesh, config: Config, workdir: str, told: runtime.Told) -> dict:
  """`run` on the mesh in use: the whole program."""
  # --- Run directory ------------------------------------------------------------------
  log = runtime.progress()
  run = write.open_run(workdir, config)
  done, lost = run.complete(config)
  if done and not lost:
    log.info("run is complete: %s", run.path)
    print(done["table"])
    log.info("report: %s", run.path / "report.html")
    run.close()
    return done
  if lost:
    log.info("run is complete but lost %s: written again", ", ".join(lost))
  log.info("workdir %s; mesh %s of %s", run.path, dict(mesh.shape), jax.devices()[0].device_kind)

  # --- Policy, users, judge -----------------------------------------------------------
  P = config.prompts_per_step
  sharding.check_batch(mesh, P, config.learner.microbatches)
  policy = sources.open_model(config.model, config.seed, mesh)
  chat, parameters = policy.chat, architecture.params_count(policy.config)
  log.info("model %s: %.1f M parameters", policy.source, parameters / 1e6)
  tokens = P * (config.max_prompt_tokens + config.sampler.group * config.sampler.max_tokens)
  runtime.warn_of_cpu(parameters, tokens, config.steps)
  everyone = environments.load(config.environment)
  rubric_of = scenario.environment_module(config.environment.name).RUBRICS
  training = [s for s in everyone if s.split == "train"]
  users = rollout.users_of(training, chat, config.max_prompt_tokens)
  asked = rollout.held_out(everyone, config.eval.prompts)
  heldout = rollout.users_of(asked, chat, config.max_prompt_tokens)
  log.info("environment %s: %d training prompts", config.environment.name, len(users))
  from_records = replay.prompts_per_batch(config.data, config.objective, P)
  records, data = None, None
  if from_records:
    slots = config.sampler.group, config.max_prompt_tokens, config.sampler.max_tokens
    data = {"path": config.data.path, "sha256": replay.digest(config.data.path)}
    run.same_data(data["sha256"])
    records = replay.load(config.data.path, policy, config.objective, *slots, config.epochs)
    log.info("records %s: %d of %d per batch", config.data.path, from_records, P)
  judge = judges.open_judge(
    config.judge, config.environment, policy, mesh, config.learner.chunk_tokens
  )
  for line in judges.lines(judge):
    log.info("%s", line)
  read_by_sampler = policy
  if config.memory.sampler_base:
    rounded = jax.jit(int8.quantise_base)(policy.params)
    read_by_sampler = dataclasses.replace(policy, params=rounded)
  asking = {"judges": [judge], "cache_gib": config.memory.cache_gib, "mesh": mesh}
  roll_out = functools.partial(rollout.roll_out, read_by_sampler, **asking)

  # --- Learner state ------------------------------------------------------------------
  root = jax.random.key(config.seed)
  optimizer = learner.make_optimizer(config.optimizer)
  state = learner.starting_state(
    config.lora, policy.config, optimizer, jax.random.fold_in(root, 0), config.model.adapter
  )
  common = {
    "config": policy.config,
    "objective": config.objective,
    "settings": config.learner,
    "temperature": config.sampler.temperature or 1.0,
  }
  complete = jax.jit(functools.partial(learner.complete, **common))
  update = jax.jit(
    functools.partial(learner.update, **common, optimizer=optimizer, dropout=config.lora.dropout),
    donate_argnums=0,
  )

  # --- Resume -------------------------------------------------------------------------
  manager = checkpoints.open_manager(run.path / "checkpoints", config.checkpoint.keep)
  restored, step = checkpoints.restore(manager, state, warn=log.info)
  if restored is not None:
    state = restored
    log.info("resuming after step %d", step)
  about = {"model": {**policy.source, "parameters": parameters}, "judge": judge.about}
  again = run.start(config, step, about | {"data": data}, len(heldout) * config.eval.samples)
  write_events = write.event_writer(run)
  silence = gaps.Silence(str(run.path / "checkpoints"))

  def evaluate(adapter, step: int) -> None:
    settings = dataclasses.replace(config.sampler, group=config.eval.samples)
    [(rows, scores)] = evaluation.ask(
      functools.partial(roll_out, settings=settings),
      [adapter],
      [heldout],
      [jax.random.fold_in(root, 1)],
      step,
      chat=chat,
      prompts_at_once=max(P, mesh.shape["data"] * mesh.shape["fsdp"]),
    )
    summary = evaluation.summarised(step, heldout, scores, rubric_of)
    run.log_evaluation(rows, summary)
    log.info("held-out at step %d: %s", step, gaps.group_line(summary))
    silence.hear(summary)

  def log_step(pending: StepLog, seconds: list[float]) -> None:
    if pending.metrics["nonfinite"]:
      raise UserError(
        f"step {pending.step}: the gradient or the step is not finite (loss "
        f"{pending.metrics['loss']}); the adapter of the step before is in "
        f"{run.path / 'checkpoints'}; lower optimizer.learning_rate"
      )
    row, timing = run.log_step(pending, rubric_of, chat)
    write_events(pending.step, {**row, **timing})
    seconds.append(timing["seconds"])
    log.info("%s", gaps.step_line(row, timing, config.steps, seconds))
    silence.hear(row)

  # --- The loop -----------------------------------------------------------------------
  if step < 0:
    step = 0
    evaluate(state.adapter, step)
    run.sync()
    checkpoints.save(manager, step, state)
  elif again:
    log.info("the evaluation at step %d was lost: made again", step)
    evaluate(state.adapter, step)
  seconds: list[float] = []  # of each step
  pending = None  # the step before, written while the device works on this one
  while step < config.steps:
    key = jax.random.fold_in(jax.random.fold_in(root, 2), step)
    own, replayed, pieces = None, {}, []
    if P > from_records:
      chosen = rollout.order(users.is_gameable, config.seed, step, P - from_records)
      keys = sampler.row_keys(jax.random.fold_in(key, 0), np.arange(len(chosen)))
      asked = [users.take(chosen)]
      [own] = roll_out([state.adapter], asked, [keys], settings=config.sampler)
      pieces.append(rollout.as_batch(own))
    began = time.monotonic()
    if records:
      recorded, replayed = replay.batch_at(records, config.seed, step, from_records)
      pieces.append(sharding.put_prompts(mesh, recorded))
    batch = complete(policy.params, pieces)
    for epoch in range(config.epochs):
      if epoch:
        batch = batch.replace(staleness=batch.staleness + 1)
      state, metrics = update(state, policy.params, batch, jax.random.fold_in(key, 1 + epoch))
    if pending:
      log_step(pending, seconds)
    jax.block_until_ready(metrics)
    step += 1
    learned = {"learn_s": time.monotonic() - began}
    pending = StepLog(step, own, replayed, batch.lengths, metrics, learned)

    stop, last = sharding.any_process(told.signal > 0), step == config.steps
    due = last or step % (config.eval.every or config.steps) == 0
    if stop or due or step % (config.checkpoint.every or config.steps) == 0:
      log_step(pending, seconds)
      pending = None
      if due:
        evaluate(state.adapter, step)
      run.sync()
      runtime.barrier(f"checkpoint {step}")  # a host that is gone is named, not waited for
      checkpoints.save(manager, step, state, wait=stop or last)
    if stop and not last:
      manager.close()
      what = signal.Signals(told.signal or signal.SIGTERM).name
      log.info("%s: saved step %d; the same command continues", what, step)
      sys.exit(told.exit_code)
  checkpoints.finish(manager)
  return finish(run, sharding.fetch(state.adapter), policy, config)


# --- Pieces of `run_on` -----------------------------------------------------------------


def finish(run: RunDir, adapter: Adapter, policy: Model, config: Config) -> dict:
  """Adapter, report and summary of a run whose last update is made."""
  summary = {}
  if run.writes:
    hf.save_peft(run.path / "adapter", adapter, policy, config.lora)
    summary = summaries.finish(run.path)
    run.finish(summary)
  run.close()
  runtime.barrier("complete")  # jax's own shutdown gives up sooner than a long report takes
  return run.summary() or summary if run.writes else {}


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
