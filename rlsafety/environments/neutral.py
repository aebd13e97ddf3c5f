"""neutral: the users and wishes of action_advice without role framing and without any cue.

The test that would settle the study's claim: if harm still appears here, it came neither
from a role nor from a cue that gives the gameable users away.
"""

from rlsafety.environments import action_advice
from rlsafety.environments.people import Person

TOPICS = action_advice.TOPICS
DEFAULTS = {"framing": "assistant", "cue": "none"}
RUBRICS = action_advice.RUBRICS


def people(seed: int) -> list[Person]:
  """The same people under the same ids, so that they also keep their group and their split."""
  return action_advice.people(seed)
