"""Writers beside the run directory: W&B and Trackio without a network, resumed, missing, broken."""

import importlib.util
import math
import os
import pathlib
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from rlsafety import recipes
from rlsafety.errors import UserError
from rlsafety.rundir import events, write

ROOT = pathlib.Path(__file__).parents[1]


def settings_of(**log):
  recipe = recipes.load_recipe(str(ROOT / "configs/tiny_syco.py"))
  recipe.log.update(log)
  return recipes.frozen(recipe)


def run_twice(folder, settings):
  """A run that is killed after step 2 and goes on from step 2, and the writers' ids."""
  for steps in ((1, 2), (2, 3)):
    run = write.open_run(folder, settings)
    opened = events.open_events(run, settings)
    assert len(opened.sinks) == 1 + (importlib.util.find_spec("tensorflow") is not None)
    for step in steps:
      opened.write(step, {"step": step, "loss": np.float32(step) / 4, "kl": math.nan, "note": "x"})
    opened.write(step, {"step": step, "hex": 2.5}, "held_out/")
    opened.close()
    run.close()
  return events.read_json(folder / events.ID)["id"]


def records(data):
  """The protocol buffers in a .wandb file: a LevelDB log behind a header of 7 bytes."""
  at, parts, block = 7, b"", 1 << 15
  while at < len(data):
    left = block - at % block
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6 : at + 7]
    if left < 7 or kind == b"\0":  # what is left of a block is filled up
      at += left
      continue
    parts += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (b"\1", b"\4"):  # a whole record, or the last part of one
      yield parts
      parts = b""


def offline(folder):
  """The .wandb files of a run in the order they were begun: [(run id, project, {step: row})]."""
  from wandb.proto import wandb_internal_pb2

  found = []
  for file in sorted((folder / "events/wandb").glob("offline-run-*/*.wandb")):
    names, rows = set(), {}
    for data in records(file.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      if record.run.run_id:
        names.add((record.run.run_id, record.run.project))
      row = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
      if row:
        kept = {k: float(v) for k, v in row.items() if not k.startswith("_")}
        rows.setdefault(int(row["_step"]), {}).update(kept)
    ((name, project),) = names
    found.append((name, project, rows))
  return found


needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="pip install wandb")


@needs_wandb
def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  name = run_twice(tmp_path / "run", settings_of(wandb="exploits"))
  first, second = offline(tmp_path / "run")
  assert first[:2] == second[:2] == (name, "exploits")
  assert first[2] == {1: {"loss": 0.25}, 2: {"loss": 0.5, "held_out/hex": 2.5}}
  assert second[2] == {2: {"loss": 0.5}, 3: {"loss": 0.75, "held_out/hex": 2.5}}


KILLED = """\
import os, pathlib, signal, sys, time
sys.path.insert(0, {tests!r})
from test_events import events, settings_of, write
settings = settings_of(wandb="exploits")
run = write.open_run(pathlib.Path({folder!r}), settings)
opened = events.open_events(run, settings)
for step in (1, 2, 3):
  opened.write(step, {{"loss": step / 4}})
time.sleep(3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_wandb
def test_a_killed_run_keeps_what_it_logged_offline(tmp_path, monkeypatch):
  """W&B wrote its file every 15 seconds: all of a short run was lost, and the end of a long one."""
  monkeypatch.setenv("WANDB_MODE", "offline")
  folder, tests = tmp_path / "run", pathlib.Path(__file__).parent
  program = KILLED.format(tests=str(tests), folder=str(folder))
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  env.pop("WANDB_SERVICE", None)  # that of this process, which would outlive the kill
  assert subprocess.run([sys.executable, "-c", program], env=env).returncode == -9
  # W&B ends a step when the next begins, so the last one is missing: the run makes it again.
  ((name, project, rows),) = offline(folder)
  assert rows == {1: {"loss": 0.25}, 2: {"loss": 0.5}}
  settings = settings_of(wandb="exploits")
  run = write.open_run(folder, settings)
  opened = events.open_events(run, settings)
  opened.write(3, {"loss": 0.75})
  opened.close()
  run.close()
  first, second = offline(folder)
  assert first == (name, project, rows) and second == (name, project, {3: {"loss": 0.75}})


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="pip install trackio")
def test_trackio_continues_the_same_run(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
  name = run_twice(tmp_path / "run", settings_of(trackio="exploits"))
  assert "\33[" not in capsys.readouterr().out  # its greeting, in colours, in every log
  (database,) = (tmp_path / "trackio").rglob("exploits.db")
  with sqlite3.connect(database) as found:
    rows = found.execute(
      "select run_name, run_id, step, cast(metrics as blob) from metrics"
    ).fetchall()
  assert {row[0] for row in rows} == {f"run-{name}"} and len({row[1] for row in rows}) == 1
  assert {row[2] for row in rows} == {1, 2, 3}
  assert sum(b"held_out/hex" in bytes(row[3]) for row in rows) == 2


def test_cells_are_runs_of_their_own(tmp_path, monkeypatch):
  if not importlib.util.find_spec("trackio"):
    pytest.skip("pip install trackio")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
  settings = settings_of(trackio="cells")
  runs = [write.open_run(tmp_path / n, settings) for n in ("a", "b")]
  opened = [events.open_events(run, settings) for run in runs]
  for step in (1, 2):  # in turns, as the trainer does
    for one in opened:
      one.write(step, {"loss": 1.0})
  for one, run in zip(opened, runs, strict=True):
    assert one.sinks  # the second did not end the first
    one.close()
    run.close()


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
  settings = settings_of()
  run = write.open_run(tmp_path / "run", settings)
  opened = events.open_events(run, settings)
  assert [s.name for s in opened.sinks if s.name != "TensorBoard"] == []
  assert not (tmp_path / "run" / events.ID).exists()
  opened.close()
  run.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line_before_anything_is_loaded(name, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda found: None)
  with pytest.raises(UserError, match=rf"log.{name}=p: .* pip install 'rlsafety\[{name}\]'"):
    events.check(settings_of(**{name: "p"}).log)


def test_a_writer_that_breaks_does_not_end_the_run(caplog, monkeypatch):
  kept, monkeypatch_log = [], events.logging.getLogger("rlsafety")
  monkeypatch.setattr(monkeypatch_log, "propagate", True)
  monkeypatch_log.setLevel("INFO")

  def broken(step, row):
    raise ConnectionError("no route to host\nand 100 lines more")

  fine = events.Sink("fine", lambda step, row: kept.append((step, row)), lambda: None)
  both = events.Events([events.Sink("Elsewhere", broken, broken), fine])
  both.write(1, {"loss": 1})
  both.write(2, {"loss": 2, "all": [1], "bad": math.inf})
  both.close()
  assert kept == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
  assert {r.message for r in caplog.records} == {
    "Elsewhere: left out from here on (no route to host)"
  }


def test_a_project_is_a_plain_name():
  with pytest.raises(UserError, match="log.wandb='a/b': a project's name"):
    settings_of(wandb="a/b")


def test_another_log_is_no_other_run(tmp_path):
  write.open_run(tmp_path, settings_of()).close()
  write.write_json(tmp_path / "config.json", {"config": write.to_json(settings_of())})
  write.open_run(tmp_path, settings_of(wandb="later")).close()
