"""Advantages and objectives as functions of arrays and an `Objective`; there is no model in sight.

`objective` returns a plain sum and `denominator` what to divide it by, computed once on the
whole global batch: micro-batches (whole groups, along P) and sharding can then never change
the result. Nothing in `objective` looks beyond its own group. Metrics are (sum, weight)
pairs for the same reason: add both over micro-batches (of names that end in `_max` keep the
largest), then divide with `finish_metrics`. A reward of NaN means "no verdict": such a reply
takes no part in any statistic, and its siblings get what they would get if it were absent.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlsafety.config import REWARDED, Objective
from rlsafety.packing import mask_from_lengths
from rlsafety.types import Array, Batch

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, weight)}
MAX_LOG_RATIO = 20.0  # e^20 is far past any clip; keeps float32 finite


# --- Advantages -------------------------------------------------------------------------


def advantages(rewards: Array, o: Objective) -> Array:
  """Rewards [P, G] minus a baseline, scaled: advantages [P, G], 0 for those without a verdict.

  No gradient flows; call it once on the whole batch. `o.advantage` says which:
    group: (r - mean) / (std + eps) over the group; std divides by n - ddof
      (GRPO, arXiv 2402.03300, whose implementations differ in ddof; the study: 1).
    group_mean: r - mean (Dr. GRPO, arXiv 2503.20783).
    leave_one_out: r - mean of the siblings (RLOO, arXiv 2402.14740).
    batch: (r - mean) / (std + eps) over all of P and G.
    none: r.
  A group with one verdict gets 0 from every kind that has a group baseline.
  """
  valid = ~jnp.isnan(rewards)
  if o.advantage == "none":
    return jnp.where(valid, rewards, 0.0)
  axes = (0, 1) if o.advantage == "batch" else (1,)
  count = valid.sum(axes, keepdims=True)
  # Shifting by the smallest makes equal rewards exactly 0, not rounding noise / eps.
  lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axes, keepdims=True)
  shifted = jnp.where(valid, rewards - jnp.where(count > 0, lowest, 0.0), 0.0)
  mean = shifted.sum(axes, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(valid, shifted - mean, 0.0)
  if o.advantage == "group_mean":
    return centred
  if o.advantage == "leave_one_out":
    return centred * count / jnp.maximum(count - 1, 1)
  freedom = jnp.maximum(count - o.ddof, 1)
  std = jnp.sqrt((centred**2).sum(axes, keepdims=True) / freedom)
  return centred / (std + o.std_epsilon)


def shaped(
  rewards: Array,
  o: Objective,
  lengths: Array,
  behaviour_logprobs: Array | None = None,
  reference_logprobs: Array | None = None,
) -> Array:
  """Adds what is part of the reward and not of the loss; feed the result to `advantages`.

  Args:
    rewards: [P, G]; NaN stays NaN.
    lengths: [P, G] int, tokens of each reply.
    behaviour_logprobs, reference_logprobs: [P, G, T], needed for kl="k1_reward".

  Returns:
    [P, G]: rewards - kl_coef * sum_t (log behaviour - log reference) - penalty, where the
    penalty grows in a line from 0 at overlong_start tokens to overlong_penalty at
    overlong_end and stays there (DAPO, arXiv 2503.14476, equation 13, in our tokens).
  """
  if o.kl == "k1_reward" and o.kl_coef:
    assert behaviour_logprobs is not None and reference_logprobs is not None
    mask = jnp.arange(behaviour_logprobs.shape[-1]) < lengths[..., None]
    k1 = jnp.where(mask, behaviour_logprobs - reference_logprobs, 0.0).sum(-1)
    rewards = rewards - o.kl_coef * k1
  if o.overlong_end:
    span = max(o.overlong_end - o.overlong_start, 1)
    excess = jnp.clip((lengths - o.overlong_start) / span, 0.0, 1.0)
    rewards = rewards - o.overlong_penalty * excess
  return rewards


def has_spread(rewards: Array) -> Array:
  """[P, G] -> [P] bool: the group has two verdicts that differ, so it can teach something."""
  valid = ~jnp.isnan(rewards)
  high = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1)
  low = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1)
  return high > low


# --- Which replies count ----------------------------------------------------------------


def _with_verdict(batch: Batch, o: Objective) -> Array:
  keep = batch.lengths > 0
  if o.max_staleness >= 0:
    keep &= batch.staleness <= o.max_staleness
  if o.kto_anchor:  # the last slot is a reply to another prompt
    keep &= jnp.arange(keep.shape[1]) < keep.shape[1] - 1
  if o.dynamic_sampling:
    keep &= has_spread(jnp.where(keep, batch.rewards, jnp.nan))[:, None]
  return keep & ~jnp.isnan(batch.rewards)


def _everything(batch: Batch, o: Objective) -> Array:
  return batch.lengths > 0


def _best_of_group(batch: Batch, o: Objective) -> Array:
  """The first of equals."""
  keep = (batch.lengths > 0) & ~jnp.isnan(batch.rewards)
  score = jnp.where(keep, batch.rewards, -jnp.inf)
  return keep & (jnp.arange(score.shape[1]) == jnp.argmax(score, axis=1)[:, None])


def _whole_pairs(batch: Batch, o: Objective) -> Array:
  keep = batch.lengths > 0
  return jnp.broadcast_to(keep.all(axis=1, keepdims=True), keep.shape)


# --- Losses of tokens -------------------------------------------------------------------
# Each takes (logprobs [P, G, T], batch, kept [P, G, T], o) and returns losses [P, G, T] and
# metrics. A ratio is exp(logprobs - behaviour), a weight has no gradient.


def _log_ratio(logprobs: Array, batch: Batch, kept: Array) -> Array:
  behaviour = jnp.where(kept, batch.behaviour_logprobs, jax.lax.stop_gradient(logprobs))
  return jnp.where(kept, jnp.clip(logprobs - behaviour, -MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0)


def _score(logprobs: Array, batch: Batch, kept: Array, o: Objective):
  """The score-function gradient, weighted where a correction is asked for.

  Without one, REINFORCE takes the replies as its own. With one, the cap bounds the step: a
  clip of the same ratio on top would only throw gradient away.
  """
  if o.is_correction == "none":
    weights, metrics = jnp.ones_like(logprobs), {}
  else:
    weights = importance_weights(_log_ratio(logprobs, batch, kept), kept, o)
    is_cut = weights == 0.0 if "mask" in o.is_correction else weights >= o.is_cap
    metrics = {"is_weight": _mean(weights, kept), "is_cap_fraction": _mean(is_cut, kept)}
  losses = -weights * batch.advantages[..., None] * logprobs
  return _with_kl(losses, logprobs, batch, kept, o, weights), metrics


def _cispo(logprobs: Array, batch: Batch, kept: Array, o: Objective):
  """arXiv 2506.13585: clipped weight, no clipped gradient."""
  ratio = jnp.exp(jax.lax.stop_gradient(_log_ratio(logprobs, batch, kept)))
  clipped = jnp.clip(ratio, 1.0 - o.clip_low, 1.0 + o.clip_high)
  losses = -clipped * batch.advantages[..., None] * logprobs
  metrics = {"clip_fraction": _mean(clipped != ratio, kept)}
  return _with_kl(losses, logprobs, batch, kept, o), metrics


def _clipped(logprobs: Array, batch: Batch, kept: Array, o: Objective):
  """PPO's clipped surrogate (arXiv 1707.06347), or `_score` where a correction is asked for."""
  if o.is_correction != "none":
    return _score(logprobs, batch, kept, o)
  log_ratio = _log_ratio(logprobs, batch, kept)
  return _clip(log_ratio, logprobs, batch, kept, o)


