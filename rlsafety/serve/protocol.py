"""OpenAI's form of requests and answers: bodies -> what is wanted, pieces -> JSON.

Every field is checked here. What a server without penalties, tools or images cannot do is refused
by the field's name and never left out in silence; fields that only label a request are taken and
ignored. Text becomes ids through `models.chat`, so that no content can make a control token.
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from rlsafety.errors import UserError
from rlsafety.models.chat import Chat
from rlsafety.serve import text as texts
from rlsafety.serve.adapters import Catalogue, Policy
from rlsafety.serve.engine import TOPS, Piece

MAX_REPLIES, MAX_STOPS, MAX_STOP_CHARS, MAX_PROMPTS = 64, 16, 256, 256
LOWEST = -9999.0  # JSON has no infinity
LABELS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL = {  # fields that we cannot honour, and the values that ask for nothing
  "presence_penalty": (0, None), "frequency_penalty": (0, None), "logit_bias": ({}, None),
  "tools": ([], None), "tool_choice": ("none", "auto", None), "functions": ([], None),
  "function_call": ("none", "auto", None), "parallel_tool_calls": (True, False, None),
  "response_format": ({"type": "text"}, None), "modalities": (["text"], None), "audio": (None,),
  "prediction": (None,), "suffix": (None, ""), "reasoning_effort": (None,), "verbosity": (None,),
  "web_search_options": (None,),
}  # fmt: skip


class Refusal(Exception):
  """A request that is refused. status: of HTTP; param: the field; code: a word for programs."""

  def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "",
               retry_after: int = 0) -> None:  # fmt: skip
    super().__init__(message)
    self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

  def body(self) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or None}
    return {"error": error}


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What a request asks for.

  prompts: ids of each; n replies to every one, each with a seed of its own, `seeds` [prompts, n].
  tops: alternatives that are told at a place, None without log-probs. echo: the prompt comes
  back in front of each reply. usage: a stream ends with the counts of tokens.
  """

  policy: Policy
  chat: bool
  prompts: list[list[int]]
  seeds: list[list[int]]
  max_tokens: int
  temperature: float
  top_p: float
  stop: tuple[str, ...]
  tops: int | None
  echo: bool
  stream: bool
  usage: bool


# --- Fields ---------------------------------------------------------------------------------


class _Fields:
  """The fields of a body, read one by one; what is left at the end is unknown."""

  def __init__(self, body: Any) -> None:
    if not isinstance(body, dict):
      raise Refusal("the body must be a JSON object")
    self.left = dict(body)

  def take(self, name: str, default: Any = None) -> Any:
    value = self.left.pop(name, None)
    return default if value is None else value

  def number(self, name: str, default: Any, low: float, high: float, whole: bool = False) -> Any:
    value = self.take(name, default)
    kinds = int if whole else (int, float)
    if value is None:
      return None
    fine = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    if not fine:
      kind = "a whole number" if whole else "a number"
      raise Refusal(f"{name} must be {kind} from {low:g} to {high:g}, not {value!r:.80}", name)
    return value

  def flag(self, name: str) -> bool:
    value = self.take(name, False)
    if not isinstance(value, bool):
      raise Refusal(f"{name} must be true or false, not {value!r:.80}", name)
    return value

  def close(self) -> None:
    for name, allowed in NEUTRAL.items():
      value = self.left.pop(name, None)
      if not any(type(value) is type(a) and value == a for a in (*allowed, 0.0)):
        raise Refusal(f"{name} is not supported; leave it out", name, code="unsupported")
    for name in LABELS:
      self.left.pop(name, None)
    unknown = [name for name, value in self.left.items() if value is not None]
    if unknown:
      raise Refusal(f"{unknown[0]!r:.80} is no field of this request", str(unknown[0])[:80])


