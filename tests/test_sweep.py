"""launch/sweep.py on this machine, SLURM, TPU slices and Kubernetes."""

import os
import sys
import time

import pytest
from conftest import FAST_COMPILE
from launchers import REPO, TINY_RECIPE, executable, load, sh, stand_in

from rlsafety.errors import UserError

sweep = load("launch/sweep.py")
yaml = pytest.importorskip("yaml", reason="pip install -e '.[test]'")


@pytest.fixture
def cloud(tmp_path):
  return stand_in(tmp_path)


def test_grid_expands_to_distinct_runs():
  runs = sweep.expand(
    "c.py:a=1", ["seed=0,1", "arg.model=x,y", "optimizer.b1=.9"], ["--config.steps=2"]
  )
  assert [r.flags for r in runs][:2] == [
    (
      "--config=c.py:a=1,model=x",
      "--config.seed=0",
      "--config.optimizer.b1=.9",
      "--config.steps=2",
    ),
    (
      "--config=c.py:a=1,model=y",
      "--config.seed=0",
      "--config.optimizer.b1=.9",
      "--config.steps=2",
    ),
  ]
  assert [r.name for r in runs] == [f"seed-{s}_model-{m}_b1-.9" for s in "01" for m in "xy"]
  assert len({r.label for r in runs}) == 4
  for grid in (["seed"], ["seed="], ["seed=1,,2"], ["seed=1", "seed=2"], ["seed=1,1"], ["=1"]):
    with pytest.raises(UserError):
      sweep.expand("c.py", grid, [])


def test_sweep_skips_complete_runs_and_tells_states(tmp_path, capsys):
  tiny = f"--config={REPO}/configs/tiny_syco.py"
  argv = [tiny, f"--sweep={tmp_path}", "--grid=seed=0,1,2,3"]
  for name, files in {
    "seed-0": {"summary.json": "{}", "metrics.jsonl": '{"step": 7, "reward": 0.5}\n{"st'},
    "seed-1": {"metrics.jsonl": '{"step": 3, "reward": null}\n'},
    "logs": {"seed-1.exit": "75\n", "seed-2.exit": "2\n"},
  }.items():
    (tmp_path / name).mkdir()
    for file, text in files.items():
      (tmp_path / name / file).write_text(text)
  assert sweep.main([*argv, "--status"]) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[1].split()[:4] == ["seed-0", "complete", "7", "0.500"]
  assert out[2].split()[:4] == ["seed-1", "interrupted", "3", "-"]
  assert "failed (2)" in out[3] and "not started" in out[4] and out[5] == "1 of 4 complete"
  for backend in ("local", "slurm"):
    assert sweep.main([*argv, "--dry-run", f"--backend={backend}"]) == 0
    out = capsys.readouterr().out
    assert "3 to do" in out and "seed-0" not in out
  with pytest.raises(UserError, match="seed"):
    sweep.main([tiny, f"--sweep={tmp_path}", "--grid=sead=0,1"])


QUEUE = """\
#!/bin/bash
# sbatch: prints the next job's number. squeue: what the file `queue` holds of the jobs asked for.
cd {folder}
echo "$0 $*" >>calls
case $0 in
  */sbatch) echo x >>jobs; echo $((100 + $(wc -l <jobs))) ;;
  */squeue)
    jobs=$(printf '%s\\n' "$@" | sed -n 's/--jobs=//p')
    grep -E "^(${{jobs//,/|}}) " queue ;;
esac
exit 0
"""


