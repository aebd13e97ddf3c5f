"""Objectives as functions of log-probs and a batch; there is no model in sight.

`objective` returns a plain sum and `denominator` what to divide it by, computed once on the
whole global batch: micro-batches (whole groups, along P) and sharding can then never change
the result. Nothing in `objective` looks beyond its own group. Metrics are (sum, weight)
pairs for the same reason: add both over micro-batches (of names that end in `_max` keep the
largest), then divide with `finish_metrics`.
"""

import dataclasses
import difflib
import math

import jax
import jax.numpy as jnp

from rlsafety import advantages as advantages_lib
from rlsafety.errors import UserError
from rlsafety.packing import mask_from_lengths
from rlsafety.types import Array, Batch

CLIPPED = ("grpo", "dr_grpo", "dapo", "ppo", "gspo")
SCORE = ("reinforce", "rloo", "cispo")  # weight * advantage * log-prob
IMITATION = ("sft", "expert_iteration")
PREFERENCE = ("dpo", "kto")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
MAX_LOG_RATIO = 20.0  # e^20 is far past any clip; keeps float32 finite

# What each name means, where it departs from the defaults of `Objective`.
PRESETS = {
  "grpo": {},
  "ppo": {"dual_clip": 3.0},
  "dr_grpo": {"advantage": "group_mean", "normalisation": "fixed"},
  "dapo": {"clip_high": 0.28, "dynamic_sampling": True},
  "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "normalisation": "sequence"},
  "cispo": {"clip_low": 1.0, "clip_high": 4.0},
  "reinforce": {"advantage": "none"},
  "rloo": {"advantage": "leave_one_out"},
  "sft": {"advantage": "none"},
  "expert_iteration": {"advantage": "none"},
  "dpo": {"advantage": "none"},
  "kto": {"advantage": "none"},
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is optimised. Frozen and hashable: a static argument of the jitted update.

  Prefer `make(name, **overrides)`, which starts from the method's own settings.
  """

  name: str = "grpo"
  clip_low: float = 0.2  # ratios are clipped to [1 - clip_low, 1 + clip_high]
  clip_high: float = 0.2
  dual_clip: float = 0.0  # 0: off; else > 1, bounds the loss where the advantage is negative
  normalisation: str = "token"  # token | sequence (mean of each reply) | fixed
  fixed_length: int = 256  # the constant of normalisation="fixed", in tokens
  kl: str = "none"  # to the reference: none | k2 | k3 (in the loss) | k1_reward
  kl_coef: float = 0.0
  entropy_coef: float = 0.0
  advantage: str = "group"  # see advantages.py
  std_epsilon: float = 1e-4
  ddof: int = 1
  dynamic_sampling: bool = False  # leave out groups whose ratings are all equal
  overlong_start: int = 0  # tokens; see advantages.rewards
  overlong_end: int = 0  # 0: no over-long penalty
  overlong_penalty: float = 1.0  # in rating points
  is_correction: str = "none"  # see `importance_weights`
  is_cap: float = 2.0
  max_staleness: int = -1  # leave out replies older than this many updates; -1: keep all
  beta: float = 0.1  # DPO, KTO: strength of the pull to the reference
  threshold: float = 5.5  # KTO: a rating above it is desirable, else undesirable
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  kto_anchor: bool = False  # the last slot of a group is a reply to another prompt

  def __post_init__(self):
    _one_of("name", self.name, PRESETS)
    _one_of("normalisation", self.normalisation, ("token", "sequence", "fixed"))
    _one_of("advantage", self.advantage, advantages_lib.KINDS)
    _one_of("is_correction", self.is_correction, CORRECTIONS)
    if self.kl == "k1":
      raise UserError(
        "objective.kl='k1': as a loss term k1 has zero expected gradient on-policy, it would "
        "restrain nothing; use 'k2' or 'k3' in the loss, or 'k1_reward'"
      )
    _one_of("kl", self.kl, ("none", "k1_reward", "k2", "k3"))
    rules = (
      ("clip_low", 0.0 <= self.clip_low <= 1.0, "must lie in [0, 1]"),
      ("clip_high", self.clip_high >= 0.0, "must not be negative"),
      ("dual_clip", self.dual_clip == 0.0 or self.dual_clip > 1.0, "must be 0 (off) or > 1"),
      ("fixed_length", self.fixed_length >= 1, "must be at least 1 token"),
      ("kl_coef", self.kl_coef >= 0.0, "must not be negative"),
      ("is_cap", self.is_cap > 0.0, "must be positive"),
      ("std_epsilon", self.std_epsilon > 0.0, "must be positive: a group may have std 0"),
      ("ddof", self.ddof in (0, 1), "must be 0 or 1"),
      ("beta", self.beta > 0.0, "must be positive"),
      (
        "overlong_start",
        not self.overlong_end or 0 <= self.overlong_start < self.overlong_end,
        "must lie below overlong_end",
      ),
      (
        "is_correction",
        self.is_correction == "none" or self.name in CLIPPED[:4] + SCORE[:2],
        f"does not apply to {self.name}: it has its own weights or needs none",
      ),
      (
        "kl",
        self.kl == "none" or self.name in CLIPPED + SCORE,
        f"does not apply to {self.name}, which has no reward or its own reference term",
      ),
    )
    for field, ok, message in rules:
      if not ok:
        raise UserError(f"objective.{field}={getattr(self, field)!r} {message}")


def make(name: str = "grpo", **overrides) -> Objective:
  """The method `name` with its usual settings, changed by `overrides`."""
  _one_of("name", name, PRESETS)
  fields = [field.name for field in dataclasses.fields(Objective)]
  for field in overrides:
    _one_of("field", field, fields)
  return Objective(**{"name": name, **PRESETS[name], **overrides})


def needs_behaviour(settings: Objective, epochs: int = 1) -> bool:
  """Whether the log-probs of the policy that wrote the replies enter the result.

  Several epochs over one batch always need them, except where no reward is involved;
  `data.recorded.load` refuses records that lack them.
  """
  if settings.name in IMITATION + PREFERENCE:
    return False
  is_ratio = settings.name in CLIPPED + ("cispo",) or settings.is_correction != "none"
  return is_ratio or settings.kl == "k1_reward" or epochs > 1


def needs_reference(settings: Objective) -> bool:
  """Whether `reference_logprobs` must be computed."""
  return settings.name in PREFERENCE or (settings.kl != "none" and settings.kl_coef > 0.0)


def active(batch: Batch, settings: Objective) -> Array:
  """[P, G] bool: the replies that are learned from. All others are as if absent."""
  keep = batch.lengths > 0
  has_verdict = ~jnp.isnan(batch.ratings)
  if settings.name == "sft":
    return keep
  if settings.name == "expert_iteration":  # the best of each group, the first of equals
    score = jnp.where(keep & has_verdict, batch.ratings, -jnp.inf)
    best = jnp.arange(score.shape[1]) == jnp.argmax(score, axis=1)[:, None]
    return best & keep & has_verdict
  if settings.name == "dpo":
    return jnp.broadcast_to(keep.all(axis=1, keepdims=True), keep.shape)
  if settings.max_staleness >= 0:
    keep &= batch.staleness <= settings.max_staleness
  if settings.name == "kto" and settings.kto_anchor:
    keep &= jnp.arange(keep.shape[1]) < keep.shape[1] - 1
  if settings.dynamic_sampling:
    keep &= advantages_lib.has_spread(jnp.where(keep, batch.ratings, jnp.nan))[:, None]
  return keep & has_verdict


def denominator(batch: Batch, settings: Objective) -> Array:
  """What the sum of `objective` over the *global* batch is divided by (at least 1)."""
  keep = active(batch, settings)
  if settings.name == "dpo":
    count = keep[:, 0].sum()
  elif settings.name == "kto" or settings.normalisation == "sequence":
    count = keep.sum()
  elif settings.normalisation == "fixed":
    count = keep.sum() * settings.fixed_length
  else:
    count = jnp.where(keep, batch.lengths, 0).sum()
  return jnp.maximum(count, 1).astype(jnp.result_type(float))


def objective(logprobs: Array, entropy: Array, batch: Batch, settings: Objective):
  """The loss of a (micro-)batch, as a sum.

  Args:
    logprobs: [P, G, T] log-probs of `batch.tokens` under the policy in training, at the
      sampling temperature; slots at and after `lengths` may hold any finite value.
    entropy: [P, G, T] entropy of the policy at each slot.
    batch: whole groups.
    settings: what to optimise.

  Returns:
    (loss_sum, metrics): a scalar to divide by `denominator` of the global batch, and
    {name: (sum, weight)}.
  """
  keep = active(batch, settings)
  mask = mask_from_lengths(batch.lengths, logprobs.shape[-1])
  logprobs = jnp.where(mask, logprobs, 0.0)
  kept = mask & keep[..., None]
  metrics = _common_metrics(jax.lax.stop_gradient(logprobs), entropy, batch, kept)
  if settings.name in PREFERENCE:
    reference = jnp.where(mask, batch.reference_logprobs, 0.0)
    log_odds = jnp.where(mask, logprobs - reference, 0.0).sum(-1)  # [P, G]
    losses, more = (_dpo if settings.name == "dpo" else _kto)(log_odds, batch, keep, settings)
    metrics |= more
    losses = losses - settings.entropy_coef * _per_reply(entropy, kept, batch.lengths)
    return jnp.where(keep, losses, 0.0).sum(), metrics
  if settings.name in IMITATION:
    losses = -logprobs
  else:
    losses, more = _policy_gradient(logprobs, batch, kept, settings)
    metrics |= more
  losses = losses - settings.entropy_coef * jnp.where(kept, entropy, 0.0)
  losses = jnp.where(kept, losses, 0.0)
  if settings.normalisation == "sequence":
    return _per_reply(losses, kept, batch.lengths).sum(), metrics
  return losses.sum(), metrics


def importance_weights(log_ratio: Array, mask: Array, settings: Objective) -> Array:
  """Weights that turn an average over the behaviour policy into one over the current one.

  Args:
    log_ratio: [P, G, T] log current - log behaviour, 0 outside `mask`.

  Returns:
    [P, G, T] without gradient. token_*: each token's own ratio; sequence_*: the product
    over the reply, the only one that is unbiased for the reply's reward. *_truncate:
    min(w, is_cap) (arXiv 1802.01561 and later TIS); *_mask: w where w <= is_cap, else 0.
    is_correction="none": ones.
  """
  if settings.is_correction == "none":
    return jnp.ones_like(log_ratio)
  log_weight = jax.lax.stop_gradient(log_ratio)
  if settings.is_correction.startswith("sequence"):
    log_weight = jnp.broadcast_to(
      jnp.where(mask, log_weight, 0.0).sum(-1, keepdims=True), log_weight.shape
    )
  log_cap = math.log(settings.is_cap)
  beyond = 0.0 if settings.is_correction.endswith("mask") else settings.is_cap
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


def _policy_gradient(logprobs, batch, kept, settings):
  """Losses [P, G, T] of the methods that have advantages, KL term included."""
  advantage = batch.advantages[..., None]
  constant = jax.lax.stop_gradient(logprobs)
  behaviour = jnp.where(kept, batch.behaviour_logprobs, constant)
  # REINFORCE takes the replies as its own: without a correction no ratio enters.
  if settings.name in ("reinforce", "rloo") and settings.is_correction == "none":
    behaviour = constant
  log_ratio = jnp.where(kept, jnp.clip(logprobs - behaviour, -MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0)
  weights = importance_weights(log_ratio, kept, settings)
  metrics = {}
  if settings.is_correction != "none" or settings.name in ("reinforce", "rloo"):
    # Corrected methods take the weighted score-function gradient: the cap bounds the step,
    # a clip of the same ratio on top would only throw gradient away.
    losses = -weights * advantage * logprobs
  elif settings.name == "cispo":  # arXiv 2506.13585: clipped weight, no clipped gradient
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    metrics["clip_fraction"] = _mean(clipped != ratio, kept)
    losses = -clipped * advantage * logprobs
  else:
    if settings.name == "gspo":  # arXiv 2507.18071: length-normalised ratio of the reply
      log_ratio = jnp.broadcast_to(
        _per_reply(log_ratio, kept, batch.lengths)[..., None], log_ratio.shape
      )
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    losses = -jnp.minimum(ratio * advantage, clipped * advantage)
    metrics["clip_fraction"] = _mean((ratio * advantage > clipped * advantage), kept)
    if settings.dual_clip:  # arXiv 1912.09729
      bound = -settings.dual_clip * advantage
      losses = jnp.where(advantage < 0, jnp.minimum(losses, bound), losses)
  if settings.is_correction != "none":
    metrics["is_weight"] = _mean(weights, kept)
    is_cut = weights == 0.0 if "mask" in settings.is_correction else weights >= settings.is_cap
    metrics["is_cap_fraction"] = _mean(is_cut, kept)
  if settings.kl in ("k2", "k3") and settings.kl_coef:
    reference = jnp.where(kept, batch.reference_logprobs, constant)
    losses = losses + settings.kl_coef * weights * kl_estimate(logprobs, reference, settings.kl)
  return losses, metrics


def _dpo(log_odds, batch, keep, settings):
  """arXiv 2305.18290, slot 0 chosen, slot 1 rejected; the pair's loss stands in slot 0."""
  margin = settings.beta * (log_odds[:, 0] - log_odds[:, 1])
  loss = -jax.nn.log_sigmoid(margin)
  pair = keep[:, 0]
  metrics = {"margin": _mean(margin, pair), "accuracy": _mean(margin > 0, pair)}
  return jnp.stack([loss, jnp.zeros_like(loss)], axis=1), metrics


def _kto(log_odds, batch, keep, settings):
  """arXiv 2402.01306: 1 - sigmoid(+-(beta log odds - z0)), z0 without gradient.

  The paper's z0 is a mean over the micro-batch, which makes the loss depend on how it is cut.
  Ours belongs to the group: 0 by default (the variant known as APO-zero, arXiv 2408.06266),
  or with kto_anchor max(0, log odds of a reply to another prompt) from the last slot.
  """
  anchor = jnp.zeros_like(log_odds[:, :1])
  if settings.kto_anchor:
    anchor = jnp.maximum(jax.lax.stop_gradient(log_odds[:, -1:]), 0.0)
  desirable = batch.ratings > settings.threshold
  value = settings.beta * (log_odds - anchor)
  losses = jnp.where(
    desirable,
    settings.desirable_weight * jax.nn.sigmoid(-value),
    settings.undesirable_weight * jax.nn.sigmoid(value),
  )
  correct = desirable == (value > 0)
  return losses, {"desirable": _mean(desirable, keep), "accuracy": _mean(correct, keep)}


def _common_metrics(logprobs, entropy, batch, kept):
  """What every method reports; `logprobs` without gradient, 0 outside the replies."""
  known = kept & ~jnp.isnan(batch.behaviour_logprobs)
  diff = jnp.where(known, logprobs - batch.behaviour_logprobs, 0.0)
  ratio = jnp.exp(jnp.clip(diff, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  replies = kept.any(-1)
  judged = (~jnp.isnan(batch.ratings) & (batch.lengths > 0)).any(axis=1)
  metrics = {
    "ratio": _mean(ratio, known),
    "ratio_deviation": _mean(jnp.abs(ratio - 1.0), known),
    "ratio_deviation_max": (jnp.abs(ratio - 1.0).max(), jnp.ones(())),
    "logprob_diff_max": (jnp.abs(diff).max(), jnp.ones(())),
    "kl": _mean(ratio - 1.0 - diff, known),  # KL(behaviour, current), k3
    "logprob": _mean(logprobs, kept),
    "entropy": _mean(jax.lax.stop_gradient(entropy), kept),
    "frac_zero_std": _mean(~advantages_lib.has_spread(batch.ratings), judged),
    "staleness": _mean(batch.staleness, replies),
  }
  if batch.reference_logprobs is not None:
    to_reference = jnp.where(kept, logprobs - batch.reference_logprobs, 0.0)
    metrics["kl_reference"] = _mean(to_reference, kept)  # k1: exact in expectation
  return metrics


def finish_metrics(metrics: dict) -> dict:
  """(sum, weight) -> sum / weight, NaN where nothing was counted; `_max` stays as it is."""
  return {
    name: total
    if name.endswith("_max")
    else jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), jnp.nan)
    for name, (total, weight) in metrics.items()
  }


def _per_reply(values, kept, lengths):
  """[P, G, T] -> [P, G]: mean over each reply's tokens, 0 for an empty one."""
  return jnp.where(kept, values, 0.0).sum(-1) / jnp.maximum(lengths, 1)


def _mean(values, mask):
  """The (sum, weight) pair of a masked mean."""
  dtype = jnp.result_type(float)
  return jnp.where(mask, values, 0).sum().astype(dtype), mask.sum().astype(dtype)


def _one_of(field, value, allowed):
  if value not in allowed:
    close = difflib.get_close_matches(str(value), list(allowed), 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"objective.{field}={value!r} is unknown; {hint}known: {', '.join(allowed)}")
