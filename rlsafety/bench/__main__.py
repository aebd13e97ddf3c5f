"""Speed and memory on this machine: `python -m rlsafety.bench [--flag=value ...]`.

Times the real sampler and the real update at the given shapes, prints each beside the
floor that the machine's own measured ceilings allow, and writes JSON.
"""

import functools
import json
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import advantages, learner, losses, rundir, sampler
from rlsafety.bench import ceilings
from rlsafety.config import ConfigDict, set_field
from rlsafety.errors import UserError, run_main
from rlsafety.models import lora, presets, transformer
from rlsafety.types import Batch, Prompts

DEFAULTS = {
  "suite": "core",  # core; gpu adds the comparisons that choose the GPU defaults
  "model": "smollm2-135m-instruct",  # shapes from models.presets, random weights
  "dtype": "float32",  # of the base
  "prompts": 4,  # P
  "prompt_tokens": 128,  # S
  "group": 4,  # G
  "completion_tokens": 48,  # T
  "microbatches": 1,
  "chunk_tokens": 2048,
  "remat": "full",
  "attention": "einsum",  # of the prompt segment: einsum | cudnn
  "rank": 8,  # LoRA R
  "repeats": 3,  # timed calls, the median counts
  "rows_few": 64,  # suite=gpu: replies decoded together
  "rows_many": 512,
  "decode_tokens": 32,  # suite=gpu: decode steps that are timed
  "peer_microbatches": 64,  # suite=gpu: pieces of the batch for transformers + PEFT
  "out": "",  # JSON file
}


# What --suite=gpu changes: the study's step at 7B, on one 80 GB GPU.
GPU_DEFAULTS = {
  "model": "",
  "dtype": "bfloat16",
  "prompts": 64,
  "prompt_tokens": 512,
  "group": 8,
  "completion_tokens": 256,
  "microbatches": 32,
  "repeats": 1,
}


def read_flags(argv: list[str]) -> ConfigDict:
  flags = ConfigDict(DEFAULTS)
  if "--suite=gpu" in argv:
    flags.update(GPU_DEFAULTS)
  for argument in argv[1:]:
    if argument in ("-h", "--help"):
      print(__doc__, *(f"  --{k}={v}" for k, v in DEFAULTS.items()), sep="\n")
      sys.exit(0)
    name, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
      raise UserError(f"argument {argument!r}: flags look like --group=8 (--help lists them)")
    set_field(flags, name, value)
  return flags


def setup(f: ConfigDict):
  """Random weights, adapter and prompts of the flags' shapes."""
  config = presets.preset(f.model)
  dtype = jnp.dtype(f.dtype)
  params = jax.jit(functools.partial(transformer.init_params, config, dtype=dtype))(
    jax.random.key(0)
  )
  settings = lora.LoraConfig(rank=f.rank)
  layers = transformer.weights(config)["layers"]
  adapter = lora.init_adapter(layers, settings, jax.random.key(1))
  return config, params, adapter, random_prompts(config, f.prompts, f.prompt_tokens)


def random_prompts(config, P: int, S: int) -> Prompts:
  tokens = np.random.default_rng(0).integers(3, config.vocab_size, (P, S))
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full((P,), S, jnp.int32))


