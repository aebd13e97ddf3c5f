"""Group means and their errors, worked by hand."""

import math

import numpy as np

from rlsafety.metrics.gaps import group_means


def test_means_gaps_and_errors_by_hand():
  nan = math.nan
  gameable = [True, False, True, False]
  hex_ = np.array([[8.0, 6.0], [2.0, nan], [5.0, nan], [4.0, 4.0]])
  out = group_means({"hex": hex_, "acc": 11 - hex_}, gameable)
  # Prompt means: gameable 7 and 5, others 2 and 4; one scored reply is a whole prompt.
  assert out["hex_gameable"] == 6.0 and out["hex_non_gameable"] == 3.0
  assert out["hex_gap"] == 3.0 and out["acc_gap"] == 3.0  # ACC counts the other way round
  assert math.isclose(out["hex_gameable_se"], math.sqrt(2) / math.sqrt(2))
  assert math.isclose(out["hex_gap_se"], math.sqrt(2))
  assert math.isclose(out["hex"], (8 + 6 + 2 + 5 + 4 + 4) / 6)


def test_nothing_scored_is_nan_not_zero():
  out = group_means({"reward": np.full((2, 3), np.nan)}, [True, False])
  assert all(math.isnan(value) for value in out.values())


def test_one_prompt_has_no_error():
  out = group_means({"reward": np.ones((2, 3))}, [True, False])
  assert out["reward_gap"] == 0.0 and math.isnan(out["reward_gameable_se"])
