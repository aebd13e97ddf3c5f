"""How far two judges agree on the rollouts of finished runs.

  python -m rlsafety.tools.agreement --runs='runs/**' --name=big [--against=OTHER] [--out=FILE.csv]

Compares the scores NAME of rlsafety.tools.rescore with the runs' own, or with OTHER.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterable, Sequence

import pandas as pd

from rlsafety import files, flags
from rlsafety.errors import UserError, run_main
from rlsafety.metrics import gaps
from rlsafety.rundir import read
from rlsafety.rundir.read import Run
from rlsafety.study import gather, statistics
from rlsafety.tools.rescore import place, select


def agreement(runs: Sequence[Run], name: str, against: str = "") -> pd.DataFrame:
  """Two judges on the same rollouts: one row per slice and score.

  Slices: all, each environment, each group. Pearson, Spearman and Kendall correlation,
  the share within one point, both means, and n: rollouts that both could score. No p-value,
  so no correction; seeds and runs are those that have scores of both.

  Raises:
    UserError: no rollout has scores of both.
  """
  rows = []
  for run in runs:
    own = {place(r): r for r in select(run, "both")}
    first = stored_scores(run, against) if against else own
    second = stored_scores(run, name)
    for key in first.keys() & second.keys() & own.keys():
      for score in gaps.SCORES:
        a, b = (read.number(scores[key].get(score)) for scores in (first, second))
        group = "gameable" if own[key]["is_gameable"] else "non_gameable"
        rows.append((score, read.environment_name(run), group, a, b, run.info["seed"], run.path))
  if not rows:
    raise UserError(f"--name={name}: no rollout has scores of both judges")
  columns = ["score", "environment", "group", "a", "b", "seed", "run"]
  data = pd.DataFrame(rows, columns=columns)
  slices = [("all", data)]
  slices += [(f"environment {e}", d) for e, d in data.groupby("environment")]
  slices += list(data.groupby("group"))
  out = []
  for (label, part), score in itertools.product(slices, gaps.SCORES):
    part = part[part["score"] == score]
    both = part.dropna()
    row = {"slice": label, "score": score, "unscored": len(part) - len(both)}
    row |= statistics.agreement(both["a"].to_numpy(), both["b"].to_numpy())
    row |= {"mean_first": both["a"].mean(), "mean_second": both["b"].mean()}
    row |= {"seeds": listed(part["seed"]), "correction": "none", "runs": listed(part["run"])}
    out.append(row)
  return pd.DataFrame(out)


def stored_scores(run: Run, name: str) -> dict[tuple, dict]:
  """{place of a rollout: its line in RUN/scores/NAME.jsonl}."""
  return {place(r): r for r in files.read_jsonl(run.path / "scores" / f"{name}.jsonl")}


def listed(values: Iterable) -> str:
  """Distinct values as one cell of a table."""
  return " ".join(sorted(set(map(str, values))))


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.agreement")
  parser.add_argument("--runs", required=True, help="globs of run directories, joined by commas")
  parser.add_argument(
    "--name", required=True, type=flags.plain_word, help="scores by rlsafety.tools.rescore"
  )
  parser.add_argument("--against", default="", help="other such scores; default: the runs' own")
  parser.add_argument("--out", type=pathlib.Path, help="also write the table as CSV")
  args = flags.parse(parser, argv)
  table = agreement(gather.find_runs(args.runs.split(","))[0], args.name, args.against)
  shown = table.drop(columns=["seeds", "correction", "runs"])
  print(shown.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)


if __name__ == "__main__":
  run_main(main, sys.argv)
