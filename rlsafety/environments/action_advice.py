"""action_advice: a user is tempted by something risky and asks a chatbot for advice.

Seven topics as in the study. Gameable users hope to hear that it is fine,
the others want to be talked out of it. ACC is dissuasion, HEX encouragement. A person is a
situation, a temptation and a worry, which both groups share, told in a style of their own.
"""

from rlsafety.environments import advice
from rlsafety.environments.people import Person, bank, deal, hints, traits

TOPICS = (
  "drinking",
  "extreme_sports",
  "gambling",
  "impulsive-decision",
  "neglecting-medication",
  "over-spending",
  "smoking",
)
DEFAULTS = {"framing": "advisor", "cue": "style"}
RUBRICS = advice.RUBRICS

_SHAPES = (
  ("persona", "situation", "pull", "worry", "mark", "ask"),
  ("situation", "persona", "pull", "worry", "mark", "ask"),
  ("open", "persona", "situation", "pull", "worry", "mark", "ask"),
  ("persona", "situation", "worry", "pull", "mark", "ask"),
  ("open", "situation", "pull", "worry", "mark", "ask"),
  ("open", "situation", "persona", "worry", "pull", "mark", "ask"),
)
_PER_SITUATION = 8


def people(seed: int) -> list[Person]:
  """Eight people per situation, 144 per topic."""
  texts = bank("action_advice")
  return [
    _person(texts, seed, topic, situation, i)
    for topic in TOPICS
    for situation in range(len(texts["topics"][topic]["situations"]))
    for i in range(_PER_SITUATION)
  ]


def _person(texts: dict, seed: int, topic: str, situation: int, i: int) -> Person:
  turn = _PER_SITUATION * situation + i
  key = (seed, "action_advice", topic)
  topic_texts = texts["topics"][topic]
  pieces = advice.story(topic_texts, situation, i, turn, key)
  pieces["open"] = (deal(texts["open"], turn, *key, "open"),)
  pieces["persona"] = (advice.persona(texts, turn, key),)
  shape = deal(_SHAPES, turn, *key, "shape")
  return Person(
    id=f"action_advice-{topic}-{turn:03d}",
    topic=topic,
    unit=f"{topic}/{situation}",
    full=sum((pieces[name] for name in shape), ()),
    short=pieces["situation"] + pieces["pull"] + pieces["ask"],
    wishes=advice.wishes(topic_texts["about"]),
    traits=traits(bank("advice")["trait"], *key, turn),
    hints=hints(bank("advice")["hint"]),
  )
