"""The comparisons that choose the GPU defaults: `python -m rlsafety.tools.speed --suite=gpu`.

Random weights of Qwen2.5-7B and Qwen1.5-7B shape (grouped and plain heads), bfloat16, on
one 80 GB GPU within 8 minutes; --model and the shape flags make it small enough for tests.
Each choice is measured against the same baseline, one change at a time:
  decode   as a run does it | adapter merged | int8 base | int8 cache
  learner  einsum | cuDNN attention for the prompt segment
and the whole step stands beside transformers + PEFT at the same shapes, where torch is there.
Rows come as they are measured; one that runs out of memory or time says so. What was compiled
stays in JAX's compilation cache, so that a second start reaches what a first one left out.
"""

import functools
import math
import time
from collections.abc import Iterator

import jax

from rlsafety import sampler
from rlsafety.config import Sampler
from rlsafety.models import int8, lora, transformer
from rlsafety.tools.speed import ceilings, core, peers

MODELS = ("qwen2.5-7b-instruct", "qwen1.5-7b-chat")
SECONDS = 465  # of the 8 minutes; the rest is for what was begun
PEER_SECONDS = 75


def names(f) -> tuple[str, ...]:
  return (f.model,) if f.model else MODELS


def peer_rows(f) -> Iterator[dict]:
  """Before anything of JAX's touches the GPU: it takes most of its memory at once."""
  for name in names(f):
    yield from peers.measure(f, name, PEER_SECONDS)


def rows(f, peak: float, bandwidth: float, seconds: float = SECONDS) -> Iterator[dict]:
  """Rows as `bench.__main__` prints them; seconds: what is left of the suite's time."""
  began = last = time.monotonic()
  longest = 0.0
  for name in names(f):
    for label, piece in pieces(f, name, peak, bandwidth):
      while True:
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        if now - began + longest > seconds:  # another row as long would end too late
          yield {"name": f"{label}: time is up, start it again for the rest", "value": math.nan}
          return
        try:
          row = next(piece, None)
        except Exception as error:  # noqa: BLE001  the other rows still count
          if "RESOURCE_EXHAUSTED" not in str(error):
            raise
          row = None
          yield {"name": f"{label}: out of memory", "value": math.nan}
        if row is None:
          break
        yield {**row, "name": f"{label}{row['name']}"}


def pieces(f, name, peak, bandwidth) -> Iterator[tuple[str, Iterator[dict]]]:
  """(label, rows) of one model, whose weights are gone when this has ended."""
  config, params, adapter, prompts = core.setup(f, name)
  for count in (f.rows_few, f.rows_many):
    for variant in VARIANTS:
      label = f"{name} decode {max(1, count // f.group) * f.group} rows, {variant}"
      yield label, decode(f, count, variant, config, params, adapter, peak, bandwidth)
  attentions = ("einsum", "cudnn") if jax.default_backend() == "gpu" else ("einsum",)
  measured = core.rows(f, config, params, adapter, prompts, peak, bandwidth, attentions)
  yield f"{name} ", measured


# name -> (what the sampler reads, fields of SamplerSettings)
VARIANTS = {
  "plain": (lambda p, a: (p, a), {}),
  "merged": (lambda p, a: (lora.merged(p, a), None), {}),
  "int8 base": (lambda p, a: (int8.quantise_base(p), a), {}),
  "int8 cache": (lambda p, a: (p, a), {"cache": "int8"}),
}


def decode(f, count, variant, config, params, adapter, peak, bandwidth) -> Iterator[dict]:
  """One row: decode_tokens steps of `count` replies, a sampling call less its prefill."""
  prepare, fields = VARIANTS[variant]
  S, G, T = f.prompt_tokens, f.group, f.decode_tokens
  P = max(1, count // G)
  prompts = core.random_prompts(config, P, S)
  base, own = jax.jit(prepare)(params, adapter)
  prefill = jax.jit(functools.partial(transformer.prefill, c=config))
  begin = lambda: prefill(base, own, prompts=prompts)  # noqa: E731
  prefill_s = ceilings.median_seconds(begin, repeats=f.repeats)
  settings = Sampler(group=G, max_tokens=T, **fields)
  keys = jax.random.split(jax.random.key(2), P)
  sample = sampler.sample_jit.lower(base, own, config, prompts, keys, settings).compile()
  sample_s = ceilings.median_seconds(lambda: sample(base, own, prompts, keys), repeats=f.repeats)
  weights = ceilings.weight_bytes(config, f.dtype)
  if variant == "int8 base":  # the output matrix stays as it is
    weights = ceilings.weight_bytes(config, "int8") + config.vocab_size * config.d_model
  width = 0.5 if fields.get("cache") else 1.0
  per_token = ceilings.cache_bytes_per_token(config, f.dtype) * width
  moved = T * (weights + P * (S + G * T / 2) * per_token)
  flops = ceilings.forward_flops(config, P * G * T, S + T / 2)
  yield {
    "name": "",
    "seconds": max(sample_s - prefill_s, 1e-9),
    "tokens": P * G * T,
    "flops": flops,
    "floor_seconds": max(moved / bandwidth, flops / peak),
    "bytes": ceilings.program_bytes(sample),
  }
