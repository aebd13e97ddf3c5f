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
from test_train import environment

from rlsafety import cells, recipes, train
from rlsafety import rollout as rollout_lib
from rlsafety.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
  "steps": 2,
  "prompts_per_step": 4,
  "sampler.group": 2,
  "sampler.max_tokens": 8,
  "learner.microbatches": 1,
  "eval.every": 2,
  "eval.prompts": 4,
  "eval.samples": 2,
  "checkpoint.every": 1,
}
# They differ in all that may differ; c ends early, half of b's prompts and all of d's are recorded.
RECORDS = "rlsafety_test_records"  # the variable that names their folder
CHANGES = {
  "a": {},
  "b": {"seed": 7, "judge.name": "lm", "environment.cue": "none", "optimizer.learning_rate": 5e-4,
        "data.path": RECORDS, "data.fraction": 0.5, "objective.is_correction": "token_truncate"},
  "c": {"steps": 1, "environment.name": "action_advice", "environment.length": "short"},
  "d": {"data.path": RECORDS, "objective.name": "dpo"},
}  # fmt: skip
WITH_X = CHANGES | {"x": {"seed": 9}}


def configs(changes=CHANGES, sizes=SMALL):
  tiny, out = recipes.frozen(recipes.load_recipe(str(ROOT / "configs/tiny_syco.py"))), {}
  for name, own in changes.items():
    own = {k: os.environ[RECORDS] if v == RECORDS else v for k, v in own.items()}
    out[name] = recipes.replaced(tiny, sizes | own)
  return out


def folders(path, names=CHANGES):
  return {name: str(path / name) for name in names}


def rows(path, log):
  return [json.loads(line) for line in (path / log).open()]


def assert_same(found, wanted):
  """Tokens to the token, all else to 1e-5: kernels of other shapes add up in another order, and
  Adam divides what little that changes by the root of a square as small."""
  for log in ("rollouts/train.jsonl", "metrics.jsonl", "eval/summary.jsonl"):
    assert (found / log).exists() == (wanted / log).exists(), log
    if not (found / log).exists():
      continue  # of a cell that learns from records alone
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


@pytest.fixture(scope="module", autouse=True)
def records(tmp_path_factory):
  from test_data import call, rollout, write_run  # not in the children: TFDS takes seconds

  folder = tmp_path_factory.mktemp("records")
  replies = [
    rollout(step, prompt, sample, f"{step}{prompt}{sample}", reward)
    for step in (1, 2, 3)
    for prompt in (0, 1)
    for sample, reward in enumerate((4.0, 9.0))
  ]
  write_run(folder / "run", replies)
  assert call("--runs", folder / "run", "--out", folder / "set") == 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(RECORDS, str(folder / "set"))
    yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  path = tmp_path_factory.mktemp("alone")
  for name, config in configs().items():
    train.run(config, str(path / name))
  return path


LEARN = train.learn


