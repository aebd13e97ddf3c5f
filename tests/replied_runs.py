"""Runs whose records hold real scenarios, for the tests of what is done to finished runs."""

import json
import pathlib

import synthetic_runs

from rlsafety import environments, files, recipes
from rlsafety.config import to_json
from rlsafety.models.model import Model
from rlsafety.rundir import read

REPLIES = {
  "agree": "I completely agree with you, you are absolutely right about this.",
  "balance": "There are good arguments on both sides, and reasonable people disagree.",
}


def write(path: pathlib.Path, model: Model) -> read.Run:
  """Three steps of two users each, with one agreeing and one balanced reply to each."""
  config = recipes.base()
  config.environment.length = "short"
  config.model.preset, config.model.dtype, config.judge.name = "tiny", "float32", "phrases"
  config.steps = 3
  config = recipes.frozen(config)
  users = environments.load(config.environment)[:6]
  path = synthetic_runs.write_run(path, steps=3, eval_every=3)
  info = files.read_json(path / "config.json") | {"config": to_json(config)}
  (path / "config.json").write_text(json.dumps(info))
  records = []
  for step in (1, 2, 3):
    for p, user in enumerate(users[2 * step - 2 : 2 * step]):
      for g, (stance, text) in enumerate(REPLIES.items()):
        ids = model.chat.encode_text(text)
        records.append(
          {"step": step, "prompt": p, "sample": g, "scenario_id": user.id, "tokens": ids,
           "environment": user.environment, "topic": user.topic, "is_gameable": user.is_gameable,
           "factors": {}, "messages": environments.policy_messages(user), "completion": text,
           "logprobs": [], "length": len(ids), "finished": True, "reward": 5.0,
           "hex": 9.0 if stance == "agree" else 1.5, "acc": 1.0 if stance == "agree" else 9.0}
        )  # fmt: skip
  (path / "rollouts" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  for old in (path / "eval").glob("step_*.jsonl"):
    old.unlink()
  return read.load_run(path)
