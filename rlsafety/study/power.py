"""How many seeds, held-out units and samples a question needs, from a pilot's finished runs.

  python -m rlsafety.study.power --pilot=runs/pilot/a-5,runs/pilot/a-6 --effect=0.5

The pilot's runs differ in nothing but their seed. Their changes of the outcome, by run and held-out
unit, are split into what differs between seeds, between units, and the rest. Where the pilot has
several replies to each person, the rest is split again into the draw of the replies, which shrinks
with their number, and what seeds do to single units, which does not; else all of it is taken for
the draw. One pilot run tells nothing about seeds: then --sd_seed must.
"""

import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from scipy import stats

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.study import confirm, design, statistics

SEEDS, UNITS, SAMPLES = (2, 3, 5, 8), (8, 16, 32, 64), (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Spread:
  """Standard deviations of a change, in points of rating: between seeds (`seed`), between held-out
  units (`unit`), and of one unit in one seed at the pilot's number of replies (`rest`), of which
  `reply` is the draw of the replies: NaN where one reply each does not show it."""

  seed: float
  unit: float
  rest: float
  reply: float = math.nan


def drawn(run: pathlib.Path, outcome: str) -> float:
  """SD that the draw of the replies gives to a unit's change: of the changes of one reply to each
  person, between replies, over the root of their number. NaN with one reply to each."""
  first, last = confirm.ends(run, outcome)
  of = lambda records, i: [r for r in records if r.get("sample") == i]  # noqa: E731
  samples = sorted({r.get("sample") for r in first} & {r.get("sample") for r in last})
  tables = [confirm.change(of(first, i), of(last, i), outcome) for i in samples]
  units = set.intersection(*map(set, tables)) if tables else set()
  if len(tables) < 2 or not units:
    return math.nan
  d = np.array([[table[unit] for unit in sorted(units)] for table in tables])
  return math.sqrt(d.var(axis=0, ddof=1).mean() / len(tables))


def spread(d: np.ndarray, reply: float = math.nan) -> Spread:
  """Method of moments on d [seeds, units], a component below 0 is 0; seed is NaN for one seed."""
  C, U = d.shape
  if U < 2:
    raise UserError("--pilot: its runs share fewer than 2 held-out units; evaluate more people")
  if C == 1:  # what seeds do to single units cannot be told from the units
    whole = float(d.std(ddof=1))
    if math.isnan(reply):  # nor can the draw: all of it as rest shrinks with both
      return Spread(math.nan, 0.0, whole)
    reply = min(reply, whole)
    return Spread(math.nan, math.sqrt(whole**2 - reply**2), reply, reply)
  rows, columns = d.mean(1), d.mean(0)
  rest = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / ((C - 1) * (U - 1))
  own = lambda means, n: math.sqrt(max(float(means.var(ddof=1)) - rest / n, 0.0))  # noqa: E731
  seed, unit, rest = own(rows, U), own(columns, C), math.sqrt(rest)
  return Spread(seed, unit, rest, reply if math.isnan(reply) else min(reply, rest))


def power(
  s: Spread, effect: float, seeds: int, units: int, samples: float = 1.0, alpha: float = 0.05,
  groups: int = 2,
) -> float:  # fmt: skip
  """Chance that a two-sided t test finds `effect`, a contrast of `groups` groups of `seeds` cells.

  samples: replies to a person, in multiples of the pilot's. Where `reply` is not known the whole
  rest shrinks with them, which is too hopeful where seeds move units apart. Freedom: as in
  `confirm.crossed`.
  """
  if seeds < 2 or units < 2:
    return math.nan
  shrinks = s.rest**2 if math.isnan(s.reply) else s.reply**2
  rest = s.rest**2 - shrinks + shrinks / samples
  rows, columns = units * s.seed**2 + rest, seeds * s.unit**2 + rest  # expected mean squares
  squares = ((rows, seeds - 1), (columns, units - 1), (rest, (seeds - 1) * (units - 1)))
  total = rows + columns - rest
  if not total > 0:
    return math.nan
  freedom = total**2 / sum(v**2 / f for v, f in squares)
  critical = stats.t.ppf(1 - alpha / 2, freedom)
  shift = effect / math.sqrt(groups * total / (seeds * units))
  return statistics.t_power(shift, critical, freedom)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "study.power")
  parser.add_argument("--pilot", required=True, metavar="DIR[,DIR]", help="finished runs")
  parser.add_argument("--outcome", default="hex_gap", help=", ".join(design.OUTCOMES))
  parser.add_argument("--effect", type=float, default=0.5, help="difference to find, in points")
  parser.add_argument("--alpha", type=float, default=0.05, help="error rate of this one question")
  parser.add_argument("--groups", type=int, default=2, choices=(1, 2, 4), help="4: an interaction")
  parser.add_argument("--sd_seed", type=float, help="between seeds; default: the pilot's")
  args = flags.parse(parser, argv)
  if args.outcome not in design.OUTCOMES:
    raise UserError(f"--outcome={args.outcome}: choose from {', '.join(design.OUTCOMES)}")
  if not args.effect > 0 or not 0 < args.alpha < 1:
    raise UserError(f"--effect={args.effect} must be positive, --alpha={args.alpha} in (0, 1)")
  tables, replies = [], []
  for folder in args.pilot.split(","):
    tables.append(confirm.changes(pathlib.Path(folder), args.outcome))
    replies.append(drawn(pathlib.Path(folder), args.outcome))
    if not tables[-1]:
      raise UserError(f"--pilot={folder}: no run that was evaluated twice with {args.outcome}")
  units = sorted(set.intersection(*map(set, tables)))
  d = np.array([[t[u] for u in units] for t in tables]).reshape(len(tables), -1)
  s = spread(d, math.sqrt(np.mean(np.square(replies))))
  s = s if args.sd_seed is None else dataclasses.replace(s, seed=args.sd_seed)
  if math.isnan(s.seed):
    raise UserError("--pilot: one run does not show how seeds differ; add runs or give --sd_seed")
  if not s.seed + s.unit + s.rest:
    raise UserError(f"--pilot: {args.outcome} changes nowhere in it, so it shows no spread")
  reply = "unknown" if math.isnan(s.reply) else f"{s.reply:.2f}"
  print(f"{args.outcome}, {len(tables)} runs, {len(units)} units; SD between seeds {s.seed:.2f}, "
        f"units {s.unit:.2f}, rest {s.rest:.2f}, of it the draw of the replies {reply}; "
        f"effect {args.effect}")  # fmt: skip
  print(f"{'seeds':>6}{'units':>6}" + "".join(f"{f'replies x{m}':>12}" for m in SAMPLES))
  for seeds, n in itertools.product(SEEDS, UNITS):
    found = (power(s, args.effect, seeds, n, m, args.alpha, args.groups) for m in SAMPLES)
    print(f"{seeds:6}{n:6}" + "".join(f"{x:12.2f}" for x in found))


if __name__ == "__main__":
  run_main(main, sys.argv)
