"""The transcripts of a page: prompts once each, rollouts as rows that point at them."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlsafety.rundir import read

MAX_ROLLOUTS = 10_000
MAX_CHARACTERS = 20_000_000  # of replies on one page, whatever their number


def transcripts(
  evaluations: dict[int, list[dict]], training: list[dict], max_rollouts: int = MAX_ROLLOUTS
) -> tuple[dict, dict[str, int]]:
  """The page's data, and how many rollouts of either kind were left out to keep it light.

  Held-out rollouts come first: whole evaluations at even distances, the first and the last
  always; if even these two do not fit, fewer prompts of both. Then whole training steps.

  Returns ({"prompts": [...], "rollouts": [[kind, step, prompt, its number in the batch,
  sample, reward, hex, acc, finished, completion], ...], "shared": factors that
  every user has}, {"held-out": n, "training": n}). kind: 0 held-out, 1 training.
  """
  every = [r for records in evaluations.values() for r in records]
  total = sum(len(str(r.get("completion", ""))) for r in every + training)
  if total > MAX_CHARACTERS:
    max_rollouts = min(max_rollouts, int(MAX_CHARACTERS / total * len(every + training)))
  held_out = [r for records in _evaluations(evaluations, max_rollouts) for r in records]
  by_step: dict[int, list[dict]] = {}
  for r in training:
    by_step.setdefault(r["step"], []).append(r)
  steps = [by_step[step] for step in sorted(by_step)]
  kept = [r for records in _spread(steps, max_rollouts - len(held_out)) for r in records]
  left_out = {"held-out": len(every) - len(held_out), "training": len(training) - len(kept)}
  return _page_data([(0, r) for r in held_out] + [(1, r) for r in kept]), left_out


def _spread(groups: list[list[dict]], room: int) -> list[list[dict]]:
  """As many of the groups, at even distances, as have at most `room` rollouts together."""
  sizes = np.array([len(group) for group in groups], int)
  most = int(room / sizes.mean()) if sizes.any() else len(groups)
  for wanted in range(min(len(groups), most), 0, -1):
    picks = np.unique(np.linspace(0, len(groups) - 1, wanted).round().astype(int))
    if sizes[picks].sum() <= room:
      return [groups[i] for i in picks]
  return []


def _evaluations(evaluations: dict[int, list[dict]], room: int) -> list[list[dict]]:
  found = _spread(list(evaluations.values()), room)
  if len(found) > 1 or len(found) == len(evaluations):
    return found
  ends = [evaluations[step] for step in sorted({min(evaluations), max(evaluations)})]
  for prompts in range(max(len(records) for records in ends), 0, -1):
    fewer = [[r for r in records if r["prompt"] < prompts] for records in ends]
    if sum(map(len, fewer)) <= room:
      return fewer
  return []


def _page_data(rollouts: list[tuple[int, dict]]) -> dict:
  prompts: list[dict] = []
  index: dict[str, int] = {}
  rows = []
  for kind, r in rollouts:
    key = json.dumps([r.get("scenario_id"), r.get("messages")], sort_keys=True)
    if key not in index:
      index[key] = len(prompts)
      prompts.append(_prompt(r))
    scores = [read.number(r.get(name)) for name in ("reward", "hex", "acc")]
    rows.append(
      [kind, r["step"], index[key], r["prompt"], r["sample"]]
      + [None if not math.isfinite(s) else round(s, 2) for s in scores]
      + [bool(r.get("finished", True)), str(r.get("completion", ""))]
    )
  # What all users share is a setting of the run, not a way to tell them apart.
  shared = set.intersection(*(set(p["factors"].items()) for p in prompts)) if prompts else set()
  for p in prompts:
    p["factors"] = {k: v for k, v in p["factors"].items() if (k, v) not in shared}
  return {"prompts": prompts, "rollouts": rows, "shared": dict(sorted(shared))}


def _prompt(r: dict) -> dict:
  return {
    "id": str(r.get("scenario_id", "?")),
    "env": str(r.get("environment", "")),
    "topic": str(r.get("topic", "")),
    "gameable": r["is_gameable"],
    "factors": {str(k): str(v) for k, v in (r.get("factors") or {}).items()},
    "messages": [
      [str(m.get("role", "")), str(m.get("content", ""))] for m in r.get("messages") or []
    ],
  }


def compared(
  runs: Sequence[read.Run], labels: Sequence[str], max_rollouts: int = MAX_ROLLOUTS
) -> tuple[dict | None, list[str]]:
  """Page data of several runs: their first and last held-out replies, and whose they are.

  Returns (data or None, labels of runs left out because max_rollouts were reached).
  """
  rollouts, owner, left_out = [], [], []
  for i, run in enumerate(runs):
    by_step = read.eval_rollouts(run)
    ends = sorted({min(by_step), max(by_step)}) if by_step else []
    own = [(0, r) for step in ends for r in by_step[step]]
    if len(rollouts) + len(own) > max_rollouts:
      left_out.append(labels[i])
    else:
      rollouts, owner = rollouts + own, owner + [i] * len(own)
  if not rollouts:
    return None, left_out
  data = _page_data(rollouts)
  data["rollouts"] = [[*row, i] for row, i in zip(data["rollouts"], owner, strict=True)]
  return data | {"runs": list(labels)}, left_out


def embed_json(value: Any) -> str:
  """JSON that may stand inside a <script> element whatever strings it holds."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  for char in "<>&\u2028\u2029":
    text = text.replace(char, f"\\u{ord(char):04x}")
  # Lone surrogates, which a byte-level tokenizer can leave, have no UTF-8 form.
  return text.encode("utf-8", "replace").decode("utf-8")
