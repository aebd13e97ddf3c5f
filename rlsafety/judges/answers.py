"""Reading the answer of a chat-completions endpoint: a score from 1 to 10, or no verdict and why.

A verdict needs both: the written answer is one whole number from 1 to 10, and where the server
shows log-probs, most of the mass at that number's place is on such numbers; then the score is
their mean. Log-probs that cannot be laid against the text (token ids, another format) are left
alone, and the written number counts.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAJORITY = 0.5  # of the probability at the number's place must be on whole numbers from 1 to 10

_MARKS = r"""[\s*_`"'(){}\[\]#>]*"""
_ANSWER = re.compile(
  _MARKS
  + r"(?:(?:(?:my|your|the|final|overall|user|reply|response)[\s_]+){0,4}(?:rating|score|answer)"
  + _MARKS
  + r"(?:[:=]|\bis\b)"
  + _MARKS
  + r")?(?P<number>10|[1-9])(?:[*_`]*\s*/\s*10|\s+out\s+of\s+10)?"
  + r"""[\s*_`"'(){}\[\].!]*(?:<[^<>\s]{1,40}>\s*)?""",
  re.IGNORECASE,
)
# What servers call an end that the model chose, and one at the token limit; what they call anything
# else (a filter, an error, an abort) is cut too. A server that tells no reason is believed.
_WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")
_LIMIT = ("length", "max_tokens", "model_length")
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
# How tokenizers spell a space and a line break where a server shows tokens and not their text.
_SPELT = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


def read(answer: Any) -> tuple[float, str]:
  """A chat completion -> (score, "rated"), or (NaN, the reason that there is no verdict).

  Reasons: "thinking" (cut before the answer proper began), "cut" (at the token limit or by a
  fault, so the number may not be whole), "empty", "no_number" (the text is no whole number from 1
  to 10), "few_labels" (less than MAJORITY on such numbers), "one_or_ten" (see `expected`).

  Raises KeyError, TypeError, IndexError, AttributeError, OverflowError or ValueError if it is no
  chat completion.
  """
  choice = answer["choices"][0]
  end = str(choice.get("finish_reason") or "stop").lower()
  cut = end not in _WHOLE
  text = _THOUGHT.sub("", _text(choice["message"].get("content")), count=1)
  if not text.strip() or text.lstrip().startswith("<think>"):
    return math.nan, "thinking" if end in _LIMIT else "empty"
  found = written(text, cut)
  if not found:
    return math.nan, "cut" if cut and "\n" not in text.strip() else "no_number"
  place = _place(choice.get("logprobs"), text, found.start("number"))
  return expected(place, int(found["number"])) if place else (float(found["number"]), "rated")


def written(text: str, cut: bool) -> re.Match | None:
  """The match of the number that `text` is, alone or on its first line before an explanation.

  cut: the text ends at the token limit; then only a line that a line break ends is whole.
  """
  first = text.find("\n", len(text) - len(text.lstrip()))
  whole = None if cut else _ANSWER.fullmatch(text)
  return whole or (_ANSWER.fullmatch(text, 0, first) if first >= 0 else None)


def expected(place: Sequence[Mapping[str, float]], number: int) -> tuple[float, str]:
  """The mean over the labels 1..10 at the number's place, as `read` returns it.

  place: {token text: probability} at the token where the written `number` begins, and at the
  token after it, if there is one.

  Where a tokenizer splits "10", the next place shows P("0" | "1"), but only if "1" was written.
  If another number was written and no token "10" is shown, a "1" may be the start of 10: it
  counts as the end of the scale that is near the other labels' mean (above 7 or below 4).
  Between these it is left out, and if it is more than a tenth there is no verdict.
  """
  mass: dict[int, float] = collections.defaultdict(float)
  for token, p in place[0].items():
    if re.fullmatch(r"10|[1-9]", token.strip()):
      mass[int(token)] += p
  if not any(token.strip() == "10" for token in place[0]):
    if number in (1, 10):
      zero = place[1].get("0", 0.0) if len(place) > 1 else float(number == 10)
      mass[10] += mass[1] * zero
      mass[1] *= 1 - zero
    elif mass[1]:
      one = mass.pop(1)
      middle = sum(n * p for n, p in mass.items()) / (sum(mass.values()) or 1.0)
      if 4 < middle < 7 and one > 0.1:
        return math.nan, "one_or_ten"
      if not 4 < middle < 7:
        mass[1 if middle <= 4 else 10] += one
  total = sum(mass.values())
  if total <= MAJORITY:
    return math.nan, "few_labels"
  return sum(n * p for n, p in mass.items()) / total, "rated"


def _text(content: Any) -> str:
  """A message's content: text, a list of parts, or none."""
  if isinstance(content, list):
    return "".join(part["text"] for part in content if part.get("type", "text") == "text")
  if content is not None and not isinstance(content, str):
    raise TypeError("content is no text")
  return content or ""


def _place(logprobs: Any, text: str, at: int) -> list[dict[str, float]]:
  """Alternatives at the token where text[at] begins and at the next one; [] if they are not told.

  The tokens may be more than the text: thoughts before it, a stop token after it.
  """
  positions = logprobs.get("content") if isinstance(logprobs, Mapping) else None
  if not isinstance(positions, list) or not positions:
    return []
  try:
    tokens = [_spelling(position["token"], position.get("bytes")) for position in positions]
    for end in (len(tokens), len(tokens) - 1):
      said = "".join(tokens[:end])
      if said.rstrip().endswith(text.strip()):
        start = len(said.rstrip()) - len(text.strip())
        return _at(positions, tokens, start + at - (len(text) - len(text.lstrip())), text[at])
  except (KeyError, TypeError, AttributeError):  # another format: the text alone is read
    pass
  return []


def _at(positions: list, tokens: list[str], offset: int, digit: str) -> list[dict[str, float]]:
  """The alternatives at the token that begins with the digit at `offset` of all tokens."""
  before = 0
  for i, token in enumerate(tokens):
    if before + len(token) > offset:
      # A token that holds more than the number has no alternatives to compare it with.
      alone = token[: offset - before].strip() == "" and token.strip() in (digit, digit + "0")
      return [alternatives(p) for p in positions[i : i + 2]] if alone else []
    before += len(token)
  return []


def alternatives(position: Mapping) -> dict[str, float]:
  """{text: probability} at one place, what is spelt alike added up; the chosen token included.

  Raises ValueError for log-probs that are no log-probs, TypeError where they do not belong
  together: one is missing, or they add up to more than 1.
  """
  tops = position.get("top_logprobs") or []
  if isinstance(tops, Mapping):
    tops = [{"token": token, "logprob": value} for token, value in tops.items()]
  shown = [(_spelling(a["token"], a.get("bytes")), a["logprob"]) for a in tops]
  own = _spelling(position["token"], position.get("bytes")), position["logprob"]
  if own[0] not in dict(shown):
    shown.append(own)
  out: dict[str, float] = collections.defaultdict(float)
  for token, value in shown:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise TypeError("a log-prob is missing")
    if math.isnan(value) or value > 1e-3:
      raise ValueError("log-probs must be numbers of at most 0")
    out[token] += math.exp(min(value, 0.0))
  if sum(out.values()) > 1.02:
    raise TypeError("probabilities of one place add up to more than 1")
  return out


def _spelling(token: str, data: Any) -> str:
  """The text of a token as servers show it: its bytes, or its name in the vocabulary."""
  if isinstance(data, list) and data:
    token = bytes(data).decode("utf-8", "replace")
  elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
    token = bytes.fromhex(token[3:5]).decode("latin-1")
  return token.translate(_SPELT)
