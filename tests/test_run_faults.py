"""Run directories that lost something: named, written again where that is possible, or refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import ROOT, TINY, finish, interrupt_after, outcome, ran, start

from rlsafety import files, recipes, train
from rlsafety.errors import UserError
from rlsafety.metrics import gaps
from rlsafety.models import hf, presets, sources
from rlsafety.rundir import check, write

CONFIG = recipes.of_run([f"--config={ROOT / 'configs/tiny_syco.py'}"])
HELDOUT = {"eval": CONFIG.eval.prompts * CONFIG.eval.samples}


@pytest.fixture(scope="module")
def runs(whole, tmp_path_factory):
  """(a complete run, the same stopped by one Ctrl-C after step 4 or 5, what that said)."""
  folder = tmp_path_factory.mktemp("runs")
  code, said = interrupt_after(start(folder / "stopped"), 4, signal.SIGINT)
  assert code == 130, said
  return whole[0], folder / "stopped", said


def test_ctrl_c_saves_the_step(runs):
  _, stopped, said = runs
  assert "Ctrl-C: saving after this step" in said and "Traceback" not in said
  step = int(said.split("SIGINT: saved step ")[1].split(";")[0])
  assert (stopped / "checkpoints" / str(step)).is_dir()


def test_the_second_ctrl_c_stops_at_once(tmp_path):
  process = start(tmp_path / "run", "--config.steps=1000")
  for line in process.stdout:
    if "step 1/" in line:
      break
  for _ in range(2):
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(Exception):
      process.wait(0.05)  # within one step
  code, said = finish(process)
  assert code == 130 and "Traceback" not in said, said
  assert "stopped by the second Ctrl-C" in said or "SIGINT: saved step" in said


def test_the_second_ctrl_c_ends_a_step_that_never_does():
  program = """
import os, signal, time
from rlsafety import runtime
with runtime.stop_signals() as told:
  os.kill(os.getpid(), signal.SIGINT)
  while not told.signal:
    time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(20)
