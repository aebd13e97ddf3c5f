"""The benchmark programs run at tiny shapes and write what they measured; no time is judged."""

import json
import math

import pytest

from rlsafety.errors import UserError
from rlsafety.models import presets
from rlsafety.tools.speed import __main__ as bench
from rlsafety.tools.speed import ceilings

TINY = ["--model=tiny", "--prompts=2", "--prompt_tokens=16", "--group=2", "--completion_tokens=4"]
TINY += ["--microbatches=2", "--repeats=1", "--dtype=float32"]


def test_gpu_suite_at_tiny_shapes(tmp_path):
  pytest.importorskip("peft", reason="pip install -e '.[parity]'")
  flags = ["--suite=gpu", *TINY, "--rows_few=4", "--rows_many=4", "--decode_tokens=3"]
  bench.main(["bench", *flags, "--peer_rows=2", f"--out={tmp_path / 'gpu.json'}"])
  result = json.loads((tmp_path / "gpu.json").read_text())
  rows = {row["name"].removeprefix("tiny "): row for row in result["rows"]}
  decode = [f"decode 4 rows, {v}" for v in ("plain", "merged", "int8 base", "int8 cache")]
  for name in (*decode, "prefill", "decode", "learner update", "whole step"):
    assert rows[name]["seconds"] > 0 and rows[name]["floor_seconds"] > 0
    assert rows[name]["flops_per_second"] > 0
  assert rows["sampler-learner log-prob difference"]["value"] < 1e-4
  for name in ("generate", "train"):  # 2 of 4 replies timed, the time of 4 told
    assert rows[f"transformers + PEFT {name}"]["seconds"] > 0
    assert rows[f"transformers + PEFT {name}"]["tokens"] == 2 * 2 * 4
  assert result["peak_memory_bytes"] > 0 and result["matmul_flops"] > 0


def test_counts_of_a_known_model():
  """SmolLM2-135M by hand: 134.5 M parameters, 4-byte cache of 30 x 2 x 3 x 64 numbers."""
  c = presets.preset("smollm2-135m-instruct")
  assert ceilings.weight_bytes(c, "float32") == 4 * 134_515_008
  assert ceilings.cache_bytes_per_token(c, "float32") == 30 * 2 * 3 * 64 * 4
  assert ceilings.matmul_params(c) == 134_515_008  # the tied embedding multiplies as the head
  assert math.isclose(
    ceilings.forward_flops(c, 10, 100) - ceilings.body_flops(c, 10, 100), 10 * 2 * 49152 * 576
  )


def test_cells_in_turns(tmp_path, capsys):
  bench.main(["bench", *TINY, "--cells=1,3", f"--out={tmp_path / 'cells.json'}"])
  rows = json.loads((tmp_path / "cells.json").read_text())["rows"]
  assert [row["cells"] for row in rows] == [1, 3]
  for row in rows:
    assert row["seconds"] == row["sample_s"] + row["update_s"] > 0
  assert "saved" in capsys.readouterr().out
  with pytest.raises(UserError, match="--cells=1,x: needs numbers"):
    bench.main(["bench", *TINY, "--cells=1,x"])


def test_mistyped_flag_suggests():
  with pytest.raises(UserError, match="prompt_tokens"):
    bench.read_flags(["bench", "--prompt_token=3"])
