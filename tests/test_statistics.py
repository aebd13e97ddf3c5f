"""Statistics against brute force, scipy's own, values worked by hand, and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlsafety.study import statistics as s

NAN = float("nan")


@pytest.mark.parametrize("ties", [False, True])
def test_exact_spearman_p_is_brute_force(ties):
  rng = np.random.default_rng(3)
  for n in (3, 5, 7):
    x, y = rng.normal(size=(2, n))
    if ties:
      x, y = np.round(x), np.round(y * 2)
      x[:2], y[1:3] = 0, 1
    if np.ptp(x) == 0 or np.ptp(y) == 0:
      continue
    rx, ry = stats.rankdata(x), stats.rankdata(y)
    observed = abs(s.pearson(rx, ry))
    every = [abs(s.pearson(rx, ry[list(p)])) for p in itertools.permutations(range(n))]
    found = s.correlate(x, y)
    assert found.exact and found.p == pytest.approx(np.mean(np.array(every) >= observed - 1e-12))
    assert found.r == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.p_t == pytest.approx(stats.spearmanr(x, y)[1], abs=1e-9)


def test_pearson_p_is_seeded_permutations_near_scipy():
  rng = np.random.default_rng(0)
  x = rng.normal(size=11)
  y = 0.6 * x + rng.normal(size=11)
  ours = s.correlate(x, y, "pearson", seed=1)
  theirs = stats.pearsonr(x, y)
  assert ours.r == pytest.approx(theirs[0]) and ours.p_t == pytest.approx(theirs[1])
  ci = theirs.confidence_interval()
  assert (ours.low, ours.high) == pytest.approx((ci.low, ci.high))
  assert ours == s.correlate(x, y, "pearson", seed=1)
  resampled = stats.permutation_test(
    (x,), lambda a, axis: np.abs(s.pearson(a, np.broadcast_to(y, a.shape))), n_resamples=20_000,
    permutation_type="pairings", vectorized=True, alternative="greater", rng=2,
  )  # fmt: skip
  assert ours.p == pytest.approx(resampled.pvalue, abs=0.01)


def test_missing_values_shrink_n_and_degenerate_input_is_nan():
  found = s.correlate([1, 2, 3, 4, NAN], [2, 1, 4, 3, 9])
  assert found.n == 4 and found.r == pytest.approx(0.6)
  assert math.isnan(s.correlate([1, 1, 1, 1], [1, 2, 3, 4]).r)
  assert math.isnan(s.correlate([1, 2], [1, 2]).p)
  with pytest.raises(ValueError, match="spearman"):
    s.correlate([1, 2, 3], [1, 2, 3], "kendall")


def test_corrections_by_hand_and_against_scipy():
  p = [0.01, 0.04, NAN, 0.03, 0.005]
  np.testing.assert_allclose(s.holm(p), [0.03, 0.06, NAN, 0.06, 0.02])
  ours = s.benjamini_hochberg(p)
  known = np.isfinite(p)
  np.testing.assert_allclose(ours[known], stats.false_discovery_control(np.array(p)[known]))
  assert s.holm([0.9, 0.8]).max() == 1.0 and len(s.holm([])) == 0


def test_partial_correlation_is_the_textbook_formula():
  rng = np.random.default_rng(1)
  z, x, y = rng.normal(size=(3, 15))
  x, y = x + z, y + z
  for method, r in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
    xy, xz, yz = r(x, y)[0], r(x, z)[0], r(y, z)[0]
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    found = s.partial(x, y, [z], method)
    assert found.r == pytest.approx(expected)
    t = expected * math.sqrt(12 / (1 - expected**2))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 12))
  assert math.isnan(s.partial(x, 2 * z, [z], "pearson").r)  # nothing is left of 2z


def test_leave_one_out_drops_each_model_once():
  x = [1, 2, 3, 4, 5, 6]
  found = s.leave_one_out(x, [1, 2, 3, 5, 4, NAN], list("abcdef"))
  assert set(found) == set("abcde")  # f has no value
  assert found["e"] == pytest.approx(1.0) and found["a"] == pytest.approx(0.8)
  linear = s.leave_one_out(x, [2, 4, 6, 8, 10, NAN], list("abcdef"), "pearson")
  assert list(linear.values()) == pytest.approx([1.0] * 5)


def test_bootstraps_vary_what_they_name():
  rng = np.random.default_rng(0)
  x = np.arange(11.0)
  steady = np.repeat(x[:, None] ** 2, 3, 1)
  assert s.bootstrap_seeds(x, steady) == (1.0, 1.0)  # equal seeds: nothing to vary
  noisy = steady + rng.normal(0, 30, steady.shape)
  low, high = s.bootstrap_seeds(x, noisy)
  assert low < np.median(s.per_seed(x, noisy)) < high <= 1
  assert s.bootstrap_seeds(x, noisy) == (low, high)  # seeded
  noisy[0] = NAN
  noisy[1, 1:] = NAN
  assert all(np.isfinite(s.bootstrap_seeds(x, noisy)))
  low, high = s.bootstrap_models(x, noisy[:, 0])
  assert low < s.correlate(x, noisy[:, 0]).r < high
  assert all(np.isnan(s.bootstrap_models([1, 2, 3], [1, 2, 3])))


def test_power_is_that_of_the_rank_test():
  """Beside the exact test itself on other draws; 0.43 where Pearson's would have 0.53."""
  assert s.power(0.6, 11) == pytest.approx(0.43, abs=0.01)
  assert s.power(s.detectable(11), 11) == pytest.approx(0.8, abs=0.01)
  assert s.power(0.0, 20) == pytest.approx(0.05, abs=0.01)
  assert s.power(0.99, 4) == 0.0 and math.isnan(s.detectable(4))  # 2 of 24 orders is no 0.05
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 8))
  y = 0.8 * x + 0.6 * rng.normal(size=x.shape)
  found = np.mean([s.correlate(a, b).p <= 0.05 for a, b in zip(x, y, strict=True)])
  assert found == pytest.approx(s.power(0.8, 8), abs=0.06)


