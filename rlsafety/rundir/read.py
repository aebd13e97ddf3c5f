"""Reading run directories: the one place that knows their file names and their flaws.

A run directory is what `rlsafety.train` leaves behind (config.json, metrics.jsonl,
eval/, rollouts/, summary.json). It may belong to a run that is still going or that was
killed: a torn last line is skipped and named, a torn line elsewhere is an error.
"""

import dataclasses
import json
import math
import operator
import pathlib
from typing import Any

import numpy as np

from rlsafety.errors import UserError
from rlsafety.files import read_json, read_jsonl
from rlsafety.metrics.gaps import SCORES

ROLES = ("system", "user", "assistant")  # of a rollout's messages
# What every rollout must have, and what it may have.
FIELDS = {"step": int, "prompt": int, "sample": int, "is_gameable": bool}
MAX_STEP = 1_000_000  # a later step is a damaged one: curves have a slot for each
OPTIONAL = {"messages": list, "factors": dict, "completion": str, "scenario_id": str}
OPTIONAL |= {"finished": bool, "length": int}


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
    return self.info["config"]

  @property
  def seed(self) -> int:
    return self.config.get("seed", 0)

  @property
  def last_step(self) -> int:
    """The last update that was logged, 0 without any."""
    return self.metrics[-1]["step"] if self.metrics else 0


