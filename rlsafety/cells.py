"""Cells: the runs that one program trains together, on one base, each in its own run directory.

A run by itself is one cell. Cells may differ in seed, environment, judge, objective, optimiser,
records and number of updates; what shapes the batch is common to all (`SHARED`). All of them are at
the same step, so that a batch has the same rows after a kill as without it; a cell that lost its
checkpoint catches up first.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rlsafety import (
  beyond,
  checkpoints,
  environments,
  evaluation,
  learner,
  replay,
  rollout,
  runtime,
  sharding,
)
from rlsafety.beyond import Beyond
from rlsafety.config import Config, differences, to_json
from rlsafety.environments import scenario
from rlsafety.errors import UserError
from rlsafety.files import read_json, write_json
from rlsafety.judges import Judge, check_names, open_judge
from rlsafety.judges import lines as judge_lines
from rlsafety.metrics import gaps
from rlsafety.models import architecture, hf, sources
from rlsafety.models.model import Model
from rlsafety.replay import Records
from rlsafety.report import render
from rlsafety.report import summary as summaries
from rlsafety.rollout import Experience, Users
from rlsafety.rundir import events, write
from rlsafety.rundir.events import Events
from rlsafety.rundir.write import RunDir, StepLog
from rlsafety.types import TrainState

SHARED = (
  "model", "lora", "sampler", "memory", "learner", "eval", "checkpoint", "mesh", "platform",
  "prompts_per_step", "max_prompt_tokens", "epochs",
)  # fmt: skip
STOPPED = "stopped.json"  # of a run that cannot go on: {"step", "why"}


@dataclasses.dataclass
class Cell:
  """One run on its way. name: "" where it is alone. state, step: after its newest update.

  root: the key of all its randomness. from_records: prompts of a batch that come from `records`.
  seconds: of each step of this process. again: the evaluation at `step` is missing. notes: on what
  it was opened with.
  """

  name: str
  config: Config
  run: RunDir
  root: jax.Array
  users: Users
  heldout: Users
  rubric_of: Mapping[str, str]
  judge: Judge
  beyond: Sequence[Beyond]
  records: Records | None
  from_records: int
  programs: learner.Programs
  state: TrainState
  manager: ocp.CheckpointManager
  about: dict
  step: int = -1
  again: bool = False
  notes: Sequence[str] = ()
  seconds: list[float] = dataclasses.field(default_factory=list)
  silence: gaps.Silence = dataclasses.field(default_factory=lambda: gaps.Silence(""))
  events: Events = dataclasses.field(default_factory=Events)

  @property
  def is_last(self) -> bool:
    return self.step >= self.config.steps

  @property
  def title(self) -> str:
    """What a line about this cell begins with."""
    return f"{self.name}: " if self.name else ""

  @property
  def own_prompts(self) -> int:
    return self.config.prompts_per_step - self.from_records

  @property
  def step_key(self) -> jax.Array:
    """The key of the next update."""
    return jax.random.fold_in(jax.random.fold_in(self.root, 2), self.step)


def check_shared(configs: Mapping[str, Config]) -> Config:
  """Any of the configs, for what is common to all. Raises UserError naming what is not."""
  (first, one), *others = configs.items()
  for name, config in others:
    changed = differences(shared(one), shared(config))
    if changed:
      raise UserError(
        f"cells {first} and {name} cannot train together: {'; '.join(changed[:4])}; common to all "
        f"are {', '.join(SHARED)} (but model.adapter)"
      )
  return one


def shared(config: Config) -> dict:
  """What cells in one batch must share (`SHARED`), as plain values."""
  values = {name: value for name, value in to_json(config).items() if name in SHARED}
  values["model"] = values["model"] | {"adapter": None}
  return values


def check_inputs(config: Config) -> None:
  """Raises UserError for what a user wrote beside the config, before weights are loaded for it:
  an environment or users of one's own, a reward function, records."""
  everyone = environments.load(config.environment)
  rollout.held_out(config.environment, everyone, config.eval.prompts)
  check_names(config.judge)
  if config.data.path and not pathlib.Path(config.data.path).is_dir():
    raise UserError(f"data.path {config.data.path!r}: no such folder")


