"""Tokens -> text while it grows: stop strings, characters of several tokens, bytes of a token."""

import codecs
import functools
from collections.abc import Sequence

from tokenizers import Tokenizer, pre_tokenizers

from rlsafety.models.chat import Chat

# --- One token ------------------------------------------------------------------------------


@functools.lru_cache(1)
def _byte_letters() -> dict[str, int]:
  """{letter: byte} of byte-level vocabularies: printable bytes are their own letter, the others
  follow in order behind U+0100."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  own = {x: ord(x) for x in letters if ord(x) < 256}
  others = sorted(set(range(256)) - set(own.values()))
  return own | dict(zip([x for x in letters if ord(x) >= 256], others, strict=True))


@functools.lru_cache(8)
def _is_byte_level(tokenizer: Tokenizer) -> bool:
  return "ByteLevel" in repr(tokenizer.decoder)


def token_bytes(chat: Chat, token: int) -> bytes:
  """The bytes of one token; a control token is its own spelling, an id without a token is empty."""
  spelling = chat.full.id_to_token(int(token))
  if spelling is None:
    return b""
  if token in chat.control:
    return spelling.encode()
  if _is_byte_level(chat.full):
    letters = _byte_letters()
    if all(x in letters for x in spelling):
      return bytes(letters[x] for x in spelling)
    return spelling.encode()  # an added token, as it stands
  if len(spelling) == 6 and spelling.startswith("<0x"):  # SentencePiece's bytes
    return bytes.fromhex(spelling[3:5])
  return spelling.replace("▁", " ").encode()


def token_text(chat: Chat, token: int) -> str:
  """The text of one token; half a character shows as U+FFFD."""
  return token_bytes(chat, token).decode("utf-8", "replace")


# --- A reply --------------------------------------------------------------------------------


class Writer:
  """The text of one reply, as far as nothing that follows can change it.

  stops: strings that end the reply and are not part of it. raw: the text goes on from a prompt's,
  so that a space in front of it is kept.
  """

  def __init__(self, chat: Chat, stops: Sequence[str] = (), raw: bool = False) -> None:
    self.chat, self.stops, self.raw = chat, tuple(s for s in stops if s), raw
    self.tokens: list[int] = []
    self.text = ""  # all of it, also what is held back
    self.shown = 0  # characters that were given out
    self.stopped = False

  def push(self, tokens: Sequence[int], last: bool = False) -> str:
    """Takes tokens and gives out the new text that is certain; with `last` all that is left."""
    if self.stopped:
      return ""
    self.tokens += tokens
    text = self._decoded()
    found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
    if found:
      text, self.stopped, last = text[: min(found)], True, True
    self.text = text
    end = len(text) if last else len(text) - self._held(text)
    new, self.shown = text[self.shown : end], max(self.shown, end)
    return new

  def _decoded(self) -> str:
    text = self.chat.decode(self.tokens)
    first = next((t for t in self.tokens if t not in self.chat.hidden), None)
    if self.raw and first is not None and not text.startswith(" "):
      spelling = self.chat.full.id_to_token(int(first)) or ""
      text = " " + text if spelling.startswith("▁") else text
    return text

  def _held(self, text: str) -> int:
    """Characters at the end that may change: half a character, or the beginning of a stop."""
    half = len(text) - len(text.rstrip("\ufffd"))
    begun = 0
    for stop in self.stops:
      for n in range(min(len(stop) - 1, len(text)), begun, -1):
        if text.endswith(stop[:n]):
          begun = n
          break
    return max(min(half, 4), begun)


def offsets(chat: Chat, tokens: Sequence[int], start: int = 0) -> list[int]:
  """Where each token begins in the text of all of them, in characters from `start`."""
  out, at, decoder = [], start, codecs.getincrementaldecoder("utf-8")("replace")
  for token in tokens:
    out.append(at)
    at += len(decoder.decode(b"" if token in chat.hidden else token_bytes(chat, token)))
  return out
