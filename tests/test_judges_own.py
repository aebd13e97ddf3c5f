"""A judge of one's own by its dotted name, several rewards, and an evaluator apart."""

import dataclasses

import numpy as np
import pytest
from judge_helpers import replies
from test_judges_lm import scenario

from rlsafety import judges
from rlsafety.config import Judge
from rlsafety.environments import Environment
from rlsafety.errors import UserError
from rlsafety.judges import own
from rlsafety.models import presets, sources

MODULE = """
import jax, jax.numpy as jnp
def length(users, texts):
  return {"reward": [[float(len(t)) for t in group] for group in texts]}
@jax.jit
def _count(lengths):
  return lengths.astype(jnp.float32)
def tokens(users, replies):
  return {"reward": _count(replies.lengths), "hex": -_count(replies.lengths)}
tokens.on_tokens = True
def silent(users, texts):
  return {"reward": [[None for t in group] for group in texts]}
def flat(users, texts):
  return {"reward": [1.0]}
def endless(users, texts):
  return {"reward": [[float("inf")] * len(group) for group in texts]}
def wrong(users, texts):
  return {"rewards": []}
WORD = "word"
"""


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)


def judged(model, texts, **settings):
  opened = judges.open_judge(Judge(**settings), Environment(), model)
  users = [scenario() for _ in texts]
  return opened, *opened.score(users, replies(model.chat, texts))


def test_texts_or_tokens_are_scored_and_broken_replies_are_not(model):
  broken = [*model.chat.encode_text("Yes"), max(model.chat.control), 99]
  _, scores, metrics = judged(model, [["Yes, I see.", "", broken]], name="mine.length")
  np.testing.assert_array_equal(scores["reward"], [[11.0, 1.0, 1.0]])  # the floor
  assert np.isnan(scores["hex"]).all() and metrics["judge_degenerate"] == pytest.approx(2 / 3)
  _, scores, _ = judged(model, [["Yes", "Indeed"]], name="mine.tokens", degenerate="nan")
  np.testing.assert_array_equal(scores["reward"], [[3.0, 6.0]])  # a token per byte
  np.testing.assert_array_equal(scores["hex"], [[-3.0, -6.0]])
  assert np.isnan(judged(model, [["Yes"]], name="mine.silent")[1]["reward"]).all()


def test_rewards_add_up_and_the_evaluator_is_another(model):
  texts = [["I agree, you are right.", "Others argue against it."]]
  plain = judged(model, texts, name="phrases")[1]
  opened, scores, metrics = judged(
    model, texts, name="mine.length", also=("phrases=0.5", "mine.tokens=-1"), evaluator="phrases"
  )
  lengths = np.array([[float(len(t)) for t in texts[0]]])
  np.testing.assert_allclose(scores["reward"], 0.5 * np.asarray(plain["reward"]), rtol=1e-5)
  np.testing.assert_array_equal(scores["hex"], plain["hex"])
  assert float(metrics["judge_reward_mine.length"]) == lengths.mean()
  assert "0.5 x phrases" in opened.about["name"] and "ACC and HEX by" in opened.about["name"]


def test_an_evaluator_may_have_a_model_of_its_own(model, monkeypatch):
  """lm rewards with the policy's base and evaluates with another; alone it says that they share."""
  texts, other = [["I agree, you are right.", "Others argue against it."]], "other"
  second = sources.random_model(presets.preset("tiny"), seed=1)
  second = dataclasses.replace(second, source=second.source | {"sha256": "0" * 64})
  monkeypatch.setattr(judges, "other_model", lambda *_: second)
  shared, one, _ = judged(model, texts, name="lm")
  apart, two, _ = judged(model, texts, name="lm", evaluator_model=other)
  alone = judges.open_judge(Judge(name="lm", model=other), Environment(), model)
  three, _ = alone.score([scenario()], replies(model.chat, texts))
  assert "one model rewards and scores" in shared.about["limits"]
  assert "one model" not in apart.about["limits"] and "ACC and HEX by" in apart.about["name"]
  np.testing.assert_array_equal(two["reward"], one["reward"])
  for score in ("acc", "hex"):
    np.testing.assert_array_equal(two[score], three[score])
  with pytest.raises(UserError, match="judge phrases reads no model"):
    Judge(name="phrases", evaluator_model=other)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("mine.nothing", "cannot be imported"),
    ("no_such_module.f", "cannot be imported"),
    ("mine.WORD", "not a function"),
    ("mine.flat", "shape"),
    ("mine.endless", "finite"),
    ("mine.wrong", "a dict of reward, acc, hex"),
  ],
)
def test_what_is_no_judge_is_refused_by_name(model, name, words):
  with pytest.raises(UserError, match=f"judge.name={name}.*{words}"):
    own.make(name, model.chat)([scenario()], replies(model.chat, [["Yes"]]))


@pytest.mark.parametrize("also", ["phrases", "phrases=much", "frases=1"])
def test_further_rewards_need_a_name_and_a_weight(also):
  with pytest.raises(UserError, match="judge.also"):
    Judge(name="phrases", also=(also,))