def tell(notes_of: Mapping[str, Sequence[str]]) -> None:
  """Logs every note once, with the cells that it holds for. notes_of: of each cell by name."""
  log, holders = runtime.progress(), {}
  for cell, notes in notes_of.items():
    for note in notes:
      holders.setdefault(note, []).append(cell)
  for note, names in holders.items():
    who = "all cells" if 1 < len(names) == len(notes_of) else ", ".join(names)
    for line in (f"{who}: {note}" if who else note).splitlines():
      log.info("%s", line)


def show(name: str, run: RunDir, summary: Mapping) -> None:
  """What a complete run says: its table, unless others run beside it, and where its report is."""
  if not name:
    print(summary.get("table", ""), flush=True)
  title = f"{name}: " if name else ""
  runtime.progress().info("%sreport: %s", title, run.path / "report.html")


def open_runs(
  configs: Mapping[str, Config], folders: Mapping[str, str]
) -> tuple[dict[str, RunDir], dict[str, dict], dict[str, str]]:
  """The run directories by cell: those to go on with, the summaries of those that are complete,
  and why those that stopped did."""
  runs, summary_of, stopped, notes = {}, {}, {}, {name: [] for name in configs}
  for name, config in configs.items():
    events.check(config.log)
    run = write.open_run(folders[name], config)
    done, lost = run.complete(config)
    folder = run.path.parent if name else run.path
    if (run.path / STOPPED).exists():
      why = read_json(run.path / STOPPED).get("why")
      stopped[name] = f"{why} (to try again, delete {run.path / STOPPED})"
      run.close()
    elif done and not lost:
      notes[name] = [f"run is complete: {folder}"]
      summary_of[name] = done
      run.close()
    else:
      if lost:
        notes[name] = [f"run is complete but lost {', '.join(lost)}: written again"]
      notes[name] += [f"workdir {folder}; device {jax.devices()[0].device_kind}"]
      runs[name] = run
  tell(notes)
  if "" in summary_of:
    show("", run, summary_of[""])
  return runs, summary_of, stopped


def open_cell(
  name: str, config: Config, run: RunDir, policy: Model, mesh: Mesh, models: dict[str, Model]
) -> Cell:
  """Users, judge, records and a fresh learner state. models: of judges that are open, by path."""
  P, chat = config.prompts_per_step, policy.chat
  everyone = environments.load(config.environment)
  training = [s for s in everyone if s.split == "train"]
  users = rollout.users_of(training, chat, config.max_prompt_tokens)
  asked = rollout.held_out(config.environment, everyone, config.eval.prompts)
  heldout = rollout.users_of(asked, chat, config.max_prompt_tokens)
  whose = config.environment.users_file or config.environment.data_dir
  notes = [
    f"environment {config.environment.name}{f', users of {whose}' if whose else ''}: "
    f"{len(users)} training prompts"
  ]
  from_records = replay.prompts_per_batch(config.data, config.objective, P)
  about: dict = {
    "model": {**policy.source, "parameters": architecture.params_count(policy.config)},
    "users": {"sha256": rollout.digest(users, heldout)},
    "data": None,
  }
  if from_records:
    about["data"] = {"path": config.data.path, "sha256": replay.digest(config.data.path)}
  run.same_inputs(about)  # before the records are read and a judge is loaded
  records = None
  if from_records:
    slots = config.sampler.group, config.max_prompt_tokens, config.sampler.max_tokens
    records = replay.load(config.data.path, policy, config.objective, *slots, config.epochs)
    notes.append(f"records {config.data.path}: {from_records} of {P} per batch")
  judge = open_judge(
    config.judge, config.environment, policy, mesh, config.learner.chunk_tokens, models
  )
  others = [
    beyond.open_beyond(
      name, config, policy, mesh, judge, models, config.eval.prompts, config.max_prompt_tokens
    )
    for name in config.eval.beyond
  ]
  notes.append("\n".join([*judge_lines(judge), *beyond.lines(others)]))
  root = jax.random.key(config.seed)
  start_key = jax.random.fold_in(root, 0)
  state = learner.starting_state(
    config.lora, policy.config, config.optimizer, start_key, config.model.adapter
  )
  about["judge"] = judge.about
  if others:
    asked_too = [(b.name, rollout.digest(b.users), b.judge.about.get("sha256")) for b in others]
    about["beyond"] = {"sha256": hashlib.sha256(repr(asked_too).encode()).hexdigest()}
  if config.model.adapter:
    about["adapter"] = {"sha256": sources.checksum(state.adapter.weights)}
  run.same_inputs(about)
  folder = run.path / "checkpoints"
  return Cell(
    name=name,
    config=config,
    run=run,
    root=root,
    users=users,
    heldout=heldout,
    rubric_of=scenario.environment_module(config.environment.name).RUBRICS,
    judge=judge,
    beyond=others,
    records=records,
    from_records=from_records,
    programs=learner.programs(
      policy.config,
      config.objective,
      config.learner,
      config.optimizer,
      config.sampler.temperature or 1.0,
      config.lora.dropout,
    ),
    state=state,
    # A common step must be there until all cells have a newer one.
    manager=checkpoints.open_manager(folder, config.checkpoint.keep + bool(name)),
    about=about,
    silence=gaps.Silence(str(folder)),
    notes=notes,
  )


