"""Speed and memory on this machine: `python -m rlsafety.tools.speed [--flag=value ...]`.

Times the real sampler and the real update at the given shapes, prints each beside the
floor that the machine's own measured ceilings allow, and writes JSON. With --cells=1,4,8: one
step of as many cells that train together, and what sharing saves.
"""

import argparse
import math
import resource
import sys
import time

import jax

from rlsafety import files, flags, runtime
from rlsafety.errors import UserError, run_main
from rlsafety.rundir import write
from rlsafety.tools.speed import ceilings, cells, core, gpu

DEFAULTS = {
  "cells": "",  # 1,4,8: time these numbers of cells in place of the suite
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
  "decode_tokens": 64,  # suite=gpu: decode steps that are timed
  "peer_rows": 64,  # suite=gpu: replies that transformers + PEFT are timed on
  "cache_gib": 0.0,  # KV cache at once, as memory.cache_gib of a run
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
  "cache_gib": 36.0,
}


def read_flags(argv: list[str]) -> argparse.Namespace:
  """DEFAULTS, changed by the suite and by the flags."""
  parser = flags.parser(__doc__, "tools.speed")
  for name, default in DEFAULTS.items():
    parser.add_argument(f"--{name}", type=type(default), default=None, help=f"{default!r}")
  given = {k: v for k, v in vars(flags.parse(parser, argv)).items() if v is not None}
  suite = GPU_DEFAULTS if given.get("suite") == "gpu" else {}
  return argparse.Namespace(**{**DEFAULTS, **suite, **given})


def peak_memory() -> float:
  """Bytes: the device's own count where it keeps one, else the process's peak."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return float(stats["peak_bytes_in_use"])
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def show(row: dict) -> None:
  """Prints a row, with the rates that follow from it, which it keeps for the file."""
  if "seconds" not in row:
    print(f"{row['name']:46}{row['value']:10.2e}", flush=True)
    return
  row["tokens_per_second"] = row["tokens"] / row["seconds"]
  text = f"{row['name']:46}{row['seconds']:10.3f}{row['tokens_per_second']:11.0f}"
  if "flops" in row:
    row["flops_per_second"] = row["flops"] / row["seconds"]
    row["share_of_ceiling"] = row["floor_seconds"] / row["seconds"]
    text += f"{row['floor_seconds']:10.3f}{row['share_of_ceiling']:7.2f}"
    text += f"{row['flops_per_second'] / 1e12:10.3f}"
    if not math.isnan(row["bytes"]):
      text += f"{row['bytes'] / 2**30:8.2f}"
  print(text, flush=True)


def main(argv: list[str]) -> None:
  f = read_flags(argv)
  if f.suite not in ("core", "gpu"):
    raise UserError(f"--suite={f.suite}: choose core or gpu")
  counts = [int(n) if n.isdigit() else 0 for n in f.cells.split(",") if f.cells]
  if not all(counts):
    raise UserError(f"--cells={f.cells}: needs numbers of cells, such as 1,4,8")
  began, rows = time.monotonic(), []
  header = f"{'':46}{'seconds':>10}{'tokens/s':>11}{'floor s':>10}{'share':>7}{'TFLOP/s':>10}"
  header += f"{'GiB':>8}"
  result = {"flags": vars(f), "rows": rows}

  def measured(source) -> None:
    for row in source:
      show(row)
      rows.append(row)

  runtime.compilation_cache()
  try:
    if f.suite == "gpu":
      print(header, flush=True)
      measured(gpu.peer_rows(f))
    result |= write.provenance()
    print(f"{result['device']}, jax {result['versions']['jax']}; {result['flags']}", flush=True)
    if counts:
      config, params, adapter, _ = core.setup(f, f.model)
      rows += cells.rows(f, config, params, adapter, counts)
      print(cells.table(rows))
      return
    peak, bandwidth = ceilings.matmul_rate(f.dtype), ceilings.memory_bandwidth()
    print(f"ceilings: {peak / 1e9:.0f} GFLOP/s in {f.dtype}, {bandwidth / 1e9:.1f} GB/s")
    print(header, flush=True)
    result |= {"matmul_flops": peak, "bandwidth": bandwidth}
    if f.suite == "gpu":
      measured(gpu.rows(f, peak, bandwidth, gpu.SECONDS - (time.monotonic() - began)))
    else:
      measured(core.rows(f, *core.setup(f, f.model), peak, bandwidth, (f.attention,)))
    print(f"{'peak memory of the process or device':46}{peak_memory() / 2**20:10.0f} MiB")
    result["peak_memory_bytes"] = peak_memory()
  finally:  # what was measured is kept, whatever happened after it
    if f.out and rows:
      files.write_json(f.out, result)
      print(f"written to {f.out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
