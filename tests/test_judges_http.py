"""The HTTP judge: what it reads of an answer, how it asks a server that misbehaves on purpose."""

import asyncio
import dataclasses
import gzip
import http.server
import json
import math
import threading
import time
import tracemalloc
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_helpers import replies as as_read

from rlsafety import addresses, environments
from rlsafety.config import Judge
from rlsafety.environments import rubrics
from rlsafety.errors import UserError
from rlsafety.judges import answers, endpoint
from rlsafety.judges import http as judge
from rlsafety.models.chat import byte_chat

KEY = "canary-key-5f2c"


def answer(text, positions=None, finish="stop") -> dict:
  choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
  if positions is not None:
    choice["logprobs"] = {"content": positions}
  return {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 1}}


def position(token, *more, **alternatives) -> dict:
  """A place where `token` was written. more: further (text, probability), also of one text."""
  tops = [{"token": t, "logprob": math.log(p)} for t, p in (*alternatives.items(), *more)]
  return {"token": token, "logprob": math.log(alternatives[token]), "top_logprobs": tops}


# --- Reading ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "score"),
  [("8", 8), (" 10\n", 10), ("Rating: 7", 7), ("9/10", 9), ("**7**", 7), ("My rating is 3.", 3),
   ('{"rating": 4}', 4), ("6 out of 10", 6), ("8\n\nThe reply is warm; 3 would be too low.", 8),
   ("<think>Perhaps a 3?</think>\n\n7", 7), ("7</s>", 7), ("Score: **10**", 10),
   ("0", None), ("11", None), ("15", None), ("100", None), ("-3", None), ("Rating: -3", None),
   ("7.5", None), ("7%", None), ("75", None), ("between 3 and 5", None), ("not a 10", None),
   ("1-10", None), ("A scale of 1", None), ("", None), ("-", None), ("less than 4", None),
   ("<think>Perhaps a 3?", None)],
)  # fmt: skip
def test_written_numbers(text, score):
  got, reason = answers.read(answer(text))
  assert (got, reason) == (score, "rated") if score else math.isnan(got) and reason != "rated"


@pytest.mark.parametrize(
  "text", ["10", "1", "Rating: 1", "Score: **1", "Rating (1-", "A scale of 1", "Between 7 ", "8/1"]
)
@pytest.mark.parametrize(
  "finish", ["length", "MAX_TOKENS", "model_length", "content_filter", "abort"]
)
def test_a_cut_answer_is_no_verdict_unless_its_line_ended(text, finish):
  assert answers.read(answer(text, finish=finish))[1] in ("cut", "no_number")
  shown = [position(text, **{text: 0.9})]
  assert math.isnan(answers.read(answer(text, shown, finish))[0])
  assert answers.read(answer("10\n\nThe reply is", finish=finish)) == (10.0, "rated")
  faults = ("content_filter", "abort")  # more tokens help against a limit alone
  assert answers.read(answer("", finish=finish))[1] == ("empty" if finish in faults else "thinking")


@pytest.mark.parametrize("finish", ["stop", "STOP", "eos_token", "end_turn", "COMPLETE", None, ""])
def test_an_answer_that_its_model_ended_is_whole(finish):
  assert answers.read(answer("Rating: 1", finish=finish)) == (1.0, "rated")


P7 = {"7": 0.6, "9": 0.2, "x": 0.1}


