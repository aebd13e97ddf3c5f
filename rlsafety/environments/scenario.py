"""Scenarios: what policy, judge and evaluators each get to see, as factors of one config.

An environment is a point in a space of independent factors. `load`
applies the factors of a config to the people of an environment's bank, or to the published
files, and returns plain records; the three `*_messages` functions turn a record into chat
messages. Changing one factor leaves every other text identical (tests/test_environments.py).
"""

import collections
import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from rlsafety.environments import framing, published, rubrics, users_file
from rlsafety.environments.people import Person, heldout_units, uniform
from rlsafety.environments.section import FACTORS, Environment
from rlsafety.errors import UserError
from rlsafety.flags import did_you_mean

# Stands for the reply in judge and evaluator messages: exactly one message is this text.
REPLY = "\u27e6reply\u27e7"

ENVIRONMENTS = ("action_advice", "therapy_talk", "political_qa", "neutral")

@dataclasses.dataclass(frozen=True)
class Scenario:
  """One user and one message, with every factor applied.

  unit: what is held out as a whole (an issue, a situation); its users share sentences.
  system, user: what the policy sees (`user` holds notes and message). message: the user's
  words alone, which judge and evaluators see. wish: what this user wants, for the judge only.
  factors: the fields that made the texts; they travel into rollouts and analysis.
  """

  id: str
  environment: str
  topic: str
  unit: str
  is_gameable: bool
  split: str  # "train" or "heldout"
  system: str
  user: str
  message: str
  wish: str
  factors: dict[str, str | float | bool]


def environment_module(name: str) -> ModuleType:
  """The module of an environment: one of ours, or any importable "package.module"."""
  if name in ENVIRONMENTS:
    return importlib.import_module(f"rlsafety.environments.{name}")
  if "." in name:
    try:
      module = importlib.import_module(name)
    except (ImportError, ValueError) as error:
      raise UserError(f"environment.name: cannot import {name!r} ({error})") from None
    for needed in ("DEFAULTS", "TOPICS", "RUBRICS", "people"):
      if not hasattr(module, needed):
        raise UserError(
          f"environment.name: {name!r} is no environment, it has no {needed} (see "
          "docs/new_environment.md)"
        )
    return module
  raise UserError(
    f"environment.name: {name!r} is not one of {', '.join(ENVIRONMENTS)}, and has no dot to be "
    "the module of your own (see docs/new_environment.md)"
  )


def default_config(name: str) -> dict[str, Any]:
  """The environment's fields with their defaults, for the `environment` part of a config."""
  return {"name": name, **FACTORS, **environment_module(name).DEFAULTS}


def load(section: Environment | Mapping[str, Any]) -> list[Scenario]:
  """All scenarios of one environment config, train and held-out, in a fixed shuffled order.

  Args:
    section: of a config, or any mapping with `name` and some of its fields.
  Raises:
    UserError: unknown field or value, with the accepted ones; a bad file of users.
  """
  given = dataclasses.asdict(section) if isinstance(section, Environment) else section
  factors = resolved(given)
  if factors["data_dir"] or factors["users_file"]:
    return _from_files(factors)
  everyone = people_of(environment_module(factors["name"]), factors["seed"])
  gameable = assign_groups(everyone, factors["gameable_fraction"], factors["seed"])
  units = [(person.topic, person.unit) for person in everyone]
  heldout = heldout_units(units, factors["heldout_fraction"], factors["seed"])
  scenarios = []
  for person in everyone:
    if person.topic not in factors["topics"]:
      continue
    group = person.id in gameable
    message = framing.message_text(person, group, factors)
    notes = framing.notes_lines(person, group, factors)
    scenarios.append(
      Scenario(
        id=person.id,
        environment=factors["name"],
        topic=person.topic,
        unit=person.unit,
        is_gameable=group,
        split="heldout" if person.unit in heldout else "train",
        system=framing.system_prompt(person.id, group, factors),
        user=framing.user_turn(notes, message),
        message=message,
        wish=person.wishes[not group],
        factors=_recorded(factors),
      )
    )
  return _mixed(scenarios, factors["seed"])


def _mixed(scenarios: list[Scenario], seed: int) -> list[Scenario]:
  """Shuffled by turns of topic and group, so that any first n are a fair sample."""
  turns: collections.Counter = collections.Counter()
  keyed = []
  for one in sorted(scenarios, key=lambda one: uniform(seed, "order", one.id)):
    cell = (one.topic, one.is_gameable, one.split)
    keyed.append((turns[cell], len(keyed), one))
    turns[cell] += 1
  return [one for _, _, one in sorted(keyed, key=lambda entry: entry[:2])]


@functools.lru_cache(maxsize=8)
def people_of(module: ModuleType, seed: int) -> tuple[Person, ...]:
  """The people of an environment, before any factor."""
  return tuple(module.people(seed))


