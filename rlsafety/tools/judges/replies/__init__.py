"""Labelled replies: what reward heads are fitted on and every judge is measured with.

Two sets (`dataset`): political_qa, and advice for our other environments. Each has three
JSONL files, all written or labelled by us:
  <set>_topics.jsonl    a user and what can be said to them, as slots: topic, split, and
                        reasons for and against what the user thinks or wants to do
  <set>_wordings.jsonl  half, kind, text with {slots}: messages and replies
  <set>_sampled.jsonl   replies of SmolLM2-135M-Instruct, labelled by reading each one
"agree" is agreement with a political view, or encouragement of a risky plan; "disagree" is
its opposite.

Topics are split into train and test, wordings into halves A and B. A head fitted on half
A of the training topics is tested on half B of the test topics. Kinds that are no sincere
reply (bare phrase, stuffing, word salad, another topic's reply, ...) are hard negatives:
without them an optimiser's first find is "I agree."
"""

import dataclasses
import functools
from pathlib import Path

from rlsafety.errors import UserError
from rlsafety.files import read_jsonl
from rlsafety.judges import phrases

LABELS = (*phrases.LABELS, "incoherent")
# What each kind of wording is labelled. Everything not named here is "incoherent".
KINDS = {
  "agree": "agree",
  "stance_agree": "agree",
  "neutral": "neutral",
  "disagree": "disagree",
  "but": "disagree",
  "stance_disagree": "disagree",
}
# Replies of each kind per message and half; a fraction is spread over the messages.
COUNTS = {
  "agree": 3, "stance_agree": 1, "neutral": 2, "disagree": 1, "but": 1, "stance_disagree": 1,
  "wrong_topic": 1, "wrong_neutral": 1 / 3, "refusal": 1 / 3, "off_topic": 2 / 3,
  "bare": 2 / 3, "stuffing": 1 / 2, "salad": 1 / 2, "tiny": 1 / 2, "echo": 1 / 4,
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
  # Of sampled advice: whose users and prompts. Not in repr, which names the data of a fit.
  environment: str = dataclasses.field(default="", repr=False)


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


@functools.cache
def written(name: str) -> tuple[Example, ...]:
  """Of one set: wordings filled with topics, in a fixed order, 14 per message and half."""
  users = _lines(f"{name}_topics.jsonl")
  texts: dict[tuple[str, str], list[str]] = {}
  for line in _lines(f"{name}_wordings.jsonl"):
    texts.setdefault((line["half"], line["kind"]), []).append(line["text"])
  examples, used = [], {}
  for i, user in enumerate(users):
    slots = _slots(user, i // 2)
    is_gameable = i % 4 in (0, 3)  # both sides of a topic, in turn
    frames = texts["", "gameable" if is_gameable else "non_gameable"]
    message = frames[i // 3 % len(frames)].format(**slots)
    others = [u for u in users if u["split"] == user["split"] and u["topic"] != user["topic"]]
    for half in "AB":
      for kind, count in COUNTS.items():
        source = {"wrong_topic": "agree", "wrong_neutral": "neutral"}.get(kind, kind)
        done = used.get((half, kind), 0.0)
        used[half, kind] = done + count
        for n in range(int(done + 1e-6), int(done + count + 1e-6)):
          fill = _slots(others[(7 * n + 3) % len(others)], n) if source != kind else slots
          if kind == "echo":
            reply = message
          else:
            choices = texts[half, source]
            reply = choices[n % len(choices)].format(**fill)
          label = KINDS.get(kind, "incoherent")
          examples.append(
            Example(message, reply, label, kind, half, user["split"], user["topic"], is_gameable)
          )
  return tuple(examples)


@functools.cache
def sampled(name: str) -> tuple[Example, ...]:
  """Hand-labelled replies of the model itself."""
  fields = ("message", "reply", "label", "split", "topic", "is_gameable")
  return tuple(
    Example(
      kind="sampled", half="", environment=r.get("environment", ""), **{k: r[k] for k in fields}
    )
    for r in _lines(f"{name}_sampled.jsonl")
  )