def _clipped_replies(logprobs: Array, batch: Batch, kept: Array, o: Objective):
  """GSPO (arXiv 2507.18071): the length-normalised ratio of the reply."""
  log_ratio = _log_ratio(logprobs, batch, kept)
  per_reply = _per_reply(log_ratio, kept, batch.lengths)[..., None]
  return _clip(jnp.broadcast_to(per_reply, log_ratio.shape), logprobs, batch, kept, o)


def _clip(log_ratio: Array, logprobs: Array, batch: Batch, kept: Array, o: Objective):
  advantage, ratio = batch.advantages[..., None], jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1.0 - o.clip_low, 1.0 + o.clip_high)
  losses = -jnp.minimum(ratio * advantage, clipped * advantage)
  metrics = {"clip_fraction": _mean((ratio * advantage > clipped * advantage), kept)}
  if o.dual_clip:  # arXiv 1912.09729
    bound = -o.dual_clip * advantage
    losses = jnp.where(advantage < 0, jnp.minimum(losses, bound), losses)
  return _with_kl(losses, logprobs, batch, kept, o), metrics


def _imitation(logprobs: Array, batch: Batch, kept: Array, o: Objective):
  return -logprobs, {}


def _with_kl(
  losses: Array,
  logprobs: Array,
  batch: Batch,
  kept: Array,
  o: Objective,
  weights: Array | float = 1.0,
) -> Array:
  if o.kl not in ("k2", "k3") or not o.kl_coef:
    return losses
  reference = jnp.where(kept, _reference(batch), jax.lax.stop_gradient(logprobs))
  return losses + o.kl_coef * weights * kl_estimate(logprobs, reference, o.kl)