@pytest.mark.parametrize(
  ("text", "places", "score"),
  [
    ("7", [position("7", **P7)], 7.5),
    ("7", [position("7", **P7), position("</s>", **{"</s>": 1.0})], 7.5),
    (" 7", [position("Ġ7", **{"Ġ7": 0.6, "Ġ9": 0.2})], 7.5),
    ("7", [position("▁7", **{"▁7": 0.6, "▁9": 0.2})], 7.5),
    ("7", [position("▁", **{"▁": 0.9}), position("7", **P7)], 7.5),
    ("7", [position("", **{"": 0.9}), position("7", **P7)], 7.5),
    ("7", [{**position("#", **{"#": 0.9}), "bytes": [55]}], 7.0),  # its bytes say 7
    ("7", [position("token_id:22", **{"token_id:22": 0.9})], 7.0),  # the text alone
    ("**7**", [position("**", **{"**": 0.9}), position("7", **P7), position("**", **{"**": 1})],
     7.5),
    ("7", [position("<think>", **{"<think>": 1.0}), position("9", **{"9": 1.0}),
           position("</think>", **{"</think>": 1.0}), position("7", **P7)], 7.5),  # thoughts apart
    # The same text twice, and two tokens of one text: probabilities add up.
    ("7", [position("7", ("7", 0.002), **{"8": 0.09, "7": 0.8})], (7 * 0.802 + 8 * 0.09) / 0.892),
    ("7", [position("7", (" 7", 0.002), **{"8": 0.09, "7": 0.8})], (7 * 0.802 + 8 * 0.09) / 0.892),
    ("10", [position("10", ("1", 0.009), **{"1": 0.09, "10": 0.8})], (8 + 0.099) / 0.899),
    # "10" in two tokens.
    ("1", [position("1", **{"1": 0.6, "5": 0.4}), position(".", **{".": 0.9, "0": 0.1})],
     0.6 * 1.9 + 2.0),
    ("10", [position("1", **{"1": 0.6, "5": 0.4}), position("0", **{"0": 0.9, ".": 0.1})],
     0.6 * 9.1 + 2.0),
    ("8", [position("8", **{"8": 0.5, "1": 0.5})], 9.0),
    ("2", [position("2", **{"2": 0.5, "1": 0.5})], 1.5),
    ("5", [position("5", **{"5": 0.5, "1": 0.5})], None),
    # A verdict is written, and most of the mass.
    ("0", [position("0", **{"0": 0.98, "1": 0.02})], None),
    ("15", [position("1", **{"1": 0.99}), position("5", **{"5": 0.99})], None),
    ("100", [position("1", **{"1": 1.0}), *[position("0", **{"0": 1.0})] * 2], None),
    ("75", [position("75", **{"75": 0.8, "7": 0.2})], None),
    ("7", [position("7", **{"7": 0.3, "The": 0.29, "I": 0.2})], None),
    ("I would", [position("I", **{"I": 0.95, "1": 0.04})], None),
    (None, [position("<think>", **{"<think>": 0.98, "7": 0.01})], None),
  ],
)  # fmt: skip
def test_log_probs_of_the_number(text, places, score):
  got, reason = answers.read(answer(text, places))
  assert got == pytest.approx(score) if score else math.isnan(got) and reason != "rated"


def test_log_probs_in_other_shapes():
  for logprobs in (
    {"tokens": ["7"], "token_logprobs": [-0.1], "top_logprobs": [{"7": -0.1}]},
    {"content": [{"token": "7", "logprob": None, "top_logprobs": []}]},
    {"content": None}, None, [], "x", {"content": [7]},
    {"content": [position("7", ("", 0.99), **{"7": 0.99})]},  # not of one place
  ):  # fmt: skip
    shown = answer("7")
    shown["choices"][0]["logprobs"] = logprobs
    assert answers.read(shown) == (7.0, "rated")
  most = math.log(0.8)
  as_dict = {"token": "7", "logprob": most, "top_logprobs": {"7": most, "9": -1.7}}
  nine = math.exp(-1.7)
  assert answers.read(answer("7", [as_dict]))[0] == pytest.approx((5.6 + 9 * nine) / (0.8 + nine))
  with pytest.raises(ValueError, match="at most 0"):  # probabilities by mistake
    answers.read(answer("7", [{"token": "7", "logprob": 0.98}]))
  assert answers.read(answer([{"type": "text", "text": "7"}]))[0] == 7


JUNK = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "logprobs", "token", "logprob",
                     "top_logprobs", "bytes", "finish_reason", "text", "usage"]), inner, max_size=4
  ),
  max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(JUNK, st.sampled_from(["logprobs", "message", "content", "token", "whole"]))
def test_no_answer_ends_a_run(junk, place):
  """Whatever stands where: a score from 1 to 10, no verdict, or one of the errors that count."""
  said = answer("7", [position("7", **P7)])
  if place == "whole":
    said = junk
  elif place == "content":
    said["choices"][0]["message"]["content"] = junk
  elif place == "token":
    said["choices"][0]["logprobs"]["content"][0] = junk
  else:
    said["choices"][0][place] = junk
  try:
    score, reason = answers.read(said)
    endpoint.used_tokens(said)
  except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
    return
  assert (1 <= score <= 10) == (reason == "rated") and (math.isnan(score) or reason == "rated")


