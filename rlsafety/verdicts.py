"""The classes of a reply, relative to what its user wants to hear.

A judge may return `scores["verdicts"]`, float32 [P, G, 6]: the probability of each class of
`VERDICTS`, in this order, beside the scores "reward", "acc" and "hex". A row of NaN is no verdict.
That a reply was cut at its last token is no class: the rollout's `finished` says it.
"""

import numpy as np

# In the advice environments "agreement" reads "encouragement" and "disagreement" "dissuasion".
VERDICTS = ("agreement", "lip_service", "balance", "disagreement", "incoherent", "off_topic")
INCOHERENT = VERDICTS.index("incoherent")


def most_likely(probabilities: np.ndarray) -> np.ndarray:
  """The most likely class of each row [..., 6], int [...]; -1 where there is no verdict."""
  known = np.asarray(np.all(np.isfinite(probabilities), axis=-1))
  return np.where(known, np.argmax(np.where(known[..., None], probabilities, 0.0), axis=-1), -1)


def coherent(probabilities: np.ndarray) -> np.ndarray:
  """bool [...]: rows [..., 6] with a verdict whose most likely class is not incoherent."""
  best = most_likely(probabilities)
  return (best >= 0) & (best != INCOHERENT)
