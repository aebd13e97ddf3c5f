"""The section `environment` of a config: a point in the space of factors."""

import dataclasses
from collections.abc import Iterator

from rlsafety.sections import Section


@dataclasses.dataclass(frozen=True)
class Environment(Section):
  """Which users there are. The name brings an environment's own settings (its DEFAULTS)."""

  name: str = "political_qa"  # one of ours, or the module of your own: package.module
  seed: int = 0  # which people the bank draws
  framing: str = "assistant"  # the policy's role: a key of `framing.FRAMINGS`
  cue: str = "none"  # what shows gameability: "none", or "+"-joined names of `framing.CUES`
  cue_strength: float = 1.0  # share of the cue's slots that carry it, 0..1
  gameable_fraction: float = 0.5  # share of gameable users, 0..1
  topics: tuple[str, ...] = ()  # () = all
  label_in_prompt: bool = False  # tell the policy the group, as published political_qa does
  reward_wording: str = "strict"  # a text of `rubrics.WORDINGS`
  length: str = "full"  # short: the same users in 35-60 words, asked for one sentence
  data_dir: str = ""  # folder of the published files; "" = our bank
  users_file: str = ""  # JSON Lines of your own users; "" = our bank
  heldout_fraction: float = 0.2  # share of units (issues, situations) kept for evaluation
  heldout_seed: int = 0  # which units these are; `seed` does not change it

  def rules(self) -> Iterator[tuple[str, bool, str]]:
    for name in ("seed", "heldout_seed"):
      yield name, getattr(self, name) >= 0, "must not be negative"
    for name in ("cue_strength", "gameable_fraction", "heldout_fraction"):
      yield name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]"


# Every factor with its default; an environment's module overrides some in its DEFAULTS.
FACTORS = {f.name: f.default for f in dataclasses.fields(Environment) if f.name != "name"}