def policy_messages(scenario: Scenario) -> list[dict[str, str]]:
  """What the policy answers. No wish; no group label unless the config asked for it."""
  return [
    {"role": "system", "content": scenario.system},
    {"role": "user", "content": scenario.user},
  ]


def judge_messages(scenario: Scenario) -> list[dict[str, str]]:
  """The rating prompt of the simulated user, 1 to 10, with the slot REPLY."""
  wording = rubrics.WORDINGS[scenario.factors["reward_wording"]].replace("{wish}", scenario.wish)
  return rubrics.rating_messages(wording, scenario.message, REPLY)


def evaluator_messages(scenario: Scenario, metric: str) -> list[dict[str, str]]:
  """The prompt of the evaluator `metric` ("acc" or "hex"), with the slot REPLY."""
  name = environment_module(scenario.environment).RUBRICS[metric]
  return rubrics.rating_messages(rubrics.EVALUATORS[name], scenario.message, REPLY)


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


def resolved(section: Mapping[str, Any]) -> dict[str, Any]:
  """Every field of an environment config with its final value.

  A field that is missing or None has the default of the module that `name` selects, else that of
  `FACTORS`; so a name brings its own defaults, wherever it is written. No topics means all.

  Raises:
    UserError: a field or value that does not exist, with those that do.
  """
  given = {field: value for field, value in section.items() if value is not None}
  if "name" not in given:
    raise UserError(f"environment.name is missing: one of {', '.join(ENVIRONMENTS)}")
  module = environment_module(given["name"])
  for field in section:
    if field not in FACTORS and field != "name":
      raise UserError(
        f"environment.{field}: no such field{did_you_mean(field, FACTORS)}; "
        f"known are name, {', '.join(FACTORS)}"
      )
  own = default_config(given["name"])
  if given.get("users_file"):
    own |= users_file.FIXED
  factors = own | given

  def accept(field, values, accepted):
    for value in values:
      if value not in accepted:
        raise UserError(f"environment.{field}: {value!r} is not one of {', '.join(accepted)}")

  accept("framing", [factors["framing"]], framing.FRAMINGS)
  accept("reward_wording", [factors["reward_wording"]], rubrics.WORDINGS)
  accept("length", [factors["length"]], ("full", "short"))
  if factors["cue"] != "none":
    accept("cue", str(factors["cue"]).split("+"), ("none", *framing.CUES))
    if "none" in factors["cue"].split("+"):
      raise UserError(f"environment.cue: {factors['cue']!r} joins 'none' with other cues")
  for field in ("cue_strength", "gameable_fraction", "heldout_fraction"):
    value = factors[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
      raise UserError(f"environment.{field}: {value!r} is not a number from 0 to 1")
  if not isinstance(factors["label_in_prompt"], bool):
    raise UserError(f"environment.label_in_prompt: {factors['label_in_prompt']!r} is not a bool")
  if not isinstance(factors["seed"], int):
    raise UserError(f"environment.seed: {factors['seed']!r} is not an integer")
  for field in ("data_dir", "users_file"):
    if not isinstance(factors[field], str):
      raise UserError(f"environment.{field}: {factors[field]!r} is not a path")
  if factors["data_dir"] and factors["users_file"]:
    raise UserError("environment.data_dir and environment.users_file: give only one of them")
  topics = factors["topics"]
  topics = (topics,) if isinstance(topics, str) and topics else tuple(topics)
  if not factors["data_dir"] and not factors["users_file"]:
    accept("topics", topics, module.TOPICS)
    topics = topics or module.TOPICS
  return factors | {"topics": topics}


def _recorded(factors: dict[str, Any]) -> dict[str, str | float | bool]:
  """The factors as a record keeps them: those that decide about the texts of a scenario."""
  left_out = ("name", "topics", "data_dir", "users_file", "heldout_fraction")
  return {name: value for name, value in factors.items() if name not in left_out}


def _from_files(factors: dict[str, Any]) -> list[Scenario]:
  """The scenarios of the published files or of a file of one's own."""
  scenarios = []
  for user in (published if factors["data_dir"] else users_file).read(factors):
    if REPLY in user.user + user.wish:
      raise UserError(f"{user.id}: the text contains the reply slot {REPLY}")
    scenarios.append(
      Scenario(
        id=user.id,
        environment=factors["name"],
        topic=user.topic,
        unit=user.unit,
        is_gameable=user.is_gameable,
        split="heldout" if user.is_heldout else "train",
        system=framing.system_prompt(user.id, user.is_gameable, factors),
        user=user.user,
        message=user.message,
        wish=user.wish,
        factors=_recorded(factors),
      )
    )
  return _mixed(scenarios, factors["seed"])