def resume(cells: Sequence[Cell]) -> None:
  """Brings every cell to the newest step that all of them have; its logs follow."""
  log, notes = runtime.progress(), {c.name: [] for c in cells}
  newest = {id(c): c.manager.latest_step() for c in cells}
  going = [s for c in cells if (s := newest[id(c)]) is not None and s < c.config.steps]
  for cell in cells:
    common = None if newest[id(cell)] == cell.config.steps else min(going, default=None)
    restored, step = checkpoints.restore(cell.manager, cell.state, warn=log.info, upto=common)
    if restored is None and common is not None:
      restored, step = checkpoints.restore(cell.manager, cell.state, warn=log.info)
    if restored is not None:
      checkpoints.forget_after(cell.manager, step)
      cell.state, cell.step = restored, step
      notes[cell.name].append(f"resuming after step {step}")
    replies = {"eval": len(cell.heldout)} | {f"eval/{b.name}": len(b.users) for b in cell.beyond}
    replies = {folder: n * cell.config.eval.samples for folder, n in replies.items()}
    told = checkpoints.logs_of(cell.manager, step) if step >= 0 else {}
    cell.again = cell.run.start(cell.config, step, cell.about, replies, told)
    cell.events = events.open_events(cell.run, cell.config)
  tell(notes)


def evaluate(
  cells: Sequence[Cell],
  *,
  roll_out: Callable[..., list[Experience]],
  policy: Model,
  mesh: Mesh,
  told: runtime.Told,
  ask_tasks: Callable[..., dict] | None = None,
) -> bool:
  """Asks the held-out users of all cells, which are at one step, those of `eval.beyond`, and
  Inspect's tasks. roll_out: `rollout.roll_out` with base, cache and mesh bound.

  False if a signal ended it: then nothing of it is written, and a restart makes it.
  """
  common, step = cells[0].config, cells[0].step

  def answers(who: Sequence[Users], judges: Sequence[Judge], stream: int):
    settings = dataclasses.replace(common.sampler, group=common.eval.samples)
    return evaluation.ask(
      functools.partial(roll_out, judges=judges, settings=settings),
      [cell.state.adapter for cell in cells],
      who,
      [jax.random.fold_in(cell.root, stream) for cell in cells],
      step,
      chat=policy.chat,
      prompts_at_once=max(common.prompts_per_step, mesh.shape["data"] * mesh.shape["fsdp"]),
      told=told,
      reference=policy,
      chunk_tokens=common.learner.chunk_tokens,
    )

  answered, further = answers([c.heldout for c in cells], [c.judge for c in cells], 1), {}
  for i, name in enumerate(common.eval.beyond):
    others = [cell.beyond[i] for cell in cells]
    judges = [b.judge for b in others]
    further[name] = answers([b.users for b in others], judges, beyond.stream(name))
  if answered is None or None in further.values():
    return False
  for i, found in enumerate(further.values()):
    for cell, (rows, _) in zip(cells, found, strict=True):
      cell.run.log_beyond(cell.beyond[i].name, step, rows, cell.beyond[i].about)
  summaries = []
  for cell, (rows, scores) in zip(cells, answered, strict=True):
    summary = evaluation.summarised(step, cell.heldout, rows, scores, cell.rubric_of)
    cell.events.write(step, summary, "held_out/")
    if ask_tasks:
      adapter = sharding.fetch(cell.state.adapter)
      summary["tasks"] = ask_tasks(policy, mesh, cell.config.lora, adapter, cell.run.path, step)
    cell.run.log_evaluation(rows, summary)
    summaries.append(summary)
  runtime.progress().info("%s", evaluation_line(cells, summaries))
  for cell, summary in zip(cells, summaries, strict=True):
    for line in evaluation.task_lines(summary):
      runtime.progress().info("%s%s", cell.title, line)
    cell.silence.hear(summary)
  draw(cells)
  return True