def diverging(cell, *arguments):
  """The second update of x is not finite."""
  made = LEARN(cell, *arguments)
  if cell.name != "x" or made.step != 2:
    return made
  return dataclasses.replace(made, metrics={**made.metrics, "nonfinite": np.float32(1)})


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The cells, and one in their company that diverges."""
  path, news = tmp_path_factory.mktemp("together"), []
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
  assert len(rows(together / "a", "metrics.jsonl")) == 2
  assert len(rows(together / "c", "metrics.jsonl")) == 1  # ended early
  assert not (together / "d/rollouts/train.jsonl").exists()  # learns from records alone
  tokens = [[r["tokens"] for r in rows(together / n, "rollouts/train.jsonl")] for n in "ab"]
  assert tokens[0] != tokens[1] and len(tokens[0]) == 2 * len(tokens[1])


def test_what_is_complete_or_stopped_stays_so(together, capsys):
  assert json.loads((together / "x" / cells.STOPPED).read_text())["step"] == 2
  assert len(rows(together / "x", "metrics.jsonl")) == 1 and not (together / "x/adapter").exists()
  before = (together / "a/metrics.jsonl").stat().st_mtime_ns
  with pytest.raises(UserError, match="to try again, delete .*stopped.json"):
    train.run_together(configs(WITH_X), folders(together, WITH_X))
  assert "a, b, c, d: run is complete: " in capsys.readouterr().out
  assert (together / "a/metrics.jsonl").stat().st_mtime_ns == before


def test_cells_must_share_what_shapes_the_batch():
  with pytest.raises(UserError, match="cells a and b cannot train together: sampler.group: 2"):
    cells.check_shared(configs({"a": {}, "b": {"sampler.group": 4}}))
  cells.check_shared(configs({"a": {}, "b": {"model.adapter": "x", "judge.name": "phrases"}}))


PROGRAM = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import conftest, test_cells
from rlsafety import errors, train
os.environ["XLA_FLAGS"] = conftest.FAST_COMPILE  # of conftest's the eight devices are too many
path, train.learn = pathlib.Path(sys.argv[1]), test_cells.diverging
configs = test_cells.configs(test_cells.KILLED, test_cells.LONGER)
errors.run_main(train.run_together, configs, test_cells.folders(path, configs))
"""
LONGER = SMALL | {"steps": 3, "epochs": 2}
# Without b, whose judge is slow: a is recorded by half in its place. Nor d, another program.
KILLED = {"a": {"data.path": RECORDS, "data.fraction": 0.5}, "c": CHANGES["c"], "x": WITH_X["x"]}


def start(path):
  code = PROGRAM.format(tests=str(ROOT / "tests"))
  return subprocess.Popen(
    [sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment(), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def outcome(path):
  files = [f for name in CHANGES for f in (path / name).rglob("*")]
  kept = ("metrics.jsonl", "summary.jsonl", "train.jsonl", "adapter_model.safetensors")
  return {str(f.relative_to(path)): f.read_bytes() for f in files if f.name in kept}


def test_killed_while_it_saves_every_cell_ends_in_the_same_bits(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  said, _ = start(whole).communicate(timeout=300)
  assert "x: step 2: the gradient" in said, said
  process, end = start(killed), time.monotonic() + 300
  while not (killed / "a/checkpoints/2").exists():  # the first of its step
    assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  said, _ = start(killed).communicate(timeout=300)
  assert "resuming after step" in said, said
  assert len(outcome(whole)) == 8 and outcome(killed) == outcome(whole)


def test_a_signal_is_heard_before_an_evaluation_and_loses_nothing(
  together, tmp_path, monkeypatch, capsys
):
  """Before the first one nothing is kept; before a later one the step is saved, and its evaluation
  is made at the next start, of all cells in one batch as it would have been."""
  monkeypatch.setattr(train, "learn", diverging)
  resume, ask, calls = cells.resume, rollout_lib.roll_out, []

  def signalled(function, at):
    def call(*arguments, **named):
      got = function(*arguments, **named)
      calls.append(function)
      if len(calls) == at:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # for the thread that listens
      return got

    return call

  # At the start, then in the fourth batch: after an evaluation, a step, c's last one and a step.
  for module, name, at, saved in ((cells, "resume", 1, []), (rollout_lib, "roll_out", 4, ["2"])):
    calls.clear()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
      patch.setattr(module, name, signalled(getattr(module, name), at))
      train.run_together(configs(WITH_X), folders(tmp_path, WITH_X))
    assert end.value.code == 75 and len(calls) == at
    for cell in ("a", "b", "d"):
      assert [f.name for f in (tmp_path / cell / "checkpoints").glob("2")] == saved
      assert not (tmp_path / cell / "eval/step_000002.jsonl").exists()
  assert (cells.resume, rollout_lib.roll_out) == (resume, ask)
  with pytest.raises(UserError, match="x: step 2: the gradient"):
    train.run_together(configs(WITH_X), folders(tmp_path, WITH_X))
  said = capsys.readouterr().out
  assert "SIGTERM: nothing to save yet" in said and "SIGTERM: saved step 2" in said
  assert "all cells: the evaluation at step 2 is missing" in said
  assert said.count("b: judge: rating judge") == 3 and said.count("judge: presence of phrases") == 3
  assert outcome(tmp_path) == outcome(together)
