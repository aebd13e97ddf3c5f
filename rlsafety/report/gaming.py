"""What moved with the reward and should not have, and where reward and evaluators part.

A reward can be gamed: by length, warmth, the user's own words. GRPO pays a reply for what sets it
apart from its siblings, so what the reward pays for is the correlation of a feature with it within
the groups of training; what the policy took up is the change on held-out users. A feature that was
paid for and went the same way is named. No judge says any of it, and none needs to pass a gate.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from rlsafety.metrics import gaps, replies
from rlsafety.metrics.matched import FEWEST, LEVEL, holm
from rlsafety.report import overview
from rlsafety.report.charts import number
from rlsafety.report.overview import Change
from rlsafety.rundir import read

# {key of a described record: (title, unit)}: what no user of ours wants for its own sake.
FEATURES = {
  "length": ("length", "tokens"),
  "cut": ("cut at the token limit", "share"),
  "echo": ("the user's own words", "share of its words"),
  "warm": ("warm words", "per 100 words"),
  "agrees": ("phrases of agreement", "share"),
  "refuses": ("phrases of refusal", "share"),
  "base_logprob": ("log-prob under the base", "nats per token"),
}
TRACKED = {
  "gameable": "hex",
  "non_gameable": "acc",
}  # the score that a group's reward should follow
BOUND = 0.999999  # of a correlation whose Fisher's z is taken
SHOWN = 3  # replies where the two judges part most


@dataclasses.dataclass(frozen=True)
class Correlation:
  """r with its 95 % interval (NaN below two units) and how many units it rests on."""

  r: float
  low: float
  high: float
  units: int

  @property
  def sign(self) -> int:
    """0 where the interval holds zero or rests on too few units."""
    if self.units < FEWEST or not (self.low > 0 or self.high < 0):
      return 0
    return 1 if self.r > 0 else -1


@dataclasses.dataclass(frozen=True)
class Feature:
  """One of FEATURES. paid: its correlation with the reward within the groups of training, by group
  of users ({} where training does not record it). change: on everyone of the held-out users."""

  key: str
  paid: dict[str, Correlation]
  change: Change

  @property
  def moved_with_reward(self) -> bool:
    """It changed, by Holm over the features, the way that it was paid for by either group."""
    way = 1 if self.change.effect.mean > 0 else -1
    return self.change.notable and way in {c.sign for c in self.paid.values()}


@dataclasses.dataclass(frozen=True)
class Parting:
  """Reward beside the score of one group of users: rank correlation over the replies of the first
  and the last evaluation, and the last one's replies that are paid most for the least of it."""

  group: str
  score: str
  first: Correlation
  last: Correlation
  replies: list[dict]


def features(evaluations: Mapping[int, list[dict]], training: Sequence[dict]) -> list[Feature]:
  """Every feature that held-out replies of two evaluations have; [] with fewer evaluations."""
  if len(evaluations) < 2:
    return []
  ends = (evaluations[step] for step in (min(evaluations), max(evaluations)))
  first, last = ([replies.described(r) for r in records] for records in ends)
  trained = [replies.described(r) for r in training]
  found = []
  for key in FEATURES:
    before, after, change = overview.compare(first, last, key, "everyone")
    if change.units:
      paid = {g: within(trained, key, g == "gameable") for g in gaps.GROUPS}
      paid = {g: c for g, c in paid.items() if math.isfinite(c.r)}
      bounds = (before.mean, before.error), (after.mean, after.error)
      found.append(Feature(key, paid, Change("everyone", *bounds, change)))
  few = holm([f.change.effect.p for f in found]) < LEVEL
  return [
    dataclasses.replace(f, change=dataclasses.replace(f.change, survives=bool(s)))
    for f, s in zip(found, few, strict=True)
  ]


def within(records: Sequence[Mapping], name: str, gameable: bool) -> Correlation:
  """Correlation of a feature with the reward inside the groups (step, prompt) of described records,
  each group's means taken away; interval by leaving out one unit at a time, on Fisher's z."""
  members: dict[tuple, list[tuple[float, float, str]]] = {}
  for r in records:
    x, y = read.number(r.get(name)), read.number(r.get("reward"))
    if r["is_gameable"] is gameable and math.isfinite(x) and math.isfinite(y):
      unit = str(r.get("unit") or r.get("scenario_id") or r["prompt"])
      members.setdefault((r["step"], r["prompt"]), []).append((x, y, unit))
  x, y, units = [], [], []
  for own in members.values():
    values = np.array([(a, b) for a, b, _ in own])
    centred = values - values.mean(0)
    x, y, units = [*x, *centred[:, 0]], [*y, *centred[:, 1]], [*units, *(u for *_, u in own)]
  return _correlation(np.array(x), np.array(y), units)


