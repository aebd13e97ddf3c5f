"""Users of other environments, asked of a policy as its own held-out users are.

`config.eval.beyond` names the environments; `environments.open_questions` is one that nobody
trains in. The replies of step N lie in RUN/eval/ENVIRONMENT/step_N.jsonl, and about.json beside
them says whose scores they carry. `report.beyond` reads them.
"""

import dataclasses
import zlib
from collections.abc import Sequence

from jax.sharding import Mesh

from rlsafety import environments, rollout
from rlsafety.config import Config
from rlsafety.environments import Environment
from rlsafety.errors import UserError
from rlsafety.judges import Judge, open_judge, probe, questions
from rlsafety.models.model import Model
from rlsafety.rollout import Users


@dataclasses.dataclass(frozen=True)
class Beyond:
  """The held-out users of another environment, and who scores the replies to them.

  about: "judge", its name; "gate", as in `Judge.about`; "foreign": why its ACC and HEX of these
  users say little, "" where they were made for them.
  """

  name: str
  users: Users
  judge: Judge
  about: dict


def section_of(name: str, own: Environment) -> Environment:
  """Another environment with its own defaults, and the people, split and length of a run's."""
  shared = {k: getattr(own, k) for k in ("seed", "heldout_seed", "length")}
  return Environment(**environments.resolved({"name": name, **shared}))


def open_beyond(
  name: str, config: Config, policy: Model, mesh: Mesh, own: Judge, models: dict[str, Model],
  count: int, slots: int,
) -> Beyond:  # fmt: skip
  """The first `count` users and their judge. own: the run's judge. slots: of a prompt.

  A probe knows the environment that it was fitted for, and questions are an environment's. Where
  none are there for this one, the run's own judge is asked and `foreign` says so; other judges
  read any user.
  """
  if name == config.environment.name:
    raise UserError(f"eval.beyond: {name} is the environment that this run trains in; leave it out")
  section, settings = section_of(name, config.environment), config.judge
  chosen = rollout.held_out(section, environments.load(section), count)
  users = rollout.users_of(chosen, policy.chat, slots)
  fitted = config.environment.name
  foreign, judge, named = "", own, {settings.name, settings.evaluator}
  if not named & {"probe", "questions"}:
    judge = open_judge(settings, section, policy, mesh, config.learner.chunk_tokens, models)
  elif probe.dataset(name) != probe.dataset(fitted):
    ships = "probe" not in named or probe.shipped(name, policy).exists()
    if ships and ("questions" not in named or probe.dataset(name) in questions.QUESTIONS):
      shipped = dataclasses.replace(
        settings,
        model="" if settings.name == "probe" else settings.model,
        evaluator_model="" if settings.evaluator == "probe" else settings.evaluator_model,
        heads="",
      )
      judge = open_judge(shipped, section, policy, mesh, config.learner.chunk_tokens, models)
    else:
      foreign = f"the judge's heads were fitted on {probe.dataset(fitted)} replies alone"
  about = {"judge": judge.about["name"], "gate": judge.about.get("gate", {}), "foreign": foreign}
  about["by_topic"] = name in environments.OUTSIDE  # where topics are the factors of a table
  return Beyond(name, users, judge, about)


def stream(name: str) -> int:
  """The number of an environment's sampling keys, beside those of a run's own (0 to 2)."""
  return 3 + zlib.crc32(name.encode()) % 2**30


def lines(found: Sequence[Beyond]) -> list[str]:
  """One line each, for the log."""
  return [
    f"beyond: {len(b.users)} prompts of {b.name}, scored by {b.about['judge']}"
    + (f" ({b.about['foreign']})" if b.about["foreign"] else "")
    for b in found
  ]
