"""Trains one model in one environment: `python -m rlsafety.train --config=configs/x.py`.

`run_on` is the whole program, read from top to bottom. One step is
  prompts.at(seed, step) -> sample -> score -> advantages -> learner.update -> logs,
with every random key derived from (seed, step): a killed run, started again with the same
command, ends in the same bits.
"""

import dataclasses
import functools
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import (
  advantages,
  checkpoints,
  environments,
  files,
  judges,
  learner,
  losses,
  replay,
  runtime,
  sampler,
  sharding,
)
from rlsafety import config as config_lib
from rlsafety.data import order as prompt_order
from rlsafety.errors import UserError, run_main
from rlsafety.metrics.gaps import group_means, threshold_rates
from rlsafety.models import architecture, hf, int8, lora, scoring, sources
from rlsafety.report.summary import finish
from rlsafety.rundir import write
from rlsafety.types import Batch, Prompts

PREEMPTED = 75  # exit code after SIGTERM: saved, start me again (sysexits' EX_TEMPFAIL)


def run(config, workdir: str) -> dict:
  """Trains as `config` says, in `workdir`; returns the summary that summary.json holds.

  Raises UserError for what the user can mend. After SIGTERM it saves and exits with
  PREEMPTED.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  with jax.set_mesh(mesh):  # the caller's own mesh, if any, is back afterwards
    return run_on(mesh, config, workdir)


def run_on(mesh, config, workdir: str) -> dict:
  """`run` on the mesh in use: the whole program."""
  # --- Run directory ------------------------------------------------------------------
  stored_config = config_lib.to_json(config)
  workdir = write.open_workdir(workdir, stored_config)
  if (workdir / "summary.json").exists():
    summary = files.read_json(workdir / "summary.json")
    say(f"run is complete: {workdir}")
    print(summary["table"])
    say(f"report: {workdir / 'report.html'}")
    return summary
  stopping = stop_on_sigterm()
  first_process = jax.process_index() == 0
  alone = write.lock(workdir) if first_process else None

  # --- Model, judge, users ------------------------------------------------------------
  say(f"workdir {workdir}; mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}")
  sharding.check_batch(mesh, config.prompts_per_step, config.learner.microbatches)
  model = sources.from_config(config, mesh)
  scenarios = environments.load(config.environment)
  rubric_of = environments.scenario.environment_module(config.environment.name).RUBRICS
  train_users = [s for s in scenarios if s.split == "train"]
  eval_users = prompt_order.held_out(scenarios, config.eval.prompts)
  encode = functools.partial(prompt_order.encode, model.chat, config.max_prompt_tokens)
  train_prompts, eval_prompts = encode(train_users), encode(eval_users)
  say(f"model {model.source}: {architecture.params_count(model.config) / 1e6:.1f} M parameters")
  say(f"environment {config.environment.name}: {len(train_users)} training prompts")
  records, from_records = replay.open_for(config, model)
  if records:
    say(f"records {config.data.path}: {from_records} of {config.prompts_per_step} per batch")
  score = judges.make_scorer(config, model, mesh)
  say_judge(score.describe())

  # --- Learner state ------------------------------------------------------------------
  root = jax.random.key(config.seed)
  optimizer = learner.make_optimizer(**config.optimizer)
  settings = learner_settings(config)
  state = init_state(config, model, optimizer, jax.random.fold_in(root, 0))
  update = jax.jit(
    functools.partial(learner.update, config=model.config, settings=settings, optimizer=optimizer),
    donate_argnums=0,
  )
  make_batch = jax.jit(functools.partial(complete_batch, config=model.config, settings=settings))
  draw = sampler_settings(config, model.chat.stop_ids)
  sampler_base = int8_base(config, model.params)

  # --- Resume -------------------------------------------------------------------------
  manager = checkpoints.open_manager(workdir / "checkpoints", config.checkpoint.keep)
  restored, step = checkpoints.restore(manager, state, warn=say)
  if restored is not None:
    state = restored
    say(f"resuming after step {step}")
  if first_process:
    write.cut_logs(workdir, step)
    record = {"config": stored_config, **write.environment(), "seed": config.seed}
    size = {"parameters": architecture.params_count(model.config)}
    record |= {"model": {**model.source, **size}, "judge": score.describe()}
    files.write_json(workdir / "config.json", record)

  def rollouts_of(adapter, users, tokens, lengths, key, settings):
    """Users -> their prompts on the device, sampled replies, and scores {name: [P, G]}."""
    prompts = sharding.put_prompts(mesh, Prompts(tokens=tokens, lengths=lengths))
    began = time.monotonic()
    rollouts = sampler.sample_all(
      sampler_base, adapter, model.config, prompts, key, settings, mesh, config.memory.cache_gib
    )
    jax.block_until_ready(rollouts)
    sampled = time.monotonic()
    scores, metrics = score(users, prompts, rollouts)
    jax.block_until_ready(scores)
    times = {"sample_s": sampled - began, "judge_s": time.monotonic() - sampled}
    return prompts, rollouts, scores, metrics, times

  def evaluate(step: int) -> None:
    """The same held-out prompts and sampling keys at every evaluated step."""
    eval_draw = dataclasses.replace(draw, group=config.eval.samples)
    rows, pieces = [], []
    size = max(config.prompts_per_step, mesh.shape["data"] * mesh.shape["fsdp"])
    for start in range(0, len(eval_users), size):
      chosen = np.arange(start, start + size) % len(eval_users)  # static shapes: wrap around
      real = min(size, len(eval_users) - start)
      users = [eval_users[i] for i in chosen]
      tokens, lengths = (x[chosen] for x in eval_prompts)
      key = jax.random.fold_in(jax.random.fold_in(root, 1), start)
      _, rollouts, scores, _, _ = rollouts_of(state.adapter, users, tokens, lengths, key, eval_draw)
      rollouts, scores = sharding.fetch((rollouts, scores))
      rollouts, scores = jax.tree.map(lambda x, n=real: x[:n], (rollouts, scores))
      rows += write.rollout_records(step, start, users[:real], model.chat, rollouts, scores)
      pieces.append(scores)
    scores = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    summary = {"step": step, "prompts": len(eval_users), "samples": config.eval.samples}
    gameable = [s.is_gameable for s in eval_users]
    summary |= group_means(scores, gameable) | threshold_rates(scores, gameable, rubric_of)
    if first_process:
      (workdir / f"eval/step_{step:06d}.jsonl").unlink(missing_ok=True)
      files.append(workdir / f"eval/step_{step:06d}.jsonl", rows)
      files.append(workdir / "eval/summary.jsonl", [summary])
    say(f"held-out at step {step}: {group_line(summary)}")

  def log(pending) -> None:
    """Writes one step; called while the device works on the next one."""
    step, users, rollouts, scores, data, lengths, metrics, times = pending
    rollouts, scores, metrics = sharding.fetch((rollouts, scores, metrics))
    lengths = sharding.fetch(lengths)
    if metrics.pop("nonfinite"):
      raise FloatingPointError(
        f"step {step}: the gradient is not finite (loss {metrics['loss']}); the adapter of the "
        f"step before is in {workdir / 'checkpoints'}; lower optimizer.learning_rate"
      )
    row = {"step": step}
    if users:
      gameable = [s.is_gameable for s in users]
      row |= group_means(scores, gameable) | threshold_rates(scores, gameable, rubric_of)
      row |= {"unscorable": int(np.isnan(scores["reward"]).sum())}
      row |= {"length_mean": rollouts.lengths.mean(), "finished": rollouts.finished.mean()}
    if data:
      means = group_means({n: data[n] for n in ("reward", "acc", "hex")}, data["is_gameable"])
      row |= {f"data_{name}": value for name, value in means.items()}
    row |= {name: float(value) for name, value in metrics.items()}
    timing = {"step": step, "seconds": sum(times.values()), **times}
    timing["tokens_per_second"] = int(lengths.sum()) / timing["seconds"]
    if first_process:
      if users:  # what this policy said; what it read stays where it was recorded
        rows = write.rollout_records(step, 0, users, model.chat, rollouts, scores)
        files.append(workdir / "rollouts/train.jsonl", rows)
      files.append(workdir / "metrics.jsonl", [row])
      files.append(workdir / "timing.jsonl", [timing])
      write_events(step, {**row, **timing})
    seconds.append(timing["seconds"])
    left = (config.steps - step) * float(np.median(seconds[-20:]))
    say(
      f"step {step}/{config.steps}  {group_line(row)}  loss {row['loss']:+.3f}  "
      f"{timing['seconds']:.1f} s  {timing['tokens_per_second']:.0f} tok/s  "
      f"left {left / 60:.1f} min"
    )

  # --- The loop -----------------------------------------------------------------------
  write_events = write.event_writer(workdir / "events", first_process)
  seconds, pending = [], None
  if step < 0:
    step = 0
    evaluate(step)
    checkpoints.save(manager, step, state)
  while step < config.steps:
    step_key = jax.random.fold_in(jax.random.fold_in(root, 2), step)
    users, rollouts, scores, judge_metrics, times = [], None, {}, {}, {}
    drawn = replayed = data = None
    if sampled := config.prompts_per_step - from_records:
      chosen = prompt_order.at(train_users, config.seed, step, sampled)
      users = [train_users[i] for i in chosen]
      tokens, lengths = (x[chosen] for x in train_prompts)
      prompts, rollouts, scores, judge_metrics, times = rollouts_of(
        state.adapter, users, tokens, lengths, jax.random.fold_in(step_key, 0), draw
      )
      drawn = prompts, rollouts, scores["reward"]
    began = time.monotonic()
    if from_records:
      replayed, data = replay.batch_at(records, config.seed, step, from_records)
      replayed = sharding.put_prompts(mesh, replayed)
    batch = make_batch(model.params, drawn, replayed)
    for epoch in range(config.epochs):
      if epoch:
        batch = batch.replace(staleness=batch.staleness + 1)
      key = jax.random.fold_in(step_key, 1 + epoch)
      state, metrics = update(state, model.params, batch, key)
    if pending:
      log(pending)
    jax.block_until_ready(metrics)
    times["learn_s"] = time.monotonic() - began
    step += 1
    metrics = {**metrics, **judge_metrics}
    pending = (step, users, rollouts, scores, data, batch.lengths, metrics, times)

    stop = stopping(step)
    last = step == config.steps
    if stop or last or step % config.eval.every == 0 or step % config.checkpoint.every == 0:
      log(pending)
      pending = None
      if last or step % config.eval.every == 0:
        evaluate(step)
      runtime.barrier(f"checkpoint {step}")  # a host that is gone is named, not waited for
      checkpoints.save(manager, step, state, wait=stop or last)
    if stop and not last:
      manager.close()
      say(f"SIGTERM: saved step {step}; the same command continues")
      sys.exit(PREEMPTED)
  manager.wait_until_finished()

  # --- The end ------------------------------------------------------------------------
  adapter = sharding.fetch(state.adapter)
  if first_process:
    hf.save_peft(workdir / "adapter", adapter, model, lora_config(config))
    summary = finish(workdir)
    files.write_json(workdir / "summary.json", summary)  # last: it says "complete"
    alone.close()
  runtime.barrier("complete")  # jax's own shutdown gives up sooner than a long report takes
  return files.read_json(workdir / "summary.json") if first_process else {}


# --- Pieces of `run` ------------------------------------------------------------------


def complete_batch(base, drawn, replayed: Batch | None, *, config, settings) -> Batch:
  """What the policy drew, as (prompts, rollouts, ratings [P, G]), and what was recorded,
  along P; either may be None. Adds what both need: reference (if at all) and advantages."""
  pieces = [] if replayed is None else [replayed]
  if drawn is not None:
    prompts, rollouts, ratings = drawn
    own = Batch(
      prompts=prompts,
      tokens=rollouts.tokens,
      lengths=rollouts.lengths,
      advantages=jnp.zeros_like(ratings),
      ratings=ratings,
      behaviour_logprobs=rollouts.logprobs,
      reference_logprobs=None,
      staleness=jnp.zeros_like(rollouts.lengths),
    )
    pieces.insert(0, own)
  batch = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
  pin = lambda x: sharding.constrain(x, "prompt", *[None] * (x.ndim - 1))  # noqa: E731
  batch = jax.tree.map(pin, batch)
  objective, reference = settings.objective, None
  if losses.needs_reference(objective):
    reference = scoring.token_scores(
      base,
      None,
      config,
      batch.prompts,
      batch.tokens,
      batch.lengths,
      temperature=settings.temperature,
      chunk_tokens=settings.chunk_tokens,
    ).logprobs
  rewards = advantages.rewards(
    batch.ratings, objective, batch.lengths, batch.behaviour_logprobs, reference
  )
  return batch.replace(
    advantages=advantages.advantages(rewards, objective), reference_logprobs=reference
  )


def say(text: str) -> None:
  """Progress, one line at a time, from process 0; readable in a log file too."""
  if jax.process_index() == 0:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def say_judge(about: dict) -> None:
  """The judge's name and limits, and each head's AUCs where it has been measured."""
  say(f"judge: {about['name']}")
  for head, sets in about.get("auc", {}).items():
    aucs = "; ".join(f"{replies} {auc['rest']:.2f}" for replies, auc in sets.items())
    say(f"  AUC of the {head} head against all other replies: {aucs}")
  say(f"  limits: {about['limits']}")


def stop_on_sigterm():
  """Returns stopping(step) -> bool: has any process been told to end?

  One process needs its own flag: jax's preemption notice exists only under
  jax.distributed.
  """
  told = []
  signal.signal(signal.SIGTERM, lambda *_: told.append(True))
  if jax.process_count() == 1:
    return lambda step: bool(told)
  from jax.experimental import multihost_utils

  def any_told(step):
    flags = multihost_utils.process_allgather(np.array([bool(told)]))
    return bool(flags.any())

  return any_told


def sampler_settings(config, stop_ids) -> sampler.SamplerSettings:
  return sampler.SamplerSettings(stop_ids=tuple(stop_ids), **config.sampler)


def int8_base(config, params: dict) -> dict:
  """What the sampler reads: the base itself, or a copy of it with int8 linears."""
  if config.memory.sampler_base not in ("", "int8"):
    raise UserError(f"memory.sampler_base={config.memory.sampler_base!r}: choose int8 or nothing")
  return jax.jit(int8.quantise_base)(params) if config.memory.sampler_base else params


def learner_settings(config) -> learner.LearnerSettings:
  return learner.LearnerSettings(
    objective=losses.make(**config.objective),
    temperature=config.sampler.temperature or 1.0,
    dropout=config.lora.dropout,
    **config.learner,
  )


def lora_config(config) -> lora.LoraConfig:
  return lora.LoraConfig(**{**config.lora, "targets": tuple(config.lora.targets)})


def init_state(config, model, optimizer, key):
  """Adapter and optimiser state, made in place on the mesh: never whole on one device.

  model.adapter names a PEFT folder to start from; its LoRA settings must be the config's.
  """
  settings = lora_config(config)
  loaded = None
  if config.model.adapter:
    loaded, found = hf.load_peft(pathlib.Path(config.model.adapter), model.config)
    for field in ("rank", "alpha", "rslora", "targets"):
      if getattr(found, field) != getattr(settings, field):
        raise UserError(
          f"model.adapter={config.model.adapter}: its {field} is {getattr(found, field)}, "
          f"lora.{field} is {getattr(settings, field)}; set --config.lora.{field} to match"
        )
  layers = architecture.weights(model.config)["layers"]
  axes = lora.adapter_axes(layers, settings)

  def init(start):
    state = learner.init_state(start or lora.init_adapter(layers, settings, key), optimizer)
    pin = lambda x, a: sharding.constrain(x, *a)  # noqa: E731
    return jax.tree.map(pin, state, learner.state_axes(state, axes))

  return jax.jit(init)(loaded)


def group_line(row: dict) -> str:
  """reward 5.1/4.8 ...: gameable / non-gameable, of own replies or else of the records."""
  prefix = "" if "reward" in row else "data_"
  parts = []
  for name in ("reward", "acc", "hex"):
    both = (row[f"{prefix}{name}_{group}"] for group in ("gameable", "non_gameable"))
    parts.append(f"{name} " + "/".join(f"{mean:.2f}" for mean in both))
  return "  ".join(parts) + f" ({prefix.replace('_', ': ')}gameable/non-gameable)"


def main(argv: list[str]) -> None:
  config, flags = config_lib.read_flags(argv, runtime.FLAGS)
  runtime.start(flags)  # on pods, under SLURM, or where a coordinator is named
  compilation_cache()
  run(config, flags["workdir"] or f"runs/{config.name}")


def compilation_cache() -> None:
  """A second start of the same program skips XLA; JAX_COMPILATION_CACHE_DIR moves it."""
  if not jax.config.jax_compilation_cache_dir:
    folder = pathlib.Path.home() / ".cache" / "rlsafety" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
  run_main(main, sys.argv)
