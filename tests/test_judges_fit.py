"""The fit of the probes against its optimality conditions, its data and its validation."""

import types

import numpy as np
import pytest
from conftest import LLAMA, make_model
from scipy import optimize

from rlsafety.errors import UserError
from rlsafety.judges import phrases
from rlsafety.tools.judges import fit, measure, replies


def test_logistic_fit_is_the_optimum():
  rng = np.random.default_rng(0)
  x, l2 = rng.normal(size=(40, 6)), 0.7
  y = x[:, 0] + 0.5 * rng.normal(size=40) > 0.8
  cost = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))

  def objective(theta):
    margin = np.where(y, 1, -1) * (x @ theta[:-1] + theta[-1])
    return np.sum(cost * np.logaddexp(0, -margin)) + l2 / 2 * theta[:-1] @ theta[:-1]

  want = optimize.minimize(objective, np.zeros(7), tol=1e-12).x
  w, b = fit.fit_logistic(x, y, l2)
  np.testing.assert_allclose(np.append(w, b), want, atol=1e-4)


def test_fit_with_more_features_than_rows_stays_in_their_span():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(12, 200)), np.arange(12) % 2 == 0
  w, b = fit.fit_logistic(x, y)
  assert ((x @ w + b > 0) == y).all()
  np.testing.assert_allclose(x.T @ np.linalg.lstsq(x.T, w, rcond=None)[0], w, atol=1e-8)
  with pytest.raises(UserError, match="both classes"):
    fit.fit_logistic(x, y | True)


def test_cross_validation_scores_no_topic_that_its_fit_has_seen():
  """Features that know the label give 1; features that know only (topic, label) give chance."""
  rng = np.random.default_rng(0)
  topics = [f"topic {i}" for i in range(40)]
  examples = [
    replies.Example("m", f"{t} {label} {i}", label, "sampled", "", split, t, True)
    for n, t in enumerate(topics)
    for split in ["test" if n >= 32 else "train"]
    for label in replies.LABELS
    for i in range(4)
  ]
  labels, known = np.array([e.label for e in examples]), {}
  noise = [known.setdefault((e.topic, e.label), rng.normal(size=64)) for e in examples]
  model = types.SimpleNamespace(config=LLAMA, params=make_model(LLAMA)[0])
  rest = {"logprob": np.zeros(len(labels)), "length": np.full(len(labels), 50)}
  rest["words"] = np.zeros((len(labels), 2, len(phrases.LABELS)))
  for x, low, high in (
    (np.stack([labels == label for label in replies.LABELS], 1), 1.0, 1.0),
    (np.stack(noise), 0.3, 0.7),
  ):
    measured = {"x": x.astype(np.float32), **rest}
    heads = fit.fit(model, "political_qa", examples, measured, 1.0)
    tables = fit.cross_validate(heads, model, examples, measured, 1.0)
    for name, table in tables.items():
      assert table["n"] == len(examples) and low <= table["rest"] <= high, (name, table)


@pytest.mark.parametrize(("name", "sampled_test"), [("political_qa", 120), ("advice", 90)])
def test_labelled_replies_are_sound(name, sampled_test):
  written, sampled = replies.written(name), replies.sampled(name)
  assert {e.label for e in (*written, *sampled)} == set(replies.LABELS)
  assert sum(e.split == "test" for e in sampled) >= sampled_test
  train, test = ({e.topic for e in (*written, *sampled) if e.split == s} for s in ("train", "test"))
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