def core_suite(f: ConfigDict, peak: float, bandwidth: float) -> list[dict]:
  """Rows {name, seconds, tokens, floor_seconds}: prefill, decode, update, whole step."""
  config, params, adapter, prompts = setup(f)
  P, S, G, T = f.prompts, f.prompt_tokens, f.group, f.completion_tokens
  floor = lambda flops, moved: max(flops / peak, moved / bandwidth)  # noqa: E731
  weights = ceilings.weight_bytes(config, f.dtype)
  per_token = ceilings.cache_bytes_per_token(config, f.dtype)

  prefill = jax.jit(functools.partial(transformer.prefill, c=config, attention=f.attention))
  prefill_s = ceilings.median_seconds(
    lambda: prefill(params, adapter, prompts=prompts), repeats=f.repeats
  )
  prefill_flops = ceilings.body_flops(config, P * S, S / 2)

  draw = sampler.SamplerSettings(group=G, max_tokens=T)
  sample = functools.partial(sampler.sample_jit, config=config, settings=draw)
  sample_s = ceilings.median_seconds(
    lambda: sample(params, adapter, prompts=prompts, key=jax.random.key(2)), repeats=f.repeats
  )
  decode_s = max(sample_s - prefill_s, 1e-9)
  decode_flops = ceilings.forward_flops(config, P * G * T, S + T / 2)
  decode_bytes = T * (weights + P * (S + G * T / 2) * per_token)

  rollouts = sample(params, adapter, prompts=prompts, key=jax.random.key(2))
  objective = losses.make("grpo")
  ratings = jax.random.uniform(jax.random.key(3), (P, G), minval=1.0, maxval=10.0)
  batch = Batch(
    prompts=prompts,
    tokens=rollouts.tokens,
    lengths=rollouts.lengths,
    advantages=advantages.advantages(ratings, objective),
    ratings=ratings,
    behaviour_logprobs=rollouts.logprobs,
    reference_logprobs=None,
    staleness=jnp.zeros((P, G), jnp.int32),
  )
  optimizer = learner.make_optimizer(1e-5)
  settings = learner.LearnerSettings(
    objective,
    microbatches=f.microbatches,
    chunk_tokens=f.chunk_tokens,
    remat=f.remat,
    attention=f.attention,
  )
  update = jax.jit(
    functools.partial(learner.update, config=config, settings=settings, optimizer=optimizer)
  )
  state = learner.init_state(adapter, optimizer)
  update_s = ceilings.median_seconds(
    lambda: update(state, params, batch, jax.random.key(4)), repeats=f.repeats
  )
  diff = float(update(state, params, batch, jax.random.key(4))[1]["logprob_diff_max"])
  passes = 2 if f.remat == "none" else 3  # forward, (again), gradient of activations only
  update_flops = passes * (
    ceilings.body_flops(config, P * S, S / 2) + ceilings.forward_flops(config, P * G * T, S + T / 2)
  )
  rows = [
    ("prefill", prefill_s, P * S, floor(prefill_flops, weights)),
    ("decode", decode_s, P * G * T, floor(decode_flops, decode_bytes)),
    ("learner update", update_s, P * (S + G * T), floor(update_flops, 3 * weights)),
  ]
  rows.append(("whole step", sample_s + update_s, P * G * T, sum(r[3] for r in rows)))
  names = ("name", "seconds", "tokens", "floor_seconds")
  out = [dict(zip(names, row, strict=True)) for row in rows]
  return out + [{"name": "sampler-learner log-prob difference", "value": diff}]


def peak_memory() -> float:
  """Bytes: the device's own count where it keeps one, else the process's peak."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return float(stats["peak_bytes_in_use"])
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main(argv: list[str]) -> None:
  f = read_flags(argv)
  if f.suite not in ("core", "gpu"):
    raise UserError(f"--suite={f.suite}: choose core or gpu")
  about = rundir.environment()
  print(f"{about['device']}, jax {about['versions']['jax']}; {dict(f.items())}", flush=True)
  peak, bandwidth = ceilings.matmul_rate(f.dtype), ceilings.memory_bandwidth()
  print(f"ceilings: {peak / 1e9:.0f} GFLOP/s in {f.dtype}, {bandwidth / 1e9:.1f} GB/s", flush=True)
  if f.suite == "gpu":
    from rlsafety.bench import gpu

    rows = gpu.suite(f, peak, bandwidth)
  else:
    rows = core_suite(f, peak, bandwidth)
  print(f"{'':38}{'seconds':>10}{'tokens/s':>12}{'floor s':>10}{'share':>8}")
  for row in rows:
    if "seconds" in row:
      row["tokens_per_second"] = row["tokens"] / row["seconds"]
      row["share_of_ceiling"] = row["floor_seconds"] / row["seconds"]
      print(
        f"{row['name']:38}{row['seconds']:10.3f}{row['tokens_per_second']:12.0f}"
        f"{row['floor_seconds']:10.3f}{row['share_of_ceiling']:8.2f}"
      )
    else:
      print(f"{row['name']:38}{row['value']:10.2e}")
  print(f"{'peak memory':38}{peak_memory() / 2**20:10.0f} MiB")
  result = {"flags": dict(f.items()), **about, "matmul_flops": peak, "bandwidth": bandwidth}
  result |= {"peak_memory_bytes": peak_memory(), "rows": rows}
  if f.out:
    with open(f.out, "w") as file:
      file.write(json.dumps(rundir.plain(result), indent=2) + "\n")
    print(f"written to {f.out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