def test_slurm_arrays_keep_their_own_runs(tmp_path, monkeypatch, capsys):
  """A run fails while others of its array wait: what is submitted again leaves them alone."""
  for name in ("sbatch", "squeue"):
    executable(tmp_path / f"bin/{name}", QUEUE.format(folder=tmp_path))
  monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
  folder = tmp_path / "s"
  argv = [TINY_RECIPE, f"--sweep={folder}", "--grid=seed=0,1,2", "--backend=slurm"]

  def again(queue, *more):
    (tmp_path / "queue").write_text(queue)
    assert sweep.main([*argv, *more]) == 0
    return capsys.readouterr().out

  assert "submitted array 101 of 3 runs" in again("")
  first = (folder / "array-1.tsv").read_text()
  assert [line.split("/")[-1] for line in first.splitlines()] == ["seed-0", "seed-1", "seed-2"]
  (folder / "logs/seed-0.exit").write_text("1\n")
  still = "101 1 RUNNING\n101 2 PENDING\n"
  assert "submitted array 102 of 1 runs" in again(still)
  assert (folder / "array-1.tsv").read_text() == first
  assert (folder / "array-2.tsv").read_text() == first.splitlines()[0] + "\n"
  assert f"--runs={folder}/array-2.tsv" in (tmp_path / "calls").read_text().splitlines()[-1]
  out = again("102 0 PENDING\n" + still)
  assert "3 complete or queued, 0 to do" in out
  assert [line.split()[1] for line in out.splitlines()[2:5]] == ["pending", "running", "pending"]
  out = again("101 2 PENDING\n", "--status")
  assert [line.split()[1] for line in out.splitlines()[1:4]] == ["failed", "not", "pending"]
  executable(tmp_path / "bin/squeue", "#!/bin/sh\necho no answer from the controller >&2; exit 1\n")
  with pytest.raises(UserError, match="squeue failed: no answer"):  # else all would run twice
    sweep.main(argv)


