"""Asking an OpenAI-compatible endpoint: what a server accepts, retries and limits.

Servers differ in what they refuse: `max_tokens`, log-probs, a temperature. What a 400 complains
of is left out or renamed, and what worked is kept for the next requests. The key comes from
RLSAFETY_JUDGE_KEY or OPENAI_API_KEY in the environment and enters no file, log or error message.
"""

import asyncio
import collections
import dataclasses
import math
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np
import tenacity

from rlsafety.addresses import KEYS
from rlsafety.errors import UserError
from rlsafety.files import parse_json
from rlsafety.judges import answers

MAX_ANSWER = 8 << 20  # bytes of an answer, as sent and unpacked
SHORT, THINKING = 16, 4096  # tokens asked for: a number, and a number after thoughts


# --- What a server accepts -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dialect:
  """Which fields of a request an endpoint accepts.

  tokens_field: its name for the limit of new tokens, `tokens`. logprobs: alternatives asked for
  at every place, 0 = none. temperature: whether 0 is asked for.
  """

  tokens_field: str = "max_tokens"
  tokens: int = SHORT
  logprobs: int = 20
  temperature: bool = True

  def body(self, model: str, messages: Sequence[dict]) -> dict[str, Any]:
    body = {"model": model, "messages": list(messages), self.tokens_field: self.tokens}
    if self.temperature:
      body["temperature"] = 0
    if self.logprobs:
      body |= {"logprobs": True, "top_logprobs": self.logprobs}
    return body


def adapt(dialect: Dialect, words: str) -> Dialect | None:
  """The dialect without what the server's `words` complain of; None if nothing is left to try."""
  words = words.lower()
  if "max_completion_tokens" in words and dialect.tokens_field == "max_tokens":
    return dataclasses.replace(dialect, tokens_field="max_completion_tokens")
  if "output limit" in words and dialect.tokens < THINKING:
    return dataclasses.replace(dialect, tokens=THINKING)
  if "temperature" in words and dialect.temperature:
    return dataclasses.replace(dialect, temperature=False)
  if "logprob" in words and dialect.logprobs > 5 and re.search(r"\b5\b", words):
    return dataclasses.replace(dialect, logprobs=5)
  if dialect.logprobs:  # what servers without log-probs say is anybody's guess
    return dataclasses.replace(dialect, logprobs=0)
  return None


@dataclasses.dataclass
class Endpoint:
  """One endpoint and what is known of it. key: sent as its bearer token, "" = none."""

  url: str
  model: str
  key: str
  dialect: Dialect = Dialect()


def key_from_environment() -> str:
  return next((os.environ[k] for k in KEYS if os.environ.get(k)), "")


# --- Asking -------------------------------------------------------------------------------


class _Again(Exception):
  """An answer that is worth asking for again. wait: seconds that the server asks for."""

  def __init__(self, reason: str, words: str = "", wait: float = 0.0) -> None:
    super().__init__(reason)
    self.words, self.wait = words, wait


@dataclasses.dataclass
class Asked:
  """scores [N], NaN = no verdict. counts: outcomes, reasons and tokens. words: what the server
  said to the first request that it refused."""

  scores: np.ndarray
  counts: collections.Counter
  words: str = ""


