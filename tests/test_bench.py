"""The benchmark programs run at tiny shapes and write what they measured; no time is judged."""

import json
import math

import pytest

from rlsafety.bench import __main__ as bench
from rlsafety.bench import ceilings
from rlsafety.errors import UserError
from rlsafety.models import presets

TINY = ["--model=tiny", "--prompts=2", "--prompt_tokens=16", "--group=2", "--completion_tokens=4"]
TINY += ["--microbatches=2", "--repeats=1", "--dtype=float32"]


def test_core_suite(tmp_path):
  bench.main(["bench", *TINY, f"--out={tmp_path / 'bench.json'}"])
  result = json.loads((tmp_path / "bench.json").read_text())
  rows = {row["name"]: row for row in result["rows"]}
  assert {"prefill", "decode", "learner update", "whole step"} <= rows.keys()
  for row in result["rows"][:-1]:
    assert row["seconds"] > 0 and row["floor_seconds"] > 0
  assert rows["sampler-learner log-prob difference"]["value"] < 1e-4
  assert result["peak_memory_bytes"] > 0 and result["matmul_flops"] > 0


def test_gpu_suite_at_tiny_shapes(tmp_path):
  pytest.importorskip("peft")
  flags = ["--suite=gpu", *TINY, "--rows_few=4", "--rows_many=8", "--decode_tokens=3"]
  bench.main(["bench", *flags, "--peer_microbatches=2", f"--out={tmp_path / 'gpu.json'}"])
  names = [row["name"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]]
  for part in ("4 rows, carry", "8 rows, list", "merged", "int8 base", "int8 cache"):
    assert any(part in name for name in names), (part, names)
  for part in ("einsum learner update", "PEFT generate", "PEFT train"):
    assert any(part in name for name in names), (part, names)


def test_counts_of_a_known_model():
  """SmolLM2-135M by hand: 134.5 M parameters, 4-byte cache of 30 x 2 x 3 x 64 numbers."""
  c = presets.preset("smollm2-135m-instruct")
  assert ceilings.weight_bytes(c, "float32") == 4 * 134_515_008
  assert ceilings.cache_bytes_per_token(c, "float32") == 30 * 2 * 3 * 64 * 4
  assert ceilings.matmul_params(c) == 134_515_008  # the tied embedding multiplies as the head
  assert math.isclose(
    ceilings.forward_flops(c, 10, 100) - ceilings.body_flops(c, 10, 100), 10 * 2 * 49152 * 576
  )


def test_mistyped_flag_suggests():
  with pytest.raises(UserError, match="prompt_tokens"):
    bench.read_flags(["bench", "--prompt_token=3"])
