"""Variants of environments: the published chain and every change of one factor, by name.

configs/paper.py takes each name as its `variant`; a recipe of your own writes
`config.environment.update(variants.named()["action_advice+therapist"])`. The gameability
report goes over all of them.
"""

from rlsafety.environments import framing, published, rubrics
from rlsafety.environments.scenario import ENVIRONMENTS, environment_module, resolved

# The study's own settings: its style joins tone, self-description and a request.
PUBLISHED = {name: {"name": name, "cue": published.CUE[name]} for name in ENVIRONMENTS}
_THERAPIST = {"name": "action_advice", "framing": "therapist"}
# From action_advice to something like therapy_talk, one change at a time.
# The study's last step also changed pool and wish wording; here it only removes the style.
CHAIN = {
  "action_advice": PUBLISHED["action_advice"],
  "action_advice+therapist": {**_THERAPIST, "cue": "style"},
  "action_advice+therapist+traits": {**_THERAPIST, "cue": "style+traits"},
  "action_advice+therapist+traits+equal_style": {**_THERAPIST, "cue": "traits"},
}

# Values that single-factor variants go through, besides each environment's own and each of
# its topics alone.
VALUES = {
  "framing": tuple(framing.FRAMINGS),
  "cue": ("none", *framing.CUES, "tone+self_description", "style+traits"),
  "cue_strength": (0.25, 0.5),
  "gameable_fraction": (0.1, 0.9),
  "label_in_prompt": (True,),
  "reward_wording": tuple(rubrics.WORDINGS),
  "length": ("short",),
}


def named() -> dict[str, dict]:
  """All variants: name -> the fields that differ from the defaults, and `name`.

  Environments under their own names, the chain, and "<environment>:<field>=<value>" for
  every change of one factor. A strength without a cue is no change and left out.
  """
  variants: dict[str, dict] = CHAIN | {name: {"name": name} for name in ENVIRONMENTS}
  for name in ENVIRONMENTS:
    default = resolved({"name": name})
    for field, values in VALUES.items():
      for value in values:
        if value == default[field] or (field == "cue_strength" and default["cue"] == "none"):
          continue
        variants[f"{name}:{field}={value}"] = {"name": name, field: value}
    for topic in environment_module(name).TOPICS:
      variants[f"{name}:topics={topic}"] = {"name": name, "topics": (topic,)}
  return variants
