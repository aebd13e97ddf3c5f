"""The power helper beside simulated studies, and its components beside what was put in."""

import numpy as np
import pytest

from rlsafety.errors import UserError
from rlsafety.study import confirm, power


def draws(rng, seeds, units, sds, effect=0.0):
  row, column, rest = sds
  return (
    effect + rng.normal(0, row, (seeds, 1)) + rng.normal(0, column, units)
    + rng.normal(0, rest, (seeds, units))
  )  # fmt: skip


def test_spread_finds_the_components_that_were_put_in():
  rng = np.random.default_rng(0)
  found = [power.spread(draws(rng, 12, 40, (0.6, 0.9, 1.2))) for _ in range(60)]
  squares = np.array([(s.seed**2, s.unit**2, s.rest**2) for s in found]).mean(0)
  assert squares == pytest.approx((0.36, 0.81, 1.44), rel=0.15)
  with pytest.raises(UserError, match="fewer than 2 held-out units"):
    power.spread(np.zeros((3, 1)))


@pytest.mark.parametrize("sds", [(0.4, 0.5, 1.0), (0.0, 0.8, 0.8)])
def test_power_is_that_of_the_test_that_answers_questions(sds):
  rng, found, n = np.random.default_rng(1), 0, 500
  for _ in range(n):
    mean, error, freedom = confirm.crossed([draws(rng, 5, 16, sds, 0.7)])
    found += abs(mean) > power.stats.t.ppf(0.975, freedom) * error
  told = power.power(power.Spread(*sds), 0.7, 5, 16, groups=1)
  assert found / n == pytest.approx(told, abs=0.08)  # freedom is estimated in the test
