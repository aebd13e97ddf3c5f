"""The real sampler and the real update at given shapes, each beside its floor."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import learner, losses, sampler, sharding
from rlsafety.config import Learner, Lora, Objective, Optimizer, Sampler
from rlsafety.models import architecture, lora, presets, transformer
from rlsafety.tools.speed import ceilings
from rlsafety.types import Batch, Prompts, Rollouts


def setup(f, name: str):
  """Random weights of a preset, adapter and prompts of the flags' shapes."""
  config = presets.preset(name)
  init = functools.partial(architecture.init_params, config, dtype=jnp.dtype(f.dtype))
  params = jax.jit(init)(jax.random.key(0))
  adapter = lora.init_adapter(config, Lora(rank=f.rank), jax.random.key(1))
  return config, params, adapter, random_prompts(config, f.prompts, f.prompt_tokens)


def random_prompts(config, P: int, S: int) -> Prompts:
  tokens = np.random.default_rng(0).integers(3, config.vocab_size, (P, S))
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full((P,), S, jnp.int32))


def batch_of(prompts: Prompts, rollouts: Rollouts, objective: Objective) -> Batch:
  """Rollouts with random rewards, ready to be learned from."""
  P, G, _ = rollouts.tokens.shape
  rewards = jax.random.uniform(jax.random.key(3), (P, G), minval=1.0, maxval=10.0)
  return Batch(
    prompts=prompts,
    tokens=rollouts.tokens,
    lengths=rollouts.lengths,
    advantages=losses.advantages(rewards, objective),
    rewards=rewards,
    behaviour_logprobs=rollouts.logprobs,
    reference_logprobs=None,
    staleness=jnp.zeros((P, G), jnp.int32),
  )


def rows(f, config, params, adapter, prompts, peak, bandwidth, attentions) -> Iterator[dict]:
  """Rows {name, seconds, tokens, flops, floor_seconds, bytes}: prefill, decode, update, whole
  step; prefill and update under each of `attentions`, the rest under the first, which the
  sampler uses."""
  P, S, G, T = f.prompts, f.prompt_tokens, f.group, f.completion_tokens
  weights = ceilings.weight_bytes(config, f.dtype)
  per_token = ceilings.cache_bytes_per_token(config, f.dtype)

  parts = {}  # one row of each, for the whole step

  def row(part, attention, seconds, tokens, flops, moved, memory):
    name = f"{part}, {attention}" if attention and len(attentions) > 1 else part
    floor = max(flops / peak, moved / bandwidth)
    values = {"seconds": seconds, "tokens": tokens, "flops": flops, "floor_seconds": floor}
    parts.setdefault(part, values)
    return {"name": name, **values, "bytes": memory}

  prefill_s = []
  for attention in attentions:
    prefill = jax.jit(functools.partial(transformer.prefill, c=config, attention=attention))
    prefill = prefill.lower(params, adapter, prompts=prompts).compile()
    seconds = ceilings.median_seconds(
      lambda prefill=prefill: prefill(params, adapter, prompts=prompts), repeats=f.repeats
    )
    prefill_s.append(seconds)
    flops, memory = ceilings.body_flops(config, P * S, S / 2), ceilings.program_bytes(prefill)
    yield row("prefill", attention, seconds, P * S, flops, weights, memory)

  settings = Sampler(group=G, max_tokens=T)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  sample = functools.partial(
    sampler.sample_all, params, adapter, config, prompts, jax.random.split(jax.random.key(2), P),
    settings, (), mesh, f.cache_gib,
  )  # fmt: skip
  dtype = jnp.dtype(f.dtype)
  at_once = sampler.prompts_at_once(config, P, S, settings, mesh, dtype, f.cache_gib)
  sample_s = ceilings.median_seconds(sample, repeats=f.repeats)
  flops = ceilings.forward_flops(config, P * G * T, S + T / 2)
  moved = T * (P // at_once * weights + P * (S + G * T / 2) * per_token)
  kept = weights + at_once * (S + G * T) * per_token
  seconds = max(sample_s - prefill_s[0], 1e-9)
  name = "decode" if at_once == P else f"decode, {P // at_once} pieces"
  yield row(name, "", seconds, P * G * T, flops, moved, kept)

  objective = Objective()
  batch = batch_of(prompts, sample(), objective)
  optimizer = learner.make_optimizer(Optimizer(learning_rate=1e-5, warmup_steps=0))
  state = learner.init_state(adapter, optimizer)
  passes = 2 if f.remat == "none" else 3  # forward, (again), gradient of activations only
  flops = passes * (ceilings.body_flops(config, P * S, S / 2) + flops)
  update_s, differences = [], []
  for attention in attentions:
    learning = Learner(
      microbatches=f.microbatches,
      chunk_tokens=f.chunk_tokens,
      remat=f.remat,
      attention=attention,
    )
    update = functools.partial(
      learner.update, config=config, objective=objective, settings=learning, optimizer=optimizer
    )
    arguments = state, params, batch, jax.random.key(4)
    update = jax.jit(update).lower(*arguments).compile()
    seconds = ceilings.median_seconds(lambda u=update, a=arguments: u(*a), repeats=f.repeats)
    update_s.append(seconds)
    differences.append(float(update(*arguments)[1]["logprob_diff_max"]))
    memory = ceilings.program_bytes(update)
    tokens = P * (S + G * T)
    yield row("learner update", attention, seconds, tokens, flops, 3 * weights, memory)

  whole = {"name": "whole step", "seconds": sample_s + min(update_s), "tokens": P * G * T}
  sums = {k: sum(part[k] for part in parts.values()) for k in ("flops", "floor_seconds")}
  yield {**whole, **sums, "bytes": float("nan")}
  for attention, difference in zip(attentions, differences, strict=True):
    end = f", {attention}" if len(attentions) > 1 else ""
    yield {"name": f"sampler-learner log-prob difference{end}", "value": difference}
