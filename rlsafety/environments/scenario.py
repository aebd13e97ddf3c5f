"""Scenarios: what policy, judge and evaluators each get to see, as factors of one config.

An environment is a point in a space of independent factors. `load` applies the factors of a
config to the people of an environment's bank, or to users from files; the three `*_messages`
functions turn a scenario into chat messages. Changing one factor leaves every other text
identical (tests/test_environments.py).
"""

import collections
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from rlsafety.environments import framing, published, rubrics, users_file
from rlsafety.environments.people import Person, User, heldout_units, uniform
from rlsafety.environments.section import Environment
from rlsafety.errors import UserError, import_own, own_code

# Stands for the reply in judge and evaluator messages: exactly one message is this text.
REPLY = "\u27e6reply\u27e7"

ENVIRONMENTS = ("action_advice", "therapy_talk", "political_qa", "neutral")
OUTSIDE = ("open_questions",)  # asked, and never trained in


@dataclasses.dataclass(frozen=True)
class Scenario:
  """One user and one message, with every factor applied.

  person: who they are, the same in both versions, gameable and not.
  unit: what is held out as a whole (an issue, a situation); its users share sentences.
  system, user: what the policy sees (`user` holds notes and message). message: the user's
  words alone, which the judge sees. plain: the same without any cue, so the same for either
  group, which evaluators see (of users from files: the message). wish: what this user wants, for
  the judge only.
  factors: the fields that made the texts; they travel into rollouts and analysis.
  """

  id: str
  person: str
  environment: str
  topic: str
  unit: str
  is_gameable: bool
  split: str  # "train" or "heldout"
  system: str
  user: str
  message: str
  plain: str
  wish: str
  factors: dict[str, str | float | bool]


def environment_module(name: str) -> ModuleType:
  """The module of an environment: one of ours, or any importable "package.module"."""
  if name in (*ENVIRONMENTS, *OUTSIDE):
    return importlib.import_module(f"rlsafety.environments.{name}")
  if "." in name:
    module = import_own("environment.name", name, name)
    for needed in ("DEFAULTS", "TOPICS", "RUBRICS", "people"):
      if not hasattr(module, needed):
        raise UserError(
          f"environment.name: {name!r} is no environment, it has no {needed} (see "
          "docs/new_environment.md)"
        )
    return module
  raise UserError(
    f"environment.name: {name!r} is not one of {', '.join((*ENVIRONMENTS, *OUTSIDE))}, and has no "
    "dot to be the module of your own (see docs/new_environment.md)"
  )


def load(section: Environment | Mapping[str, Any]) -> list[Scenario]:
  """All scenarios of one environment config, train and held-out, in a fixed shuffled order.

  Args:
    section: of a config, or any mapping with `name` and some of its fields.
  Raises:
    UserError: unknown field or value, with the accepted ones; a bad file of users.
  """
  factors = resolved(section)
  if factors["users_file"]:
    return _scenarios(users_file.read(factors), factors)
  if factors["data_dir"]:
    return _scenarios(published.read(factors), factors)
  module = environment_module(factors["name"])
  return list(_of_module(module.people, tuple(factors.items())))


@functools.lru_cache(maxsize=32)
def _of_module(people: Callable, factors: tuple[tuple[str, Any], ...]) -> tuple[Scenario, ...]:
  """`load` of a module's users, made once: a run asks for the same ones several times. people: the
  module's, another one after a reload."""
  return tuple(_scenarios(bank_users(dict(factors)), dict(factors)))


def _scenarios(users: Iterable[User], factors: dict[str, Any]) -> list[Scenario]:
  # What decides about the texts of a scenario; it travels into records.
  left_out = ("name", "topics", "data_dir", "users_file", "heldout_fraction")
  recorded = {name: value for name, value in factors.items() if name not in left_out}
  scenarios = []
  for user in users:
    if REPLY in user.user + user.wish:
      raise UserError(f"{user.id}: the text contains the reply slot {REPLY}")
    scenarios.append(
      Scenario(
        id=user.id,
        person=user.id,
        environment=factors["name"],
        topic=user.topic,
        unit=user.unit,
        is_gameable=user.is_gameable,
        split="heldout" if user.is_heldout else "train",
        system=framing.system_prompt(user.id, user.is_gameable, factors),
        user=user.user + (framing.BRIEF if factors["length"] == "short" else ""),
        message=user.message,
        plain=user.plain or user.message,
        wish=user.wish,
        factors=dict(recorded),
      )
    )
  return _mixed(scenarios, factors["seed"])


def heldout_pairs(section: Environment | Mapping[str, Any]) -> list[tuple[Scenario, Scenario]]:
  """Every held-out person in both versions, (gameable, not), in the order of `load`.

  Raises:
    UserError: users of files, who exist in one version only.
  """
  factors = resolved(section)
  for field in ("data_dir", "users_file"):
    if factors[field]:
      raise UserError(f"environment.{field}={factors[field]!r}: its users have one version each")
  others = {s.person: s for s in load(factors | {"gameable_fraction": 0.0})}
  everyone = load(factors | {"gameable_fraction": 1.0})
  return [(s, others[s.person]) for s in everyone if s.split == "heldout"]


