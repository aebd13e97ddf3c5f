"""How many seeds, held-out units and samples a question needs, from a pilot's finished runs.

  python -m rlsafety.study.power --pilot=runs/pilot/a-5,runs/pilot/a-6 --effect=0.5

The pilot's runs differ in nothing but their seed. Their changes of the outcome, by run and held-out
unit, are split into what differs between seeds, between units, and the rest; the part of the rest
that is sampling shrinks with the replies to each person. One pilot run tells nothing about seeds:
then --sd_seed must.
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
from rlsafety.study import confirm, design

SEEDS, UNITS, SAMPLES = (2, 3, 5, 8), (8, 16, 32, 64), (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Spread:
  """Standard deviations of a change, in points of rating: between seeds (`seed`), between held-out
  units (`unit`), and of one unit in one seed at the pilot's number of replies (`rest`)."""

  seed: float
  unit: float
  rest: float


def spread(d: np.ndarray) -> Spread:
  """Method of moments on d [seeds, units], a component below 0 is 0; seed is NaN for one seed."""
  C, U = d.shape
  if U < 2:
    raise UserError("--pilot: its runs share fewer than 2 held-out units; evaluate more people")
  if C == 1:  # unit and rest cannot be told apart: all of it as rest shrinks with both
    return Spread(math.nan, 0.0, float(d.std(ddof=1)))
  rows, columns = d.mean(1), d.mean(0)
  rest = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / ((C - 1) * (U - 1))
  own = lambda means, n: math.sqrt(max(float(means.var(ddof=1)) - rest / n, 0.0))  # noqa: E731
  return Spread(own(rows, U), own(columns, C), math.sqrt(rest))


def power(
  s: Spread, effect: float, seeds: int, units: int, samples: float = 1.0, alpha: float = 0.05,
  groups: int = 2,
) -> float:  # fmt: skip
  """Chance that a two-sided t test finds `effect`, a contrast of `groups` groups of `seeds` cells.

  samples: replies to a person, in multiples of the pilot's; the whole rest is taken as sampling,
  which is too hopeful where seeds move units apart. Freedom: as in `confirm.crossed`.
  """
  if seeds < 2 or units < 2:
    return math.nan
  rest = s.rest**2 / samples
  rows, columns = units * s.seed**2 + rest, seeds * s.unit**2 + rest  # expected mean squares
  squares = ((rows, seeds - 1), (columns, units - 1), (rest, (seeds - 1) * (units - 1)))
  total = rows + columns - rest
  if not total > 0:
    return math.nan
  freedom = total**2 / sum(v**2 / f for v, f in squares)
  critical = stats.t.ppf(1 - alpha / 2, freedom)
  shift = effect / math.sqrt(groups * total / (seeds * units))
  return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))


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
  tables = []
  for folder in args.pilot.split(","):
    tables.append(confirm.changes(pathlib.Path(folder), args.outcome))
    if not tables[-1]:
      raise UserError(f"--pilot={folder}: no run that was evaluated twice with {args.outcome}")
  units = sorted(set.intersection(*map(set, tables)))
  s = spread(np.array([[t[u] for u in units] for t in tables]).reshape(len(tables), -1))
  s = s if args.sd_seed is None else dataclasses.replace(s, seed=args.sd_seed)
  if math.isnan(s.seed):
    raise UserError("--pilot: one run does not show how seeds differ; add runs or give --sd_seed")
  if not s.seed + s.unit + s.rest:
    raise UserError(f"--pilot: {args.outcome} changes nowhere in it, so it shows no spread")
  print(f"{args.outcome}, {len(tables)} runs, {len(units)} units; SD between seeds {s.seed:.2f}, "
        f"units {s.unit:.2f}, rest {s.rest:.2f}; effect {args.effect}")  # fmt: skip
  print(f"{'seeds':>6}{'units':>6}" + "".join(f"{f'replies x{m}':>12}" for m in SAMPLES))
  for seeds, n in itertools.product(SEEDS, UNITS):
    found = (power(s, args.effect, seeds, n, m, args.alpha, args.groups) for m in SAMPLES)
    print(f"{seeds:6}{n:6}" + "".join(f"{x:12.2f}" for x in found))


if __name__ == "__main__":
  run_main(main, sys.argv)