def number(value: Any) -> float:
  """A score as read from JSON: null, missing and non-numbers are NaN (no verdict)."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return math.nan
  return float(value)


def load_run(path: str | pathlib.Path) -> Run:
  """Reads config.json, metrics.jsonl and eval/summary.jsonl of one run directory."""
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"{path}: no such run directory")
  notes: list[str] = []
  info = _info(path / "config.json")
  metrics = _by_step(read_jsonl(path / "metrics.jsonl", notes), "metrics.jsonl", notes)
  evaluations = _by_step(read_jsonl(path / "eval" / "summary.jsonl", notes), "summary.jsonl", notes)
  # The report is written before summary.json, which is last: all updates made also counts.
  done = bool(metrics) and metrics[-1]["step"] >= number(info["config"].get("steps"))
  complete = (path / "summary.json").exists() or done
  if not complete:
    notes.append("this run is not complete: it is still going or was stopped")
  return Run(path, info, metrics, evaluations, complete, tuple(notes))


def _info(path: pathlib.Path) -> dict:
  """config.json with the parts that are read from it, which may be missing, as objects."""
  info = {"model": {}, **read_json(path)}
  try:  # its words go into tables and pages, which are UTF-8
    json.dumps(info, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise UserError(f"{path}: holds half a character, {error.object[error.start]!a}") from None
  info["config"] = {"model": {}, "environment": {}, **_object(info, "config", path)}
  for place, name in ((info, "model"), (info["config"], "model"), (info["config"], "environment")):
    _object(place, name, path)
  if not isinstance(info["config"].get("seed", 0), int):
    raise UserError(f"{path}: `config.seed` is {info['config']['seed']!r:.40}, no integer")
  return info


def _object(place: dict, name: str, path: pathlib.Path) -> dict:
  value = place.get(name, {})
  if not isinstance(value, dict):
    raise UserError(f"{path}: `{name}` is {value!r:.40}, where an object is expected")
  return value


def _by_step(records: list[dict], name: str, notes: list[str]) -> list[dict]:
  """Sorted by step; a step that was written twice keeps its last line."""
  steps = {}
  for record in records:
    if type(record.get("step")) is not int or not 0 <= record["step"] <= MAX_STEP:
      raise UserError(f"{name}: a line has no `step` of 0 to {MAX_STEP}: {json.dumps(record)[:80]}")
    if record["step"] in steps:
      notes.append(f"{name}: step {record['step']} appears twice, last one kept")
    steps[record["step"]] = record
  return [steps[step] for step in sorted(steps)]


def train_rollouts(run: Run, notes: list[str] | None = None) -> list[dict]:
  """The records of the replies that the policy wrote to be trained on, in order."""
  return _rollouts(run.path / "rollouts" / "train.jsonl", notes)


def eval_rollouts(
  run: Run, notes: list[str] | None = None, beyond: str = ""
) -> dict[int, list[dict]]:
  """{step: records} of the held-out evaluations, in order of steps; beyond: of the users of
  another environment, one of `beyond(run)`."""
  found = {}
  for path in sorted((run.path / "eval" / beyond).glob("step_*.jsonl")):
    try:
      step = int(path.stem.removeprefix("step_"))
    except ValueError:
      raise UserError(f"{path}: expected a name like step_000000.jsonl") from None
    found[step] = _rollouts(path, notes)
  return dict(sorted(found.items()))


def beyond(run: Run) -> list[str]:
  """The other environments whose users a run was asked about."""
  return sorted(f.parent.name for f in (run.path / "eval").glob("*/about.json"))


def _rollouts(path: pathlib.Path, notes: list[str] | None) -> list[dict]:
  records = read_jsonl(path, notes)
  for line, record in enumerate(records, 1):
    wrong = [field for field, kind in FIELDS.items() if type(record.get(field)) is not kind]
    wrong += [f for f, kind in OPTIONAL.items() if f in record and type(record[f]) is not kind]
    wrong += [field for field in SCORES if not _is_score(record.get(field))]
    if not wrong and not 0 <= record["step"] <= MAX_STEP:
      wrong = ["step"]
    if not wrong and not all(map(_is_message, record.get("messages", ()))):
      wrong = ["messages"]
    if wrong:
      value = repr(record.get(wrong[0]))[:40]
      raise UserError(f"{path}, line {line}: `{wrong[0]}` is {value}; delete or mend that line")
  return records


def _is_score(value: Any) -> bool:
  """Null and NaN are no verdict; a text, or a number of no scale, would change a mean unseen."""
  return value is None or (type(value) in (int, float) and not abs(value) > 1e6)


def _is_message(value: Any) -> bool:
  fields = isinstance(value, dict) and [value.get("role"), value.get("content")]
  return bool(fields) and fields[0] in ROLES and isinstance(fields[1], str)


def rescored(
  run: Run, records: list[dict], name: str, source: str, notes: list[str] | None = None
) -> list[dict]:
  """Those of `records` that RUN/scores/NAME.jsonl holds, with its ACC and HEX.

  source: "train" or "heldout", what the records are. notes get how many there are, if not
  all. Raises UserError where training rollouts were never re-scored under this name.
  """
  path = run.path / "scores" / f"{name}.jsonl"
  if not path.exists() and source == "train" and records:
    raise UserError(
      f"{path}: no such scores; make them with python -m rlsafety.tools.rescore --source=both"
    )
  place = operator.itemgetter("step", "prompt", "sample")
  scored = read_jsonl(path)
  for line, record in enumerate(scored, 1):
    if bad := [k for k in ("step", "prompt", "sample") if type(record.get(k)) is not int]:
      value = repr(record.get(bad[0]))[:40]
      raise UserError(f"{path}, line {line}: `{bad[0]}` is {value}; delete or mend that line")
  new = {place(r): r for r in scored if r.get("source") == source}
  kept = [
    {**record, "acc": found.get("acc"), "hex": found.get("hex")}
    for record in records
    if (found := new.get(place(record)))
  ]
  if len(kept) < len(records) and notes is not None:
    kind = {"train": "training", "heldout": "held-out"}[source]
    notes.append(f"{path}: holds {len(kept)} of {len(records)} {kind} rollouts, no others are used")
  return kept


def prompt_means(records: list[dict], name: str, gameable: bool) -> dict[tuple, float]:
  """{(scenario, prompt): mean reward, acc or hex over its scored replies} of one group."""
  means = unit_means(records, name)
  return {key[:2]: mean for key, mean in means.items() if key[2] is gameable}


def unit_means(records: list[dict], name: str) -> dict[tuple, float]:
  """The same of everyone: {(scenario, prompt, is_gameable, unit): mean}. The unit of users that
  have none is the person, and else the prompt."""
  found = {}
  for r in records:
    value = number(r.get(name))
    if math.isfinite(value):
      unit = r.get("unit") or r.get("person") or r["prompt"]
      key = r.get("scenario_id"), r["prompt"], r["is_gameable"], str(unit)
      found.setdefault(key, []).append(value)
  return {key: float(np.mean(values)) for key, values in found.items()}


def model_name(run: Run) -> str:
  """How the policy is called: by its GGUF file, whose folder or package often says little, else
  by its path or preset."""
  file, chosen = str(run.info["model"].get("file", "")), run.config["model"]
  path = file.removesuffix(".gguf") if file.endswith(".gguf") else chosen.get("path")
  return str(path or chosen.get("preset") or "").rstrip("/").split("/")[-1]


def environment_name(run: Run) -> str:
  return str(run.config["environment"].get("name", ""))
