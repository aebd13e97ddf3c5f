"""Labelled replies: what reward heads are fitted on and every judge is measured with.

Two sets (`dataset`): political_qa, and advice for our other environments. Each has three
JSONL files, all written or labelled by us:
  <set>_topics.jsonl    a user and what can be said to them, as slots: topic, split, and
                        reasons for and against what the user thinks or wants to do
  <set>_wordings.jsonl  half, kind, text with {slots}: messages and replies
  <set>_sampled.jsonl   replies of SmolLM2-135M-Instruct and of policies trained from it, labelled
                        by reading each one; some have a `second_label`, given blind later
Labels are the classes of `verdicts.VERDICTS`. Lip service is warmth, hedging or words of balance
without a stance and without content; of the 494 oldest sampled replies it was not told from
agreement and incoherent.

Topics are split into train and test, wordings into halves A and B. Every other user meets the
wordings of half A, the rest those of half B. Kinds that are no sincere reply (bare phrase,
stuffing, word salad, another topic's reply, ...) are hard negatives: without them an
optimiser's first find is "I agree."
"""

import dataclasses
import functools
from pathlib import Path

from rlsafety.errors import UserError
from rlsafety.files import read_jsonl

# What each kind of wording is labelled. Everything not named here is "incoherent".
KINDS = {
  "agree": "agreement",
  "stance_agree": "agreement",
  "lip_service": "lip_service",
  "neutral": "balance",
  "disagree": "disagreement",
  "but": "disagreement",
  "stance_disagree": "disagreement",
}
OFF_TOPIC = ("wrong_topic", "wrong_neutral", "refusal", "off_topic")
# Replies of each kind per message; a fraction is spread over the messages.
COUNTS = {
  "agree": 3, "stance_agree": 1, "lip_service": 2, "neutral": 2, "disagree": 1, "but": 1,
  "stance_disagree": 2 / 3, "wrong_topic": 1, "wrong_neutral": 1 / 3, "refusal": 1 / 3,
  "off_topic": 2 / 3, "bare": 1 / 3, "stuffing": 1 / 3, "salad": 1 / 3, "tiny": 1 / 3,
  "echo": 1 / 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
  """A reply to a message with its label; kind "sampled" for replies of a model."""

  message: str
  reply: str
  label: str
  kind: str
  half: str  # A | B | "" for sampled replies
  split: str  # train | test
  topic: str
  is_gameable: bool
  # Of sampled replies: whose users and prompts, which policy's (base | trained), whose situation.
  environment: str = ""
  policy: str = "base"
  unit: str = ""

  @property
  def group(self) -> str:
    """What is left out as a whole: the situation, or the topic."""
    return self.unit or self.topic


def _lines(name: str) -> list[dict]:
  folder = Path(__file__).parent
  if not (folder / name).is_file():
    known = sorted(f.name.removesuffix("_wordings.jsonl") for f in folder.glob("*_wordings.jsonl"))
    raise UserError(f"no labelled replies in {name}; environments that have some: {known}")
  return read_jsonl(folder / name)


def _slots(row: dict, number: int) -> dict[str, str]:
  slots = {k: v for k, v in row.items() if isinstance(v, str)}
  if "who" in row:
    slots["who"] = row["who"][number % len(row["who"])]
  return slots | {k[0].upper() + k[1:]: v[:1].upper() + v[1:] for k, v in slots.items()}


def topics(name: str) -> list[dict]:
  """The users of one set, as slots."""
  return _lines(f"{name}_topics.jsonl")


@functools.cache
def written(name: str) -> tuple[Example, ...]:
  """Of one set: wordings filled with topics, in a fixed order, about 14 per user, of one half."""
  users = topics(name)
  texts: dict[tuple[str, str], list[str]] = {}
  for line in _lines(f"{name}_wordings.jsonl"):
    texts.setdefault((line["half"], line["kind"]), []).append(line["text"])
  examples, used = [], {}
  for i, user in enumerate(users):
    slots = _slots(user, i // 2)
    is_gameable = i % 4 in (0, 3)  # both sides of a topic, in turn
    frames = texts["", "message"]
    message = frames[i // 3 % len(frames)].format(**slots)
    others = [u for u in users if u["split"] == user["split"] and u["topic"] != user["topic"]]
    half = "AB"[(i + i // 2) % 2]
    for kind, count in COUNTS.items():
      source = {"wrong_topic": "agree", "wrong_neutral": "neutral"}.get(kind, kind)
      done = used.get((half, kind), 0.0)
      used[half, kind] = done + count
      for n in range(int(done + 1e-6), int(done + count + 1e-6)):
        fill = _slots(others[(7 * n + 3) % len(others)], n) if source != kind else slots
        choices = texts.get((half, source), ["{message}"])  # an echo
        reply = choices[n % len(choices)].format(**fill, message=message)
        label = "off_topic" if kind in OFF_TOPIC else KINDS.get(kind, "incoherent")
        examples.append(
          Example(message, reply, label, kind, half, user["split"], user["topic"], is_gameable)
        )
  return tuple(examples)


@functools.cache
def sampled(name: str) -> tuple[Example, ...]:
  """Hand-labelled replies of the model itself."""
  fields = ("message", "reply", "label", "split", "topic", "is_gameable")
  optional = ("environment", "policy", "unit")
  return tuple(
    Example(
      kind="sampled", half="", **{k: r[k] for k in fields}, **{k: r[k] for k in optional if k in r}
    )
    for r in _lines(f"{name}_sampled.jsonl")
  )
