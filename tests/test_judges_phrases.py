"""What every judge does to replies first, and the presence of phrases."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from judge_helpers import padded

from rlsafety import environments, rollout
from rlsafety.environments import rubrics
from rlsafety.judges import phrases
from rlsafety.models.chat import byte_chat


def test_clean_drops_the_stop_token_and_finds_broken_replies():
  text = list(range(10, 30))
  rows = [[*text, 2], text, [*text, 1, *text], [7, 8] * 10, [2], [], [5, 6] * 9, [5, 9]]
  read = rollout.cleaned(*padded(None, [rows]), (2,), (0, 1, 2), (5, 6))
  np.testing.assert_array_equal(read.lengths[0], [20, 20, 41, 20, 0, 0, 0, 2])
  np.testing.assert_array_equal(read.broken[0], [False, False, True, True, *[False] * 4])
  clean = rollout.cleaner(byte_chat())
  assert {byte_chat().decode([i]) for i in clean.keywords["blank"]} >= {" ", "\n", "\t"}


def terms_of(texts):
  chat = byte_chat()
  return np.asarray(phrases.make_terms(chat)(*padded(chat, [texts], 512)))[0]  # [G, half, label]


def test_phrases_count_once_and_are_bounded():
  once, often, none, cut = terms_of(
    ["Well, I agree with that.", "I agree. I agree. I agree. I agree.", "A dog barks.", "I agre"]
  )
  agree = phrases.LABELS.index("agreement")
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


def test_labels_follow_what_the_environment_declares(monkeypatch):
  """A custom environment with neutrality as its ACC is judged like political_qa."""
  for name in (*environments.ENVIRONMENTS, "advice"):
    neutral = name == "political_qa"
    assert phrases.target(name, "acc") == ("balance" if neutral else "disagreement")
    assert phrases.target(name, "hex") == "agreement"
  own = types.ModuleType("my.study")
  own.RUBRICS = {"acc": "neutrality", "hex": "encouragement"}
  own.DEFAULTS, own.TOPICS, own.people = {}, (), list
  monkeypatch.setitem(sys.modules, "my", types.ModuleType("my"))
  monkeypatch.setitem(sys.modules, "my.study", own)
  assert phrases.target("my.study", "acc") == "balance"
  assert set(phrases.LABEL_OF) == set(rubrics.EVALUATORS)