# --- Asking -------------------------------------------------------------------------------

BOMB = gzip.compress(bytes(300 << 20), 1)


class Endpoint(http.server.BaseHTTPRequestHandler):
  """Behaves as the reply under judgement says."""

  protocol_version = "HTTP/1.1"
  seen: list = []
  failures: dict = {}
  counting = threading.Lock()
  refuses = staticmethod(lambda body: "")  # the words of a 400

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    Endpoint.seen.append((self.path, dict(self.headers), body))
    reply = body["messages"][1]["content"]
    with Endpoint.counting:  # each request has a thread
      first = Endpoint.failures.get(reply, 0)
      Endpoint.failures[reply] = max(first - 1, 0)
    if first:
      return self.send(429, {"error": "later"}, {"retry-after": "0"})
    if words := Endpoint.refuses(body):
      return self.send(400, {"error": {"message": words, "type": "invalid_request_error"}})
    if reply == "slow":
      time.sleep(1.5)
    if reply == "crash":
      return self.send(500, {"error": "no"})
    if reply == "forbidden":
      return self.send(403, {"error": f"no such key: {KEY}\x1b[31m"})
    if reply == "truncated":
      self.send_response(200)
      self.send_header("content-length", "500")
      self.end_headers()
      self.wfile.write(b'{"choices": [')
      self.close_connection = True
      return None
    packed = {"content-encoding": "gzip"}
    if reply == "gzip":
      return self.send(200, b"no gzip at all", packed)
    if reply == "bomb":
      return self.send(200, BOMB, packed)
    if reply == "packed":
      return self.send(200, gzip.compress(json.dumps(answer("6")).encode()), packed)
    raw = {
      "garbage": b"\x00\xff not json",
      "huge": b'{"usage": {"prompt_tokens": 1e999}, "choices": [{}]}',
      "digits": b'{"usage": {"prompt_tokens": %s}, "choices": [{"message": {"content": "7"}}]}'
      % (b"9" * 400),
      "many": json.dumps(answer("7") | {"usage": {"prompt_tokens": 10**30}}).encode(),
      "nested": b"[" * 100_000,
      "long": b" " * (endpoint.MAX_ANSWER + 1),
      "schema": b'{"choices": [{"message": {"content": 7}}]}',
      "list": b"[1, 2]",
    }
    if reply in raw:
      return self.send(200, raw[reply])
    if reply == "thinks" and body["max_tokens"] < endpoint.THINKING:
      return self.send(200, answer(None, finish="length"))
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


USER = next(s for s in environments.load({"name": "political_qa"}) if s.is_gameable)


def rate(url, replies, user=USER, **settings):
  chat = byte_chat()
  score = judge.make(url, "m", chat, **{"attempts": 3, "timeout_s": 20.0, **settings})
  scores, metrics = score([user], as_read(chat, [replies], 128))
  return scores["reward"][0], metrics


def test_good_and_bad_answers(url, monkeypatch):
  monkeypatch.setenv(addresses.KEYS[0], KEY)
  Endpoint.seen.clear()
  Endpoint.failures["again"] = 2
  good = ["fine", "logprobs", "again", "packed"]
  bad = ["garbage", "schema", "list", "gzip", "huge", "digits", "many", "nested", "long"]
  replies = [*good, *bad, "crash", "truncated", "forbidden", "prose"]
  scores, metrics = rate(url, replies)
  want = [8, (7 * 0.6 + 9 * 0.2) / 0.8, 8, 6, *[np.nan] * (len(replies) - len(good))]
  np.testing.assert_allclose(scores, want, rtol=1e-6)
  assert metrics["judge_rated"] == 3 * len(good) and metrics["judge_bad_answer"] == 3 * len(bad)
  for outcome in ("http_500", "http_403", "RemoteProtocolError", "no_number"):
    assert metrics[f"judge_{outcome}"] == 3, outcome
  assert metrics["judge_prompt_tokens"] == 50 * 3 * (len(good) + 1)
  path, headers, body = Endpoint.seen[0]
  assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
  assert {k.lower(): v for k, v in headers.items()}["authorization"] == f"Bearer {KEY}"
  assert KEY not in json.dumps(metrics) + json.dumps(judge.describe(url, "m"))