def read(body: Any, catalogue: Catalogue, chat: Chat, context: int, is_chat: bool) -> Wanted:
  """The body of /v1/chat/completions or /v1/completions. context: tokens of prompt and reply.

  Raises Refusal: 400 naming the field, 404 for an unknown model.
  """
  fields = _Fields(body)
  name = fields.take("model")
  if not isinstance(name, str) or not name:
    raise Refusal("model must be a name of /v1/models", "model")
  try:
    policy = catalogue.find(name)
  except LookupError as error:
    raise Refusal(str(error.args[0]), "model", 404, "model_not_found") from None
  if is_chat:
    prompts = [_conversation(fields.take("messages"), chat)]
    tops = fields.number("top_logprobs", 0, 0, TOPS, whole=True)
    logprobs = fields.flag("logprobs")
    if tops and not logprobs:
      raise Refusal("top_logprobs needs logprobs: true", "top_logprobs")
    tops, echo, default = tops if logprobs else None, False, None
  else:
    prompts = _prompts(fields.take("prompt"), chat)
    tops = fields.number("logprobs", None, 0, TOPS, whole=True)
    echo, default = fields.flag("echo"), 16
  longest = max(map(len, prompts))
  room = context - longest
  if room < 1 and not (echo and room == 0):
    raise Refusal(
      f"the prompt has {longest} tokens, prompt and reply together may have {context}",
      "messages" if is_chat else "prompt", code="context_length_exceeded",
    )  # fmt: skip
  limit = fields.take("max_completion_tokens")
  if limit is not None:
    fields.left["max_tokens"] = limit
  max_tokens = fields.number("max_tokens", default, 0 if echo else 1, 1 << 30, whole=True)
  if max_tokens is None:
    max_tokens = room
  n = fields.number("n", 1, 1, MAX_REPLIES, whole=True)
  best_of = fields.number("best_of", n, 1, MAX_REPLIES, whole=True)
  if best_of != n:
    raise Refusal(f"best_of={best_of} is not supported; leave it out or set it to n", "best_of")
  if len(prompts) * n > MAX_PROMPTS:
    raise Refusal(f"{len(prompts)} prompts with n={n} are more than {MAX_PROMPTS} replies", "n")
  stream, options = fields.flag("stream"), fields.take("stream_options", {})
  usage = options.get("include_usage", False) if isinstance(options, dict) else None
  if not isinstance(usage, bool) or (options and not stream):
    raise Refusal("stream_options takes include_usage, with stream: true", "stream_options")
  seed = fields.number("seed", None, -(2**63), 2**63 - 1, whole=True)
  wanted = Wanted(
    policy=policy,
    chat=is_chat,
    prompts=prompts,
    seeds=_seeds(seed, len(prompts), n),
    max_tokens=min(max_tokens, room),
    temperature=float(fields.number("temperature", 1.0, 0, 2)),
    top_p=float(fields.number("top_p", 1.0, 1e-6, 1)),
    stop=_stops(fields.take("stop", [])),
    tops=tops,
    echo=echo,
    stream=stream,
    usage=usage,
  )
  fields.close()
  return wanted


def _seeds(seed: int | None, prompts: int, n: int) -> list[list[int]]:
  """32 bits for every reply: from the seed, its prompt and its number, else at random."""
  if seed is None:
    return [[random.getrandbits(32) for _ in range(n)] for _ in range(prompts)]
  mixed = random.Random(seed)  # the same for the same seed, also of a single reply
  return [[mixed.getrandbits(32) for _ in range(n)] for _ in range(prompts)]


