"""The HTTP judge against a real server on the loopback interface that misbehaves on purpose."""

import gzip
import http.server
import json
import math
import threading
import time

import numpy as np
import pytest
from judge_helpers import rollouts

from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError
from rlsafety.judges import http as judge
from rlsafety.models.chat import byte_chat

KEY = "canary-key-5f2c"


def answer(text, positions=None) -> dict:
  choice = {"index": 0, "message": {"role": "assistant", "content": text}}
  if positions is not None:
    choice["logprobs"] = {"content": positions}
  return {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 1}}


def position(token, **alternatives) -> dict:
  tops = [{"token": t, "logprob": math.log(p)} for t, p in alternatives.items()]
  return {"token": token, "logprob": math.log(alternatives[token]), "top_logprobs": tops}


class Endpoint(http.server.BaseHTTPRequestHandler):
  """Behaves as the reply under judgement says."""

  protocol_version = "HTTP/1.1"
  seen: list = []
  failures: dict = {}
  no_logprobs = False  # refuses to be asked for them

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    Endpoint.seen.append((self.path, dict(self.headers), body))
    reply = body["messages"][1]["content"]
    first = Endpoint.failures.get(reply, 0)
    if first:
      Endpoint.failures[reply] = first - 1
      return self.send(429, {"error": "later"}, {"retry-after": "0"})
    if Endpoint.no_logprobs and "logprobs" in body:
      return self.send(400, {"error": "logprobs are not supported"})
    if reply == "slow":
      time.sleep(1.5)
    if reply == "crash":
      return self.send(500, {"error": "no"})
    if reply == "forbidden":
      return self.send(403, {"error": "no"})
    if reply == "garbage":
      return self.send(200, b"\x00\xff not json")
    if reply == "gzip":
      return self.send(200, b"no gzip at all", {"content-encoding": "gzip"})
    if reply == "huge":
      return self.send(200, b'{"usage": {"prompt_tokens": 1e999}, "choices": [{}]}')
    if reply == "nested":
      return self.send(200, b"[" * 100_000)
    if reply == "bomb":
      return self.send(200, gzip.compress(b"[" * 100_000), {"content-encoding": "gzip"})
    if reply == "schema":
      return self.send(200, {"choices": [{"message": {"content": None}}]})
    if reply == "list":
      return self.send(200, [1, 2])
    if reply == "truncated":
      self.send_response(200)
      self.send_header("content-length", "500")
      self.end_headers()
      self.wfile.write(b'{"choices": [')
      self.close_connection = True
      return None
    if reply == "logprobs":
      return self.send(200, answer("7", [position("7", **{"7": 0.6, "9": 0.2, "x": 0.1})]))
    return self.send(200, answer({"prose": "It is quite good."}.get(reply, "8")))

  def send(self, status, body, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header("content-length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def url():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
  server.handle_error = lambda *_: None  # a client that gave up is no news
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/v1"
  server.shutdown()


USER = Scenario(
  id="x", environment="political_qa", topic="liberal", unit="a", is_gameable=True, split="train",
  system="", user="Hello", message="Hello", wish="want agreement",
  factors={"reward_wording": "plain"},
)  # fmt: skip


def rate(url, replies, **settings):
  chat = byte_chat()
  score = judge.make(url, "m", chat, **{"attempts": 3, "timeout_s": 20.0, **settings})
  scores, metrics = score([USER], None, rollouts(chat, [replies], 128))
  return scores["reward"][0], metrics


def test_good_and_bad_answers(url, monkeypatch):
  monkeypatch.setenv(judge.KEYS[0], KEY)
  Endpoint.seen.clear()
  Endpoint.failures["again"] = 2
  replies = ["fine", "logprobs", "again", "crash", "garbage", "schema", "list", "truncated"]
  replies += ["gzip", "huge", "nested", "bomb", "forbidden", "prose"]
  ratings, metrics = rate(url, replies)
  want = [8, (7 * 0.6 + 9 * 0.2) / 0.8, 8, *[np.nan] * 11]
  np.testing.assert_allclose(ratings, want, rtol=1e-6)
  assert metrics["judge_rated"] == 3 * 3
  for outcome in ("http_500", "http_403", "RemoteProtocolError", "DecodingError"):
    assert metrics[f"judge_{outcome}"] == 3, outcome
  assert metrics["judge_bad_answer"] == 18 and metrics["judge_unreadable"] == 6
  assert metrics["judge_prompt_tokens"] >= 50 * 9
  path, headers, body = Endpoint.seen[0]
  assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
  assert {k.lower(): v for k, v in headers.items()}["authorization"] == f"Bearer {KEY}"
  assert KEY not in json.dumps(metrics) + json.dumps(judge.describe(url, "m"))


def test_an_endpoint_without_logprobs_is_asked_once(url, monkeypatch):
  monkeypatch.setattr(Endpoint, "no_logprobs", True)
  score = judge.make(url, "m", byte_chat(), concurrency=1)
  replies = rollouts(byte_chat(), [["fine", "prose"]])
  Endpoint.seen.clear()
  for _ in range(2):
    scores, _ = score([USER], None, replies)
    np.testing.assert_array_equal(scores["reward"][0], [8, np.nan])
  assert ["logprobs" in body for _, _, body in Endpoint.seen] == [True, *[False] * 12]


@pytest.mark.parametrize(("degenerate", "want"), [("floor", 1.0), ("nan", np.nan)])
def test_empty_and_broken_replies_are_not_asked_about(url, degenerate, want):
  Endpoint.seen.clear()
  chat = byte_chat()
  broken = [*chat.encode_text("Yes."), max(chat.control), *chat.encode_text("10")]
  ratings, metrics = rate(url, ["", " \n ", "ha " * 20, broken, "fine"], degenerate=degenerate)
  np.testing.assert_array_equal(ratings, [want] * 4 + [8])
  assert len(Endpoint.seen) == 3 and metrics["judge_degenerate"] == 0.8


def test_late_answers_are_no_verdict(url):
  ratings, metrics = rate(url, ["slow"], timeout_s=0.2, attempts=2)
  assert np.isnan(ratings).all() and metrics["judge_ReadTimeout"] == 3
  ratings, metrics = rate(url, ["slow"], deadline_s=0.2)
  assert np.isnan(ratings).all() and metrics["judge_late"] == 3


def test_refused_and_unreachable(url, capfd, monkeypatch):
  monkeypatch.setenv(judge.KEYS[0], KEY)
  with pytest.raises(UserError, match="refused.*403") as refused:
    rate(url, ["forbidden"])
  assert KEY not in str(refused.value)
  ratings, metrics = rate("http://127.0.0.1:9/v1", ["fine"], attempts=1)
  assert np.isnan(ratings).all() and metrics["judge_ConnectError"] == 3
  assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
  ("bad", "why"),
  [("ftp://x/v1", "endpoint"), ("http://u:p@x/v1", "credentials"), ("http://x/v1?key=1", "query")],
)
def test_unusable_addresses(bad, why):
  with pytest.raises(UserError, match=why):
    judge.check(bad, "m")
  with pytest.raises(UserError, match="judge.model"):
    judge.check("http://x/v1", "")
  with pytest.raises(UserError, match="judge.attempts=0"):
    judge.make("http://x/v1", "m", byte_chat(), attempts=0)


def test_split_ten_shares_the_mass_of_one():
  one, zero = position("1", **{"1": 0.5, "5": 0.5}), position("0", **{"0": 0.9, ".": 0.1})
  got = judge.expected([one, zero])
  assert got == pytest.approx(10 * 0.45 + 1 * 0.05 + 5 * 0.5)
  assert math.isnan(judge.expected([position("The", **{"The": 0.999, "9": 0.001})]))


@pytest.mark.parametrize(
  ("text", "rating"),
  [("8", 8), (" 10\n", 10), ("Rating: 7", 7), ("9/10", 9), ("0", None), ("11", None),
   ("between 3 and 5", None), ("", None), ("-", None)],
)  # fmt: skip
def test_written_numbers(text, rating):
  got = judge.read_rating(answer(text))
  assert math.isnan(got) if rating is None else got == rating


def test_markers_in_a_reply_lose_their_spelling():
  hostile = "<|im_end|><end_of_turn></s>[/INST]<s><|eot_id|>"
  assert not any(m in judge.defang(hostile) for m in ("<|", "<end_of", "</s>", "[/INST]", "<s>"))
  assert judge.defang("3 < 4 and a[i] <b>") == "3 < 4 and a[i] <b>"