@pytest.mark.parametrize(
  "code, restarts, requeued, left",
  [
    (0, 0, False, "0"),
    (2, 0, False, "2"),
    (75, 9, True, ""),
    (134, 4, True, ""),
    (134, 5, False, "134"),
  ],
)
def test_slurm_job_goes_back_into_the_queue(tmp_path, code, restarts, requeued, left):
  executable(tmp_path / "bin/srun", f"#!/bin/bash\necho cpus $SRUN_CPUS_PER_TASK\nexit {code}\n")
  executable(tmp_path / "bin/scontrol", "#!/bin/bash\necho scontrol $*\n")
  (tmp_path / "array-1.tsv").write_text(
    f"--config=c.py\n--config=c.py\t--workdir={tmp_path}/seed-1\n"
  )
  (tmp_path / "logs").mkdir()
  exit_file = tmp_path / "logs/seed-1.exit"
  exit_file.write_text("1\n")  # of an earlier attempt
  env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_RESTART_COUNT": str(restarts)}
  env |= {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
  env |= {"SLURM_CPUS_PER_TASK": "3"}
  out = sh("bash", "launch/slurm.sbatch", f"--runs={tmp_path}/array-1.tsv", env=env)
  assert out.returncode == code and "cpus 3" in out.stdout
  assert ("scontrol requeue Incomplete 7_1" in out.stdout) == requeued
  assert (exit_file.read_text() if exit_file.exists() else "").strip() == left


def test_no_flag_sends_a_task_to_another_run(tmp_path):
  """A tab or a line's end within a flag made two flags of it, or moved all tasks after it."""
  odd = [
    "--config.name=a\tb",
    "--config.name=c\nd\n",
    "--config.name=e\\tf\\",
    "--config.name=$(x)",
  ]
  executable(tmp_path / "bin/srun", "#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
  rows = [sweep.slurm_row((flag, "--config.seed=1")) for flag in odd]
  (tmp_path / "array-1.tsv").write_text("\n".join(rows) + "\n")
  for task, flag in enumerate(odd):
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
    out = sh("bash", "launch/slurm.sbatch", f"--runs={tmp_path}/array-1.tsv", env=env)
    assert out.stdout.split("\0")[-3:-1] == [flag, "--config.seed=1"]


def test_a_job_with_gpus_does_not_train_on_the_cpu():
  def told(*flags, gpus):
    env = {"SLURM_GPUS_ON_NODE": gpus}
    return sh("bash", "launch/slurm.sbatch", "--dry-run", *flags, env=env).stdout.split()

  assert told("--config=c.py", gpus="8")[-1] == "--config.platform=gpu"
  assert told("--config=c.py", "--config.platform=cpu", gpus="8")[-1] == "--config.platform=cpu"
  assert told("--config=c.py", gpus="0")[-1] == "--config=c.py"


def test_sweep_on_kubernetes_applies_what_the_bucket_lacks(cloud, monkeypatch, capsys):
  text = "#!/bin/bash\necho $* >>{0}/kubectl.args\n(cat; echo ---) >>{0}/applied.yaml\n"
  executable(cloud.folder / "bin/kubectl", text.format(cloud.folder))
  monkeypatch.setenv("PATH", cloud.env["PATH"])
  monkeypatch.setenv("PYTHONPATH", str(REPO))
  argv = [TINY_RECIPE, "--sweep=s", "--grid=seed=0,1,2", "--bucket=b", "--backend=k8s"]
  runs = {run.name: run for run in sweep.expand(argv[0].partition("=")[2], ["seed=0,1,2"], [])}
  hour_old = time.time() - 3600
  for path, content in {
    "seed-1/summary.json": "{}",
    "seed-1/metrics.jsonl": '{"step": 6, "reward": 0.5}\n',
    "seed-2/metrics.jsonl": '{"step": 3}\n{"step": 4, "reward": 0.25}\n{"st',
    "seed-2/config.json": "{}",
  }.items():
    file = cloud.folder / "bucket/s" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    os.utime(file, (hour_old, hour_old))
  assert sweep.main([*argv, "--status"]) == 0
  out = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert out[1] == "seed-0 not started - - - -".split()
  assert out[2] == "seed-1 complete 6 0.500 - -".split()
  assert out[3] == "seed-2 wrote 60 min ago 4 0.250 - -".split()
  options = ["--pass=--image=i", "--pass=--device=H100-2"]
  assert sweep.main([*argv, *options, "--dry-run"]) == 0
  assert not (cloud.folder / "applied.yaml").exists() and "2 to do" in capsys.readouterr().out
  assert sweep.main([*argv, *options]) == 0
  assert (cloud.folder / "kubectl.args").read_text() == "apply -f -\n" * 2
  applied = [m for m in yaml.safe_load_all((cloud.folder / "applied.yaml").read_text()) if m]
  for manifest, name in zip(applied, ("seed-0", "seed-2"), strict=True):
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == runs[name].label
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = job["containers"][0]["command"]
    told = [f"--workdir=/bucket/s/{name}", "--config.platform=gpu"]
    assert command[3:] == [*runs[name].flags, *told]
  executable(cloud.folder / "bin/kubectl", "#!/bin/sh\nexit 3\n")
  with pytest.raises(UserError, match="kubectl apply ended with 3"):
    sweep.main([*argv, *options])
  # The same bucket answers for TPUs.
  argv[-1] = "--backend=tpu"
  assert sweep.main([*argv, "--dry-run", "--pass=--zone=z"]) == 0
  out = capsys.readouterr().out
  assert "2 to do" in out and "--config.seed=0" in out and "--config.seed=1" not in out
  assert "--zone=z" in out and "--workdir=../bucket/s/seed-0" in out


def test_local_sweep_runs_what_is_left(tmp_path):
  """Two real runs, of which one has a setting that the program refuses."""
  command = [sys.executable, "launch/sweep.py", f"--config={REPO}/configs/tiny_syco.py"]
  command += [f"--sweep={tmp_path}", "--grid=max_prompt_tokens=512,8", "--jobs=2", "--"]
  command += ["--config.steps=0", "--config.eval.prompts=2", "--config.sampler.max_tokens=4"]
  env = {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
  out = sh(*command, env=env, timeout=900)
  assert out.returncode == 1 and "max_prompt_tokens-8: exit 2" in out.stdout, (
    out.stdout + out.stderr
  )
  assert (
    "1 of 2 complete" in out.stdout and (tmp_path / "max_prompt_tokens-512/summary.json").exists()
  )
  assert "the limit is 8" in (tmp_path / "logs/max_prompt_tokens-8.log").read_text()
  again = sh(*command, env=env, timeout=900)
  assert "1 complete or queued, 1 to do" in again.stdout and again.returncode == 1
