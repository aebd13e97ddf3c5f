"""Hostile replies through every local judge, and the measures of agreement."""

import argparse
import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from judge_helpers import replies as as_read

from rlsafety import judges
from rlsafety.environments.scenario import REPLY
from rlsafety.errors import UserError
from rlsafety.judges import http, lm, phrases, probe
from rlsafety.metrics.gaps import threshold_rates
from rlsafety.models import sources
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.sources import random_model
from rlsafety.study.statistics import agreement
from rlsafety.tools.judges import audit, compare, measure, replies

CONFIG = ModelConfig(
  vocab_size=512, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24
)


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG, 0)


def test_there_are_enough_attacks_and_none_holds_a_control_token(model):
  found = audit.attacks("What about taxes?", "There are two sides to this.")
  assert len(set(found)) >= 60 and {"empty", "fake tag", "long"} <= {k for k, _ in found}
  assert REPLY in audit.APPENDED["fake tag"] and "yes " * 2_500 in audit.ALONE["long"]
  for _, text in found:
    assert not set(model.chat.encode_text(text)) & model.chat.control


def make_judge(name, model, endpoint):
  if name == "probe":
    width = CONFIG.d_model
    arrays = (np.zeros(width), np.ones(width), np.ones((8, width)), np.zeros(8))
    base = probe.fingerprint(CONFIG, model.params)
    targets = {"acc": "balance", "hex": "agreement"}
    info = {"environment": "political_qa", "base": base, "targets": targets}
    heads = probe.Heads(probe.NAMES, (1,), *(a.astype(np.float32) for a in arrays), info)
    return probe.make(model, heads)
  if name == "http":
    return http.make(endpoint, "m", model.chat)
  if name == "phrases":
    return phrases.make(model.chat, "political_qa")
  return lm.make(model, model.chat)


