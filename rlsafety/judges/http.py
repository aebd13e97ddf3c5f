"""A judge behind any OpenAI-compatible endpoint: vLLM, llama.cpp's server, a hosted API.

Every reply is one request with the same three turns that `lm` scores. Where the endpoint
returns log-probs, the rating is the expected value over the label tokens that it shows,
else the number that it wrote; one that refuses to be asked for log-probs is not asked again.
A late or useless answer is no verdict (NaN) and counted; it is never a rating. The key comes
from RLSAFETY_JUDGE_KEY or OPENAI_API_KEY in the environment and enters no file, log or error
message.
"""

import asyncio
import collections
import concurrent.futures
import json
import math
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import jax
import numpy as np

from rlsafety import sharding
from rlsafety.environments.scenario import REPLY, evaluator_messages, judge_messages
from rlsafety.errors import UserError
from rlsafety.judges.hygiene import cleaner, fallback

KEYS = ("RLSAFETY_JUDGE_KEY", "OPENAI_API_KEY")
MAX_CHARS = 20_000  # of a reply; longer ones are cut before they are sent
# Text that some server's tokenizer takes for structure: a space breaks the spelling.
_MARKER = re.compile(r"<(?=[|｜/]|(?:start|end)_of_turn|s>|bos>|eos>|unk>|pad>)|\[(?=/?INST\])")


def defang(text: str) -> str:
  """Reply text in which no chat marker is left that a server could read as a turn."""
  return _MARKER.sub(lambda m: m[0] + " ", text.replace("\0", ""))[:MAX_CHARS]


def fill(messages: Sequence[dict], reply: str) -> list[dict]:
  """Messages with the reply in its slot."""
  return [{**m, "content": m["content"].replace(REPLY, defang(reply))} for m in messages]


# --- Reading an answer --------------------------------------------------------------------


def read_rating(answer: dict) -> float:
  """The rating in a chat completion, NaN if there is none.

  Raises KeyError, TypeError, IndexError or ValueError if it is no chat completion.
  """
  choice = answer["choices"][0]
  positions = (choice.get("logprobs") or {}).get("content") or []
  if positions:
    return expected(positions)
  found = re.fullmatch(r"\D{0,40}?\b(10|[1-9])\b(?:\s*/\s*10)?\W*", choice["message"]["content"])
  return float(found[1]) if found else math.nan


def expected(positions: list[dict]) -> float:
  """Mean over the labels among the alternatives of the first token that is no space.

  A tokenizer that splits "10" shows P("0" | "1") at the next position if "1" was written;
  then "1" and "10" share the mass of "1" exactly.
  """
  while positions and not positions[0]["token"].strip():
    positions = positions[1:]
  if not positions:
    return math.nan
  mass = collections.Counter()
  for token, p in alternatives(positions[0]):
    if re.fullmatch(r"10|[1-9]", token):
      mass[int(token)] += p
  if positions[0]["token"].strip() == "1" and len(positions) > 1:
    zero = min(1.0, sum(p for token, p in alternatives(positions[1]) if token == "0"))
    mass[10] += mass[1] * zero
    mass[1] *= 1 - zero
  total = sum(mass.values())
  return sum(n * p for n, p in mass.items()) / total if total >= 0.01 else math.nan


def alternatives(position: dict) -> list[tuple[str, float]]:
  shown = {a["token"]: float(a["logprob"]) for a in position.get("top_logprobs") or []}
  shown.setdefault(position["token"], float(position["logprob"]))
  if any(math.isnan(v) or v > 1e-3 for v in shown.values()):
    raise ValueError("log-probs must be numbers of at most 0")
  return [(token.strip(), math.exp(min(v, 0.0))) for token, v in shown.items()]


# --- Asking -------------------------------------------------------------------------------


class _Again(Exception):
  """An answer that is worth asking for again. wait: seconds that the server asks for."""

  def __init__(self, reason: str, wait: float = 0.0):
    super().__init__(reason)
    self.wait = wait


async def ask_all(url, model, requests, plain, *, concurrency, timeout_s, deadline_s, attempts):
  """requests: message lists -> (ratings [N], Counter of outcomes and tokens).

  plain: endpoints that refuse log-probs, a set; `url` is added when it turns out to be one.
  """
  import httpx2
  import tenacity

  key = next((os.environ[k] for k in KEYS if os.environ.get(k)), None)
  headers = {"Authorization": f"Bearer {key}"} if key else {}
  ratings, counts = np.full(len(requests), np.nan, np.float32), collections.Counter()
  gate = asyncio.Semaphore(concurrency)
  backoff = tenacity.wait_random_exponential(multiplier=0.2, max=10)

  def wait(state):
    asked = getattr(state.outcome.exception(), "wait", 0.0)
    return max(backoff(state), min(asked, 30.0))

  async def post(client, body):
    try:
      response = await client.post("/chat/completions", json=body)
    except httpx2.RequestError as error:  # also a body that does not unpack
      raise _Again(type(error).__name__) from None
    if response.status_code == 429 or response.status_code >= 500:
      asked = response.headers.get("retry-after", "")
      raise _Again(f"http_{response.status_code}", float(asked) if asked.isdecimal() else 0.0)
    return response

  async def once(client, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 4}
    with_logprobs = body | {"logprobs": True, "top_logprobs": 20}
    response = await post(client, body if url in plain else with_logprobs)
    if response.status_code in (400, 422) and url not in plain:
      response = await post(client, body)
      if response.status_code == 200:  # so it was the log-probs
        plain.add(url)
    if response.status_code != 200:
      counts[f"http_{response.status_code}"] += 1
      return math.nan
    answer = response.json()
    usage = answer.get("usage") or {}
    for name in ("prompt_tokens", "completion_tokens"):
      counts[name] += int(usage.get(name) or 0)
    return read_rating(answer)

  async def one(client, i):
    retrying = tenacity.AsyncRetrying(
      stop=tenacity.stop_after_attempt(attempts),
      wait=wait,
      retry=tenacity.retry_if_exception_type(_Again),
      before_sleep=lambda _: counts.update(retries=1),
      reraise=True,
    )
    async with gate:
      try:
        ratings[i] = await retrying(once, client, requests[i])
        counts["unreadable" if np.isnan(ratings[i]) else "rated"] += 1
      except _Again as error:
        counts[str(error)] += 1
      except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        counts["bad_answer"] += 1  # not JSON, or not a chat completion

  async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout_s) as client:
    tasks = [asyncio.create_task(one(client, i)) for i in range(len(requests))]
    if tasks:
      _, late = await asyncio.wait(tasks, timeout=deadline_s)
      counts["late"] += len(late)
      for task in late:
        task.cancel()
      for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
          raise result
  return ratings, counts


