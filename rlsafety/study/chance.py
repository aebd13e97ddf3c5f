"""How often runs that learn nothing are starred: sweeps drawn from one policy's own replies.

  python -m rlsafety.train --config=configs/smollm2_syco.py --config.steps=0 \
      --config.eval.samples=48 --workdir=runs/pool
  python -m rlsafety.study.chance --pool=runs/pool

At a learning rate of 0 the policy stays what it is, so first and last evaluation are two draws of
its replies. Here they are drawn from the pool: of every held-out person other replies for either
end, at the same places for both versions, who share their sampling keys. Each run is written to a
folder and read back by what stars runs: the report, and the answers to a study's questions, over
--seeds runs against 0 and against as many others. The judge's gate is lifted, which would star
nothing at all of most.
"""

import collections
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from rlsafety import files, flags, progress
from rlsafety.errors import UserError, run_main
from rlsafety.metrics.gaps import SCORES
from rlsafety.metrics.matched import LEVEL
from rlsafety.report import overview
from rlsafety.rundir import read
from rlsafety.study import confirm, design

ANY = "any of these"
FIELDS = ("prompt", "is_gameable", "scenario_id", "unit", "person", "verdict", *SCORES)


def halves(
  records: Sequence[Mapping], samples: int, rng: np.random.Generator
) -> tuple[list[dict], list[dict]]:
  """`samples` replies of every prompt for either evaluation, none in both."""
  size = 1 + max(r["sample"] for r in records)
  place = {p: rng.permutation(size) for p in dict.fromkeys(r.get("person") for r in records)}
  ends: tuple[list[dict], list[dict]] = [], []
  for r in records:
    end, sample = divmod(int(place[r.get("person")][r["sample"]]), samples)
    if end < 2:
      ends[end].append({k: r.get(k) for k in FIELDS} | {"step": end, "sample": sample})
  return ends


def write_run(path: pathlib.Path, info: Mapping, ends: Sequence[list[dict]]) -> None:
  """What report and study read of a run of one update; info: the pool's config.json."""
  (path / "eval").mkdir(parents=True, exist_ok=True)
  gate = {"gate": {name: {"passed": True} for name in SCORES}}
  files.write_json(path / "config.json", {**info, "judge": gate})
  lines = {"summary": [{"step": 0}, {"step": 1}]}
  lines |= {f"step_{step:06d}": rows for step, rows in enumerate(ends)}
  for name, rows in lines.items():
    (path / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def of_report(path: pathlib.Path) -> dict[str, overview.Change]:
  """The rows of a run's table."""
  run = read.load_run(path)
  found = overview.overview(run, read.eval_rollouts(run))
  assert found is not None  # it was written with two evaluations
  rows = ((name, what, cell) for name, own in found.rows.items() for what, cell in own.items())
  return {f"{name} {what}": cell for name, what, cell in rows if not cell.unscored}


def questions(seeds: int) -> design.Study:
  """Of every outcome: did it change in the first `seeds` cells, and more than in the others?"""
  first, others = ([f"{kind}{i}" for i in range(seeds)] for kind in "ab")
  asked = [
    design.Question(f"{outcome}, {kind}", tuple(first), tuple(less), outcome)
    for kind, less in (("one group", ()), ("two groups", others))
    for outcome in design.OUTCOMES
  ]
  return design.Study("chance", dict.fromkeys([*first, *others]), tuple(asked))


def sweeps(pool: read.Run, samples: int, seeds: int, count: int, seed: int) -> list[tuple]:
  """(title, {what can be starred: times}, out of how many) for the rows of a report and a study's
  answers: at their own p, and as they are starred, corrected by Holm."""
  records = read.eval_rollouts(pool)[0]
  rng, study = np.random.default_rng(seed), questions(seeds)
  found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  totals: collections.Counter = collections.Counter()

  def count_in(title: str, starred: Mapping[str, bool]) -> None:
    totals[title] += 1
    found[title].update({name: int(star) for name, star in starred.items()})
    found[title].update({ANY: int(any(starred.values()))})

  with tempfile.TemporaryDirectory() as folder:
    for _ in progress.bar(range(count), "sweeps"):
      for cell in study.cells:
        write_run(pathlib.Path(folder) / cell, pool.info, halves(records, samples, rng))
        rows = of_report(pathlib.Path(folder) / cell)
        count_in("rows of a report, alone", {k: c.effect.notable for k, c in rows.items()})
        count_in("stars of a report", {k: c.notable for k, c in rows.items()})
      answers = confirm.answers(study, pathlib.Path(folder))
      answers = [a for a in answers if np.isfinite(a.p)]
      count_in("answers of a study, alone", {a.question.name: a.p < LEVEL for a in answers})
      count_in(
        "answers of a study, corrected", {a.question.name: a.p_corrected < LEVEL for a in answers}
      )
  return [(title, found[title], totals[title]) for title in found]


def share(times: int, of: int) -> str:
  """Such as "4.5 % [2.1, 8.4]", with the exact binomial interval."""
  ends = stats.binomtest(times, of).proportion_ci(0.95)
  return f"{100 * times / of:5.1f} % [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "study.chance")
  parser.add_argument("--pool", required=True, metavar="RUN_DIR", help="a run with an evaluation")
  parser.add_argument("--samples", type=int, default=2, help="replies to a prompt; default 2")
  parser.add_argument("--seeds", type=int, default=3, help="runs of a group; default 3")
  parser.add_argument("--sweeps", type=int, default=200, help="default 200")
  parser.add_argument("--seed", type=int, default=0, help="of the draws")
  args = flags.parse(parser, argv)
  pool = read.load_run(args.pool)
  size = 1 + max((r["sample"] for r in read.eval_rollouts(pool).get(0, [])), default=-1)
  for name, least in (("samples", 1), ("seeds", 1), ("sweeps", 1)):
    if getattr(args, name) < least:
      raise UserError(f"--{name}={getattr(args, name)}: must be at least {least}")
  if size < 2 * args.samples:
    raise UserError(
      f"--pool={args.pool}: {size} replies to a prompt at step 0, two draws of --samples="
      f"{args.samples} need {2 * args.samples}; --config.eval.samples makes more"
    )
  for title, found, of in sweeps(pool, args.samples, args.seeds, args.sweeps, args.seed):
    print(f"{title}: starred out of {of}")
    for name, times in found.items():
      print(f"  {name:34}{share(times, of)}")


if __name__ == "__main__":
  run_main(main, sys.argv)