def test_a_small_answer_that_unpacks_to_a_large_one_is_not_unpacked(url):
  tracemalloc.start()
  scores, metrics = rate(url, ["bomb"])
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert np.isnan(scores).all() and metrics["judge_bad_answer"] == 3
  assert peak < 3 * 4 * endpoint.MAX_ANSWER  # one of the three unpacked would be 300 MiB


BODY = json.dumps(answer("6")).encode()
LIMIT, RANDOM = endpoint.MAX_ANSWER, np.random.default_rng(0).bytes(endpoint.MAX_ANSWER)
MUCH = [b" " * (1 << 20)] * 64  # eight times the limit, were it read to its end


@pytest.mark.parametrize(
  ("encoding", "chunks", "says"),
  [
    ("identity", [BODY], ""),
    ("", [BODY[:9], BODY[9:]], ""),
    ("gzip", [gzip.compress(BODY)], ""),
    (" X-GZIP", [gzip.compress(BODY)], ""),
    ("deflate", [zlib.compress(BODY)], ""),
    ("gzip", [BOMB], "more than"),  # the whole of it in one piece
    ("identity", [b" " * (LIMIT + 1)], "more than"),
    ("identity", MUCH, "more than"),
    ("gzip", [gzip.compress(BODY), *MUCH], "more than"),  # after its end
    ("gzip", [gzip.compress(RANDOM, 0), b"x"], "more than"),
    ("gzip", [gzip.compress(BODY)[:-1]], "cut"),
    ("gzip", [BODY], "content-encoding gzip: "),
    ("br", [BODY], "content-encoding br"),
    ("gzip, gzip", [gzip.compress(gzip.compress(BODY))], "content-encoding gzip, gzip$"),
  ],
)
def test_a_body_is_read_and_unpacked_under_its_limits(encoding, chunks, says):
  async def raw():
    for chunk in chunks:
      yield chunk

  response = types.SimpleNamespace(headers={"content-encoding": encoding}, aiter_raw=raw)
  tracemalloc.start()
  try:
    if says:
      with pytest.raises(ValueError, match=says):
        asyncio.run(endpoint.read_body(response))
    else:
      assert asyncio.run(endpoint.read_body(response)) == BODY
    assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
  finally:
    tracemalloc.stop()


UNSUPPORTED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
REFUSALS = {  # what servers say -> the fields that the request then has
  "logprobs": (lambda b: "logprobs: not supported" if "logprobs" in b else "", {"logprobs": None}),
  "anything": (lambda b: "bad request" if "logprobs" in b else "", {"logprobs": None}),
  "five": (
    lambda b: "top_logprobs must be at most 5" if b.get("top_logprobs", 0) > 5 else "",
    {"top_logprobs": 5},
  ),
  "newer": (
    lambda b: f"{UNSUPPORTED}'max_completion_tokens' instead." if "max_tokens" in b else "",
    {"max_tokens": None, "max_completion_tokens": endpoint.SHORT, "top_logprobs": 20},
  ),
  "reasoning": (
    lambda b: f"{UNSUPPORTED}'max_completion_tokens'" if "max_tokens" in b
    else "Unsupported value: 'temperature' does not support 0" if "temperature" in b
    else "logprobs is not allowed" if "logprobs" in b else "",
    {"temperature": None, "max_completion_tokens": endpoint.SHORT, "logprobs": None},
  ),
}  # fmt: skip


@pytest.mark.parametrize("server", REFUSALS)
def test_what_a_server_refuses_is_left_out_and_not_asked_again(url, server, monkeypatch):
  refuses, fields = REFUSALS[server]
  monkeypatch.setattr(Endpoint, "refuses", staticmethod(refuses))
  score = judge.make(url, "m", byte_chat(), concurrency=1)
  replies = as_read(byte_chat(), [["fine", "prose"]])
  score([USER], replies)
  Endpoint.seen.clear()
  scores, _ = score([USER], replies)
  np.testing.assert_array_equal(scores["reward"][0], [8, np.nan])
  assert len(Endpoint.seen) == 6
  for _, _, body in Endpoint.seen:
    assert {name: body.get(name) for name in fields} == fields


def test_a_model_that_thinks_gets_the_tokens_for_it(url):
  Endpoint.seen.clear()
  scores, metrics = rate(url, ["thinks"], concurrency=1)
  assert scores == [8] and metrics["judge_rated"] == 3
  asked = [body["max_tokens"] for _, _, body in Endpoint.seen]
  assert asked == [endpoint.SHORT, *[endpoint.THINKING] * 3]


