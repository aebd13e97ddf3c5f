"""Ratings of a group of replies -> advantages; arrays in, arrays out.

NaN means "no verdict": such a reply takes no part in any statistic, its advantage is 0,
and its siblings get what they would get if it were absent.
"""

import jax.numpy as jnp

KINDS = ("group", "group_mean", "leave_one_out", "batch", "none")


def advantages(ratings, settings):
  """Baselines and scales ratings; no gradient flows, call it once on the whole batch.

  Args:
    ratings: [P, G] float, NaN = no verdict.
    settings: an `Objective`; reads `advantage`, `ddof` and `std_epsilon`.

  Returns:
    [P, G], by `settings.advantage`:
      group: (r - mean) / (std + eps) over the group; std divides by n - ddof
        (GRPO, arXiv 2402.03300, whose implementations differ in ddof; the study: 1).
      group_mean: r - mean (Dr. GRPO, arXiv 2503.20783).
      leave_one_out: r - mean of the siblings (RLOO, arXiv 2402.14740).
      batch: (r - mean) / (std + eps) over all of P and G.
      none: r.
    A group with one verdict gets 0 from every kind that has a group baseline.
  """
  valid = ~jnp.isnan(ratings)
  if settings.advantage == "none":
    return jnp.where(valid, ratings, 0.0)
  axes = (0, 1) if settings.advantage == "batch" else (1,)
  count = valid.sum(axes, keepdims=True)
  # Shifting by the smallest makes equal ratings exactly 0, not rounding noise / eps.
  lowest = jnp.min(jnp.where(valid, ratings, jnp.inf), axes, keepdims=True)
  shifted = jnp.where(valid, ratings - jnp.where(count > 0, lowest, 0.0), 0.0)
  mean = shifted.sum(axes, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(valid, shifted - mean, 0.0)
  if settings.advantage == "group_mean":
    return centred
  if settings.advantage == "leave_one_out":
    return centred * count / jnp.maximum(count - 1, 1)
  freedom = jnp.maximum(count - settings.ddof, 1)
  std = jnp.sqrt((centred**2).sum(axes, keepdims=True) / freedom)
  return centred / (std + settings.std_epsilon)


def rewards(ratings, settings, lengths, behaviour_logprobs=None, reference_logprobs=None):
  """Adds what is part of the reward and not of the loss; feed the result to `advantages`.

  Args:
    ratings: [P, G]; NaN stays NaN.
    settings: an `Objective`; reads `kl`, `kl_coef` and `overlong_*`.
    lengths: [P, G] int, tokens of each reply.
    behaviour_logprobs, reference_logprobs: [P, G, T], needed for kl="k1_reward".

  Returns:
    [P, G]: ratings - kl_coef * sum_t (log behaviour - log reference) - penalty, where the
    penalty grows in a line from 0 at overlong_start tokens to overlong_penalty at
    overlong_end and stays there (DAPO, arXiv 2503.14476, equation 13, in our tokens).
  """
  if settings.kl == "k1_reward" and settings.kl_coef:
    mask = jnp.arange(behaviour_logprobs.shape[-1]) < lengths[..., None]
    k1 = jnp.where(mask, behaviour_logprobs - reference_logprobs, 0.0).sum(-1)
    ratings = ratings - settings.kl_coef * k1
  if settings.overlong_end:
    span = max(settings.overlong_end - settings.overlong_start, 1)
    excess = jnp.clip((lengths - settings.overlong_start) / span, 0.0, 1.0)
    ratings = ratings - settings.overlong_penalty * excess
  return ratings


def has_spread(ratings):
  """[P, G] -> [P] bool: the group has two verdicts that differ, so it can teach something."""
  valid = ~jnp.isnan(ratings)
  high = jnp.max(jnp.where(valid, ratings, -jnp.inf), axis=1)
  low = jnp.min(jnp.where(valid, ratings, jnp.inf), axis=1)
  return high > low
