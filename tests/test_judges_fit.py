"""The fit of the probes against its optimality conditions, its data and its validation."""

import types

import numpy as np
import pytest
from conftest import LLAMA, make_model
from scipy import optimize, special

from rlsafety.errors import UserError
from rlsafety.judges import probe
from rlsafety.tools.judges import fit, measure, replies
from rlsafety.verdicts import VERDICTS


def test_softmax_fit_is_the_optimum():
  rng = np.random.default_rng(0)
  x, l2 = rng.normal(size=(40, 6)), 0.7
  y = np.digitize(x[:, 0] + 0.5 * rng.normal(size=40), (-0.5, 0.8))
  cost = len(y) / 3 / np.bincount(y)[y]

  def objective(theta):
    w, b = theta[:18].reshape(3, 6), theta[18:]
    logp = special.log_softmax(x @ w.T + b, axis=1)
    return -cost @ logp[range(40), y] + l2 / 2 * np.sum(w * w)

  w, b = fit.fit_softmax(x, y, 3, l2)
  found = np.append(w.ravel(), b)
  best = optimize.minimize(objective, found, tol=1e-12)
  assert objective(found) <= best.fun + 1e-5
  np.testing.assert_allclose(w, best.x[:18].reshape(3, 6), atol=2e-2)


def test_fit_with_more_features_than_rows_stays_in_their_span():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(12, 200)), np.arange(12) % 2
  w, b = fit.fit_softmax(x, 2 * y, 3)  # nobody is of class 1
  assert (np.argmax(x @ w.T + b, 1) == 2 * y).all()
  np.testing.assert_allclose(x.T @ np.linalg.lstsq(x.T, w.T, rcond=None)[0], w.T, atol=1e-8)
  with pytest.raises(UserError, match="both classes"):
    fit.fit_softmax(x, y * 0, 2)


def test_nothing_is_scored_by_a_fit_that_has_seen_its_topic_and_heads_share_no_layer():
  """Features that know the label give 1; features that know only (topic, label) give chance."""
  rng = np.random.default_rng(0)
  topics = [f"topic {i}" for i in range(40)]
  examples = [
    replies.Example("m", f"{t} {label} {i}", label, "sampled", "", split, t, True, policy=policy)
    for n, t in enumerate(topics)
    for split in ["test" if n >= 32 else "train"]
    for label in VERDICTS
    for i, policy in enumerate(("base", "trained"))
  ]
  labels, known = np.array([e.label for e in examples]), {}
  noise = [known.setdefault((e.topic, e.label), rng.normal(size=64)) for e in examples]
  model = types.SimpleNamespace(config=LLAMA, params=make_model(LLAMA)[0])
  layers = len(measure.default_layers(LLAMA.n_layers))
  rest = {"logprob": np.zeros(len(labels)), "length": np.full(len(labels), 50)}
  for x, low, high in (
    (np.stack([labels == label for label in VERDICTS], 1), 1.0, 1.0),
    (np.stack(noise), 0.25, 0.75),
  ):
    measured = {"x": np.tile(x, layers).astype(np.float32), **rest}
    heads = fit.fit(model, "political_qa", examples, measured, 1.0)
    used = np.abs(heads.weight).reshape(len(probe.NAMES), layers, -1).sum(-1) > 0
    assert layers == 1 or not (used[:2].any(0) & used[2:].any(0)).any()
    values = fit.unseen(heads, model, examples, measured, 1.0)
    for source, found in measure.contrasts(values["hex"], examples, "agreement", 200).items():
      assert set(found) == {"balance", "disagreement"}, source
      for t in found.values():
        assert t["wanted"] == t["others"] == len(topics)
        assert low <= t["auc"] <= high and t["low"] <= t["auc"] <= t["high"], t


def test_intervals_are_over_units_not_replies():
  """Ten copies of every reply leave the interval as it is."""
  rng = np.random.default_rng(2)
  one = [
    replies.Example("m", "r", label, "sampled", "", "test", f"unit {i}", True)
    for i in range(12)
    for label in ("agreement", "balance")
  ]
  values = rng.normal(size=len(one)) + np.array([e.label == "agreement" for e in one])
  once = measure.contrasts(values, one, "agreement", 500)["base"]["balance"]
  often = measure.contrasts(
    np.repeat(values, 10), [e for e in one for _ in range(10)], "agreement", 500
  )
  often = often["base"]["balance"]
  assert often["wanted"] == 120 and once["low"] < once["auc"] < once["high"]
  assert [often[k] for k in ("auc", "low", "high")] == pytest.approx(
    [once[k] for k in ("auc", "low", "high")]
  )


@pytest.mark.parametrize(("name", "sampled_test"), [("political_qa", 120), ("advice", 90)])
def test_labelled_replies_are_sound(name, sampled_test):
  written, sampled = replies.written(name), replies.sampled(name)
  assert {e.label for e in (*written, *sampled)} == set(VERDICTS)
  assert {e.policy for e in sampled} == {"base", "trained"}
  assert sum(e.split == "test" for e in sampled) >= sampled_test
  train, test = ({e.group for e in (*written, *sampled) if e.split == s} for s in ("train", "test"))
  assert not train & test
  for e in written:
    assert "{" not in e.reply + e.message, e
  halves = [
    {e.reply for e in written if e.half == h and e.kind not in ("tiny", "echo")} for h in "AB"
  ]
  assert not halves[0] & halves[1]


def test_auc_counts_pairs():
  assert measure.auc([2, 1], [1, 0]) == pytest.approx(3.5 / 4)
  assert measure.auc([2, 1, np.nan], [np.nan, 1, 0]) == pytest.approx(3.5 / 4)
  assert np.isnan(measure.auc([np.nan], [1.0])) and measure.auc([0.0], [-np.inf]) == 1
