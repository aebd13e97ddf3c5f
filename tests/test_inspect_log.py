"""Inspect logs read back through inspect_ai itself."""

import math
import sys

import pytest
import synthetic_runs

from rlsafety import tools
from rlsafety.errors import UserError
from rlsafety.rundir import read
from rlsafety.tools import export


def test_logs_read_back_with_every_rollout_and_score(tmp_path, monkeypatch):
  log = pytest.importorskip("inspect_ai.log", reason="pip install -e '.[inspect]'")
  from rlsafety.tools import inspect_log  # needs the extra

  path = synthetic_runs.write_run(tmp_path / "run", steps=12, eval_every=12, extra=["<b>x</b>"])
  monkeypatch.setattr(inspect_log, "PER_LOG", 100)
  written = inspect_log.write_inspect_logs(path, tmp_path / "logs")
  assert [p.name for p in written] == ["heldout.eval", "train_000.eval", "train_001.eval"]
  records = [r for rs in read.eval_rollouts(read.load_run(path)).values() for r in rs]
  log_file = log.read_eval_log(str(written[0]))
  assert log_file.status == "success" and len(log_file.samples) == len(records)
  assert len({(s.id, s.epoch) for s in log_file.samples}) == len(records)
  found = {(s.metadata["step"], s.id, s.epoch): s for s in log_file.samples}
  for r in records:
    sample = found[r["step"], f"{r['scenario_id']}@{r['step']}.{r['prompt']}", r["sample"] + 1]
    assert sample.messages[-1].text == r["completion"]
    assert [m.role for m in sample.messages] == ["system", "user", "assistant"]
    for label, field in (("reward", "reward"), ("HEX", "hex"), ("ACC", "acc")):
      value = sample.scores[label].value
      assert value == r[field] if r[field] is not None else math.isnan(value)
  train = [s for p in written[1:] for s in log.read_eval_log(str(p)).samples]
  assert len(train) == 12 * 16 and any(math.isnan(s.scores["reward"].value) for s in train)


def test_without_the_extra_export_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "inspect_ai", None)
  monkeypatch.delitem(sys.modules, "rlsafety.tools.inspect_log", raising=False)
  monkeypatch.delattr(tools, "inspect_log", raising=False)
  with pytest.raises(UserError, match="pip install 'rlsafety.inspect.'"):
    export.main(["export", f"--run={tmp_path}", "--format=inspect"])