def _stops(value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value
  fine = isinstance(stops, list) and len(stops) <= MAX_STOPS
  if not fine or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
    what = f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
    raise Refusal(f"stop must be {what}, not {value!r:.80}", "stop")
  return tuple(stops)


# --- Prompts --------------------------------------------------------------------------------


def _conversation(messages: Any, chat: Chat) -> list[int]:
  if not isinstance(messages, list) or not messages:
    raise Refusal("messages must be a list of at least one message", "messages")
  turns = []
  for i, message in enumerate(messages):
    where = f"messages[{i}]"
    if not isinstance(message, dict):
      raise Refusal(f"{where} must be an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
      raise Refusal(f"{where}.role must be system, user or assistant, not {role!r:.80}", where)
    unknown = {k for k, v in message.items() if v} - {"role", "content", "name"}
    if unknown - {"refusal", "annotations"}:
      raise Refusal(f"{where}.{min(unknown)!s:.80} is not supported", where, code="unsupported")
    turns.append({"role": role, "content": _content(content, where)})
  try:
    return chat.encode(turns)
  except UserError as error:  # of the template: an order of roles that it does not know
    raise Refusal(f"messages: {error}", "messages") from None


def _content(content: Any, where: str) -> str:
  if content is None:
    return ""
  if isinstance(content, str):
    return content
  if isinstance(content, list) and all(
    isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
    for p in content
  ):
    return "".join(part["text"] for part in content)
  raise Refusal(f"{where}.content must be a text, or a list of parts of type text", where)


def _prompts(value: Any, chat: Chat) -> list[list[int]]:
  """A text, ids, or a list of either -> ids of each."""
  is_id = lambda x: isinstance(x, int) and not isinstance(x, bool)  # noqa: E731
  if isinstance(value, str) or (isinstance(value, list) and value and is_id(value[0])):
    value = [value]
  if not isinstance(value, list) or not value:
    raise Refusal("prompt must be a text, a list of token ids, or a list of these", "prompt")
  if len(value) > MAX_PROMPTS:
    raise Refusal(f"{len(value)} prompts are more than {MAX_PROMPTS}", "prompt")
  out = []
  for prompt in value:
    if isinstance(prompt, str):
      ids = beginning(chat) + chat.encode_text(prompt)
    elif isinstance(prompt, list) and all(is_id(i) and 0 <= i < chat.vocab_size for i in prompt):
      ids = list(prompt)
    else:
      what = f"a text or a list of token ids from 0 to {chat.vocab_size - 1}"
      raise Refusal(f"each prompt must be {what}", "prompt")
    if not ids:
      raise Refusal("a prompt is empty", "prompt")
    out.append(ids)
  return out


def beginning(chat: Chat) -> list[int]:
  """What the model's own tokenizer puts in front of a text: the bos token, or nothing."""
  ids = chat.full.encode("", add_special_tokens=True).ids
  return ids if len(ids) == 1 and ids[0] in chat.control else []


# --- Answers --------------------------------------------------------------------------------


class Choice:
  """One reply of an answer as it grows: its text, its log-probs, why it ended."""

  def __init__(self, wanted: Wanted, chat: Chat, prompt: Sequence[int]) -> None:
    self.wanted, self.chat = wanted, chat
    self.writer = texts.Writer(chat, wanted.stop, raw=not wanted.chat)
    self.finish = ""
    self.drawn = 0
    self.entries: list[Entry] = []  # of the tokens that were drawn, in the chat form
    self.told = 0  # how many of them a stream has given out
    self.front = chat.decode(prompt) if wanted.echo else ""
    self.front_entries: list[Entry] = []

  def scored(self, piece: Piece) -> None:
    """The prompt's own log-probs."""
    self.front_entries = entries(self.chat, piece, self.wanted.tops)
    if not self.wanted.max_tokens:
      self.finish = "length"

  def push(self, piece: Piece) -> str:
    """Takes drawn tokens; returns the new text. `finish` is set when the reply has ended."""
    if self.finish:
      return ""
    tokens = list(piece.tokens)
    self.drawn += len(tokens)
    ended = piece.finish == "stop"
    text = self.writer.push(tokens[:-1] if ended else tokens, last=bool(piece.finish))
    if self.wanted.tops is not None:
      new = entries(self.chat, piece, self.wanted.tops)
      self.entries += new[:-1] if ended and self.wanted.chat else new
    if self.writer.stopped:
      self.finish = "stop"
      kept = texts.offsets(self.chat, self.writer.tokens)
      self.entries = self.entries[: sum(at < len(self.writer.text) for at in kept)]
    else:
      self.finish = piece.finish
    return text

  def logprobs(self, new: bool = False) -> dict | None:
    """Of all tokens, or with `new` of those since the last call, in the form of the request."""
    if self.wanted.tops is None:
      return None
    start, self.told = (self.told if new else 0), len(self.entries)
    if self.wanted.chat:
      return {"content": self.entries[start:], "refusal": None}
    everything = [*self.front_entries, *self.entries]
    begin = len(self.front_entries) + start if start else 0
    where = texts.offsets(self.chat, [e.id for e in everything])
    shown = everything[begin:]
    return {
      "tokens": [e["token"] for e in shown],
      "token_logprobs": [e["logprob"] for e in shown],
      "top_logprobs": [e.by_text() for e in shown] if self.wanted.tops else None,
      "text_offset": where[begin:],
    }


class Entry(dict):
  """A token as the chat form has it, with its id."""

  def __init__(self, shown: Mapping, token: int, top: list[dict]) -> None:
    super().__init__(shown, top_logprobs=top)
    self.id = token

  def by_text(self) -> dict[str, float] | None:
    """The completion form: {text: log-prob} of the alternatives and the token itself."""
    if self["logprob"] is None:
      return None
    out = {self["token"]: self["logprob"]}
    for other in self["top_logprobs"]:  # likeliest first: of two spelt alike it stays
      out.setdefault(other["token"], other["logprob"])
    return out


def entries(chat: Chat, piece: Piece, tops: int | None) -> list[Entry]:
  """[{"token", "logprob", "bytes", "top_logprobs"}, ...] of a piece, with its first `tops`."""

  def entry(token: int, logprob: float) -> dict:
    raw = texts.token_bytes(chat, token)
    shown = raw.decode("utf-8", "replace")
    value = None if math.isnan(logprob) else max(float(logprob), LOWEST)
    return {"token": shown, "logprob": value, "bytes": list(raw)}

  out = []
  for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
    places = zip(piece.top_ids[i], piece.top_logprobs[i], strict=True) if tops else ()
    top = [entry(int(t), float(x)) for t, x in list(places)[: tops or 0]]
    out.append(Entry(entry(token, logprob), token, top))
  return out
