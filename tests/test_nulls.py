"""Nulls: shuffled labels, whose bands noise exceeds at its level and a real gap by far, and runs of
a policy that did not change, which are starred as rarely."""

import collections
import json

import numpy as np
import pandas as pd
import pytest

from rlsafety.errors import UserError
from rlsafety.study import chance, nulls, scalars

STEPS = np.arange(1, 31)


def rollouts(rng, gap=0.0, people=0.7):
  """30 steps of 8 prompts x 2 replies, prompts unlike each other, half of them gameable."""
  n = len(STEPS) * 8
  prompt, gameable = np.arange(n), np.tile([True, False], n // 2)
  rows = np.repeat(np.stack([np.repeat(STEPS, 8), prompt, gameable]), 2, axis=1)
  frame = pd.DataFrame(rows.T, columns=["step", "prompt", "is_gameable"])
  frame["is_gameable"] = frame["is_gameable"].astype(bool)
  for name in ("reward", "acc", "hex"):
    noise = np.repeat(rng.normal(0, people, n), 2) + rng.normal(0, 1, 2 * n)
    frame[name] = 5 + noise + gap * frame["is_gameable"] * (1 if name == "hex" else -1)
  return frame


def of(found, window=5):
  means = {seed: scalars.step_means(frame, STEPS) for seed, frame in found.items()}
  return scalars.seed_summary(means, window)["scalars"]


def test_unbiased_runs_are_within_the_bands_at_their_level_and_a_gap_is_not():
  """200 sweeps of nothing: each scalar is beyond its band in about 5 % of them."""
  rng = np.random.default_rng(0)
  beyond = dict.fromkeys(
    ("max_hex_gap", "max_acc_gap", "hex_gap_auc_normalised", "hms", "hms_signed"), 0
  )
  for i in range(200):
    found = {0: rollouts(rng)}
    own, band = of(found), nulls.bands(found, STEPS, 5, draws=100, seed=i)
    for name in beyond:
      beyond[name] += abs(own[name]) > band[f"{name}_null95"]
      assert band[f"{name}_null95"] > 0  # noise alone: the published HMS is never 0
  assert all(1 <= count <= 18 for count in beyond.values()), beyond  # 10 +- 2.6 standard errors
  found = {0: rollouts(rng, gap=1.5), 1: rollouts(rng, gap=1.5)}
  own, band = of(found), nulls.bands(found, STEPS, 5)
  assert all(own[name] > 1.2 * band[f"{name}_null95"] for name in beyond)


def test_two_seeds_narrow_the_bands_and_one_group_has_none():
  rng = np.random.default_rng(1)
  one = {0: rollouts(rng)}
  two = one | {1: rollouts(rng)}
  ratio = nulls.bands(two, STEPS, 5)["hms_null95"] / nulls.bands(one, STEPS, 5)["hms_null95"]
  assert 0.55 < ratio < 0.9  # about 1 / sqrt(2)
  alone = {0: one[0][one[0]["is_gameable"]]}
  assert all(np.isnan(v) for v in nulls.bands(alone, STEPS, 5).values())


def test_signed_hms_lets_opposite_areas_cancel():
  curves = pd.DataFrame({"hex_gap": [-2.0, -2.0], "acc_gap": [1.0, 1.0]})
  found = scalars.curve_scalars(curves)
  assert found["hms"] == 1.5 and found["hms_signed"] == -0.5


def write_pool(path, size=12):
  """Replies of one policy to 12 persons of 6 units in both versions: units and persons differ, and
  versions share the noise of a sample."""
  rng = np.random.default_rng(3)
  unit, person, noise = (rng.normal(size=n) for n in (6, 12, (12, size)))
  rows = []
  for p, gameable in enumerate([True] * 12 + [False] * 12):
    i = p % 12
    for sample in range(size):
      scores = 5 + unit[i % 6] + person[i] + noise[i, sample] + rng.normal(0, 0.5, 3)
      row = {"step": 0, "prompt": p, "sample": sample, "is_gameable": gameable}
      row |= {"unit": f"u{i % 6}", "person": f"p{i}", "scenario_id": f"p{i}"}
      verdict = "incoherent" if sample % 4 == 0 else "agreement"
      rows.append(row | dict(zip(("reward", "acc", "hex"), scores, strict=True), verdict=verdict))
  (path / "eval").mkdir(parents=True)
  (path / "eval/step_000000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  (path / "config.json").write_text(json.dumps({"config": {}}))
  return rows


def test_ends_share_no_reply_and_versions_share_their_places(tmp_path):
  rows = write_pool(tmp_path)
  ends = chance.halves(rows, 2, np.random.default_rng(0))
  hexes = {(r["prompt"], r["hex"]): r["sample"] for r in rows}
  places = [{(r["prompt"], hexes[r["prompt"], r["hex"]]) for r in end} for end in ends]
  assert len(places[0]) == len(places[1]) == 48 and not places[0] & places[1]
  for end in places:
    of = collections.defaultdict(set)
    for prompt, sample in end:
      of[prompt].add(sample)
    assert all(of[p] == of[p + 12] and len(of[p]) == 2 for p in range(12))


def test_runs_that_learn_nothing_are_starred_at_their_level(tmp_path, capsys):
  write_pool(tmp_path)
  chance.main(["chance", f"--pool={tmp_path}", "--sweeps=40", "--seeds=2"])
  said = capsys.readouterr().out
  shares, title = collections.defaultdict(dict), ""
  for line in said.splitlines():
    if line.startswith("  "):
      shares[title][line[:36].strip()] = float(line[36:].split("%")[0])
    else:
      title = line.partition(":")[0]
  assert [len(of) for of in shares.values()] == [13, 13, 21, 21]
  # 160 reports of 12 rows: one in 20 rows, and without a correction one in 6 reports or more.
  alone, starred = shares["rows of a report, alone"], shares["stars of a report"]
  assert 2 < np.mean([v for k, v in alone.items() if k != chance.ANY]) < 8
  assert alone[chance.ANY] > 15 and starred[chance.ANY] <= 8  # 5 and two standard errors
  assert shares["answers of a study, corrected"][chance.ANY] <= 12  # of 40 sweeps
  with pytest.raises(UserError, match="12 replies to a prompt"):
    chance.main(["chance", f"--pool={tmp_path}", "--samples=7"])
