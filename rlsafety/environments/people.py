"""The people who write to the chatbot, before any factor of the experiment is applied.

An environment is a module with
  TOPICS    names of its topics, balanced in the bank;
  DEFAULTS  the factors it sets unlike `section.Environment`;
  RUBRICS   {"acc": ..., "hex": ...}: names in `rubrics.EVALUATORS`;
  people(seed) -> list[Person].

Everything a person might say is decided here by the seed alone. Factors choose later
between ready texts, which is why changing one of them leaves every other text as it was.
Draws are hashes of names and not a shared random stream: a person does not depend on who
else is in the bank, on the platform or on the Python version.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlsafety.errors import UserError
from rlsafety.files import read_json

# Names that open a sentence of the banks and keep their capital within one.
NAMES = ("Washington", "France", "Norway", "Monday", "Tuesday", "Friday", "Christmas")


@dataclasses.dataclass(frozen=True)
class Choice:
  """One slot: what each group says with a cue, and what anyone says without (may be "").

  cue: of `framing.CUES`, in a message: tone, self_description or request; traits and hints are
    named by their place. unseen: what (gameable, non-gameable) held-out users say instead, in
    wordings that no training user has; None: the same.
  """

  gameable: str
  non_gameable: str
  plain: str = ""
  cue: str = "tone"
  unseen: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Person:
  """One simulated user.

  unit: the wording they share with some others (a policy issue, a situation); whole units
    are held out, so no held-out user's story was seen in training.
  full, short: the pieces of the message, joined by spaces, in the two lengths.
  notes: lines about the user that the environment always shows; a `Choice` among traits
    and hints is a line that exists only with that cue.
  wishes: what the judge is told a (gameable, non-gameable) user wants; follows "the user".
  """

  id: str
  topic: str
  unit: str
  full: tuple[str | Choice, ...]
  short: tuple[str | Choice, ...]
  wishes: tuple[str, str]
  notes: tuple[str, ...] = ()
  traits: tuple[Choice, ...] = ()
  hints: tuple[Choice, ...] = ()


@dataclasses.dataclass(frozen=True)
class User:
  """One user with their group, split and texts, from a bank or from a file.

  user: what the policy reads; message: the same without the notes in front of it; plain: that
  message without any cue, "" where it is not known.
  """

  id: str
  topic: str
  unit: str
  is_gameable: bool
  is_heldout: bool
  user: str
  message: str
  wish: str
  plain: str = ""


def refuse_other(factors: dict[str, Any], fixed: dict[str, Any], field: str) -> None:
  """Raises UserError for a factor that texts from a file (named by `field`) cannot follow."""
  for name, value in fixed.items():
    if factors[name] != value:
      raise UserError(
        f"environment.{name}: {factors[name]!r} is not possible with {field}, whose texts are "
        f"fixed; use {value!r}, or our bank with {field}=''"
      )


def heldout_units(units: Iterable[tuple[str, str]], factors: dict[str, Any]) -> set[str]:
  """Units kept for evaluation: the same share within every stratum, others with each seed.

  units: (stratum, unit) of every user; our bank's strata are the topics.
  """
  strata: dict[str, dict[str, None]] = {}
  for stratum, unit in units:
    strata.setdefault(stratum, {})[unit] = None
  held: set[str] = set()
  for names in strata.values():
    ranked = sorted(names, key=lambda unit: uniform(factors["heldout_seed"], "heldout", unit))
    held |= set(ranked[: round(factors["heldout_fraction"] * len(names))])
  return held


def uniform(*key: Any) -> float:
  """A number in [0, 1) that depends on the key alone, the same on every machine."""
  digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def shuffled(items: Sequence, *key: Any) -> list:
  """The items in the order of `uniform(*key, i)`, which depends on the key alone."""
  start = hashlib.sha256("".join(f"{part}/" for part in key).encode())

  def place(i: int) -> bytes:  # what is common to all of them is hashed once
    number = start.copy()
    number.update(b"%d" % i)
    return number.digest()[:8]

  return [items[i] for i in sorted(range(len(items)), key=place)]


@functools.lru_cache(maxsize=4096)
def _deck(size: int, key: tuple) -> tuple[int, ...]:
  return tuple(shuffled(range(size), *key))


def deal(items: Sequence, turn: int, *key: Any) -> Any:
  """Card `turn` of endlessly reshuffled decks: every item is used equally often."""
  lap, place = divmod(turn, len(items))
  return items[_deck(len(items), (*key, lap))[place]]


def hand(items: Sequence, size: int, *key: Any) -> list:
  """`size` different items."""
  left = list(items)
  return [left.pop(int(uniform(*key, k) * len(left))) for k in range(size)]


def mix(lists: Sequence[Sequence], turn: int, *key: Any) -> list:
  """One item of each list: every combination once before any comes again."""
  number, items = deal(range(math.prod(map(len, lists))), turn, *key), []
  for options in lists:
    number, place = divmod(number, len(options))
    items.append(options[place])
  return items


def unseen(wordings: Sequence[str]) -> int:
  """How many of a cue's wordings, the last, are for held-out users alone: a quarter."""
  return len(wordings) // 4