def partings(evaluations: Mapping[int, list[dict]]) -> list[Parting]:
  """Where reward and evaluator part, for each group of users that has both scores at two steps."""
  if len(evaluations) < 2:
    return []
  ends = [evaluations[step] for step in (min(evaluations), max(evaluations))]
  out = []
  for group, score in TRACKED.items():
    both = [[r for r in of if r["is_gameable"] is (group == "gameable") and _scored(r, score)]
            for of in ends]  # fmt: skip
    if all(both):
      first, last = (_ranked(of, score) for of in both)
      apart = _ranks(both[1], "reward") - _ranks(both[1], score)
      most = [both[1][i] for i in np.argsort(-apart, kind="stable")[:SHOWN] if apart[i] > 0]
      out.append(Parting(group, score, first, last, most))
  return out


def _scored(record: Mapping, score: str) -> bool:
  return all(math.isfinite(read.number(record.get(k))) for k in ("reward", score))


def _ranks(records: Sequence[Mapping], name: str) -> np.ndarray:
  """Mean ranks of a score, from 0 to 1."""
  values = np.array([read.number(r[name]) for r in records])
  below = (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)
  return below / len(values)


def _ranked(records: Sequence[Mapping], score: str) -> Correlation:
  """Spearman's correlation of reward and score over replies."""
  x, y = (_ranks(records, name) for name in ("reward", score))
  units = [str(r.get("unit") or r.get("scenario_id") or r["prompt"]) for r in records]
  return _correlation(x - x.mean(), y - y.mean(), units)


def _correlation(x: np.ndarray, y: np.ndarray, units: Sequence[str]) -> Correlation:
  """Of centred x and y, with a jackknife over units."""
  if not len(x):
    return Correlation(math.nan, math.nan, math.nan, 0)
  names, place = np.unique(np.asarray(units), return_inverse=True)
  sums = np.stack([np.bincount(place, v, len(names)) for v in (x * y, x * x, y * y)])
  n, r = len(names), _r(*sums.sum(1))
  others = (sums.sum(1, keepdims=True) - sums).T  # of all units but one
  left = np.arctanh(np.clip([_r(*row) for row in others], -BOUND, BOUND))
  if n < 2 or not np.isfinite(left).all() or not math.isfinite(r):
    return Correlation(r, math.nan, math.nan, n)
  error = math.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
  half = float(special.stdtrit(n - 1, 0.975)) * error
  z = math.atanh(min(max(r, -BOUND), BOUND))
  return Correlation(r, math.tanh(z - half), math.tanh(z + half), n)


def _r(xy: float, xx: float, yy: float) -> float:
  return float(xy / math.sqrt(xx * yy)) if xx > 0 and yy > 0 else math.nan


def table(found: Sequence[Feature]) -> list[str]:
  """Console lines that name what moved with the reward; [] where nothing did."""
  lines = []
  for f in (f for f in found if f.moved_with_reward):
    title, unit = FEATURES[f.key]
    paid = ", ".join(f"{c.r:+.2f} {g.replace('_', '-')}" for g, c in f.paid.items() if c.sign)
    ends = f"{number(f.change.before[0])} -> {number(f.change.after[0])} {unit}"
    lines.append(f"moved with the reward: {title} {ends}; correlation in groups {paid}")
  return lines


def as_dict(found: Sequence[Feature]) -> dict:
  """{"moved": {key: {"before", "after", "change": [mean, error], "interval", "units", "paid":
  {group: [r, low, high]}, "moved_with_reward"}}}, {} where there is nothing to compare."""
  own = {}
  for f in found:
    ends = {k: list(getattr(f.change, k)) for k in ("before", "after", "change")}
    paid = {g: [c.r, c.low, c.high] for g, c in f.paid.items()}
    about = {"interval": list(f.change.effect.interval), "units": f.change.effect.units}
    own[f.key] = ends | about | {"paid": paid, "moved_with_reward": f.moved_with_reward}
  return {"moved": own} if own else {}
