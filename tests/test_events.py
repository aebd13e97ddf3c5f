"""Writers beside the run directory: W&B and Trackio without a network, resumed, missing, broken."""

import importlib.util
import math
import pathlib
import sqlite3

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


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="pip install wandb")
def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  name = run_twice(tmp_path / "run", settings_of(wandb="exploits"))
  from wandb.proto import wandb_internal_pb2

  files = sorted((tmp_path / "run/events/wandb").glob("offline-run-*/*.wandb"))
  assert [f.name for f in files] == [f"run-{name}.wandb"] * 2
  seen = {}
  for file in files:
    for data in records(file.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      if record.run.run_id:
        assert (record.run.run_id, record.run.project) == (name, "exploits")
      row = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
      if row:
        seen.setdefault(int(row["_step"]), {}).update(
          {k: float(v) for k, v in row.items() if not k.startswith("_")}
        )
  assert seen == {
    1: {"loss": 0.25}, 2: {"loss": 0.5, "held_out/hex": 2.5}, 3: {"loss": 0.75, "held_out/hex": 2.5}
  }  # fmt: skip


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="pip install trackio")
def test_trackio_continues_the_same_run(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
  name = run_twice(tmp_path / "run", settings_of(trackio="exploits"))
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
