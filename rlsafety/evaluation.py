"""Held-out evaluation: the same users and sampling keys at every evaluated step."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from rlsafety import sharding
from rlsafety.metrics import gaps
from rlsafety.models.chat import Chat
from rlsafety.models.lora import Adapter
from rlsafety.rollout import Experience, Users
from rlsafety.rundir import write


def evaluate(
  roll_out: Callable[[Adapter, Users, jax.Array], Experience],
  adapter: Adapter,
  users: Users,
  key: jax.Array,
  step: int,
  *,
  chat: Chat,
  prompts_at_once: int,
  rubric_of: Mapping[str, str],
) -> tuple[list[dict], dict]:
  """Asks all held-out users, `prompts_at_once` in a call.

  roll_out: `rollout.roll_out` with everything bound but these. Returns the records of
  eval/step_N.jsonl and the line of eval/summary.jsonl.
  """
  rows, pieces = [], []
  for start in range(0, len(users), prompts_at_once):
    chosen = np.arange(start, start + prompts_at_once) % len(users)  # static shapes: wrap around
    real = min(prompts_at_once, len(users) - start)
    asked = users.take(chosen)
    experience = roll_out(adapter, asked, jax.random.fold_in(key, start))
    rollouts, scores = sharding.fetch((experience.rollouts, experience.scores))
    rollouts, scores = jax.tree.map(lambda x, n=real: x[:n], (rollouts, scores))
    rows += write.rollout_records(step, start, asked.take(range(real)), chat, rollouts, scores)
    pieces.append(scores)
  scores = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
  summary = {"step": step, "prompts": len(users), "samples": scores["reward"].shape[1]}
  summary |= gaps.group_means(scores, users.is_gameable)
  return rows, summary | gaps.threshold_rates(scores, users.is_gameable, rubric_of)
