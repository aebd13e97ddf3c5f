"""Reading run directories: the one place that knows their file names and their flaws.

A run directory is what `rlsafety.train` leaves behind (config.json, metrics.jsonl,
eval/, rollouts/, summary.json). It may belong to a run that is still going or that was
killed: a torn last line is skipped and named, a torn line elsewhere is an error.
"""

import dataclasses
import json
import math
import pathlib

from rlsafety.errors import UserError
from rlsafety.files import read_json, read_jsonl

SCORES = ("reward", "acc", "hex")
GROUPS = ("gameable", "non_gameable")
# Which way each gap points: positive means that the gameable group gets more reward and
# encouragement, and less dissuasion (PAPER_FACTS: HEX_gap = G - NG, ACC_gap = NG - G).
GAP_SIGN = {"reward": 1, "acc": -1, "hex": 1}


@dataclasses.dataclass(frozen=True)
class Run:
  """One run directory, metrics read, rollouts left on disk.

  path: the directory. info: config.json. metrics: one dict per update, null read as NaN.
  evaluations: eval/summary.jsonl, one dict per evaluated step, in order of steps.
  complete: summary.json exists, or the last update is logged. notes: what was
  odd, in words for the reader.
  """

  path: pathlib.Path
  info: dict
  metrics: list[dict]
  evaluations: list[dict]
  complete: bool
  notes: tuple[str, ...]

  @property
  def config(self) -> dict:
    return self.info.get("config", {})


def number(value) -> float:
  """A score as read from JSON: null, missing and non-numbers are NaN (no verdict)."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return math.nan
  return float(value)


def score(record: dict, name: str) -> float:
  """A rollout's reward, acc or hex; NaN if it has no verdict."""
  return number(record.get(name))


def load_run(path) -> Run:
  """Reads config.json, metrics.jsonl and eval/summary.jsonl of one run directory."""
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"{path}: no such run directory")
  notes: list[str] = []
  info = read_json(path / "config.json")
  metrics = _by_step(read_jsonl(path / "metrics.jsonl", notes), "metrics.jsonl", notes)
  evaluations = _by_step(read_jsonl(path / "eval" / "summary.jsonl", notes), "summary.jsonl", notes)
  # The report is written before summary.json, which is last: all updates made also counts.
  done = bool(metrics) and metrics[-1]["step"] >= info.get("config", {}).get("steps", math.inf)
  complete = (path / "summary.json").exists() or done
  if not complete:
    notes.append("this run is not complete: it is still going or was stopped")
  return Run(path, info, metrics, evaluations, complete, tuple(notes))


def _by_step(records, name, notes):
  """Sorted by step; a step that was written twice keeps its last line."""
  steps = {}
  for record in records:
    if not isinstance(record.get("step"), int):
      raise UserError(f"{name}: a line has no integer 'step': {json.dumps(record)[:80]}")
    if record["step"] in steps:
      notes.append(f"{name}: step {record['step']} appears twice, last one kept")
    steps[record["step"]] = record
  return [steps[step] for step in sorted(steps)]


def train_rollouts(run: Run, notes: list[str] | None = None) -> list[dict]:
  return read_jsonl(run.path / "rollouts" / "train.jsonl", notes)


def eval_rollouts(run: Run, notes: list[str] | None = None) -> dict[int, list[dict]]:
  """{step: records} of the held-out evaluations, in order of steps."""
  found = {}
  for path in sorted((run.path / "eval").glob("step_*.jsonl")):
    try:
      step = int(path.stem.removeprefix("step_"))
    except ValueError:
      raise UserError(f"{path}: expected a name like step_000000.jsonl") from None
    found[step] = read_jsonl(path, notes)
  return dict(sorted(found.items()))


def model_name(run: Run) -> str:
  """How the run names its policy: config.json's model name, else the path or preset."""
  stated, chosen = (d if isinstance(d, dict) else {"name": d or ""} for d in
                    (run.info.get("model"), run.config.get("model")))  # fmt: skip
  names = (stated.get("name"), chosen.get("name"), chosen.get("path"), chosen.get("preset"))
  name = next((str(n) for n in names if n), str(stated.get("path") or ""))
  return name.rstrip("/").split("/")[-1].removeprefix("package:")


def environment_name(run: Run) -> str:
  source = run.config.get("environment") or run.info.get("environment") or ""
  return str(source.get("name", "") if isinstance(source, dict) else source)