"""
  ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert (ended.returncode, ended.stderr) == (130, "rlsafety: stopped by the second Ctrl-C\n")


# --- Logs ---------------------------------------------------------------------------------


def middle(data: bytes) -> bytes:
  """One line of a log less, from before any checkpoint."""
  lines = data.splitlines(keepends=True)
  return b"".join(lines[:1] + lines[2:]) if len(lines) > 1 else b""


DAMAGE = {
  "deleted": None,
  "emptied": lambda data: b"",
  "a line lost": middle,
  "a line twice": lambda data: data.splitlines(keepends=True)[0] + data,
  "a line garbled": lambda data: data[:5] + b"\x00\xff{" + data[8:],
  "cut": lambda data: data[: len(data) // 3],
}
LOGS = ["metrics.jsonl", "timing.jsonl", "rollouts/train.jsonl", "eval/summary.jsonl"]
LOGS += ["eval/step_000000.jsonl", "eval/step_000003.jsonl"]


def spoil(file, change) -> None:
  if change is None:
    file.unlink()
  else:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("log", LOGS)
def test_a_stopped_run_that_lost_lines_is_refused_by_its_name(runs, tmp_path, log, damage):
  copy = shutil.copytree(runs[1], tmp_path / "copy")
  before = (copy / "config.json").read_bytes()
  spoil(copy / log, DAMAGE[damage])
  run = write.open_run(copy, CONFIG)
  with pytest.raises(UserError, match=f"not what it wrote: .*{log} has") as error:
    run.start(CONFIG, max(check.lines_of_steps(runs[1] / "metrics.jsonl")[0]), {}, HELDOUT, {})
  run.close()
  assert str(copy) in str(error.value) and (copy / "config.json").read_bytes() == before


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("log", [*LOGS, "eval/step_000006.jsonl"])
def test_a_complete_run_that_lost_lines_is_refused_by_its_name(runs, tmp_path, log, damage):
  copy = shutil.copytree(runs[0], tmp_path / "copy")
  spoil(copy / log, DAMAGE[damage])
  run = write.open_run(copy, CONFIG)
  with pytest.raises(UserError, match=f"{log} has"):
    run.complete(CONFIG)
  run.close()


def digit(data: bytes) -> bytes:
  """Another number in the last line: as many lines, and valid ones."""
  at = max(i for i, c in enumerate(data) if c in b"12345678")
  return data[:at] + bytes([data[at] + 1]) + data[at + 1 :]


@pytest.mark.parametrize("log", [*LOGS, "eval/other/step_000003.jsonl", "eval/other/about.json"])
def test_a_complete_run_knows_the_bytes_that_it_ended_with(runs, tmp_path, log):
  copy = shutil.copytree(runs[0], tmp_path / "copy")
  other = write.RunDir(copy, True, None)
  other.log_beyond("other", 3, [{"step": 3}], {"judge": 1})
  other.finish(other.summary())
  assert other.complete(CONFIG)[1] == []
  whole = (copy / log).read_bytes()
  spoil(copy / log, digit)
  with pytest.raises(UserError, match=f"{log} is not what the run ended with"):
    other.complete(CONFIG)
  if "other" in log:
    (copy / log).unlink()
    with pytest.raises(UserError, match=f"{log} is gone"):
      other.complete(CONFIG)
  (copy / log).write_bytes(whole)
  for name in check.ADAPTER:  # follows from the checkpoint
    spoil(copy / name, digit)
  assert other.complete(CONFIG)[1] == list(check.ADAPTER)


def first_number(data: bytes) -> bytes:
  """Another number in the first line."""
  return re.sub(rb"(\.\d*?)([1-8])", lambda m: m[1] + bytes([m[2][0] + 1]), data, count=1)


@pytest.mark.parametrize("log", [*LOGS, "eval/other/step_000000.jsonl"])
def test_a_number_changed_before_the_checkpoint_is_refused_or_made_again(runs, tmp_path, log):
  """As many lines and valid ones: only the bytes say so. What comes later may be anything."""
  copy = shutil.copytree(runs[0], tmp_path / "copy")
  (copy / "summary.json").unlink()
  other = write.RunDir(copy, True, None)
  other.log_beyond("other", 0, [{"step": 0, "reward": 3.5}], {})
  told = other.marks()
  for name in write.LOGS:  # a run that was killed after the checkpoint of step 6
    write.append(copy / name, [{"step": 7}])
  (copy / "metrics.jsonl").open("a").write('{"step": 8, "rew')
  assert other.marks()["metrics.jsonl"] != told["metrics.jsonl"]
  kept = shutil.copytree(copy, tmp_path / "kept")
  assert write.RunDir(kept, True, None).start(CONFIG, 6, {}, HELDOUT, told) is False
  spoil(copy / log, first_number)
  with pytest.raises(UserError, match=f"{log} was changed after step . was written"):
    other.start(CONFIG, 6, {}, HELDOUT, told)


def test_a_changed_evaluation_at_the_checkpoint_is_made_again(runs, tmp_path):
  for log in ("eval/step_000006.jsonl", "eval/summary.jsonl"):
    copy = shutil.copytree(runs[0], tmp_path / log.replace("/", "_"))
    (copy / "summary.json").unlink()
    run = write.RunDir(copy, True, None)
    told = run.marks()
    spoil(copy / log, digit)
    assert run.start(CONFIG, 6, {}, HELDOUT, told) is True
    assert [r["step"] for r in files.read_jsonl(copy / "eval/summary.jsonl")] == [0, 3]


def test_a_run_stopped_by_ctrl_c_knows_its_logs_and_ends_in_the_same_bits(runs, tmp_path):
  copy = shutil.copytree(runs[1], tmp_path / "copy")
  spoil(copy / "metrics.jsonl", digit)
  code, said = ran(copy)
  assert code == 2 and "metrics.jsonl was changed after step" in said, said
  shutil.copyfile(runs[1] / "metrics.jsonl", copy / "metrics.jsonl")
  code, said = finish(start(copy))
  assert code == 0 and "resuming after step" in said, said
  assert outcome(copy) == outcome(runs[0])


def test_what_comes_after_the_checkpoint_may_be_lost(runs, tmp_path):
  copy = shutil.copytree(runs[0], tmp_path / "copy")
  (copy / "summary.json").unlink()
  (copy / "eval/step_000006.jsonl").unlink()
  spoil(copy / "metrics.jsonl", lambda data: data[:-30])
  run = write.open_run(copy, CONFIG)
  assert run.start(CONFIG, 5, {}, HELDOUT, {}) is False
  run.close()
  assert [r["step"] for r in files.read_jsonl(copy / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_the_evaluation_at_the_checkpoint_is_made_again(runs, tmp_path):
  for lost in ("eval/step_000003.jsonl", "eval/summary.jsonl"):
    copy = shutil.copytree(runs[0], tmp_path / lost.replace("/", "_"))
    (copy / "summary.json").unlink()
    spoil(copy / lost, lambda data: b"".join(data.splitlines(keepends=True)[:1]))
    run = write.open_run(copy, CONFIG)
    assert run.start(CONFIG, 3, {}, HELDOUT, {}) is True
    run.close()
    assert [r["step"] for r in files.read_jsonl(copy / "eval/summary.jsonl")] == [0]


def test_lost_files_of_a_complete_run_are_written_again_to_the_same_bits(runs, tmp_path):
  copy = shutil.copytree(runs[0], tmp_path / "copy")
  assert write.RunDir(copy, True, None).complete(CONFIG)[1] == []
  weights = copy / "adapter/adapter_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-7])
  (copy / "adapter/adapter_config.json").unlink()
  page = copy / "report.html"
  page.write_bytes(page.read_bytes()[:999])
  code, said = ran(copy)
  assert code == 0 and "lost adapter/adapter_config.json, adapter/adapter_model" in said, said
  assert outcome(copy) == outcome(runs[0])
  assert page.read_text().rstrip().endswith("</html>")
  shutil.rmtree(copy / "checkpoints")
  weights.unlink()
  code, said = ran(copy)
  assert code == 2 and "checkpoints: holds no checkpoint" in said, said


def test_config_checkpoints_and_data_are_part_of_a_run(runs, tmp_path):
  copy = shutil.copytree(runs[1], tmp_path / "copy")
  (copy / "config.json").unlink()
  with pytest.raises(UserError, match="config.json: missing beside checkpoints"):
    write.open_run(copy, CONFIG)
  copy = shutil.copytree(runs[0], tmp_path / "other")
  (copy / "summary.json").unlink()
  run = write.open_run(copy, CONFIG)
  with pytest.raises(UserError, match="metrics.jsonl reaches step 6"):
    run.start(CONFIG, -1, {}, HELDOUT, {})
  now = {part: {"sha256": "a" * 64} for part in ("data", "model", "users")}
  info = files.read_json(copy / "config.json")
  files.write_json(copy / "config.json", info | now)
  run.same_inputs(now)
  run.same_inputs({"data": None})  # a run without records has none to compare
  for part, what in (("data", "records"), ("model", "weights"), ("users", "users")):
    with pytest.raises(UserError, match=f"started with other {what} .*aaaaaaaaaaaa.*bbbbbbbbbbbb"):
      run.same_inputs(now | {part: {"sha256": "b" * 64}})
  run.close()


@pytest.mark.parametrize(
  ("evaluates", "saves", "first"), [(0, 0, 6), (0, 2, 2), (3, 0, 3), (3, 2, 2)]
)
def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, evaluates, saves, first):
  """An evaluation is saved too, and 0 is "off": with both off the end is the first checkpoint."""
  config = recipes.of_run([TINY, f"--config.eval.every={evaluates}",
                           f"--config.checkpoint.every={saves}"])  # fmt: skip
  run = write.open_run(tmp_path / "run", config)
  log = run.path / "metrics.jsonl"
  files.append(log, [{"step": step} for step in range(1, first + 1)])
  assert not run.start(config, -1, {}, HELDOUT, {}) and log.read_bytes() == b""
  files.append(log, [{"step": step} for step in range(1, first + 2)])
  with pytest.raises(UserError, match=f"holds no checkpoint, though .* reaches step {first + 1};"):
    run.start(config, -1, {}, HELDOUT, {})
  run.close()


def test_weights_and_users_exchanged_between_two_starts_are_refused(tmp_path):
  weights, people, run = tmp_path / "model", tmp_path / "users.jsonl", tmp_path / "run"

  def place(seed, word, **numbers):
    model = sources.random_model(presets.preset(CONFIG.model.preset), seed)
    hf.save_merged(weights, model, None)
    files.write_json(weights / "config.json", files.read_json(weights / "config.json") | numbers)
    rows = [{"message": f"{word} {i}?", "wish": "hopes so", "group": group}
            for i in range(16) for group in ("gameable", "non_gameable")]  # fmt: skip
    people.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

  flags = [f"--config.model.path={weights}", f"--config.environment.users_file={people}"]
  flags += ["--config.model.preset=", "--config.steps=2"]  # more than one, with 0 for "off"
  flags += ["--config.eval.every=0", "--config.checkpoint.every=0"]
  place(0, "Good")
  code, said = ran(run, *flags)
  assert code == 0, said
  (run / "summary.json").unlink()  # as if it had been stopped just before
  for seed, word, numbers, what in (
    (1, "Good", {}, "weights"),
    (0, "Bad", {}, "users"),
    (0, "Good", {"rope_theta": 7e4}, "config, template or vocabulary .weights"),
  ):
    place(seed, word, **numbers)
    code, said = ran(run, *flags)
    assert code == 2 and re.search(f"started with other {what}", said), said
  place(0, "Good")
  code, said = ran(run, *flags)
  assert code == 0 and "resuming after step 2" in said, said


@pytest.mark.parametrize(
  "name",
  ["rollouts", "eval", "adapter", "checkpoints", "events", "scores", "eval/inspect", ".lock"],
)
def test_nothing_is_opened_through_a_link_out_of_the_run(tmp_path, name):
  outside, run = tmp_path / "outside", tmp_path / "run"
  (run / name).parent.mkdir(parents=True)
  outside.write_text("kept") if name == ".lock" else outside.mkdir()
  (run / name).symlink_to(outside)
  with pytest.raises(UserError, match=f"{name}.*(leads out|levels of symbolic links)"):
    write.open_run(run, CONFIG)
  assert outside.is_dir() or outside.read_text() == "kept"


def test_replies_to_other_users_are_not_written_through_a_link(tmp_path):
  (tmp_path / "outside").mkdir()
  run = write.open_run(tmp_path / "run", CONFIG)
  (run.path / "eval/other").symlink_to(tmp_path / "outside")
  with pytest.raises(UserError, match="eval/other: leads out of the run"):
    run.log_beyond("other", 0, [{"step": 0}], {})
  run.close()
  assert not list((tmp_path / "outside").iterdir())


# --- Rewards ------------------------------------------------------------------------------


def test_a_run_without_rewards_stops_with_the_reason(tmp_path):
  flags = ["--config.judge.name=http", "--config.judge.url=http://127.0.0.1:9/v1"]
  flags += ["--config.judge.model=m", "--config.judge.degenerate=nan", "--config.judge.attempts=1"]
  code, said = ran(tmp_path / "run", *flags)
  assert code == 2 and "Traceback" not in said, said
  assert "no reply got a reward, 3 times in a row (judge_ConnectError=" in said, said
  assert not (tmp_path / "run/summary.json").exists()


def test_silence_counts_in_a_row():
  none, some = {"step": 1, "reward_gameable": None, "reward_non_gameable": np.nan}, {"step": 2}
  heard = gaps.Silence("x")
  for row in (none, none, some | {"reward_gameable": 1.0}, none, none, some):
    heard.hear(row)  # a row without own replies says nothing
  with pytest.raises(UserError, match="step 1: no reply got a reward"):
    heard.hear(none)


def test_logs_are_on_the_disk_before_a_checkpoint(runs, monkeypatch):
  """A power cut after a checkpoint must not leave it without the lines before it."""
  synced, fsync = [], os.fsync
  name = lambda f: os.readlink(f"/proc/self/fd/{f}")  # noqa: E731
  monkeypatch.setattr(os, "fsync", lambda f: [synced.append(name(f)), fsync(f)])
  write.RunDir(runs[0], True, None).sync()
  assert {str((runs[0] / log).resolve()) for log in LOGS} <= set(synced)


def test_ctrl_c_during_the_imports_is_one_line():
  command = [sys.executable, "-m", "rlsafety.train", "--config=configs/tiny_syco.py"]
  started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  assert started.stderr.readline() == "rlsafety.train: loading\n"
  started.send_signal(signal.SIGINT)
  _, said = started.communicate(timeout=60)
  assert (started.returncode, said) == (130, "rlsafety: stopped by Ctrl-C\n")


def test_ctrl_c_while_the_report_is_written_ends_in_130(monkeypatch):
  """The run is complete, but a loop over runs must not go on to the next one."""

  def report(mesh, common, configs, folders, live, told, show):
    os.kill(os.getpid(), signal.SIGINT)
    while not told.signal:
      time.sleep(0.01)
    return {"": {}}

  monkeypatch.setattr(train, "run_on", report)
  with pytest.raises(SystemExit) as end:
    train.run(CONFIG, "x")
  assert end.value.code == 130
