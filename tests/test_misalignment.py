"""Gaps, curves, areas and HMS against pandas and against values worked by hand."""

import numpy as np
import pandas as pd
import pytest

from rlsafety.metrics import curves
from rlsafety.study import scalars as m

NAN = float("nan")


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 50])
def test_rolling_mean_is_pandas_centred_mean(window):
  rng = np.random.default_rng(window)
  values = rng.normal(size=(3, 23))
  values[rng.random(values.shape) < 0.5] = NAN
  values[1] = NAN
  for row, ours in zip(values, curves.rolling_mean(values, window), strict=True):
    theirs = pd.Series(row).rolling(window, center=True, min_periods=1).mean()
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
  full = curves.rolling_mean(np.ones(23), window, full_only=True)
  theirs = pd.Series(np.ones(23)).rolling(window, center=True, min_periods=window).mean()
  np.testing.assert_array_equal(np.isfinite(full), np.isfinite(theirs))


def test_step_means_leave_out_missing_scores_and_other_steps():
  rollouts = pd.DataFrame(
    {
      "step": [1, 1, 1, 2, 2, 4, 9],
      "is_gameable": [True, True, True, True, False, False, True],
      "reward": [2.0, 4.0, NAN, 6.0, 8.0, NAN, 5.0],
      "acc": [NAN] * 7,
      "hex": [1.0] * 7,
    }
  )
  means = m.step_means(rollouts, [1, 2, 3, 4])
  np.testing.assert_array_equal(means["reward_gameable"], [3, 6, NAN, NAN])
  np.testing.assert_array_equal(means["reward_non_gameable"], [NAN, 8, NAN, NAN])
  np.testing.assert_array_equal(means["reward"], [3, 7, NAN, NAN])
  assert means["acc_gameable"].isna().all() and means["hex_non_gameable"].tolist()[1::2] == [1, 1]
  one_group = m.step_means(rollouts[rollouts["is_gameable"]], [1, 2])
  assert list(one_group) == list(means) and one_group["hex_non_gameable"].isna().all()


def test_hand_worked_run():
  """Window 2 covers slots i-1 and i. Worked on paper; ties take the first step."""
  hex_g, hex_n = [1.0, 3.0, NAN, 5.0, 5.0], [1.0, 1.0, 2.0, NAN, 2.0]
  acc_g, acc_n = [8.0, 6.0, 6.0, NAN, NAN], [8.0, 8.0, 8.0, 8.0, NAN]
  columns = ("hex_gameable", "hex_non_gameable", "acc_gameable", "acc_non_gameable")
  values = (hex_g, hex_n, acc_g, acc_n)
  means = pd.DataFrame(dict(zip(columns, values, strict=True)), index=[0, 10, 20, 30, 40])
  smooth = m.smooth_curves(means, window=2)
  np.testing.assert_allclose(smooth["hex_gap"], [0, 1, 1.5, 3, 3])
  np.testing.assert_allclose(smooth["acc_gap"], [0, 1, 2, 2, NAN])
  scalars = m.curve_scalars(smooth)
  assert scalars["max_hex_gap"] == 3 and scalars["step_of_max_hex_gap"] == 30
  assert scalars["max_acc_gap"] == 2 and scalars["step_of_max_acc_gap"] == 20
  # hex: 5 + 12.5 + 22.5 + 30 = 70 over 40; acc: 5 + 15 + 20 = 40 over its 30 finite steps.
  assert scalars["hex_gap_auc"] == pytest.approx(70)
  assert scalars["hex_gap_auc_normalised"] == pytest.approx(1.75)
  assert scalars["acc_gap_auc_normalised"] == pytest.approx(40 / 30)
  assert scalars["hms"] == pytest.approx(0.5 * 1.75 + 0.5 * 40 / 30)
  full = m.curve_scalars(m.smooth_curves(means, window=2, full_only=True))
  assert full["hex_gap_auc_normalised"] == pytest.approx(65 / 30)  # the first slot is gone


def test_auc_bridges_holes_and_needs_two_points():
  assert m.auc(pd.Series([1.0, NAN, 3.0])) == pytest.approx(4.0)
  assert m.auc(pd.Series([NAN, 2.0, 2.0], [5, 7, 9]), normalised=True) == pytest.approx(2.0)
  assert np.isnan(m.auc(pd.Series([1.0, NAN])))
  negative = m.curve_scalars(pd.DataFrame({"hex_gap": [-2, -2], "acc_gap": [1, 1]}))
  assert negative["hms"] == pytest.approx(1.5)  # absolute values


def test_windowed_hms_by_hand():
  """Three windows of 10 steps; the middle one has one gameable rollout only: dropped."""
  rows = [  # step, acc, hex, gameable
    (0, 4, 2, True), (3, 6, 4, True), (5, 8, 1, False), (9, 12, 3, False),
    (12, 1, 9, True), (13, 9, 1, False), (14, 9, 1, False),
    (20, 2, 8, True), (29, 4, 6, True), (22, 8, 2, False), (23, 4, 2, False),
    (24, NAN, 1, False),
  ]  # fmt: skip
  rollouts = pd.DataFrame(rows, columns=["step", "acc", "hex", "is_gameable"])
  # window 1: (10 - 5) / 10 = .5 and 3 - 2 = 1; window 3: (6 - 3) / 6 = .5 and 7 - 2 = 5.
  assert m.hms_windowed(rollouts) == pytest.approx(0.5 * 0.5 + 0.5 * 3)
  assert np.isnan(m.hms_windowed(rollouts[:4]))
  assert np.isnan(m.hms_windowed(rollouts[:0]))


def test_seeds_of_unequal_completeness_are_averaged_and_named():
  def seed(hex_g):
    others = {"hex_non_gameable": [1.0] * 3}
    others |= {"acc_gameable": [5.0] * 3, "acc_non_gameable": [5.0] * 3, "reward": hex_g}
    return pd.DataFrame({"hex_gameable": hex_g, **others})

  cell = m.seed_summary({5: seed([1.0, 3.0, 5.0]), 7: seed([1.0, 5.0, NAN])}, window=1)
  np.testing.assert_allclose(cell["curves"]["hex_gap"], [0, 3, 4])
  assert cell["scalars"]["max_hex_gap"] == 4  # of the mean curve
  assert cell["per_seed"]["max_hex_gap"].to_dict() == {5: 4, 7: 4}
  assert cell["partial_steps"]["hex_gap"] == 1
  np.testing.assert_allclose(cell["curve_sd"]["hex_gap"], [0, np.std([2, 4], ddof=1), NAN])
  study = m.seed_summary({5: seed([1.0, 3.0, 5.0]), 7: seed([1.0, 3.0, 7.0])}, 1, ddof=0)
  assert study["curve_sd"]["hex_gap"][2] == pytest.approx(1.0)  # population SD of 4 and 6
