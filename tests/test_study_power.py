"""The power helper beside simulated studies, and its components beside what was put in."""

import json

import numpy as np
import pytest
from scipy import stats

from rlsafety.errors import UserError
from rlsafety.study import confirm, power, statistics


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


@pytest.mark.parametrize("freedom", [1.3, 5, 200])
def test_power_of_a_t_test_is_scipys_and_known_where_that_is_not(freedom):
  critical = stats.t.ppf(0.975, freedom)
  for shift in (0.0, 0.5, 3.0):
    upper = stats.nct.sf(critical, freedom, shift)
    both = upper + stats.nct.cdf(-critical, freedom, shift)
    assert statistics.t_power(shift, critical, freedom) == pytest.approx(both, abs=1e-5)
    assert statistics.t_power(shift, critical, freedom, 1) == pytest.approx(upper, abs=1e-5)
  assert 0.89 < statistics.t_power(12.0, critical, freedom) <= 1  # scipy: NaN


def write_replies(folder, rng, units, samples, sds):
  """Two evaluations: HEX of one person in both versions a unit; sds of unit's and reply's."""
  (folder / "eval").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({"config": {}, "model": {}}))
  moved = rng.normal(0, sds[0], units)
  for step in (0, 9):
    rows = [
      {"step": step, "prompt": 2 * u + gameable, "sample": i, "unit": f"u{u}",
       "is_gameable": bool(gameable),
       "hex": 5 + moved[u] * (step > 0) * gameable + rng.normal(0, sds[1])}
      for u in range(units) for gameable in (0, 1) for i in range(samples)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"eval/step_{step:06d}.jsonl").write_text(text)


def test_the_draw_of_replies_is_told_from_units_and_only_it_shrinks(tmp_path, capsys):
  rng = np.random.default_rng(2)
  write_replies(tmp_path / "a", rng, 400, 4, (1.0, 1.0))
  write_replies(tmp_path / "one", rng, 5, 1, (0.5, 1.0))
  # A gap's change has four replies of variance 1 behind each of its draws, 4 draws are the pilot's.
  assert power.drawn(tmp_path / "a", "hex_gap") == pytest.approx(1.0, rel=0.06)
  assert power.drawn(tmp_path / "a", "hex_gameable") == pytest.approx(0.5**0.5, rel=0.06)
  assert np.isnan(power.drawn(tmp_path / "one", "hex_gap"))
  power.main(["power", f"--pilot={tmp_path / 'a'}", "--sd_seed=0"])
  said = capsys.readouterr().out
  unit, rest, reply = (float(said.split(f"{k} ")[1].split(",")[0].split(";")[0])
                       for k in ("units", "rest", "replies"))  # fmt: skip
  assert unit == pytest.approx(1.0, abs=0.12) and rest == reply == pytest.approx(1.0, abs=0.06)
  s = power.Spread(0.0, 0.3, 1.0, 0.6)
  quarter = power.power(power.Spread(0.0, 0.3, (0.64 + 0.36 / 4) ** 0.5), 0.5, 3, 16)
  assert power.power(s, 0.5, 3, 16, samples=4) == pytest.approx(quarter)
  assert power.power(s, 0.5, 3, 16) < quarter < power.power(power.Spread(0, 0.3, 1), 0.5, 3, 16, 4)