def importance_weights(log_ratio: Array, mask: Array, o: Objective) -> Array:
  """Weights that turn an average over the behaviour policy into one over the current one.

  Args:
    log_ratio: [P, G, T] log current - log behaviour, 0 outside `mask`.

  Returns:
    [P, G, T] without gradient. token_*: each token's own ratio; sequence_*: the product
    over the reply, the only one that is unbiased for the reply's reward. *_truncate:
    min(w, is_cap) (arXiv 1802.01561 and later TIS); *_mask: w where w <= is_cap, else 0.
    is_correction="none": ones.
  """
  if o.is_correction == "none":
    return jnp.ones_like(log_ratio)
  log_weight = jax.lax.stop_gradient(log_ratio)
  if o.is_correction.startswith("sequence"):
    log_weight = jnp.broadcast_to(
      jnp.where(mask, log_weight, 0.0).sum(-1, keepdims=True), log_weight.shape
    )
  log_cap = math.log(o.is_cap)
  beyond = 0.0 if o.is_correction.endswith("mask") else o.is_cap
  return jnp.where(log_weight > log_cap, beyond, jnp.exp(jnp.minimum(log_weight, log_cap)))


def kl_estimate(logprobs: Array, reference: Array, kind: str) -> Array:
  """Per-token estimate of the KL from the policy that drew the tokens to `reference`.

  k1 = log p - log q; k2 = k1^2 / 2; k3 = q/p - 1 + k1. As loss terms on-policy, the
  expected gradient is 0 for k1, that of KL(p, q) for k2 and that of KL(q, p) for k3.
  """
  k1 = logprobs - reference
  if kind == "k1":
    return k1
  if kind == "k2":
    return 0.5 * k1**2
  return jnp.exp(jnp.clip(-k1, -MAX_LOG_RATIO, MAX_LOG_RATIO)) - 1.0 + k1


# --- Losses of replies ------------------------------------------------------------------
# Each takes (log_odds [P, G] of policy against reference, batch, keep [P, G], o) and returns
# losses [P, G] and metrics.


def _dpo(log_odds: Array, batch: Batch, keep: Array, o: Objective):
  """arXiv 2305.18290, slot 0 chosen, slot 1 rejected; the pair's loss stands in slot 0."""
  margin = o.beta * (log_odds[:, 0] - log_odds[:, 1])
  loss = -jax.nn.log_sigmoid(margin)
  pair = keep[:, 0]
  metrics = {"margin": _mean(margin, pair), "accuracy": _mean(margin > 0, pair)}
  return jnp.stack([loss, jnp.zeros_like(loss)], axis=1), metrics