@pytest.fixture(scope="module")
def endpoint():
  """Rates everything 7."""

  class Sevens(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
      json.loads(self.rfile.read(int(self.headers["content-length"])))
      self.send_response(200)
      data = b'{"choices": [{"message": {"content": "7"}}]}'
      self.send_header("content-length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *_):
      pass

  server = ThreadingHTTPServer(("127.0.0.1", 0), Sevens)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/v1"
  server.shutdown()


@pytest.mark.parametrize("judge", ("lm", "probe", "phrases", "http"))
def test_no_attack_breaks_a_judge(model, endpoint, judge):
  chat, made = model.chat, make_judge(judge, model, endpoint)
  texts = [t for _, t in audit.attacks("Well?", "It depends.")]
  row = [chat.encode_text(t)[:48] for t in texts]
  row.append(sorted(chat.control) * 3)
  user = measure.scenarios_of("political_qa", audit.examples_for("political_qa", 1)[:1])
  scores, metrics = made(user, as_read(chat, [row]))
  for name in ("reward", "acc", "hex"):
    got = np.asarray(scores[name])
    assert got.shape == (1, len(row)) and ((got >= 1) & (got <= 10) | np.isnan(got)).all()
    empty = [i for i, r in enumerate(row) if not chat.decode(r).strip(" \n")]
    assert len(empty) >= 5 and (got[0, empty] == 1).all()
  assert all(np.ndim(v) == 0 for v in jax.device_get(metrics).values())
  assert float(metrics["judge_degenerate"]) < 0.5 or judge == "probe"
  if judge == "http":  # ten thousand tokens, uncut: endless, so broken
    scores, _ = made(user, as_read(chat, [[audit.ALONE["long"][1]]], 10_000))
    assert np.asarray(scores["reward"]).tolist() == [[1.0]]


def test_each_reply_is_rated_by_the_wish_of_its_own_topic():
  examples = [e for e in replies.sampled("advice") if e.topic == "bank: theft"][:1]
  examples += [e for e in replies.written("advice") if e.topic == "gambling"][:1]
  theft, gambling = measure.scenarios_of("action_advice", examples)
  assert "thought of stealing" in theft.wish and "starting to gamble" in gambling.wish
  assert "gambling again" in measure.scenarios_of("therapy_talk", examples)[1].wish
  assert gambling.message == examples[1].message and gambling.environment == "action_advice"
  for e, s in zip(
    replies.written("political_qa"),
    measure.scenarios_of("political_qa", replies.written("political_qa")),
    strict=True,
  ):
    said = re.search(r"holds (\S+) political", s.wish)
    assert said[1] == "firm" if e.is_gameable else "balanced account" in s.wish
  with pytest.raises(UserError, match="no topic 'chess'"):
    measure.scenarios_of("neutral", [dataclasses.replace(examples[0], topic="bank: chess")])


def test_sampled_replies_of_environments_that_share_a_head_are_counted_apart():
  one = replies.sampled("advice")[0]
  examples = [
    dataclasses.replace(one, environment=name, label=label, is_gameable=flag)
    for name, flags in (("therapy_talk", [True]), ("action_advice", [True, False] * 3))
    for flag in flags
    for label in ("agreement", "disagreement")
  ]
  score = np.array([e.label == "agreement" for e in examples], np.float32)
  ratings = {"reward": score, "hex": score, "acc": 1 - score}
  tables = measure.tables_of("therapy_talk", ratings, examples)
  few, enough = (tables["acc"][f"sampled, {n}"] for n in ("therapy_talk", "action_advice"))
  assert (few["n"], few["wanted"]) == (2, 1) and np.isnan(few["rest"])
  assert (enough["n"], enough["wanted"]) == (12, 6) and enough["rest"] == 1
  lines = measure.show(tables).splitlines()
  line = next(x for x in lines if x.startswith("acc") and "therapy" in x)
  assert line.split()[3:6] == ["2", "1", "-"]
  gameable, nines = [e.is_gameable for e in examples], {k: 9 * v for k, v in ratings.items()}
  rubric_of = {"acc": "dissuasion", "hex": "encouragement"}
  assert threshold_rates(nines, gameable, rubric_of) == {
    "acc_rate": np.mean([e.label != "agreement" for e in examples if not e.is_gameable]),
    "hex_rate": np.mean([e.label == "agreement" for e in examples if e.is_gameable]),
  }


def test_the_model_of_one_judge_is_not_the_file_of_another(monkeypatch):
  made = []
  monkeypatch.setattr(sources, "open_model", lambda settings: None)
  opened = lambda j, _, model: made.append((j.name, j.model, j.adapter))  # noqa: E731
  monkeypatch.setattr(judges, "open_judge", opened)
  parser = argparse.ArgumentParser()
  compare.judge_flags(parser)
  given = ["--judge_model=other", "--probe=my.safetensors", "--adapter=folder", "--url=http://x/v1"]
  flags = parser.parse_args(given)
  compare.build(flags, ("lm", "probe", "phrases", "http"))
  assert made == [
    ("lm", "other", "folder"), ("probe", "my.safetensors", ""), ("phrases", "", ""),
    ("http", "other", ""),
  ]  # fmt: skip


def test_a_reply_that_names_the_slot_is_only_text(model):
  user = measure.scenarios_of("political_qa", audit.examples_for("political_qa", 1)[:1])
  scores, _ = lm.make(model, model.chat)(user, as_read(model.chat, [[REPLY, "Hm."]]))
  assert np.isfinite(np.asarray(scores["reward"])).all()


def test_audit_ranks_what_a_phrase_counter_falls_for(model):
  """Phrases alone satisfy the phrase judge: its own audit must say so."""
  score = judges.Judge(phrases.make(model.chat, "political_qa"), phrases.describe())
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
  got = agreement(a, b)
  assert got["n"] == 4 and got["within_1"] == 0.75
  assert got["kendall"] == pytest.approx((5 - 1) / 6)
  assert got["spearman"] == pytest.approx(0.8)
  constant = agreement(a, np.full(6, 2.0))
  assert np.isnan(constant["pearson"]) and constant["within_1"] == 0.6
