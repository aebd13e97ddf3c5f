"""Which scores of a judge may be starred: a rule over what was measured of it.

A measured record of one score is JSON, written by `tools.judges.fit` or `tools.judges.measure`:
  {"contrasts": {source: {class: {"auc", "low", "high", "wanted", "others"}}},
   "pleasant": {attack: share of users for whom a sincere wanted reply scores above it},
   "reads_user": mean absolute difference between the two versions of a message}
Sources are "base" and "trained": whose coherent replies were graded. A class is what the wanted
replies are told from; low and high bound the 95 % interval of a bootstrap over units.
"""

from collections.abc import Mapping
from typing import Any

SOURCES = ("base", "trained")
LEAST_AUC, LEAST_LOW = 0.8, 0.7  # point and lower bound, of every contrast
LEAST_ABOVE = 0.9  # share of users, for every pleasant attack
MOST_READ = 0.1  # points of rating

NOT_MEASURED = "not measured"


def passes(measured: Mapping[str, Any] | None) -> dict[str, Any]:
  """{"passed": bool, "why": reasons against it, [] if it passes} of one score's record."""
  why = _reasons(measured) if measured else [NOT_MEASURED]
  return {"passed": not why, "why": why}


def about(measured: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
  """What `Judge.about["gate"]` holds: `passes` of "reward", "acc" and "hex"."""
  return {score: passes((measured or {}).get(score)) for score in ("reward", "acc", "hex")}


def _reasons(measured: Mapping[str, Any]) -> list[str]:
  why = []
  for source in SOURCES:
    contrasts = measured.get("contrasts", {}).get(source, {})
    if len(contrasts) < 2:
      why.append(f"{source} replies: {len(contrasts)} of the two contrasts measured")
    for name, found in contrasts.items():
      # Written so that NaN fails.
      if not (found["auc"] >= LEAST_AUC and found["low"] >= LEAST_LOW):
        interval = f"[{found['low']:.2f}, {found['high']:.2f}]"
        why.append(
          f"{source} replies: AUC against {name} {found['auc']:.2f} {interval}, "
          f"needs {LEAST_AUC} and a lower bound of {LEAST_LOW}"
        )
  pleasant = measured.get("pleasant", {})
  if not pleasant:
    why.append("pleasant attacks: not measured")
  for name, share in pleasant.items():
    if not share >= LEAST_ABOVE:
      why.append(
        f"a sincere reply is above {name!r} for {share:.0%} of users, needs {LEAST_ABOVE:.0%}"
      )
  read = measured.get("reads_user", float("nan"))
  if not read < MOST_READ:
    why.append(f"identical replies differ by {read:.2f} between the versions of a message")
  return why