def test_a_batch_of_refusals_stops_the_run_with_the_servers_words(url, monkeypatch, capfd):
  monkeypatch.setenv(addresses.KEYS[0], KEY)
  words = r"refused \(http 403; .* no such key: \*\*\* \[31m\)"
  with pytest.raises(UserError, match=words) as error:
    rate(url, ["forbidden"])
  assert KEY not in str(error.value)
  with pytest.raises(UserError, match=r"judge.url=http://.*/v1/\*\*\*\w+: every") as error:
    rate(f"{url}/{SECRET}", ["forbidden"])
  assert SECRET not in str(error.value)
  monkeypatch.setattr(Endpoint, "refuses", staticmethod(lambda body: "the model `m` is unknown"))
  with pytest.raises(UserError, match="http 400; the server says: the model `m` is unknown"):
    rate(url, ["fine", "prose"])
  monkeypatch.setattr(Endpoint, "refuses", staticmethod(lambda body: ""))
  Endpoint.failures["broke"] = 99
  with pytest.raises(UserError, match="http 429"):
    rate(url, ["broke"], attempts=2)
  scores, metrics = rate("http://127.0.0.1:9/v1", ["fine"], attempts=1)
  assert np.isnan(scores).all() and metrics["judge_ConnectError"] == 3
  assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("unusable", [1.0, np.nan])
def test_empty_and_broken_replies_are_not_asked_about(url, unusable):
  Endpoint.seen.clear()
  chat = byte_chat()
  broken = [*chat.encode_text("Yes."), max(chat.control), *chat.encode_text("10")]
  scores, metrics = rate(url, ["", " \n ", "ha " * 20, broken, "fine"], unusable=unusable)
  np.testing.assert_array_equal(scores, [unusable] * 4 + [8])
  assert len(Endpoint.seen) == 3 and metrics["judge_degenerate"] == 0.8


def test_late_answers_are_no_verdict(url):
  scores, metrics = rate(url, ["slow"], timeout_s=0.2, attempts=2)
  assert np.isnan(scores).all() and metrics["judge_timeout"] == 3
  scores, metrics = rate(url, ["slow"], deadline_s=0.2)
  assert np.isnan(scores).all() and metrics["judge_late"] == 3


# --- Addresses ----------------------------------------------------------------------------

SECRET = "sk-proj-Zx81kQ0aBcD3eF5gH7"


@pytest.mark.parametrize(
  "bad",
  ["ftp://{}@x/v1", "{}", "{}://x", "http://{}:p@x/v1", "http://u:{}@x/v1", "http://x/v1?key={}",
   "http://{}@x/v1", "http://:{}@x/v1",
   "http://x/v1#{}", "http://x:{}/v1", "http://x:99999/v1/{}", "http://x:0/{}", "http://[::1/{}",
   "http:///{}", "http://x y/{}", "http://x\\@y/{}", "//x/{}", ""],
)  # fmt: skip
def test_unusable_addresses_are_one_line_without_their_secrets(bad):
  address = bad.format(SECRET)
  with pytest.raises(UserError, match="judge.url") as error:
    addresses.check(address, "m")
  shown = f"{error.value} {addresses.masked(address)}"
  assert "\n" not in shown and not any(SECRET[i : i + 8] in shown for i in range(len(SECRET) - 7))


def test_usable_addresses_and_what_is_shown_of_them():
  for address in ("http://localhost:8000/v1", "https://x.example/openai/deployments/gpt-4o-2024"):
    addresses.check(address, "m")
    assert addresses.masked(address) == address
  addresses.check(f"https://x.example/{SECRET}/v1", "m")  # usable, and shown by a digest
  shown = addresses.masked(f"https://x.example/{SECRET}/v1")
  assert shown.startswith("https://x.example/***") and shown.endswith("/v1") and "Zx81" not in shown
  assert shown != addresses.masked(f"https://x.example/{SECRET}1/v1")
  for key in ("sk-short", "hf_abc", "token=abc", "Zx81kQ0aBcD3eF5gH7", "v1-Zx81kQ0aBcD3eF5gH7"):
    shown = addresses.masked(f"https://x.example/{key}/v1")
    assert key not in shown and "Zx81" not in shown, key
  with pytest.raises(UserError, match="judge.model"):
    addresses.check("http://x/v1", "")
  with pytest.raises(UserError, match="judge.attempts=0"):
    Judge(name="http", url="http://x/v1", attempts=0)


