"""What training cells together saves: one step of 1, 4, 8 ... cells, in turns on one machine.

Sampling is one batch of all cells' prompts, as `rollout.roll_out` makes it; updates follow one by
one. Replies have full length; judges, which are not shared work, are left out.
"""

import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import learner, sampler, sharding
from rlsafety.config import Learner, Objective, Optimizer, Sampler
from rlsafety.models import lora
from rlsafety.tools.speed import core


def rows(f, config, params, adapter, counts: Sequence[int]) -> Iterator[dict]:
  """A row {name, cells, sample_s, update_s, seconds, tokens} for every number of cells: medians of
  f.repeats rounds, in each of which every number has its turn. Seconds are those of one cell."""
  P, settings = f.prompts, Sampler(group=f.group, max_tokens=f.completion_tokens)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  learning = Learner(microbatches=f.microbatches, chunk_tokens=f.chunk_tokens, remat=f.remat)
  optimizer = learner.make_optimizer(Optimizer(learning_rate=1e-5, warmup_steps=0))
  objective, prompts = Objective(), core.random_prompts(config, P, f.prompt_tokens)
  update = jax.jit(functools.partial(
    learner.update, config=config, objective=objective, settings=learning, optimizer=optimizer
  ))  # fmt: skip

  def sample(n: int):
    own, many = adapter, jax.tree.map(lambda x: jnp.tile(x, (n, *[1] * (x.ndim - 1))), prompts)
    if n > 1:
      own = lora.side_by_side((adapter,) * n, (P,) * n)
    keys = jax.random.split(jax.random.key(2), n * P)
    return sampler.sample_all(params, own, config, many, keys, settings, (), mesh, f.cache_gib)

  state = learner.init_state(adapter, optimizer)
  batch = core.batch_of(prompts, sample(1), objective)
  learn = lambda n: [update(state, params, batch, jax.random.key(4))[1] for _ in range(n)]  # noqa: E731
  jax.block_until_ready([learn(1), *map(sample, counts)])  # compiled
  seconds = {n: ([], []) for n in counts}
  for n in list(counts) * f.repeats:
    for part, work in zip(seconds[n], (sample, learn), strict=True):
      began = time.perf_counter()
      jax.block_until_ready(work(n))
      part.append((time.perf_counter() - began) / n)
  for n in counts:
    sample_s, update_s = (float(np.median(part)) for part in seconds[n])
    tokens = P * f.group * f.completion_tokens
    yield {"name": f"{n} cells together, one of them", "cells": n, "sample_s": sample_s,
           "update_s": update_s, "seconds": sample_s + update_s, "tokens": tokens}  # fmt: skip


def table(found: Sequence[dict]) -> str:
  """Seconds of one cell by the number of cells, and what sharing saves of the first row's."""
  names = ("sample s", "update s", "whole s")
  lines = [f"{'cells':>5}" + "".join(f"{n:>10}" for n in names) + f"{'saved':>8}   (of one cell)"]
  for row in found:
    parts = "".join(f"{row[key]:10.2f}" for key in ("sample_s", "update_s", "seconds"))
    lines.append(f"{row['cells']:5}{parts}{1 - row['seconds'] / found[0]['seconds']:8.0%}")
  return "\n".join(lines)
