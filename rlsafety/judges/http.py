"""A judge behind any OpenAI-compatible endpoint: vLLM, llama.cpp's server, a hosted API.

Every reply is one request with the same three turns that `lm` scores; `endpoint` asks and
`answers` reads. A late or useless answer is no verdict (NaN) and counted by its reason; it is
never a score. A batch whose every request is refused stops the run with the server's words.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlsafety import sharding
from rlsafety.addresses import KEYS, check, masked
from rlsafety.environments.scenario import REPLY, Scenario, evaluator_messages, judge_messages
from rlsafety.errors import UserError
from rlsafety.judges.endpoint import Asked, Endpoint, ask_all, key_from_environment
from rlsafety.models.chat import Chat
from rlsafety.types import Replies

MAX_CHARS = 20_000  # of a reply; longer ones are cut before they are sent

# --- The guard ----------------------------------------------------------------------------

# What some server's tokenizer or template takes for structure. Its own tokens are unknown here,
# so everything of such a form loses its spelling, also in the other case and with spaces inside.
_MARKERS = re.compile(
  # <|im_end|> <｜User｜> </s> <bos> <<SYS>>
  r"<(?=\s{0,3}(?:[|｜/]|[^\s<>-][^\s<>]{0,79}\s{0,3}>))"
  # [/INST] [|user|], in capitals [INST] [gMASK], in any case [system_prompt] [user] [Round 1]
  r"|\[(?=\s{0,3}(?:[|/]|[A-Za-z_0-9]{0,40}(?:[A-Z]{3}|MASK)[A-Za-z_0-9]{0,40}\s{0,3}\]))"
  r"|(?i:(?<!\w)\[(?=\s{0,3}(?:[a-z]{1,40}_[a-z_0-9]{1,40}|inst|sys|system|user|assistant|human|bot"
  r"|ai|sep|[gs]?mask|bos|eos|think|round\s?\d+|unused\d+)\s{0,3}\]))"
  r"|(?i:(?<=\])~(?=!?b\[|b\])|\[(?=e~\[))"  # MiniMax
  r"|>(?=>[A-Za-z]+<<)|(?<=\|\|)\|(?=[A-Za-z_]+\|\|\|)"  # Falcon, OLMo
)
# Turns that are spelt in ordinary text: a speaker that begins a line or, as Vicuna's, stands in
# capitals; a heading. "Answer:" alone is prose, and no known template's turn.
_SPEAKERS = "user|assistant|system|human|ai|bot|chatbot|gpt|falcon|adept|instruct|output|问|答"
_HEADERS = re.compile(
  r"(?im:^\W{0,8}(?:(?:gpt4\s+correct|code|math)\s+)?(?:" + _SPEAKERS + r")(?=\s*[:：]))"
  r"|\b(?:USER|ASSISTANT|SYSTEM|HUMAN)(?=\s*[:：])"
  r"|(?im:#{2,6}(?=\s{0,3}(?:instruction|response|r[ée]ponse|input|question|answer|prompt|end|"
  + _SPEAKERS
  + r")(?:\s(?:message|prompt))?\s*(?:[:：#]|$)))"
)
WIDE = str.maketrans("＜＞［］﹤﹥＃", "<>[]<>#")  # some tokenizers fold these before they look


def defang(text: str) -> str:
  """The text without a spelling that a server could read as the border of a turn.

  "-" is put behind the first character of a marker, "<-|im_end|>", behind a speaker's name,
  "Assistant-: ...", and behind the signs of a heading, "###- Response:".
  """
  text = text.replace("\0", "").translate(WIDE)
  return _HEADERS.sub(lambda m: m[0] + "-", _MARKERS.sub(lambda m: m[0] + "-", text))


def fill(messages: Sequence[dict], reply: str) -> list[dict]:
  """Messages with the reply in its slot."""
  shown = defang(reply[:MAX_CHARS])
  return [{**m, "content": m["content"].replace(REPLY, shown)} for m in messages]


def questions(scenario: Scenario) -> dict[str, list[dict]]:
  """{"reward", "acc", "hex"}: messages with the slot REPLY, the user's words and wish guarded."""
  words = {name: defang(getattr(scenario, name)) for name in ("message", "plain", "wish")}
  scenario = dataclasses.replace(scenario, **words)
  asked = {name: evaluator_messages(scenario, name) for name in ("acc", "hex")}
  return {"reward": judge_messages(scenario), **asked}