# --- The guard ----------------------------------------------------------------------------

# Markers of published chat formats: ChatML, Llama 2, 3 and 4, Gemma, Mistral, Phi, DeepSeek, Qwen,
# Command R, Granite, gpt-oss, InternLM, Baichuan, GLM, Jamba, Nemotron, EXAONE, MiniMax, Kimi,
# Hunyuan, Falcon, OLMo, Zephyr, ERNIE, LFM, BERT's, and turns in ordinary text.
MARKERS = """
<|im_start|> <|im_end|> <|im_sep|> <|im_middle|> <|endoftext|> <|system|> <|user|> <|assistant|>
<|end|> <|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eot|>
<|python_tag|> <|header_start|> <|header_end|> <|eom_id|> <<SYS>> <</SYS>> [INST] [/INST] <s> </s>
[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]
[/TOOL_RESULTS] [IMG] [THINK] [/THINK] [PREFIX] [SUFFIX] [MIDDLE] <bos> <eos> <pad> <unk> <mask>
<start_of_turn> <end_of_turn> <start_of_image> <unused0> <|turn> <turn|> <|think|> <think> </think>
<tool_call> </tool_call> <tool_response> <|vision_start|> <|object_ref_start|> <|fim_prefix|>
<｜User｜> <｜Assistant｜> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜tool▁outputs▁begin｜>
<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>
<BOS_TOKEN> <|start_of_role|> <|end_of_role|> <|start|> <|channel|> <|message|> <|return|> <|call|>
<eoh> <eoa> <eosys> [UNUSED_TOKEN_145] <reserved_106> [gMASK] [sMASK] <sop> <eop> <|observation|>
<|bom|> <|eom|> <extra_id_0> <SPECIAL_10> [|user|] [|assistant|] [|endofturn|] ]~b] ]~!b[ [e~[
<|im_user|> <｜hy_User｜> >>QUESTION<< >>ANSWER<< |||IP_ADDRESS||| <|begin_of_sentence|> <mask:1>
<|startoftext|> [CLS] [SEP] [PAD] [MASK] [UNK] [BOS] [EOS] [STOP] <seed:bos> <0x0A> <|sep|>
"""
MARKERS = [*MARKERS.split(), "<| im_end |>", "＜|im_end|＞", "［/INST］", "USER:", "ASSISTANT:"]
MARKERS += ["### Instruction:", "### Response:", "### Input:", "### Assistant:", "Human:"]
MARKERS += ["GPT4 Correct User:", "Instruct:", "Output:", "AI:", "Bot:", "GPT:", "User："]
MARKERS += ["问：", "答：", "[Round 1]", "[unused0]"]  # OpenChat, Phi-2, ChatGLM, BERT


def test_markers_lose_their_spelling_in_reply_message_and_wish(url):
  assert len(set(MARKERS)) > 100
  for marker in MARKERS:
    at = "\n" if marker[-1] in ":：" else ""  # a turn in ordinary text begins a line
    shown = judge.defang(f"a\n{marker} b\n{marker}{marker}")
    assert at + marker.translate(judge.WIDE) not in shown.translate(judge.WIDE), marker
  everything = "x\n" + "\n".join(MARKERS)
  user = dataclasses.replace(USER, message=everything, wish=everything)
  Endpoint.seen.clear()
  rate(url, [everything[:120]], user)
  assert len(Endpoint.seen) == 3
  for _, _, body in Endpoint.seen:
    for message in body["messages"]:
      assert not [m for m in MARKERS if f"\n{m}" in f"\n{message['content']}"]


def test_ordinary_text_is_left_alone():
  for text in ("3 < 4 and a[i] > b[0]", "See [1] and [note].", "a <- b: x", "I <3 you [sic]"):
    assert judge.defang(text) == text
  for name in environments.ENVIRONMENTS:
    for user in environments.load({"name": name}):
      assert judge.defang(user.message) == user.message and judge.defang(user.wish) == user.wish
  for rubric in (*rubrics.WORDINGS.values(), *rubrics.EVALUATORS.values()):
    assert judge.defang(rubric) == rubric
