"""The page of a run that goes on, and a signal before its first update."""

import logging
import signal
import types

import pytest
import synthetic_runs

from rlsafety import cells, runtime, stopping
from rlsafety.report import render


def test_a_run_that_is_going_says_how_far_it_is(tmp_path):
  run = synthetic_runs.write_run(tmp_path / "run", steps=40, eval_every=20, complete=False)
  for name in ("metrics.jsonl", "timing.jsonl"):  # as at the evaluation of step 20
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join(lines[:20]))
  (run / "timing.jsonl").write_text('{"step": 1, "seconds": 90}\n{"step": 20, "seconds": 60.0}\n')
  page = render.write_report(run).read_text()
  assert "<b>Step 20 of 40, about 25 min left if it goes on, evaluations not counted. Drawn" in page
  (run / "timing.jsonl").unlink()
  (run / "metrics.jsonl").unlink()
  (run / "rollouts/train.jsonl").unlink()
  assert "<b>Step 0 of 40. Drawn" in render.write_report(run).read_text()  # the first evaluation
  done = synthetic_runs.write_run(tmp_path / "done", steps=4)
  assert "Step 4 of" not in render.write_report(done).read_text()


def test_a_page_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, caplog):
  log = logging.getLogger("rlsafety")
  monkeypatch.setattr(runtime, "progress", lambda: log)
  monkeypatch.setattr(log, "propagate", True)
  monkeypatch.setattr(log, "handlers", [])  # of the test before, as pytest hears both
  log.setLevel(logging.INFO)
  drawn = []
  monkeypatch.setattr(render, "write_report", lambda path: drawn.append(path) or 1 / 0)
  run = types.SimpleNamespace(path=tmp_path, writes=True)
  cell = types.SimpleNamespace(run=run, is_last=False, title="a: ", step=3)
  last = types.SimpleNamespace(run=run, is_last=True, title="b: ", step=9)
  cells.draw([cell, last])
  assert drawn == [tmp_path]  # the last page is `finish`'s to write
  assert [r.message for r in caplog.records] == ["a: no page at step 3: division by zero"]


def test_who_leaves_after_a_signal_says_what_is_saved(monkeypatch):
  closed, log = [], types.SimpleNamespace(info=lambda *said: closed.append(said[0] % said[1:]))
  monkeypatch.setattr(runtime, "progress", lambda: log)
  monkeypatch.setattr(stopping.checkpoints, "finish", lambda manager: closed.append("finished"))

  def cell(newest):
    manager = types.SimpleNamespace(
      latest_step=lambda: newest, close=lambda: closed.append("closed")
    )
    shut = types.SimpleNamespace(close=lambda: None)
    return types.SimpleNamespace(manager=manager, events=shut, run=shut)

  for newest, said in ((None, "nothing to save yet"), (0, "saved step 0")):
    with pytest.raises(SystemExit) as end:
      stopping.leave([cell(newest)], runtime.Told(signal.SIGTERM))
    assert end.value.code == runtime.PREEMPTED
    assert closed == ["finished", "closed", f"SIGTERM: {said}; the same command continues"]
    closed.clear()