def bank_users(factors: dict[str, Any]) -> list[User]:
  """The people of an environment's module, with their group, split and texts."""
  everyone = people_of(environment_module(factors["name"]), factors["seed"])
  gameable = assign_groups(everyone, factors["gameable_fraction"], factors["seed"])
  units = [(person.topic, person.unit) for person in everyone]
  heldout = heldout_units(units, factors)
  users = []
  for person in everyone:
    if person.topic in factors["topics"]:
      group = person.id in gameable
      is_heldout = person.unit in heldout
      message = framing.message_text(person, group, factors, is_heldout)
      notes = framing.notes_lines(person, group, factors, is_heldout)
      shown = framing.user_turn(notes, message)
      about = (person.id, person.topic, person.unit, group, is_heldout)
      plain = framing.message_text(person, group, factors | {"cue": "none"}, is_heldout)
      users.append(User(*about, shown, message, person.wishes[not group], plain))
  return users


def _mixed(scenarios: list[Scenario], seed: int) -> list[Scenario]:
  """Shuffled by turns of topic and group, so that any first n are a fair sample."""
  turns: collections.Counter = collections.Counter()
  keyed = []
  for one in sorted(scenarios, key=lambda one: uniform(seed, "order", one.id)):
    cell = (one.topic, one.is_gameable, one.split)
    keyed.append((turns[cell], len(keyed), one))
    turns[cell] += 1
  return [one for _, _, one in sorted(keyed, key=lambda entry: entry[:2])]


def people_of(module: ModuleType, seed: int) -> tuple[Person, ...]:
  """The people of an environment, before any factor."""
  if module.__name__.startswith("rlsafety."):  # a fault of ours keeps its traceback
    return _made(module.people, seed)
  with own_code(f"environment.name={module.__name__}"):
    return _made(module.people, seed)


@functools.lru_cache(maxsize=8)
def _made(people: Callable[[int], Iterable[Person]], seed: int) -> tuple[Person, ...]:
  return tuple(people(seed))


def policy_messages(scenario: Scenario) -> list[dict[str, str]]:
  """What the policy answers. No wish; no group label unless the config asked for it."""
  return [
    {"role": "system", "content": scenario.system},
    {"role": "user", "content": scenario.user},
  ]


def judge_messages(scenario: Scenario) -> list[dict[str, str]]:
  """The question for the simulated user's reward, 1 to 10, with the slot REPLY."""
  wording = rubrics.WORDINGS[str(scenario.factors["reward_wording"])]
  return rubrics.score_messages(wording.replace("{wish}", scenario.wish), scenario.message, REPLY)


def evaluator_messages(scenario: Scenario, metric: str) -> list[dict[str, str]]:
  """The question for the evaluator `metric` ("acc" or "hex"), with the slot REPLY."""
  name = environment_module(scenario.environment).RUBRICS[metric]
  return rubrics.score_messages(rubrics.EVALUATORS[name], scenario.plain, REPLY)


def assign_groups(everyone: Sequence[Person], fraction: float, seed: int) -> set[str]:
  """Ids of the gameable users.

  Both groups get users of every unit, so content does not tell the group. A larger fraction
  only adds users; the split, the topics and all other factors do not move anyone.
  """
  units: dict[tuple[str, str], list[Person]] = {}
  for person in everyone:
    units.setdefault((person.topic, person.unit), []).append(person)
  chosen = set()
  for number, members in enumerate(units.values()):
    members = sorted(members, key=lambda person: uniform(seed, "group", person.id))
    # Golden-ratio offsets spread the rounding evenly over units.
    offset = (number * 0.6180339887) % 1.0
    chosen |= {m.id for rank, m in enumerate(members) if (rank + offset) / len(members) < fraction}
  return chosen


def resolved(section: Environment | Mapping[str, Any]) -> dict[str, Any]:
  """Every field of an environment config with its final value.

  A field that is missing or None has the default of the module that `name` selects, else that of
  `Environment`; so a name brings its own defaults, wherever it is written. No topics means all.

  Raises:
    UserError: a field or value that does not exist, with those that do.
  """
  stated = dataclasses.asdict(section) if isinstance(section, Environment) else section
  given = {field: value for field, value in stated.items() if value is not None}
  if not given.get("name"):
    raise UserError(f"environment.name is missing: one of {', '.join(ENVIRONMENTS)}")
  module = environment_module(given["name"])
  own = {**module.DEFAULTS, **(users_file.FIXED if given.get("users_file") else {})}
  if given.get("data_dir"):
    own["cue"] = published.CUE.get(given["name"], "style")
  if isinstance(given.get("topics"), str):
    given["topics"] = tuple(filter(None, given["topics"].split(",")))
  factors = dataclasses.asdict(Environment.of({**own, **given}))

  def accept(field: str, values: Iterable[str], accepted: Iterable[str]) -> None:
    for value in values:
      if value not in accepted:
        raise UserError(f"environment.{field}: {value!r} is not one of {', '.join(accepted)}")

  accept("framing", [factors["framing"]], framing.FRAMINGS)
  accept("reward_wording", [factors["reward_wording"]], rubrics.WORDINGS)
  accept("length", [factors["length"]], ("full", "short"))
  cues = factors["cue"].split("+")
  accept("cue", cues, ("none", *framing.CUES))
  if "none" in cues and len(cues) > 1:
    raise UserError(f"environment.cue: {factors['cue']!r} joins 'none' with other cues")
  if factors["data_dir"] and factors["users_file"]:
    raise UserError("environment.data_dir and environment.users_file: give only one of them")
  if not factors["data_dir"] and not factors["users_file"]:
    accept("topics", factors["topics"], module.TOPICS)
    factors["topics"] = factors["topics"] or tuple(module.TOPICS)
  return factors
