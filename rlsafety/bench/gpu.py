"""The comparisons that choose the GPU defaults: `python -m rlsafety.bench --suite=gpu`.

Random weights of Qwen2.5-7B and Qwen1.5-7B shape (grouped and plain heads), bfloat16, on
one 80 GB GPU within 8 minutes; --model and the shape flags make it small enough for tests.
Each choice is measured against the same baseline, one change at a time:
  decode   cache in the scan's carry | layers on a list | adapter merged | int8 base | int8 cache
  learner  einsum | cuDNN attention for the prompt segment
and the whole step stands beside transformers + PEFT at the same shapes, where torch is there.
"""

import functools
import time

import jax

from rlsafety import sampler
from rlsafety.bench import ceilings
from rlsafety.models import int8, lora

MODELS = ("qwen2.5-7b-instruct", "qwen1.5-7b-chat")
SECONDS = 450  # no new row is begun after this: the suite promises 8 minutes


def suite(f, peak: float, bandwidth: float) -> list[dict]:
  """Rows as `bench.__main__` prints them. f.model = "" measures both MODELS."""
  from rlsafety.bench.__main__ import core_suite, setup

  began, rows = time.monotonic(), []
  for name in [f.model] if f.model else MODELS:
    with f.unlocked():
      f.model = name
    config, params, adapter, _ = setup(f)
    for count in (f.rows_few, f.rows_many):
      rows += decode_rows(f, name, count, config, params, adapter, bandwidth, peak)
    del params
    for attention in ("einsum", "cudnn"):
      if attention == "cudnn" and jax.default_backend() != "gpu":
        continue
      with f.unlocked():
        f.attention = attention
      if time.monotonic() - began > SECONDS:
        break
      for row in core_suite(f, peak, bandwidth):
        rows.append({**row, "name": f"{name} {attention} {row['name']}"})
    if time.monotonic() - began < SECONDS:
      rows += peer_rows(f, name)
  return rows


def decode_rows(f, name, count, config, params, adapter, bandwidth, peak) -> list[dict]:
  """One decode step per variant, from the difference of a long and a short sampling call."""
  from rlsafety.bench.__main__ import random_prompts

  P, S, G, T = max(1, count // f.group), f.prompt_tokens, f.group, f.decode_tokens
  prompts = random_prompts(config, P, S)
  dense = ceilings.weight_bytes(config, f.dtype)
  small = ceilings.weight_bytes(config, "int8") + config.vocab_size * config.d_model * 2
  per_token = ceilings.cache_bytes_per_token(config, f.dtype)
  flops = ceilings.forward_flops(config, P * G * T, S + T / 2)
  variants = {
    "carry": (lambda p, a: (p, a), dense, {}),
    "list": (lambda p, a: (p, a), dense, {"unroll": True}),
    "merged": (lambda p, a: (lora.merged(p, a), None), dense, {}),
    "int8 base": (lambda p, a: (int8.quantise_base(p), a), small, {}),
    "int8 cache": (lambda p, a: (p, a), dense, {"cache": "int8"}),
  }
  rows = []
  for variant, (prepare, weights, settings) in variants.items():
    label = f"{name} decode {P * G} rows, {variant}"
    try:
      base, own = jax.jit(prepare)(params, adapter)
      seconds = []
      for tokens in (T, 2 * T):
        draw = sampler.SamplerSettings(group=G, max_tokens=tokens, **settings)
        run = functools.partial(sampler.sample_jit, config=config, settings=draw)
        seconds.append(
          ceilings.median_seconds(
            lambda run=run, base=base, own=own: run(
              base, own, prompts=prompts, key=jax.random.key(2)
            ),
            repeats=f.repeats,
          )
        )
    except Exception as error:  # noqa: BLE001  out of memory: the other variants still count
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      rows.append({"name": f"{label}: out of memory", "value": float("nan")})
      continue
    width = 0.5 if settings.get("cache") else 1.0
    moved = T * (weights + P * (S + G * 1.5 * T) * per_token * width)
    rows.append(
      {
        "name": label,
        "seconds": max(seconds[1] - seconds[0], 1e-9),
        "tokens": P * G * T,
        "floor_seconds": max(moved / bandwidth, flops / peak),
      }
    )
  return rows


def peer_rows(f, name: str) -> list[dict]:
  """transformers generating and PEFT training the same shapes, where torch and peft are."""
  try:
    import peft
    import torch
    import transformers
  except ImportError as error:
    print(f"transformers + PEFT not measured: {error}")
    return []
  from rlsafety.models import families, presets

  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, f.dtype)
  config = presets.preset(name)
  hf = families.hf_config(config)
  P, S, G, T = f.prompts, f.prompt_tokens, f.group, f.completion_tokens
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**hf), dtype=dtype
    )
  settings = peft.LoraConfig(
    r=f.rank, lora_alpha=32, use_rslora=True, target_modules="all-linear", lora_dropout=0.0
  )
  model = peft.get_peft_model(model, settings)
  model.enable_input_require_grads()
  model.gradient_checkpointing_enable()
  tokens = torch.randint(3, config.vocab_size, (P * G, S), device=device)
  sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)

  def timed(fn):
    fn()
    sync()
    began = time.perf_counter()
    fn()
    sync()
    return time.perf_counter() - began

  def generate():
    with torch.no_grad():
      model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, pad_token_id=0,
        min_new_tokens=T, max_new_tokens=T, use_cache=True,
      )  # fmt: skip

  def train():
    rows = max(1, P * G // max(1, f.peer_microbatches))
    whole = torch.randint(3, config.vocab_size, (P * G, S + T), device=device)
    for piece in whole.split(rows):
      logits = model(piece, logits_to_keep=T + 1).logits[:, :-1]
      picked = torch.log_softmax(logits.float(), -1).gather(-1, piece[:, S:, None])
      (-picked.mean()).backward()
    model.zero_grad()

  out = []
  for label, fn in (("generate", generate), ("train", train)):
    try:
      model.eval() if label == "generate" else model.train()
      seconds = timed(fn)
      row = {"seconds": seconds, "tokens": P * G * T, "floor_seconds": float("nan")}
    except torch.OutOfMemoryError:
      row = {"value": float("nan")}
      label += ": out of memory"
    out.append({"name": f"{name} transformers + PEFT {label}", **row})
  return out