async def ask_all(
  endpoint: Endpoint,
  requests: Sequence[Sequence[dict]],
  *,
  concurrency: int,
  timeout_s: float,
  deadline_s: float,
  attempts: int,
) -> Asked:
  """Asks for every one of `requests` (message lists); `endpoint.dialect` learns on the way.

  timeout_s: of an attempt, body included. deadline_s: of all; what is missing then is NaN.
  """
  asked = Asked(np.full(len(requests), np.nan, np.float32), collections.Counter())
  counts, gate = asked.counts, asyncio.Semaphore(concurrency)
  backoff = tenacity.wait_random_exponential(multiplier=0.2, max=10)
  headers = {"accept-encoding": "identity"}
  headers |= {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}

  def wait(state: tenacity.RetryCallState) -> float:
    failed = state.outcome.exception() if state.outcome else None
    return max(backoff(state), min(getattr(failed, "wait", 0.0), 30.0))

  async def post(
    client: httpx2.AsyncClient, messages: Sequence[dict], dialect: Dialect
  ) -> tuple[int, bytes]:
    body = dialect.body(endpoint.model, messages)
    try:
      async with asyncio.timeout(timeout_s):
        async with client.stream("POST", "/chat/completions", json=body) as response:
          data = await read_body(response)
    except TimeoutError:
      raise _Again("timeout") from None
    except httpx2.RequestError as error:
      raise _Again(type(error).__name__) from None
    status = response.status_code
    if status in (408, 429) or status >= 500:
      asked_for = response.headers.get("retry-after", "")
      pause = float(asked_for) if asked_for.isdecimal() else 0.0
      raise _Again(f"http_{status}", server_words(data, endpoint.key), pause)
    return status, data

  async def once(client: httpx2.AsyncClient, messages: Sequence[dict]) -> tuple[float, str]:
    dialect: Dialect | None = endpoint.dialect
    while dialect:
      tried = dialect
      status, data = await post(client, messages, tried)
      if status == 200:
        answer = parse_json(data, "answer")
        score, reason = answers.read(answer)
        for name, number in used_tokens(answer).items():
          counts[name] += number
        if tried != endpoint.dialect and reason != "thinking":
          endpoint.dialect = tried
        if reason != "thinking" or tried.tokens >= THINKING:
          return score, reason
        fewer = min(tried.logprobs, 5)  # thoughts have many places
        dialect = dataclasses.replace(tried, tokens=THINKING, logprobs=fewer)
        continue
      words = server_words(data, endpoint.key)
      asked.words = asked.words or words
      may_adapt = status in (400, 422) or (status == 403 and "logprob" in words.lower())
      dialect = adapt(tried, words) if may_adapt else None
    return math.nan, f"http_{status}"

  async def one(client: httpx2.AsyncClient, i: int) -> None:
    retrying = tenacity.AsyncRetrying(
      stop=tenacity.stop_after_attempt(attempts),
      wait=wait,
      retry=tenacity.retry_if_exception_type(_Again),
      before_sleep=lambda _: counts.update(retries=1),
      reraise=True,
    )
    async with gate:
      try:
        asked.scores[i], reason = await retrying(once, client, requests[i])
        counts[reason] += 1
      except _Again as error:
        counts[str(error)] += 1
        asked.words = asked.words or error.words
      except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        counts["bad_answer"] += 1  # not JSON, not a chat completion, or too much of it

  async with httpx2.AsyncClient(base_url=endpoint.url, headers=headers, timeout=None) as client:
    tasks = [asyncio.create_task(one(client, i)) for i in range(len(requests))]
    if tasks:
      _, late = await asyncio.wait(tasks, timeout=deadline_s)
      counts["late"] += len(late)
      for task in late:
        task.cancel()
      for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
          raise result
  return asked


async def read_body(response: httpx2.Response) -> bytes:
  """The body, unpacked; never more than MAX_ANSWER bytes are read or made.

  Raises ValueError for a larger one, and for an encoding other than gzip and deflate.
  """
  encoding = response.headers.get("content-encoding", "identity").strip().lower()
  if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
    raise ValueError(f"content-encoding {encoding}")
  unpack = zlib.decompressobj(47) if encoding not in ("identity", "") else None
  received, out = 0, bytearray()
  async for chunk in response.aiter_raw():
    received += len(chunk)
    try:
      out += unpack.decompress(chunk, MAX_ANSWER + 1 - len(out)) if unpack else chunk
    except zlib.error as error:
      raise ValueError(f"content-encoding {encoding}: {error}") from None
    if max(received, len(out)) > MAX_ANSWER:
      raise ValueError(f"more than {MAX_ANSWER} bytes")
  if unpack and not unpack.eof:
    raise ValueError(f"content-encoding {encoding}: cut")
  return bytes(out)


def used_tokens(answer: dict) -> dict[str, int]:
  """{"prompt_tokens", "completion_tokens"} of an answer. Raises ValueError for no numbers."""
  usage, out = answer.get("usage") or {}, {}
  for name in ("prompt_tokens", "completion_tokens"):
    value = usage.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
      raise ValueError(f"usage.{name} is no number of tokens")
    out[name] = value
  return out


def server_words(data: bytes, key: str = "") -> str:
  """What a server says of a refused request, on one line, without the key if it repeats it."""
  try:
    said: Any = parse_json(data, "answer")
  except UserError:
    said = data.decode("utf-8", "replace")
  for field in ("error", "message", "detail"):
    if isinstance(said, dict) and said.get(field):
      said = said[field]
  text = " ".join(re.sub(r"[^\x20-\x7e]+", " ", str(said)).split())
  return (text.replace(key, "***") if key else text)[:300]
