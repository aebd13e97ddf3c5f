"""A run's scores as arrays: its own, or those that `tools.rescore` gave its rollouts later."""

import math
import random

import numpy as np

from rlsafety.errors import UserError
from rlsafety.files import read_jsonl
from rlsafety.metrics import curves
from rlsafety.metrics.gaps import group_means
from rlsafety.rundir import read


def rollout_scores(run, name="", compat=False, seed=42, notes=None) -> dict:
  """Arrays over a run's training rollouts: step, is_gameable, reward, acc, hex.

  name: of a re-scoring whose ACC and HEX replace the run's own (rollouts that it left out
  are left out here). compat: one rollout per step, drawn with `seed`, missing verdicts
  filled in as the study did.
  """
  records = read.train_rollouts(run)
  if name:
    records = _rescored(run, records, name, "train", notes)
  if compat:
    rng, by_step = random.Random(seed), {}
    for record in records:
      by_step.setdefault(record["step"], []).append(record)
    records = [rng.choice(group) for _, group in sorted(by_step.items())]
  out = {
    "step": np.array([r["step"] for r in records], int),
    "is_gameable": np.array([bool(r["is_gameable"]) for r in records], bool),
  }
  values = {k: np.array([read.score(r, k) for r in records], float) for k in read.SCORES}
  return out | (curves.published_compat(values) if compat else values)


def evaluations(run, name="", notes=None) -> dict[int, dict]:
  """{step: line of eval/summary.jsonl}, with a re-scoring's ACC and HEX gaps if one is named;
  those are NaN at a step that it left out."""
  lines = {line["step"]: line for line in run.evaluations}
  if not name:
    return lines
  records = [r for step in read.eval_rollouts(run).values() for r in step]
  prompts = {step: {} for step in lines}
  for r in _rescored(run, records, name, "heldout", notes):
    key = r["prompt"], bool(r["is_gameable"])
    prompts.get(r["step"], {}).setdefault(key, []).append(r)
  for step, groups in prompts.items():
    lines[step] = {**lines[step], "acc_gap": math.nan, "hex_gap": math.nan}
    if groups:
      mean = lambda g, k: [curves.nanmean([read.score(r, k) for r in g])]  # noqa: E731
      means = {k: np.array([mean(g, k) for g in groups.values()]) for k in ("acc", "hex")}
      lines[step] |= group_means(means, np.array([gameable for _, gameable in groups]))
  return lines


def _rescored(run, records, name, source, notes=None):
  """The records that RUN/scores/NAME.jsonl holds, with its ACC and HEX; notes say how many."""
  path = run.path / "scores" / f"{name}.jsonl"
  if not path.exists() and source == "train" and records:
    raise UserError(
      f"{path}: no such scores; make them with python -m rlsafety.tools.rescore --source=both"
    )
  keys = ("step", "prompt", "sample")
  new = {tuple(r[k] for k in keys): r for r in read_jsonl(path) if r.get("source") == source}
  kept = []
  for record in records:
    found = new.get(tuple(record[k] for k in keys))
    if found:
      kept.append({**record, "acc": found.get("acc"), "hex": found.get("hex")})
  if len(kept) < len(records) and notes is not None:
    kind = {"train": "training", "heldout": "held-out"}[source]
    notes.append(f"{path}: holds {len(kept)} of {len(records)} {kind} rollouts, no others are used")
  return kept