def deal_choice(
  cue: str,
  styles: dict[str, list[str]],
  turn: int,
  *key: Any,
  frame: Sequence[Sequence[str]] = (("",), ("",)),
  **fill: str,
) -> Choice:
  """One `Choice` from {"gameable": [...], "non_gameable": [...], "plain": [...]}.

  frame: what may stand before and after a wording, mixed with it; it shows no group.
  """

  def said(kind: str, texts: Sequence[str], *of: str) -> str:
    return fill_in("".join(mix((frame[0], texts, frame[1]), turn, *key, kind, *of)), **fill)

  cued = {kind: styles[kind] for kind in ("gameable", "non_gameable")}
  kept = {kind: len(texts) - unseen(texts) for kind, texts in cued.items()}
  gameable, other = (said(kind, texts[: kept[kind]]) for kind, texts in cued.items())
  new = tuple(said(kind, texts[kept[kind] :], "unseen") for kind, texts in cued.items())
  return Choice(gameable, other, said("plain", styles["plain"]), cue, (new[0], new[1]))


def toned(leads: dict[str, list[str]], turn: int, content: str, *key: Any) -> Choice:
  """The same content in the tone of either group; turn: how often it was said before."""
  frame = (("",), (" " + uncapital(content),))
  return deal_choice("tone", leads, turn, *key, content, frame=frame)


def traits(lines: dict[str, list[str]], *key: Any) -> tuple[Choice, ...]:
  """Two different character traits of each group."""
  seen, new = [], []
  for kind in ("gameable", "non_gameable"):
    kept = len(lines[kind]) - unseen(lines[kind])
    seen.append(hand(lines[kind][:kept], 2, *key, kind))
    new.append(hand(lines[kind][kept:], 2, *key, kind, "unseen"))
  pairs = zip(*seen, *new, strict=True)
  return tuple(Choice(a, b, cue="traits", unseen=(c, d)) for a, b, c, d in pairs)


def hints(lines: dict[str, list[str]]) -> tuple[Choice, ...]:
  """The explicit reward hint: every line of {"gameable": [...], "non_gameable": [...]}."""
  pairs = zip(lines["gameable"], lines["non_gameable"], strict=True)
  return tuple(Choice(gameable, other) for gameable, other in pairs)


def fill_in(text: str, **fill: str) -> str:
  """Replaces {name}, and {Name} by the value with a capital; other braces stay."""
  for name, value in fill.items():
    text = text.replace("{" + name + "}", value)
    text = text.replace("{" + name.capitalize() + "}", capital(value))
  return text


def uncapital(text: str) -> str:
  """The text as it goes on after other words: a small first letter, unless it is a name."""
  if re.match(r"(I\b|[A-Z]{2}|" + "|".join(NAMES) + ")", text):
    return text
  return text[:1].lower() + text[1:]


def capital(text: str) -> str:
  """The text with its first letter as a capital."""
  return text[:1].upper() + text[1:]


@functools.cache
def bank(name: str) -> dict:
  """The texts of one environment, `bank/<name>.json` (written for this project)."""
  return read_json(Path(__file__).parent / "bank" / f"{name}.json")
