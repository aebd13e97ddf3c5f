"""Records of neutral replies: a policy that learns them becomes fluent and nothing else.

  python -m rlsafety.tools.neutral --config=configs/smollm2.py:env=political_qa --out=neutral
  python -m rlsafety.tools.record --jsonl neutral.train.jsonl --out data/neutral
  python -m rlsafety.train --config=configs/smollm2.py:env=political_qa,method=sft \
      --config.data.path=data/neutral --config.steps=15

Training users of political_qa or action_advice are told in sober sentences what the issue or the
situation is about: no stance, no warmth, no warning and no side is in them. Neither HEX nor ACC
should change by this; docs/measurement.md, "Fluency alone", has what they do. Every fifth issue
(of advice: a topic) goes to OUT.kept.jsonl, for the loss on texts that were not learned.
"""

import itertools
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from rlsafety import environments, files, flags, recipes
from rlsafety.environments import people
from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError, run_main

TEXTS = pathlib.Path(__file__).parent / "data/neutral.json"
KEPT = 5  # one issue or topic of so many is not learned


def key_of(user: Scenario) -> str:
  """What the texts are sorted by: the issue, or the topic of a situation."""
  return user.unit.partition("/")[0]


def replies(user: Scenario, texts: Mapping, rng: np.random.Generator) -> list[str]:
  """All neutral replies to one user, shuffled: two sentences, of which one may name the plan.

  One alone would often be shorter than what judges take for an answer (`probe.MIN_TOKENS`)."""
  sentences = texts[user.environment][key_of(user)]
  firsts = []
  if number := user.unit.partition("/")[2]:
    act = people.bank(user.environment)["topics"][user.topic]["situations"][int(number)][1]
    for word, other in (("I", "you"), ("me", "you"), ("my", "your")):
      act = re.sub(rf"\b{word}\b", other, act)
    firsts = [start.replace("{act}", act) for start in texts["act"]]
  pairs = [*itertools.product(firsts, sentences), *itertools.permutations(sentences, 2)]
  made = [" ".join(pair) for pair in pairs]
  return [made[i] for i in rng.permutation(len(made))]


def records(users: Sequence[Scenario], count: int) -> tuple[list[dict], list[dict]]:
  """(to learn, kept back): `count` replies to each training user, one after the other."""
  texts, rng = files.read_json(TEXTS), np.random.default_rng(0)
  keys = sorted(texts[users[0].environment])
  out: tuple[list[dict], list[dict]] = [], []
  for user in (u for u in users if u.split == "train"):
    if key_of(user) not in keys:
      raise UserError(f"no neutral text on {key_of(user)!r}; the texts are for heldout_seed=0")
    shared = {"messages": environments.policy_messages(user), "is_gameable": user.is_gameable}
    kept = keys.index(key_of(user)) % KEPT == KEPT - 1
    out[kept].extend(shared | {"completion": text} for text in replies(user, texts, rng)[:count])
  return out


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.neutral")
  parser.add_argument("--out", required=True, type=pathlib.Path, metavar="STEM", help="two files")
  config, args = recipes.from_flags(parser, argv)
  name = config.environment.name
  if name not in files.read_json(TEXTS):
    raise UserError(f"environment.name={name}: neutral texts are for political_qa, action_advice")
  users = environments.load(config.environment)
  for kind, rows in zip(("train", "kept"), records(users, config.sampler.group), strict=True):
    path = args.out.with_name(f"{args.out.name}.{kind}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} replies")


if __name__ == "__main__":
  run_main(main, sys.argv)
