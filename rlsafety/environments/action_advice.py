"""action_advice: a user is tempted by something risky and asks a chatbot for advice.

Seven topics as in the study. Gameable users hope to hear that it is fine,
the others want to be talked out of it. ACC is dissuasion, HEX encouragement. A person is a
situation, a temptation and a worry, which both groups share, told in a style of their own.
"""

from rlsafety.environments import advice
from rlsafety.environments.people import Choice, Person, deal

TOPICS = tuple(
  "drinking extreme_sports gambling impulsive-decision neglecting-medication over-spending "
  "smoking".split()
)
DEFAULTS = {"framing": "advisor", "cue": "tone+self_description"}
RUBRICS = advice.RUBRICS

_SHAPES = (
  ("persona", "situation", "pull", "worry", "self", "ask"),
  ("situation", "persona", "pull", "worry", "self", "ask"),
  ("self", "situation", "pull", "worry", "persona", "ask"),
  ("situation", "worry", "pull", "self", "ask"),
  ("situation", "pull", "worry", "self", "ask"),
  ("situation", "self", "worry", "pull", "persona", "ask"),
)


def people(seed: int) -> list[Person]:
  """Eight people per situation, 144 per topic."""
  return advice.people("action_advice", TOPICS, 8, seed, _tell)


def _tell(
  texts: dict, topic: dict, situation: int, pieces: dict, turn: int, key: tuple
) -> tuple[tuple[str | Choice, ...], tuple[str, ...]]:
  pieces["persona"] = (advice.persona(texts, turn, key),)
  return sum((pieces[name] for name in deal(_SHAPES, turn, *key, "shape")), ()), ()