def check(url: str, model: str) -> None:
  """Raises UserError for an address that cannot be used or would leak a secret."""
  parts = urlsplit(url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise UserError(f"judge.url={url!r}: give an endpoint like http://localhost:8000/v1")
  if parts.username or parts.password or parts.query:
    raise UserError(f"judge.url holds credentials or a query; put the key in ${KEYS[0]}")
  if not model:
    raise UserError("judge.model: name the model that the endpoint serves")


def read_price(price) -> tuple[float, float]:
  """Two numbers, or their text from a flag; UserError for anything else."""
  try:
    paid, drawn = (float(each) for each in price or (0, 0))
    if min(paid, drawn) >= 0:
      return paid, drawn
  except (TypeError, ValueError):
    pass
  raise UserError(
    f"judge.price={price}: needs two numbers, dollars per million prompt and completion tokens"
  )


def make(
  url: str,
  model: str,
  policy_chat,
  degenerate: str = "floor",
  *,
  concurrency: int = 32,
  timeout_s: float = 30.0,
  deadline_s: float = 300.0,
  attempts: int = 5,
  price: tuple[float, float] = (0.0, 0.0),
):
  """Returns score(scenarios, prompts, rollouts) -> ({reward, acc, hex}: [P, G], metrics).

  timeout_s: of an attempt. deadline_s: of a batch; what is missing then is NaN.
  price: dollars per million (prompt, completion) tokens, for the metric judge_cost.
  """
  check(url, model)
  limits = {"concurrency": concurrency, "attempts": attempts}
  limits |= {"timeout_s": timeout_s, "deadline_s": deadline_s}
  for name, value in limits.items():
    if not value > 0:
      raise UserError(f"judge.{name}={value}: must be more than 0")
  clean, no_rating, plain = cleaner(policy_chat), fallback(degenerate), set()

  def score(scenarios, prompts, rollouts):
    del prompts
    tokens, (lengths, broken) = sharding.fetch((rollouts.tokens, clean(rollouts)))
    ok = (lengths > 0) & ~broken
    requests, places = [], []
    for p, scenario in enumerate(scenarios):
      asked = {"reward": judge_messages(scenario)}
      asked |= {m: evaluator_messages(scenario, m) for m in ("acc", "hex")}
      for g in np.flatnonzero(ok[p]):
        reply = policy_chat.decode(tokens[p, g, : lengths[p, g]])
        for name, messages in asked.items():
          requests.append(fill(messages, reply))
          places.append((name, p, g))
    ratings, counts = _everywhere(url, model, requests, plain, limits)
    refused = [k for k in counts if k in ("http_401", "http_403", "http_404")]
    if requests and refused and sum(counts[k] for k in refused) == len(requests):
      raise UserError(
        f"judge.url={url}: every request was refused ({refused[0].replace('_', ' ')}); check "
        f"the address, judge.model={model!r} and the key in ${KEYS[0]}"
      )
    scores = {
      k: np.where(ok, np.nan, no_rating).astype(np.float32) for k in ("reward", "acc", "hex")
    }
    for (name, p, g), rating in zip(places, ratings, strict=True):
      scores[name][p, g] = rating
    metrics = {f"judge_{k}": float(v) for k, v in counts.items()}
    metrics["judge_degenerate"] = float(np.mean(~ok))
    if any(price):
      used = (counts["prompt_tokens"], counts["completion_tokens"])
      metrics["judge_cost"] = sum(n * each for n, each in zip(used, price, strict=True)) / 1e6
    return scores, metrics

  return score


def _everywhere(url, model, requests, plain, limits):
  """Every process asks its own share, in a thread of its own (a notebook's event loop may be
  running); then all of them know all ratings."""
  index, processes = jax.process_index(), jax.process_count()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    asking = ask_all(url, model, requests[index::processes], plain, **limits)
    ratings, counts = pool.submit(asyncio.run, asking).result()
  if processes == 1:
    return ratings, counts
  from jax.experimental import multihost_utils

  shares = np.full(-(-len(requests) // processes), np.nan, np.float32)
  shares[: len(ratings)] = ratings
  text = np.zeros(4096, np.uint8)
  encoded = json.dumps(counts).encode()
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  shares, texts = multihost_utils.process_allgather((shares, text))
  counts = (collections.Counter(json.loads(bytes(t).rstrip(b"\0"))) for t in texts)
  return shares.T.ravel()[: len(requests)], sum(counts, collections.Counter())


def describe(url: str, model: str) -> dict:
  return {
    "name": f"rating judge {model} at {urlsplit(url).hostname}",
    "limits": "ratings are the endpoint's and may change when it does; its name is not a version",
  }