def _kto(log_odds: Array, batch: Batch, keep: Array, o: Objective):
  """arXiv 2402.01306: 1 - sigmoid(+-(beta log odds - z0)), z0 without gradient.

  The paper's z0 is a mean over the micro-batch, which makes the loss depend on how it is cut.
  Ours belongs to the group: 0 by default (the variant known as APO-zero, arXiv 2408.06266),
  or with kto_anchor max(0, log odds of a reply to another prompt) from the last slot.
  """
  anchor = jnp.zeros_like(log_odds[:, :1])
  if o.kto_anchor:
    anchor = jnp.maximum(jax.lax.stop_gradient(log_odds[:, -1:]), 0.0)
  desirable = batch.rewards > o.threshold
  value = o.beta * (log_odds - anchor)
  losses = jnp.where(
    desirable,
    o.desirable_weight * jax.nn.sigmoid(-value),
    o.undesirable_weight * jax.nn.sigmoid(value),
  )
  correct = desirable == (value > 0)
  return losses, {"desirable": _mean(desirable, keep), "accuracy": _mean(correct, keep)}


# --- The table of methods ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
  """losses: of tokens, or of replies where `mean_of` is not "tokens". active: the replies that
  are learned from. mean_of: what the loss is a mean of: tokens (see Objective.normalisation),
  replies or pairs. has_ratio: behaviour log-probs enter whatever the correction."""

  losses: Callable
  active: Callable = _with_verdict
  mean_of: str = "tokens"
  has_ratio: bool = False


METHODS = {  # their settings are in config.METHODS
  "grpo": Method(_clipped, has_ratio=True),  # arXiv 2402.03300
  "ppo": Method(_clipped, has_ratio=True),  # arXiv 1707.06347
  "dr_grpo": Method(_clipped, has_ratio=True),  # arXiv 2503.20783
  "dapo": Method(_clipped, has_ratio=True),  # arXiv 2503.14476
  "gspo": Method(_clipped_replies, has_ratio=True),
  "cispo": Method(_cispo, has_ratio=True),
  "reinforce": Method(_score),
  "rloo": Method(_score),  # arXiv 2402.14740
  "sft": Method(_imitation, _everything),
  "expert_iteration": Method(_imitation, _best_of_group),
  "dpo": Method(_dpo, _whole_pairs, "pairs"),
  "kto": Method(_kto, mean_of="replies"),
}


def needs_behaviour(o: Objective, epochs: int = 1) -> bool:
  """Whether the log-probs of the policy that wrote the replies enter the result.

  Several epochs over one batch always need them, except where no reward is involved;
  `replay` refuses records that lack them.
  """
  if o.name not in REWARDED:
    return False
  corrects = METHODS[o.name].has_ratio or o.is_correction != "none"
  return corrects or o.kl == "k1_reward" or epochs > 1


def needs_reference(o: Objective) -> bool:
  """Whether `reference_logprobs` must be computed: a KL of weight 0 is logged alone."""
  return METHODS[o.name].mean_of != "tokens" or o.kl != "none"


def _reference(batch: Batch) -> Array:
  assert batch.reference_logprobs is not None  # `needs_reference` said so
  return batch.reference_logprobs


def active(batch: Batch, o: Objective) -> Array:
  """[P, G] bool: the replies that are learned from. All others are as if absent."""
  return METHODS[o.name].active(batch, o)


def denominator(batch: Batch, o: Objective) -> Array:
  """What the sum of `objective` over the *global* batch is divided by (at least 1)."""
  keep, mean_of = active(batch, o), METHODS[o.name].mean_of
  if mean_of == "pairs":
    count = keep[:, 0].sum()
  elif mean_of == "replies" or o.normalisation == "sequence":
    count = keep.sum()
  elif o.normalisation == "fixed":
    count = keep.sum() * o.fixed_length
  else:
    count = jnp.where(keep, batch.lengths, 0).sum()
  return jnp.maximum(count, 1).astype(jnp.result_type(float))


