"""Matched changes: intervals hold what they say, nulls are not starred, pairs share persons."""

import math

import numpy as np
import pytest

from rlsafety import environments, rollout
from rlsafety.metrics import matched

UNITS, PERSONS = 12, 24
GAMEABLE = np.repeat([True, False], PERSONS)
UNIT = np.tile(np.arange(PERSONS) % UNITS, 2).astype(str)


def test_a_gap_is_that_of_differences_within_persons():
  rng = np.random.default_rng(0)
  values = rng.normal(size=40) + np.repeat([5.0, 0.0], 20)
  units = np.tile(np.repeat(np.arange(10), 2), 2).astype(str)
  found = matched.effect(values, np.repeat([True, False], 20), units, (1.0, -1.0))
  of_units = (values[:20] - values[20:]).reshape(10, 2).mean(1)
  assert found.mean == pytest.approx(of_units.mean()) and found.units == 10
  assert found.error == pytest.approx(of_units.std(ddof=1) / np.sqrt(10))
  assert found.detectable == pytest.approx((2.2622 + 0.8834) * found.error, rel=1e-3)
  values[3] = np.nan  # no verdict: that version alone is left out
  assert np.isfinite(matched.effect(values, np.repeat([True, False], 20), units, (1.0, -1.0)).error)
  assert matched.effect(values[:20], np.ones(20, bool), units[:20], (1.0, -1.0)).units == 0


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5), (1.0, -1.0)])
def test_the_error_is_the_spread_of_what_is_left_without_each_unit(weights):
  """Units of unequal size, as incoherent replies leave them."""
  rng = np.random.default_rng(4)
  values = np.where(rng.random(48) < 0.4, np.nan, rng.normal(size=48))
  whole = matched.effect(values, GAMEABLE, UNIT, weights)
  used = np.isfinite(values) & (GAMEABLE | bool(weights[1]))
  left = [
    matched.effect(np.where(UNIT == unit, np.nan, values), GAMEABLE, UNIT, weights).mean
    for unit in sorted(set(UNIT[used]))
  ]
  n = len(left)
  assert whole.units == n >= 11
  assert whole.error == pytest.approx(np.std(left, ddof=1) * (n - 1) / math.sqrt(n))
  alone = matched.effect(values, GAMEABLE, np.where(GAMEABLE, "a", "b"), weights)
  assert not np.isfinite(alone.error)  # a group within one unit


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5), (1.0, -1.0)])
def test_null_sweeps_are_starred_at_most_at_their_level(weights):
  """400 reports of a policy that did not change: what replies scatter by is measured at 135M."""
  rng = np.random.default_rng(1)
  stars = 0
  for _ in range(400):
    noise = rng.normal(0, 1.58, (2, 2 * PERSONS, 2)).mean(-1)
    stars += matched.effect(noise[1] - noise[0], GAMEABLE, UNIT, weights).notable
  assert stars <= 28  # 5 % and two standard errors of 400 draws


@pytest.mark.parametrize("samples, share", [(2, 0.8), (8, 0.9)])
def test_intervals_hold_the_truth_and_another_evaluation_of_the_same_policies(samples, share):
  """Of 400 pairs of evaluations with other keys. The components are those of HEX at 135M.

  An interval of 95 % holds the true change that often, but another evaluation's mean, which has
  its own sampling noise, less often where that noise dominates: 18 of 20 take about 8 replies.
  """
  rng = np.random.default_rng(2)
  truth, again = 0, 0
  for _ in range(400):
    change = 0.4 * GAMEABLE + rng.normal(0, 0.63, len(GAMEABLE))
    first, second = (
      matched.effect(
        change + rng.normal(0, 1.58 * np.sqrt(2 / samples), len(change)),
        GAMEABLE,
        UNIT,
        (1.0, -1.0),
      )
      for _ in range(2)
    )
    low, high = second.interval
    truth += low <= 0.4 <= high
    again += low <= first.mean <= high
  assert truth / 400 >= 0.93 and again / 400 >= share


def test_errors_of_an_evaluation_are_over_units_and_a_gap_of_equal_versions_is_exact():
  rng = np.random.default_rng(2)
  person = rng.normal(size=(12, 1)) + rng.normal(size=(12, 2))  # 12 persons of 6 units, 2 replies
  hex_ = np.concatenate([person, person])
  gameable, units = np.repeat([True, False], 12), [f"u{i // 2}" for i in range(12)] * 2
  found = matched.errors({"hex": hex_}, gameable, units)
  assert found["hex_gap_se"] < 1e-12
  of_units = person.mean(1).reshape(6, 2).mean(1)
  for key in ("hex_se", "hex_gameable_se", "hex_non_gameable_se"):
    assert found[key] == pytest.approx(of_units.std(ddof=1) / math.sqrt(6))


def test_held_out_persons_come_in_both_versions_spread_over_units():
  section = environments.Environment(name="political_qa", length="short")
  scenarios = environments.load(section)
  chosen = rollout.held_out(section, scenarios, 24)
  persons = [s.person for s in chosen]
  assert persons[:12] == persons[12:] and len(set(persons)) == 12
  assert [s.is_gameable for s in chosen] == [True] * 12 + [False] * 12
  count = [sum(s.unit == unit for s in chosen[:12]) for unit in {s.unit for s in chosen}]
  units = {s.unit for s in scenarios if s.split == "heldout"}
  assert len(count) == min(12, len(units)) and max(count) - min(count) <= 1
  assert {s.split for s in chosen} == {"heldout"}


def test_shares_of_verdicts_and_scores_of_coherent_replies():
  classes = np.eye(6, dtype=np.float32)[[[0, 4], [2, 4]]]
  scores = {
    "verdicts": classes,
    "hex": np.array([[8.0, 1], [2, 9]]),
    "acc": np.full((2, 2), np.nan),
  }
  found = matched.verdict_shares(scores, np.array([[True, False], [True, True]]))
  assert found["share_incoherent"] == 0.5 and found["share_agreement"] == 0.25
  assert found["hex_coherent"] == 5.0 and np.isnan(found["acc_coherent"])
  assert found["share_cut"] == 0.25
