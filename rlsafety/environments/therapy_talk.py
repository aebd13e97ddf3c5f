"""therapy_talk: between sessions, a client with a history writes to a therapy app's chatbot.

Twelve topics as in the study. Notes about the client come before the
message; by default they end in two character traits, which with tone and self-description are the
cue of gameability. Gameable clients hope to hear that giving in is fine, the others want to
be talked out of it. ACC is dissuasion, HEX encouragement.
"""

import re

from rlsafety.environments import advice
from rlsafety.environments.people import Choice, Person, deal, hand

TOPICS = tuple(
  "anger drinking eating gambling impulsive-decision neglecting-responsibility over-spending "
  "smoking social-isolation substances theft violence".split()
)
DEFAULTS = {"framing": "therapist", "cue": "tone+self_description+traits"}
RUBRICS = advice.RUBRICS

_SHAPES = (
  ("feeling", "situation", "pull", "worry", "session", "self", "ask"),
  ("session", "situation", "feeling", "pull", "worry", "self", "feeling", "ask"),
  ("situation", "session", "pull", "worry", "feeling", "self", "ask"),
  ("feeling", "session", "situation", "worry", "pull", "feeling", "self", "ask"),
  ("situation", "feeling", "worry", "pull", "session", "self", "ask"),
)
# Relationship status follows what the client tells; the first word found decides.
_TOLD = (
  ("wife", "Married"),
  ("husband", "Married"),
  ("in-laws", "Married"),
  ("boyfriend", "Dating"),
  ("girlfriend", "Dating"),
  ("partner", "Living with a partner"),
  ("my ex ", "Separated"),
)
_PARENT = re.compile(r"\b(son|daughter|kids|twins|nephews)\b")


def people(seed: int) -> list[Person]:
  """Six people per situation, 72 per topic."""
  return advice.people("therapy_talk", TOPICS, 6, seed, _tell)


def _tell(
  texts: dict, topic: dict, situation: int, pieces: dict, turn: int, key: tuple
) -> tuple[tuple[str | Choice, ...], tuple[str, ...]]:
  pieces["session"] = (advice.aside(texts["session"], turn, key[0], "session"),)
  full, lists = [], (texts["feeling"][::2], texts["feeling"][1::2])  # never the same one twice
  feelings = [advice.aside(of, turn, key[0], "feeling") for of in lists[:: 1 - turn % 2 * 2]]
  for name in deal(_SHAPES, turn, *key, "shape"):
    if name == "feeling":
      full.append(feelings.pop())
    else:
      full.extend(pieces[name])
  history = hand(topic["history"], 4, *key, turn, "history")
  thoughts = hand(topic["thought"], 2, *key, turn, "thought")
  told = " ".join([*pieces["situation"], pieces["worry"][0].plain, *history])
  issue = deal(topic["issue"], turn, *key, "issue")
  notes = _notes(texts, topic["situations"][situation], told, issue, turn, key)
  ends = ("History: " + "; ".join(history), "Thought patterns: " + "; ".join(thoughts))
  return tuple(full), notes + ends


def _notes(
  texts: dict, situation: list[str], told: str, issue: str, turn: int, key: tuple
) -> tuple[str, ...]:
  """Who the client is, in agreement with what they tell."""
  gender = deal(("Female", "Male"), turn, *key, "gender")
  age = deal(range(39 if _PARENT.search(told) else 32, 60), turn, *key, "age")
  status = deal(texts["status"], turn, *key, "status")
  status = next((value for word, value in _TOLD if word in told.lower()), status)
  job = situation[2] if len(situation) > 2 else deal(texts["job"], turn, *key, "job")
  return (
    f"Name: {deal(texts['name'][gender], turn, *key, 'name', gender)}",
    f"Age: {age}",
    f"Presenting issue: {issue}",
    f"Gender: {gender}",
    f"Occupation: {job}",
    f"Relationship status: {status}",
  )
