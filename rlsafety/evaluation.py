"""Held-out evaluation: the same users and sampling keys at every evaluated step."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import config, progress, runtime, sampler, sharding
from rlsafety.errors import UserError
from rlsafety.metrics import gaps, matched
from rlsafety.models import scoring
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.chat import Chat
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.rollout import Experience, Users
from rlsafety.rundir import write
from rlsafety.types import Prompts

# Of one cell: the records of eval/step_N.jsonl, and {score: [P, G]}.
Answered = tuple[list[dict], dict[str, np.ndarray]]


def ask(
  roll_out: Callable[[Sequence[Adapter], Sequence[Users], Sequence[jax.Array]], list[Experience]],
  adapters: Sequence[Adapter],
  users: Sequence[Users],
  keys: Sequence[jax.Array],
  step: int,
  *,
  chat: Chat,
  prompts_at_once: int,
  told: runtime.Told,
  reference: Model,
  chunk_tokens: int = 2048,
) -> list[Answered] | None:
  """Asks every cell's held-out users, `prompts_at_once` of each cell in a call.

  roll_out: `rollout.roll_out` of these cells with everything bound but these. adapters, users,
  keys: one of each for every cell. reference: the base; records get `base_logprob` under it, the
  mean over a reply's tokens, in nats; chunk_tokens: tokens whose logits exist at once there.
  None if a signal came before the last call: nothing is kept.
  """
  row_keys = [
    sampler.row_keys(key, np.array(numbers(asked))) for key, asked in zip(keys, users, strict=True)
  ]
  rows, pieces = [[] for _ in users], [[] for _ in users]
  for start in progress.bar(range(0, max(map(len, users)), prompts_at_once), "held-out users"):
    if sharding.any_process(told.signal > 0):
      return None
    # Static shapes: the last call, and a cell with fewer users, begin again with the first.
    chosen = [np.arange(start, start + prompts_at_once) % len(asked) for asked in users]
    asked = [u.take(rows_of) for u, rows_of in zip(users, chosen, strict=True)]
    own_keys = [k[rows_of] for k, rows_of in zip(row_keys, chosen, strict=True)]
    for i, got in enumerate(roll_out(adapters, asked, own_keys)):
      n = max(0, min(prompts_at_once, len(users[i]) - start))
      found = sharding.fetch((got.rollouts, got.scores))
      rollouts, scores = jax.tree.map(lambda x, n=n: x[:n], found)
      own = write.rollout_records(step, start, asked[i].take(range(n)), chat, rollouts, scores)
      replies = got.rollouts.tokens, got.rollouts.lengths
      mean = mean_logprob(reference.params, reference.config, got.prompts, *replies, chunk_tokens)
      flat = sharding.fetch(mean)[:n].ravel()
      rows[i] += [r | {"base_logprob": float(x)} for r, x in zip(own, flat, strict=True)]
      pieces[i].append(scores)
  return [
    (own, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    for own, parts in zip(rows, pieces, strict=True)
  ]


@functools.partial(jax.jit, static_argnames=("config", "chunk_tokens"))
def mean_logprob(
  params: dict, config: ModelConfig, prompts: Prompts, tokens: jax.Array, lengths: jax.Array,
  chunk_tokens: int,
) -> jax.Array:  # fmt: skip
  """[P, G]: mean log-prob of a reply's tokens [P, G, T] under the base alone; NaN without any."""
  scored = scoring.token_scores(
    params, None, config, prompts, tokens, lengths, chunk_tokens=chunk_tokens
  )
  return jnp.where(lengths > 0, scored.logprobs.sum(-1) / lengths, jnp.nan)


def numbers(users: Users) -> list[int]:
  """A number for each user that names its sampling key: the versions of one person share it."""
  seen: dict[str, int] = {}
  return [seen.setdefault(s.person, len(seen)) for s in users.scenarios]


def summarised(
  step: int,
  users: Users,
  rows: Sequence[Mapping],
  scores: Mapping[str, np.ndarray],
  rubric_of: Mapping[str, str],
) -> dict:
  """The line of eval/summary.jsonl of one evaluation; rows, scores: as `ask` gives them.

  Its standard errors are over units: what a person's two versions share is in no gap.
  """
  summary = {"step": step, "prompts": len(users), "samples": scores["reward"].shape[1]}
  summary |= gaps.group_means(scores, users.is_gameable)
  summary |= matched.errors(scores, users.is_gameable, [s.unit for s in users.scenarios])
  summary |= matched.verdict_shares(scores, np.array([row["finished"] for row in rows]))
  return summary | gaps.threshold_rates(scores, users.is_gameable, rubric_of)


def task_lines(summary: Mapping) -> list[str]:
  """One line for every number of Inspect's tasks in a line of eval/summary.jsonl."""
  out = []
  for name, found in summary.get("tasks", {}).items():
    where = f"task {name} at step {summary['step']}"
    if "error" in found:
      out.append(f"{where}: failed, the run goes on: {found['error']}")
    else:
      stderr = f" (stderr {found['stderr']:.3f})" if np.isfinite(found["stderr"]) else ""
      out.append(f"{where}: {found['value']:.3f}{stderr}, {found['n']} samples")
  return out


def tasks_of(settings: config.Eval) -> Callable[..., dict] | None:
  """`serve.tasks.ask` of the tasks that the config names, None where it names none.

  Raises UserError where Inspect, a task or a single process is missing.
  """
  if not settings.tasks:
    return None
  try:
    from rlsafety.serve import tasks  # Inspect and a server, extras that no other run needs
  except ImportError as error:
    raise UserError(f"eval.tasks: {error}; run: pip install 'rlsafety[inspect]'") from None
  tasks.check(settings.tasks)
  return functools.partial(tasks.ask, settings)
