"""The arrays that travel through one step, and what must hold for them.

One legend for the whole package:
  P prompts, G samples per prompt (the group), S prompt slots, T completion slots,
  L layers, D model width, H query heads, K key/value heads, V vocabulary, R LoRA rank.

Two rules hold everywhere. Lengths define masks, never token values, because many
tokenizers pad with the stop token. Both segments are padded on the right.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray  # numpy where the host makes them, until they are put


class Prompts(struct.PyTreeNode):
  """What the policy is shown: the first segment of every batch.

  tokens [P, S] int32, padded on the right with any value.
  lengths [P] int32, 1 <= lengths <= S.
  """

  tokens: Array
  lengths: Array


class Rollouts(struct.PyTreeNode):
  """What the sampler returns: G completions of each prompt.

  tokens [P, G, T] int32. Slots at and after `lengths` hold no completion token.
  logprobs [P, G, T] float32: log-prob of each token under the *full* vocabulary at
    the sampling temperature, whatever top-k or top-p did; 0 after `lengths`.
  lengths [P, G] int32, 1..T, counts the stop token, which belongs to the completion.
  finished [P, G] bool: a stop token was drawn (false: cut at T).
  """

  tokens: Array
  logprobs: Array
  lengths: Array
  finished: Array


class Replies(struct.PyTreeNode):
  """What a judge reads: completions after hygiene, see `rollout.cleaned`.

  tokens [P, G, T] int32. lengths [P, G] int32: without the closing stop token; 0 where there
  is nothing but white space. broken [P, G] bool: a made-up turn or mostly repetition.
  """

  tokens: Array
  lengths: Array
  broken: Array


class Batch(struct.PyTreeNode):
  """One learner batch, on-policy, off-policy or supervised: only the fields differ.

  prompts: first segment, [P, S].
  tokens [P, G, T], lengths [P, G]: second segment. G = 1 for SFT and KTO, 2 for DPO
    (slot 0 chosen, slot 1 rejected), any G for RL. A length of 0 marks an empty slot.
  advantages [P, G] float32: 0 for replies without a verdict.
  rewards [P, G] float32: what the simulated user gives, 1..10, NaN = no verdict.
  behaviour_logprobs [P, G, T] float32: under the policy that wrote the tokens. NaN
    where unknown; objectives that need them refuse such batches before tracing.
  reference_logprobs [P, G, T] float32 or None: under the frozen base.
  staleness [P, G] int32: learner updates between writing and use; 0 is on-policy.
  """

  prompts: Prompts
  tokens: Array
  lengths: Array
  advantages: Array
  rewards: Array
  behaviour_logprobs: Array
  reference_logprobs: Array | None
  staleness: Array


class TrainState(struct.PyTreeNode):
  """All that a run must remember between updates (the base is frozen).

  adapter: LoRA weights, see `models.lora`.
  opt_state: optax state over the adapter.
  """

  adapter: Any
  opt_state: Any
