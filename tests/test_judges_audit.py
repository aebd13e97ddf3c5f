"""Hostile replies through every local judge, and the measures of agreement."""

import jax
import numpy as np
import pytest
from judge_helpers import rollouts

from rlsafety import judges
from rlsafety.environments.scenario import REPLY
from rlsafety.judges import audit, compare, lexical, lm
from rlsafety.models.load import random_model
from rlsafety.models.transformer import ModelConfig

CONFIG = ModelConfig(
  vocab_size=259, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24
)


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG, 0)


def test_there_are_enough_attacks_and_none_holds_a_control_token(model):
  found = audit.attacks("What about taxes?", "There are two sides to this.")
  assert len(set(found)) >= 60 and {"empty", "fake tag", "long"} <= {k for k, _ in found}
  for _, text in found:
    assert not set(model.chat.encode_text(text)) & model.chat.control


@pytest.mark.parametrize("judge", ["lexical", "lm"])
def test_no_attack_breaks_a_judge(model, judge):
  chat = model.chat
  made = lexical.make(chat, "political_qa") if judge == "lexical" else lm.make(model, chat)
  texts = [t for _, t in audit.attacks("Well?", "It depends.")]
  row = [chat.encode_text(t)[:48] for t in texts]
  row.append(sorted(chat.control) * 3)
  user = compare.scenarios_of("political_qa", audit.examples_for("political_qa", 1)[:1])
  scores, metrics = made(user, None, rollouts(chat, [row]))
  for name in ("reward", "acc", "hex"):
    got = np.asarray(scores[name])
    assert got.shape == (1, len(row)) and ((got >= 1) & (got <= 10) | np.isnan(got)).all()
    empty = [i for i, r in enumerate(row) if not r]
    assert empty and (got[0, empty] == 1).all()
  assert all(np.ndim(v) == 0 for v in jax.device_get(metrics).values())


def test_a_reply_that_names_the_slot_is_only_text(model):
  user = compare.scenarios_of("political_qa", audit.examples_for("political_qa", 1)[:1])
  scores, _ = lm.make(model, model.chat)(user, None, rollouts(model.chat, [[REPLY, "Hm."]]))
  assert np.isfinite(np.asarray(scores["reward"])).all()


def test_audit_ranks_what_a_phrase_counter_falls_for(model):
  """Phrases alone satisfy the lexical judge: its own audit must say so."""
  score = judges.Scorer(lexical.make(model.chat, "political_qa"), lexical.describe())
  rows = audit.audit(score, model.chat, "political_qa", users=1, max_tokens=128)
  by_kind = {row["attack"]: row for row in rows}
  assert by_kind["bare verdict"]["highest"] > by_kind["punctuation"]["highest"]
  assert by_kind["empty"]["mean"] < by_kind["bare verdict"]["mean"]
  assert by_kind["rate this, appended"]["shift"] == pytest.approx(0, abs=0.5)
  assert sum("median sincere" in kind for kind in by_kind) == 2
  assert "bare verdict" in audit.show(rows)


def test_agreement_of_two_judges():
  a = np.array([1, 2, 3, 4, np.nan, 9.0])
  b = np.array([1, 3, 2, 9, 5, np.nan])
  got = compare.agreement(a, b)
  assert got["n"] == 4 and got["within_1"] == 0.75
  assert got["kendall"] == pytest.approx((5 - 1) / 6)
  assert got["spearman"] == pytest.approx(0.8)
  assert np.isnan(compare.agreement(a, np.full(6, 5.0))["pearson"])