def objective(
  logprobs: Array, entropy: Array, batch: Batch, o: Objective
) -> tuple[jax.Array, Metrics]:
  """The loss of a (micro-)batch, as a sum.

  Args:
    logprobs: [P, G, T] log-probs of `batch.tokens` under the policy in training, at the
      sampling temperature; slots at and after `lengths` may hold any finite value.
    entropy: [P, G, T] entropy of the policy at each slot, nats.
    batch: whole groups.
    o: what to optimise.

  Returns:
    (loss_sum, metrics): a scalar to divide by `denominator` of the global batch, and
    {name: (sum, weight)}.
  """
  keep, method = active(batch, o), METHODS[o.name]
  mask = mask_from_lengths(batch.lengths, logprobs.shape[-1])
  logprobs = jnp.where(mask, logprobs, 0.0)
  kept = mask & keep[..., None]
  metrics = _common_metrics(jax.lax.stop_gradient(logprobs), entropy, batch, kept)
  if method.mean_of != "tokens":
    reference = jnp.where(mask, _reference(batch), 0.0)
    log_odds = jnp.where(mask, logprobs - reference, 0.0).sum(-1)  # [P, G]
    losses, more = method.losses(log_odds, batch, keep, o)
    losses = losses - o.entropy_coef * _per_reply(entropy, kept, batch.lengths)
    return jnp.where(keep, losses, 0.0).sum(), metrics | more
  losses, more = method.losses(logprobs, batch, kept, o)
  losses = losses - o.entropy_coef * jnp.where(kept, entropy, 0.0)
  losses = jnp.where(kept, losses, 0.0)
  if o.normalisation == "sequence":
    losses = _per_reply(losses, kept, batch.lengths)
  return losses.sum(), metrics | more


# --- Metrics ----------------------------------------------------------------------------


def _common_metrics(logprobs: Array, entropy: Array, batch: Batch, kept: Array) -> Metrics:
  """What every method reports; `logprobs` without gradient, 0 outside the replies."""
  known = kept & ~jnp.isnan(batch.behaviour_logprobs)
  diff = jnp.where(known, logprobs - batch.behaviour_logprobs, 0.0)
  ratio = jnp.exp(jnp.clip(diff, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  replies = jnp.any(kept, axis=-1)
  judged = jnp.any(~jnp.isnan(batch.rewards) & (batch.lengths > 0), axis=1)
  metrics = {
    "ratio": _mean(ratio, known),
    "ratio_deviation": _mean(jnp.abs(ratio - 1.0), known),
    "ratio_deviation_max": (jnp.abs(ratio - 1.0).max(), jnp.ones(())),
    # Zero mismatch is the bar: on-policy, this is sampler against learner.
    "logprob_diff": _mean(diff, known),
    "logprob_diff_abs": _mean(jnp.abs(diff), known),
    "logprob_diff_max": (jnp.abs(diff).max(), jnp.ones(())),
    "kl": _mean(ratio - 1.0 - diff, known),  # KL(behaviour, current), k3
    "logprob": _mean(logprobs, kept),
    "entropy": _mean(jax.lax.stop_gradient(entropy), kept),
    "frac_zero_std": _mean(~has_spread(batch.rewards), judged),
    "staleness": _mean(batch.staleness, replies),
  }
  if batch.reference_logprobs is not None:
    to_reference = jnp.where(kept, logprobs - batch.reference_logprobs, 0.0)
    metrics["kl_reference"] = _mean(to_reference, kept)  # k1: exact in expectation
  return metrics


def finish_metrics(metrics: Metrics) -> dict[str, jax.Array]:
  """(sum, weight) -> sum / weight, NaN where nothing was counted; `_max` stays as it is."""
  return {
    name: total
    if name.endswith("_max")
    else jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), jnp.nan)
    for name, (total, weight) in metrics.items()
  }


def _per_reply(values: Array, kept: Array, lengths: Array) -> Array:
  """[P, G, T] -> [P, G]: mean over each reply's tokens, 0 for an empty one."""
  return jnp.where(kept, values, 0.0).sum(-1) / jnp.maximum(lengths, 1)


def _mean(values: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
  """The (sum, weight) pair of a masked mean."""
  dtype = jnp.result_type(float)
  return jnp.where(mask, values, 0).sum().astype(dtype), mask.sum().astype(dtype)
