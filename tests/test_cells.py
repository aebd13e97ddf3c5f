"""Cells that train together: each gets what it gets alone, whatever happens to the others."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlsafety import cells, recipes, train
from rlsafety.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
  "steps": 4,
  "prompts_per_step": 4,
  "mesh.data": 2,
  "mesh.fsdp": 2,
  "mesh.tensor": 2,
  "sampler.group": 2,
  "sampler.max_tokens": 8,
  "learner.microbatches": 1,
  "eval.every": 2,
  "eval.prompts": 4,
  "eval.samples": 2,
  "checkpoint.every": 1,
}
# They differ in all that may differ; c ends early.
CHANGES = {
  "a": {},
  "b": {"seed": 7, "judge.name": "lm", "environment.cue": "none", "optimizer.learning_rate": 5e-4},
  "c": {"steps": 2, "environment.name": "action_advice", "environment.length": "short"},
}
WITH_X = CHANGES | {"x": {"seed": 9}}


def configs(changes=CHANGES):
  tiny = recipes.frozen(recipes.load_recipe(str(ROOT / "configs/tiny_syco.py")))
  return {name: recipes.replaced(tiny, SMALL | own) for name, own in changes.items()}


def folders(path, names=CHANGES):
  return {name: str(path / name) for name in names}


def rows(path, log):
  return [json.loads(line) for line in (path / log).open()]


def assert_same(found, wanted):
  """Tokens to the token, all else to 1e-5: kernels of other shapes add up in another order, and
  Adam divides what little that changes by the root of a square as small."""
  for log in ("rollouts/train.jsonl", "metrics.jsonl", "eval/summary.jsonl"):
    here, there = rows(found, log), rows(wanted, log)
    assert len(here) == len(there), log
    for a, b in zip(here, there, strict=True):
      assert a.keys() == b.keys()
      assert a.get("tokens") == b.get("tokens")
      for name, value in a.items():
        if isinstance(value, float):
          assert value == pytest.approx(b[name], rel=1e-5, abs=1e-5, nan_ok=True), (log, name)
  here, there = (load_file(p / "adapter/adapter_model.safetensors") for p in (found, wanted))
  for name, x in there.items():
    np.testing.assert_allclose(here[name], x, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  path = tmp_path_factory.mktemp("alone")
  for name, config in configs().items():
    train.run(config, str(path / name))
  return path


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The cells, and one in their company whose second update is not finite."""
  path, news, learn = tmp_path_factory.mktemp("together"), [], train.learn

  def diverging(cell, *arguments):
    made = learn(cell, *arguments)
    if cell.name != "x" or made.step != 2:
      return made
    return dataclasses.replace(made, metrics={**made.metrics, "nonfinite": np.float32(1)})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "learn", diverging)
    with pytest.raises(UserError, match="^x: step 2: the gradient or the step is not finite"):
      train.run_together(configs(WITH_X), folders(path, WITH_X), lambda: news.append(1))
  assert len(news) >= 3
  return path


def test_a_cell_gets_what_it_gets_alone_though_another_diverges(alone, together):
  for name in CHANGES:
    assert_same(together / name, alone / name)
    summaries = [json.loads((p / name / "summary.json").read_text()) for p in (together, alone)]
    assert summaries[0].keys() == summaries[1].keys()
  assert len(rows(together / "a", "metrics.jsonl")) == 4
  assert len(rows(together / "c", "metrics.jsonl")) == 2  # ended early
  tokens = [[r["tokens"] for r in rows(together / n, "rollouts/train.jsonl")] for n in "ab"]
  assert tokens[0] != tokens[1]


def test_what_is_complete_or_stopped_stays_so(together, capsys):
  assert json.loads((together / "x" / cells.STOPPED).read_text())["step"] == 2
  assert len(rows(together / "x", "metrics.jsonl")) == 1 and not (together / "x/adapter").exists()
  before = (together / "a/metrics.jsonl").stat().st_mtime_ns
  with pytest.raises(UserError, match="to try again, delete .*stopped.json"):
    train.run_together(configs(WITH_X), folders(together, WITH_X))
  assert capsys.readouterr().out.count("run is complete") == 3
  assert (together / "a/metrics.jsonl").stat().st_mtime_ns == before


def test_cells_must_share_what_shapes_the_batch():
  with pytest.raises(UserError, match="cells a and b cannot train together: sampler.group: 2"):
    cells.check_shared(configs({"a": {}, "b": {"sampler.group": 4}}))
  cells.check_shared(configs({"a": {}, "b": {"model.adapter": "x", "judge.name": "phrases"}}))


PROGRAM = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import test_cells
from rlsafety import errors, train
path, learn = pathlib.Path(sys.argv[1]), train.learn
def diverging(cell, *arguments):
  made = learn(cell, *arguments)
  if cell.name == "x" and made.step == 2:
    made.metrics["nonfinite"] = 1.0
  return made
train.learn = diverging
configs = test_cells.configs(test_cells.WITH_X)
errors.run_main(train.run_together, configs, test_cells.folders(path, configs))
"""


def start(path, cache):
  code = PROGRAM.format(tests=str(ROOT / "tests"))
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), PYTHONPATH=str(ROOT))
  return subprocess.Popen(
    [sys.executable, "-c", code, str(path)], env=env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def outcome(path):
  files = [f for name in CHANGES for f in (path / name).rglob("*")]
  kept = ("metrics.jsonl", "summary.jsonl", "train.jsonl", "adapter_model.safetensors")
  return {str(f.relative_to(path)): f.read_bytes() for f in files if f.name in kept}


def test_killed_twice_every_cell_ends_in_the_same_bits(together, tmp_path, cache):
  for cell, step in (("b", 1), ("a", 3)):  # in the middle of saving a step of all cells
    process = start(tmp_path, cache)
    end = time.monotonic() + 300
    while not (tmp_path / cell / "checkpoints" / str(step)).exists():
      assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  said, _ = start(tmp_path, cache).communicate(timeout=300)
  assert "a: resuming after step" in said, said
  assert outcome(tmp_path) == outcome(together)