def test_no_relation_is_shown_only_by_enough_models():
  assert s.equivalence(0.0, 11) > 0.05 > s.equivalence(0.0, 40)
  assert s.equivalence(0.5, 40) == pytest.approx(0.5) and s.equivalence(-0.9, 40) > 0.99
  assert s.equivalence(0.3, 40) == pytest.approx(s.equivalence(-0.3, 40))


def test_a_relation_that_one_family_carries():
  models = ["Qwen1.5-0.5B-Chat", "Qwen1.5-4B-Chat", "Qwen1.5-7B-Chat", "Meta-Llama-3-8B-Instruct",
            "Llama-2-7b-chat-hf", "gemma-2b"]  # fmt: skip
  found = s.without_families([1, 2, 3, 4, 5, 6], [1, 2, 3, 2.5, 1.5, 0.5], models)
  assert list(found) == ["qwen", "llama", "gemma"]
  assert found["qwen"] == pytest.approx(-1.0) and found["gemma"] > 0.2


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_intervals_keep_their_level_at_eleven_models(method):
  """True values in closed form for a bivariate normal: 6/pi asin(rho/2) for Spearman."""
  rng = np.random.default_rng(4)
  for rho in (0.0, 0.5, 0.8):
    truth = rho if method == "pearson" else 6 / math.pi * math.asin(rho / 2)
    x = rng.normal(size=(2_000, 11))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=x.shape)
    inside = []
    for r in s.r_rows(x, y, method):
      low, high = s.interval(r, 11, method)
      inside.append(low <= truth <= high)
    assert 0.93 <= np.mean(inside) <= 0.975, (rho, np.mean(inside))
