"""Writing a run directory (its contract is in the README, `runs.py` reads it).

Logs are JSON Lines, one unbuffered append per line, so that a kill loses at most the line
being written. Files that are replaced are written beside and renamed.
"""

import fcntl
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess

import jax
import numpy as np

from rlsafety.config import differences
from rlsafety.environments import policy_messages
from rlsafety.errors import UserError
from rlsafety.files import parse_json, read_json
from rlsafety.rundir import place
from rlsafety.types import Rollouts

LOGS = ("metrics.jsonl", "timing.jsonl", "rollouts/train.jsonl", "eval/summary.jsonl")


def open_workdir(workdir: str, config: dict) -> pathlib.Path:
  """Creates the folder or continues it. Refuses one that belongs to a different config."""
  path = place.check(workdir, jax.process_index())
  for folder in (path / "rollouts", path / "eval"):
    folder.mkdir(exist_ok=True)
  stored = path / "config.json"
  if stored.exists():
    try:
      old = read_json(stored)["config"]
    except (ValueError, KeyError):
      raise UserError(f"{stored}: not readable as a run's config; move the folder away") from None
    # The mesh is where a run goes on, not what it is: checkpoints serve any other.
    changed = differences({**old, "mesh": None}, {**config, "mesh": None})
    if changed:
      raise UserError(
        f"workdir {path} belongs to a run with another config ({'; '.join(changed[:4])}"
        f"{'; ...' if len(changed) > 4 else ''}); give another --workdir or delete it"
      )
  return path


def lock(workdir: pathlib.Path):
  """Keeps a second process out of a run that is being written, until the returned file is
  closed or this process ends, however it ends. File systems without locks pass."""
  file = open(workdir / ".lock", "a")
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
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(b"".join(kept))
  os.replace(partial, path)


def cut_logs(workdir: pathlib.Path, step: int) -> None:
  """Brings every log back to `step`, the restored one (-1: to nothing)."""
  for name in LOGS:
    cut_after(workdir / name, step)
  for file in (workdir / "eval").glob("step_*.jsonl"):
    if int(file.stem.split("_")[1]) > step:
      file.unlink()


def rollout_records(step, first, users, chat, rollouts: Rollouts, scores) -> list[dict]:
  """One record per reply, as rollouts/ and eval/ store them."""
  records = []
  for p, user in enumerate(users):
    about = {
      "scenario_id": user.id,
      "environment": user.environment,
      "topic": user.topic,
      "is_gameable": user.is_gameable,
      "factors": dict(user.factors),
      "messages": policy_messages(user),
    }
    for g in range(rollouts.tokens.shape[1]):
      n = int(rollouts.lengths[p, g])
      tokens = rollouts.tokens[p, g, :n].tolist()
      records.append(
        {"step": step, "prompt": first + p, "sample": g, **about}
        | {"completion": chat.decode(tokens), "tokens": tokens}
        | {"logprobs": [round(float(x), 6) for x in rollouts.logprobs[p, g, :n]]}
        | {"length": n, "finished": bool(rollouts.finished[p, g])}
        | {"reward": scores["reward"][p, g], "acc": scores["acc"][p, g]}
        | {"hex": scores["hex"][p, g]}
      )
  return records


def event_writer(folder: pathlib.Path, active: bool):
  """write(step, row) to TensorBoard through clu, where the `tensorboard` extra is there."""
  found = [importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard")]
  if not active or not all(found):
    return lambda step, row: None
  from clu import metric_writers

  writer = metric_writers.SummaryWriter(str(folder))

  def write(step, row):
    finite = {k: float(v) for k, v in row.items() if np.ndim(v) == 0 and np.isfinite(v)}
    writer.write_scalars(step, finite)
    writer.flush()

  return write


def environment() -> dict:
  """Versions, device and code revision, for config.json."""
  from importlib.metadata import PackageNotFoundError, version

  import rlsafety

  versions = {"rlsafety": rlsafety.__version__, "python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"):
    try:
      versions[name] = version(name)
    except PackageNotFoundError:
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
