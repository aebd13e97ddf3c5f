"""Writing a run directory (the README lists its files, `read.py` reads them).

Logs are JSON Lines, one append per step, so that a kill loses at most the line being written.
Files that are replaced are written beside and renamed. Only process 0 writes; a RunDir knows
whether it does, and nobody else asks.
"""

import dataclasses
import fcntl
import importlib.metadata
import itertools
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np

import rlsafety
from rlsafety import checkpoints, replay, sharding
from rlsafety.config import Config, differences, to_json
from rlsafety.errors import UserError
from rlsafety.files import append, parse_json, read_json, sync, write_bytes, write_json
from rlsafety.metrics import gaps
from rlsafety.models.chat import Chat
from rlsafety.rollout import Experience, Users
from rlsafety.rundir import check, place
from rlsafety.types import Array, Rollouts
from rlsafety.verdicts import VERDICTS, most_likely

FOLDERS = ("rollouts", "eval", "adapter", "checkpoints", "events", "scores")
LOGS = ("metrics.jsonl", "timing.jsonl", "rollouts/train.jsonl", "eval/summary.jsonl")

INPUTS = {  # section of config.json with a sha256: what it is of
  "data": "records", "model": "weights", "users": "users", "judge": "judge's weights or heads",
  "beyond": "users of eval.beyond, or judge of them,", "adapter": "weights of model.adapter",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepLog:
  """What one update leaves to be written, on the device until it is.

  own: fresh experience, None if there was none. replayed: scores [P, G] and is_gameable [P] of
  recorded replies, {} if there were none. lengths [P, G]: tokens that were learned from.
  metrics: the learner's scalars. seconds: {"learn_s"}.
  """

  step: int
  own: Experience | None
  replayed: Mapping[str, np.ndarray]
  lengths: Array
  metrics: Mapping[str, jax.Array]
  seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RunDir:
  """path: the directory. writes: is this the process that does? lock: held until `close`. seen: how
  far `marks` has read each log."""

  path: pathlib.Path
  writes: bool
  lock: IO | None
  seen: dict = dataclasses.field(default_factory=dict)

  def summary(self) -> dict | None:
    """What a complete run left; None for any other."""
    file = self.path / "summary.json"
    return read_json(file) if file.exists() else None

  def complete(self, config: Config) -> tuple[dict | None, list[str]]:
    """(the summary of a complete run or None, its files that must be written again).

    Raises UserError if a complete run lost a log that nothing can write again.
    """
    summary = self.summary()
    if summary is None:
      return None, []
    wanted = _wanted(config, config.steps, {"eval": check.heldout_replies(self.path)})
    check.refuse(self.path, list(check.faults(self.path, wanted)))
    digests = summary.get("sha256", {})
    if not isinstance(digests, dict):
      raise UserError(f"{self.path}/summary.json: sha256 is {digests!r:.40}; restore the file")
    changed = check.changed(self.path, digests)
    check.refuse(self.path, [fault for fault in changed if fault[0] not in check.ADAPTER])
    lost = {fault[0] for fault in changed} | set(check.rebuildable(self.path))
    return summary, sorted(lost)

  def start(
    self, config: Config, step: int, about: dict, replies: Mapping[str, int], told: Mapping
  ) -> bool:
    """Brings the logs back to `step`, the restored one, and writes config.json.

    step -1: nothing was restored. about: further facts, such as model and judge. replies:
    of an evaluation, by folder. told: the `marks` of that checkpoint. Returns whether the
    evaluation at `step` must be made again. Raises UserError if something else that was written
    before the checkpoint is lost or changed.
    """
    again = False
    if self.writes:
      again = self._evaluation_lost(config, step, replies, told)
      for name in LOGS:
        cut_after(self.path / name, step - (again and name.startswith("eval/")))
      for file in (self.path / "eval").rglob("step_*.jsonl"):
        if int(file.stem.split("_")[1]) > step:
          file.unlink()
      record = {"config": to_json(config), **provenance(), "seed": config.seed}
      write_json(self.path / "config.json", record | about)
    return sharding.any_process(again)

  def _evaluation_lost(
    self, config: Config, step: int, replies: Mapping[str, int], told: Mapping
  ) -> bool:
    if step < 0:
      newest = max(check.lines_of_steps(self.path / "metrics.jsonl")[0], default=0)
      first = min([e for e in (config.eval.every, config.checkpoint.every) if e] or [config.steps])
      damaged = self.path / "checkpoints" / checkpoints.DAMAGED
      if (newest > first or self.summary()) and not damaged.exists():
        raise UserError(
          f"{self.path}/checkpoints: holds no checkpoint, though metrics.jsonl reaches step "
          f"{newest}; restore it from a copy, or start the run again in another --workdir"
        )
      return False
    found = list(check.faults(self.path, _wanted(config, step, replies)))
    lost = {name for name, *_ in found}
    found += [fault for fault in check.altered(self.path, told) if fault[0] not in lost]
    own = [fault for fault in found if fault[1] == step and fault[0].startswith("eval/")]
    check.refuse(self.path, [fault for fault in found if fault not in own])
    return bool(own)

  def same_inputs(self, about: Mapping[str, Any]) -> None:
    """Raises UserError if the run was started with other inputs than the digests in `about` say:
    an adapter that learned from both would be nobody's."""
    stored = self.path / "config.json"
    before = read_json(stored) if stored.exists() else {}
    for (section, what), key in itertools.product(INPUTS.items(), ("sha256", "reading")):
      old, new = before.get(section), about.get(section)
      one, other = (x.get(key) if isinstance(x, dict) else None for x in (old, new))
      what = f"config, template or vocabulary ({what})" if key == "reading" else what
      if one and other and one != other:
        raise UserError(
          f"{stored}: the run was started with other {what} ({section}.{key} {one!s:.12}, now "
          f"{other:.12}); restore them, or give another --workdir"
        )

  def log_step(self, log: StepLog, rubric_of: Mapping[str, str], chat: Chat) -> tuple[dict, dict]:
    """Writes one step; returns its rows of metrics.jsonl and timing.jsonl.

    All processes must call it. rubric_of: an environment's RUBRICS.
    """
    log = _fetched(log)
    row = step_row(log, rubric_of)
    times = {**(log.own.seconds if log.own else {}), **log.seconds}
    timing = {"step": log.step, "seconds": sum(times.values()), **times}
    timing["tokens_per_second"] = int(log.lengths.sum()) / timing["seconds"]
    if self.writes:
      if log.own:  # what this policy said; what it read stays where it was recorded
        own = log.own
        rows = rollout_records(log.step, 0, own.users, chat, own.rollouts, own.scores)
        append(self.path / "rollouts" / "train.jsonl", rows)
      append(self.path / "metrics.jsonl", [row])
      append(self.path / "timing.jsonl", [timing])
    return row, timing

  def log_evaluation(self, rows: list[dict], summary: dict) -> None:
    """Writes one evaluation, what a run that was killed in it had begun to write replaced."""
    if self.writes:
      file = self.path / "eval" / f"step_{summary['step']:06d}.jsonl"
      file.unlink(missing_ok=True)
      append(file, rows)
      append(self.path / "eval" / "summary.jsonl", [summary])

  def log_beyond(self, name: str, step: int, rows: list[dict], about: dict) -> None:
    """Writes the replies to the users of another environment at one step."""
    if self.writes:
      folder = self.path / "eval" / name
      if not folder.resolve().is_relative_to(self.path.resolve()):
        raise UserError(f"{folder}: leads out of the run, by a symbolic link; delete the link")
      folder.mkdir(parents=True, exist_ok=True)
      write_json(folder / "about.json", about)
      file = folder / f"step_{step:06d}.jsonl"
      file.unlink(missing_ok=True)
      append(file, rows)

  def _logs(self) -> list[str]:
    replies = sorted((self.path / "eval").rglob("step_*.jsonl"))
    return [*LOGS, *(str(file.relative_to(self.path)) for file in replies)]

  def sync(self) -> None:
    """Puts the logs on the disk: a checkpoint must not outlive what was logged before it."""
    if self.writes:
      for name in self._logs():
        sync(self.path / name)

  def marks(self) -> dict:
    """`check.marks` of the logs; {} where another process writes."""
    return check.marks(self.path, self._logs(), self.seen) if self.writes else {}

  def finish(self, summary: dict) -> None:
    """Writes summary.json, last of all: it says that the run is complete."""
    if self.writes:
      write_json(self.path / "summary.json", summary | {"sha256": check.digests(self.path)})

  def close(self) -> None:
    if self.lock:
      self.lock.close()


def open_run(workdir: str | pathlib.Path, config: Config) -> RunDir:
  """Creates the directory or continues it, and keeps every other process out of it.

  Raises UserError if it cannot be written, belongs to a different config or is in use.
  """
  path = place.check(str(workdir), jax.process_index())
  for name in (*FOLDERS, "eval/inspect"):
    if not (path / name).resolve().is_relative_to(path.resolve()):
      raise UserError(f"{path / name}: leads out of the run, by a symbolic link; delete the link")
  for folder in (path / "rollouts", path / "eval"):
    folder.mkdir(exist_ok=True)
  stored = path / "config.json"
  if not stored.exists() and any((path / "checkpoints").glob("[0-9]*")):
    raise UserError(f"{stored}: missing beside checkpoints; restore it, or give another --workdir")
  if stored.exists():
    try:
      old = read_json(stored)["config"]
      if not isinstance(old, dict):
        raise KeyError("config")
    except (ValueError, KeyError):
      raise UserError(f"{stored}: not readable as a run's config; move the folder away") from None
    # Where a run goes on and who watches is not what it is: checkpoints serve any other.
    where = {"mesh": None, "platform": None, "log": None}
    changed = differences(old | where, to_json(config) | where)
    if changed:
      raise UserError(
        f"workdir {path} belongs to a run with another config ({'; '.join(changed[:4])}"
        f"{'; ...' if len(changed) > 4 else ''}); give another --workdir or delete it"
      )
  writes = jax.process_index() == 0
  return RunDir(path, writes, hold(path) if writes else None)


def hold(workdir: pathlib.Path) -> IO:
  """Keeps a second process out of a run that is being written, until the returned file is
  closed or this process ends, however it ends. File systems without locks pass."""
  path = workdir / ".lock"
  try:
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
  except OSError as error:
    raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise UserError(
      f"workdir {workdir}: another process is training in it; wait for it, stop it, or give "
      "another --workdir"
    ) from None
  except OSError:
    pass
  return file


def cut_after(path: pathlib.Path, step: int) -> None:
  """Drops the lines of later steps and a torn last line: a resumed run writes them again."""
  if not path.exists():
    return
  kept = []
  with open(path, "rb") as f:
    for line in f:
      try:
        if parse_json(line, str(path))["step"] <= step and line.endswith(b"\n"):
          kept.append(line)
      except (ValueError, KeyError, TypeError):
        continue
  write_bytes(path, b"".join(kept))


def _wanted(config: Config, step: int, replies: Mapping[str, int]) -> dict[str, Mapping[int, int]]:
  """What the logs hold after update `step`, see `check.expected`."""
  every, P = config.eval.every, config.prompts_per_step
  own = P - replay.prompts_per_batch(config.data, config.objective, P)
  evaluations = [
    at for at in range(step + 1) if at in (0, config.steps) or every and at % every == 0
  ]
  return check.expected(step, evaluations, own * config.sampler.group, replies)


# --- What is written --------------------------------------------------------------------


def _fetched(log: StepLog) -> StepLog:
  """The same with numpy arrays."""
  own = log.own
  if own:
    arrays = sharding.fetch((own.rollouts, own.scores, own.judge_metrics))
    rollouts, scores, judge_metrics = arrays
    own = dataclasses.replace(own, rollouts=rollouts, scores=scores, judge_metrics=judge_metrics)
  lengths, metrics = sharding.fetch((log.lengths, log.metrics))
  return dataclasses.replace(log, own=own, lengths=lengths, metrics=metrics)


def step_row(log: StepLog, rubric_of: Mapping[str, str]) -> dict[str, Any]:
  """The line of metrics.jsonl; scores of recorded replies stand under data_*."""
  row: dict[str, Any] = {"step": log.step}
  if log.own:
    gameable, scores = log.own.users.is_gameable, log.own.scores
    row |= gaps.group_means(scores, gameable) | gaps.threshold_rates(scores, gameable, rubric_of)
    row["unscorable"] = int(np.isnan(scores["reward"]).sum())
    row["length_mean"] = log.own.rollouts.lengths.mean()
    row["finished"] = log.own.rollouts.finished.mean()
  if log.replayed:
    scores = {name: log.replayed[name] for name in gaps.SCORES}
    means = gaps.group_means(scores, log.replayed["is_gameable"])
    row |= {f"data_{name}": value for name, value in means.items()}
  metrics = {**log.metrics, **(log.own.judge_metrics if log.own else {})}
  return row | {name: float(value) for name, value in metrics.items() if name != "nonfinite"}


def rollout_records(
  step: int,
  first: int,
  users: Users,
  chat: Chat,
  rollouts: Rollouts,
  scores: Mapping[str, np.ndarray],
) -> list[dict]:
  """One record per reply, as rollouts/ and eval/ store them; first: number of the first user."""
  records = []
  classes = most_likely(scores["verdicts"]) if "verdicts" in scores else None
  for p, user in enumerate(users.scenarios):
    about = {
      "scenario_id": user.id,
      "environment": user.environment,
      "topic": user.topic,
      "unit": user.unit,
      "person": user.person,
      "is_gameable": user.is_gameable,
      "factors": dict(user.factors),
      "messages": users.messages[p],
    }
    for g in range(rollouts.tokens.shape[1]):
      n = int(rollouts.lengths[p, g])
      tokens = rollouts.tokens[p, g, :n].tolist()
      records.append(
        {"step": step, "prompt": first + p, "sample": g, **about}
        | {"completion": chat.decode(tokens), "tokens": tokens}
        | {"logprobs": [round(float(x), 6) for x in rollouts.logprobs[p, g, :n]]}
        | {"length": n, "finished": bool(rollouts.finished[p, g])}
        | {name: scores[name][p, g] for name in gaps.SCORES}
        | ({} if classes is None else {"verdict": [*VERDICTS, None][classes[p, g]]})
      )
  return records


def provenance() -> dict[str, Any]:
  """Versions, device and code revision, for config.json."""
  versions = {"rlsafety": rlsafety.__version__, "python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "absent"
  device = jax.devices()[0]
  return {
    "versions": versions,
    "git": _git_revision(),
    "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "processes": jax.process_count(),
  }


def _git_revision() -> str:
  """Revision of the checkout that the code runs from, "+changes" if it was edited. Launchers
  leave it in a file REVISION where they copy the code without its history."""
  root = pathlib.Path(__file__).parents[2]
  if (root / "REVISION").exists():
    return (root / "REVISION").read_text().strip()
  if not shutil.which("git") or not (root / ".git").exists():
    return ""
  run = lambda *a: subprocess.run(  # noqa: E731
    ["git", "-C", str(root), *a], capture_output=True, text=True
  ).stdout.strip()
  return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")
