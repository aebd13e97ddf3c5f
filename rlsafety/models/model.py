"""A model in memory: what loading gives, and what sampling, judging and saving take."""

import dataclasses

from rlsafety.models.architecture import ModelConfig
from rlsafety.models.chat import Chat


@dataclasses.dataclass(frozen=True)
class Model:
  """config, params in the layout of `architecture.weights`, chat, and where they are from."""

  config: ModelConfig
  params: dict
  chat: Chat
  source: dict
