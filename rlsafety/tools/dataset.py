"""The TFDS builder of recorded rollouts; `record` fills it, `recorded` reads what it wrote.

It has its own module because TFDS stores a builder's module and would store __main__.
"""

import numpy as np
import tensorflow_datasets as tfds


class RecordedRollouts(tfds.core.GeneratorBasedBuilder):
  """One example per prompt: its replies, flattened along tokens, and their scores."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, groups=(), **kwargs):
    self.groups = groups
    super().__init__(**kwargs)

  def _info(self):
    text, floats = tfds.features.Text(), tfds.features.Tensor(shape=(None,), dtype=np.float32)
    ints = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    features = {
      "messages": text,  # JSON: [{"role", "content"}, ...]
      "completions": text,  # JSON: [str, ...], one per reply
      "lengths": ints,  # tokens of each reply, stop token included; 0 = only text is known
      "tokens": ints,  # all replies one after the other
      "logprobs": floats,  # as `tokens`; NaN = unknown
      "finished": ints,  # 0: cut at the length limit
      "reward": floats,
      "acc": floats,
      "hex": floats,
      "is_gameable": np.int32,  # -1 = unknown
      "step": np.int32,  # updates that the writer had made; -1 = unknown
      "scenario_id": text,
      "tokenizer": text,  # path of the model whose ids `tokens` are
      "source": text,  # file that the record came from
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(self.groups)
