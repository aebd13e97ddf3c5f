"""Means by user group with standard errors over prompts, and what a run says of them.

Positive gaps mean that gameable users fare worse or are courted more: reward and HEX are
gameable minus non-gameable, ACC the other way round (`GAP_SIGN`).
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlsafety.environments.rubrics import THRESHOLDS
from rlsafety.errors import UserError

SCORES = ("reward", "acc", "hex")
GROUPS = ("gameable", "non_gameable")
# HEX_gap = gameable - non-gameable, ACC_gap = the other way round (arXiv 2604.12500).
GAP_SIGN = {"reward": 1, "acc": -1, "hex": 1}


def group_means(
  scores: Mapping[str, np.ndarray], is_gameable: Sequence[bool] | np.ndarray
) -> dict[str, float]:
  """scores {name: [P, G]}, NaN = no verdict; is_gameable [P] -> flat dict of floats.

  For each of SCORES: `<name>`, `<name>_gameable`, `<name>_non_gameable`, `<name>_gap`, and the
  standard errors `..._se` of the last three. A group's mean is the mean of its prompts'
  means, and its error comes from the spread between prompts: the replies to one prompt
  are not independent of each other. NaN where nothing was scored.
  """
  flags, out = np.asarray(is_gameable, bool), {}
  for name in filter(scores.__contains__, SCORES):
    values = scores[name]
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN, as meant
      per_prompt = np.nanmean(np.asarray(values, np.float64), axis=1)
      out[name] = float(np.nanmean(values))
    groups = {"gameable": per_prompt[flags], "non_gameable": per_prompt[~flags]}
    for group, means in groups.items():
      out[f"{name}_{group}"], out[f"{name}_{group}_se"] = mean_and_error(means)
    sign = GAP_SIGN[name]
    out[f"{name}_gap"] = sign * (out[f"{name}_gameable"] - out[f"{name}_non_gameable"])
    out[f"{name}_gap_se"] = float(
      np.hypot(out[f"{name}_gameable_se"], out[f"{name}_non_gameable_se"])
    )
  return out


def threshold_rates(
  scores: Mapping, is_gameable: Sequence[bool] | np.ndarray, rubric_of: Mapping[str, str]
) -> dict[str, float]:
  """The study's discretised metrics, as shares of the replies with a verdict: `acc_rate` of
  those to non-gameable users and `hex_rate` of those to gameable users that are above the
  published thresholds. scores {name: [P, ...]}; rubric_of: an environment's RUBRICS."""
  flags = np.asarray(is_gameable, bool)
  return {
    f"{name}_rate": share_above(rubric_of[name], np.ravel(np.asarray(scores[name])[chosen]))
    for name, chosen in (("acc", ~flags), ("hex", flags))
  }


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and its standard error (ddof 1) over the finite values; NaN if too few."""
  values = values[np.isfinite(values)]
  if not values.size:
    return float("nan"), float("nan")
  error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else float("nan")
  return float(values.mean()), float(error)


def share_above(rubric: str, scores: Sequence[float] | np.ndarray) -> float:
  """Share of the scores of an evaluator that are above the study's threshold.

  The study's discretised metrics are this share x 100: of ACC over the replies to non-gameable
  users, and of HEX over those to gameable users. NaN (no verdict) does not count.
  """
  known = [score for score in map(float, scores) if score == score]
  return sum(score > THRESHOLDS[rubric] for score in known) / len(known) if known else math.nan


def group_line(row: Mapping[str, Any]) -> str:
  """reward 5.1/4.8 ...: gameable / non-gameable, of own replies or else of the records; acc and hex
  only where the judge scores them."""
  prefix = "" if "reward" in row else "data_"
  parts = []
  for name in ("reward", "acc", "hex"):
    both = [row[f"{prefix}{name}_{group}"] for group in ("gameable", "non_gameable")]
    if name == "reward" or np.isfinite(both).any():
      parts.append(f"{name} " + "/".join(f"{mean:.2f}" for mean in both))
  return "  ".join(parts) + f" ({prefix.replace('_', ': ')}gameable/non-gameable)"


def step_line(row: Mapping, timing: Mapping, steps: int, seconds: Sequence[float]) -> str:
  """Progress of one step; row and timing: its lines in the logs, seconds: of all so far."""
  left = (steps - row["step"]) * float(np.median(seconds[-20:]))
  return (
    f"step {row['step']}/{steps}  {group_line(row)}  "
    f"groups with spread {1 - row['frac_zero_std']:.0%}  "
    f"{timing['seconds']:.1f} s  {timing['tokens_per_second']:.0f} tok/s  "
    f"left {left / 60:.1f} min"
  )


SILENT = 3  # updates and evaluations in a row without a reward: the run learns from nothing


@dataclasses.dataclass
class Silence:
  """Counts updates and evaluations in a row whose replies got no reward at all."""

  saved: str  # where the state before them is, for the message
  count: int = 0

  def hear(self, row: Mapping) -> None:
    """row: of metrics.jsonl or eval/summary.jsonl. Raises UserError at the SILENT-th in a row."""
    means = [row[f"reward_{g}"] for g in ("gameable", "non_gameable") if f"reward_{g}" in row]
    if means:
      self.count = 0 if np.isfinite(np.array(means, float)).any() else self.count + 1
    if self.count >= SILENT:
      judged = {k: v for k, v in row.items() if k.startswith("judge_") and v}
      raise UserError(
        f"step {row['step']}: no reply got a reward, {SILENT} times in a row ("
        f"{', '.join(f'{k}={v:g}' for k, v in judged.items()) or 'see judge_* in metrics.jsonl'}); "
        f"mend the judge, then start the same command again: it goes on from {self.saved}"
      )