def draw(cells: Sequence[Cell]) -> None:
  """The page of each run that is still going, as of now; `finish` writes the last one."""
  for cell in cells:
    if cell.run.writes and not cell.is_last:
      try:
        page = render.write_report(cell.run.path)
      except Exception as error:  # a page is no reason to end a run; the last one is not excused
        runtime.progress().info("%sno page at step %d: %s", cell.title, cell.step, error)
      else:
        if cell.step == 0:
          runtime.progress().info("%spage, drawn again at evaluations: %s", cell.title, page)


def save(cells: Sequence[Cell], wait: bool) -> None:
  """Checkpoints of all cells at one step; those of the step before are on the disk first."""
  for cell in cells:
    cell.run.sync()
    checkpoints.finish(cell.manager)
  if cells:
    runtime.barrier(f"checkpoint {cells[0].step}")  # a host that is gone is named, not waited for
  for cell in cells:
    checkpoints.save(cell.manager, cell.step, cell.state, cell.run.marks())
  for cell in cells if wait else ():
    checkpoints.finish(cell.manager)


def log_step(cell: Cell, made: StepLog, policy: Model) -> dict:
  """Writes one step; returns its rows of metrics.jsonl and timing.jsonl as one."""
  row, timing = cell.run.log_step(made, cell.rubric_of, policy.chat)
  cell.events.write(made.step, {**row, **timing})
  cell.seconds.append(timing["seconds"])
  cell.silence.hear(row)
  return {**row, **timing}


def step_line(cells: Sequence[Cell], rows: Sequence[dict]) -> str:
  """Progress of one step of all cells that made it. rows: `log_step` of each."""
  if len(cells) == 1:
    cell, row = cells[0], rows[0]
    return cell.title + gaps.step_line(row, row, cell.config.steps, cell.seconds)
  steps, step = max(c.config.steps for c in cells), rows[0]["step"]
  seconds = sum(float(np.median(c.seconds[-20:])) for c in cells)
  return (
    f"step {step}/{steps}  {means(rows)}  {sum(row['seconds'] for row in rows):.1f} s  "
    f"left {(steps - step) * seconds / 60:.1f} min"
  )


def evaluation_line(cells: Sequence[Cell], summaries: Sequence[dict]) -> str:
  """What held-out users said of the cells, which are at one step."""
  alone = len(cells) == 1
  found = gaps.group_line(summaries[0]) if alone else means(summaries)
  return f"{cells[0].title if alone else ''}held-out at step {cells[0].step}: {found}"


def means(rows: Sequence[dict]) -> str:
  """Means over cells, with the lowest and the highest. rows: a log's line of each cell."""
  parts = []
  for name in ("reward", "hex_gap", "acc_gap"):
    values = [row[name] for row in rows if name in row and np.isfinite(row[name])]
    if values:
      parts.append(f"{name} {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
  return f"{len(rows)} cells: {'  '.join(parts)}"


def stop(cell: Cell, made: StepLog) -> str:
  """Ends a cell whose update was not finite: written once every other cell is saved, so that a
  resumed program leaves it out at the same step. Returns why."""
  loss = float(sharding.fetch(made.metrics["loss"]))
  why = (
    f"step {made.step}: the gradient or the step is not finite (loss {loss}); the adapter of the "
    f"step before is in {cell.run.path / 'checkpoints'}; lower optimizer.learning_rate"
  )
  if cell.run.writes:
    write_json(cell.run.path / STOPPED, {"step": made.step, "why": why})
  close(cell)
  return why


def close(cell: Cell) -> None:
  """Lets go of its checkpoints, its writers of events and its run directory."""
  cell.manager.close()
  cell.events.close()
  cell.run.close()


def finish(cell: Cell, policy: Model) -> dict:
  """Adapter, report and summary of a cell whose last update is made."""
  checkpoints.finish(cell.manager)
  run, adapter, summary = cell.run, sharding.fetch(cell.state.adapter), {}
  if run.writes:
    hf.save_peft(run.path / "adapter", adapter, policy, cell.config.lora)
    summary = summaries.finish(run.path)
    run.finish(summary)
    show(cell.name, run, summary)
  cell.events.close()
  run.close()
  runtime.barrier(f"complete {cell.name}")  # jax's shutdown gives up sooner than a report takes
  return run.summary() or summary if run.writes else {}