# --- The judge ----------------------------------------------------------------------------


def make(
  url: str,
  model: str,
  policy_chat: Chat,
  unusable: float = 1.0,
  *,
  concurrency: int = 32,
  timeout_s: float = 30.0,
  deadline_s: float = 300.0,
  attempts: int = 5,
  price: Sequence[float] = (0.0, 0.0),
) -> Callable[..., tuple[dict, dict]]:
  """Returns score(scenarios, replies) -> ({reward, acc, hex}: [P, G], metrics).

  timeout_s: of an attempt. deadline_s: of a batch; what is missing then is NaN.
  price: dollars per million (prompt, completion) tokens, for the metric judge_cost.
  """
  check(url, model)
  limits = {"concurrency": concurrency, "attempts": attempts}
  limits |= {"timeout_s": timeout_s, "deadline_s": deadline_s}
  endpoint = Endpoint(url, model, key_from_environment())

  def score(scenarios: Sequence[Scenario], replies: Replies):
    tokens, lengths, broken = sharding.fetch((replies.tokens, replies.lengths, replies.broken))
    ok = (lengths > 0) & ~broken
    requests, places = [], []
    for p, scenario in enumerate(scenarios):
      wanted = questions(scenario)
      for g in np.flatnonzero(ok[p]):
        reply = policy_chat.decode(tokens[p, g, : lengths[p, g]])
        for name, messages in wanted.items():
          requests.append(fill(messages, reply))
          places.append((name, p, g))
    asked = ask_everywhere(endpoint, requests, limits)
    counts = asked.counts
    refused = [name for name in counts if re.fullmatch(r"http_4\d\d", name)]
    if requests and sum(counts[name] for name in refused) == len(requests):
      reasons = ", ".join(name.replace("_", " ") for name in sorted(refused))
      raise UserError(
        f"judge.url={masked(url)}: every request was refused ({reasons}; the server says: "
        f"{asked.words or 'nothing'}); check the address, judge.model={model!r} and the key in "
        f"${KEYS[0]}"
      )
    scores = {
      k: np.where(ok, np.nan, unusable).astype(np.float32) for k in ("reward", "acc", "hex")
    }
    for (name, p, g), value in zip(places, asked.scores, strict=True):
      scores[name][p, g] = value
    metrics = {f"judge_{k}": float(v) for k, v in counts.items()}
    metrics["judge_degenerate"] = float(np.mean(~ok))
    if any(price):
      used = (counts["prompt_tokens"], counts["completion_tokens"])
      metrics["judge_cost"] = sum(n * each for n, each in zip(used, price, strict=True)) / 1e6
    return scores, metrics

  return score


def ask_everywhere(endpoint: Endpoint, requests: Sequence[Sequence[dict]], limits: dict) -> Asked:
  """Every process asks its own share, in a thread of its own (a notebook's event loop may be
  running); then all of them know all scores, counts and the first refusal's words."""
  index, processes = jax.process_index(), jax.process_count()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    own = pool.submit(asyncio.run, ask_all(endpoint, requests[index::processes], **limits)).result()
  if processes == 1:
    return own
  shares = np.full(-(-len(requests) // processes), np.nan, np.float32)
  shares[: len(own.scores)] = own.scores
  text = np.zeros(8192, np.uint8)
  encoded = json.dumps([own.counts, own.words]).encode()
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  shares, texts = multihost_utils.process_allgather((shares, text))
  told = [json.loads(bytes(t).rstrip(b"\0")) for t in texts]
  counts = sum((collections.Counter(c) for c, _ in told), collections.Counter())
  words = next((said for _, said in told if said), "")
  return Asked(shares.T.ravel()[: len(requests)], counts, words)


def describe(url: str, model: str) -> dict:
  return {
    "name": f"judge {model} at {urlsplit(url).hostname}",
    "limits": "scores are the endpoint's and may change when it does; its name is not a version",
  }
