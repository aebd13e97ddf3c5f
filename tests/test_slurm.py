"""launch/slurm.sbatch on a real slurmctld and slurmd, started here on the loopback interface.

Needs Debian's slurm-wlm and munge, and root (slurmd runs tasks as their owners). Elsewhere
these tests skip. One node of this machine; two tasks on it make two JAX processes.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import FAST_COMPILE

REPO = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
LACKING = [p for p in PROGRAMS if not shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]

pytestmark = [
  pytest.mark.skipif(bool(LACKING), reason=f"SLURM is not installed here: no {', '.join(LACKING)}"),
  pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobRequeue=1
KillWait=20
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=0
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def wait_for(condition, seconds, what):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if value := condition():
      return value
    time.sleep(0.2)
  raise AssertionError(f"{what} not seen within {seconds} s")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """A one-node cluster; yields the environment in which its commands work."""
  folder = tmp_path_factory.mktemp("slurm")
  for name in ("state", "spool"):
    (folder / name).mkdir()
  key = folder / "munge.key"
  key.write_bytes(os.urandom(1024))
  key.chmod(0o600)
  conf = folder / "slurm.conf"
  host = socket.gethostname().split(".")[0]
  conf.write_text(CONF.format(folder=folder, host=host, controller=free_port(), daemon=free_port()))
  env = dict(os.environ, SLURM_CONF=str(conf), PYTHONPATH=str(REPO), RLSAFETY_PYTHON=sys.executable)
  # One device per task; code generation takes most of a tiny run, its quality no matter here.
  env |= {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu", "NPROC": "4"}
  env["PATH"] += ":/usr/sbin:/sbin"
  commands = [
    ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    + [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
    + [f"--seed-file={folder}/munged.seed", "--num-threads=2"],
    ["slurmctld", "-D", "-c", "-f", str(conf)],
    ["slurmd", "-D", "-f", str(conf)],
  ]
  daemons = []
  try:
    for command in commands:
      log = (folder / f"{command[0]}.out").open("w")
      daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
      if command[0] == "munged":
        wait_for((folder / "munge.socket").exists, 10, "munge socket")

    def idle():
      query = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
      return query.stdout.strip() == "idle"

    try:
      wait_for(idle, 30, "an idle node")
    except AssertionError:
      pytest.skip(f"SLURM does not start on this machine, see {folder}")
    yield env
  finally:
    if len(daemons) == len(commands):  # a failed test leaves no job behind
      subprocess.run(["scancel", "--user=root"], env=env, timeout=60)
      time.sleep(1)
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in reversed(daemons):
      try:
        daemon.wait(20)
      except subprocess.TimeoutExpired:
        daemon.kill()


TINY = [
  f"--config={REPO}/configs/tiny_syco.py",
  "--config.steps=2",
  "--config.eval.every=2",
  "--config.eval.prompts=4",
  "--config.checkpoint.every=1",
  "--config.sampler.max_tokens=8",
]


def out_of(command, env, **kwargs):
  kwargs = {"capture_output": True, "text": True, "timeout": 300, "cwd": REPO} | kwargs
  return subprocess.run([str(c) for c in command], env=env, **kwargs)


def gone(job, env):
  """No task of the job waits or runs any more."""
  return lambda: out_of(["squeue", "-h", "-j", job], env).stdout.strip() == ""


def test_sweep_runs_an_array_and_skips_what_is_complete(slurm, tmp_path):
  sweep = tmp_path / "sweep"
  command = [sys.executable, "launch/sweep.py", f"--sweep={sweep}", *TINY[:1], "--backend=slurm"]
  command += ["--grid=seed=1,2", "--jobs=2", "--pass=--cpus-per-task=1", "--", *TINY[1:]]
  first = out_of(command, slurm)
  assert first.returncode == 0 and "submitted array" in first.stdout, first.stderr
  job = (sweep / "arrays.tsv").read_text().split()[0]
  waiting = out_of(command, slurm)  # what is queued is left to the queue
  assert "2 complete or queued, 0 to do" in waiting.stdout
  wait_for(gone(job, slurm), 900, "the end of the array")
  logs = "".join(p.read_text() for p in (sweep / "logs").glob("*.log"))
  assert sorted(p.parent.name for p in sweep.glob("*/summary.json")) == ["seed-1", "seed-2"], logs
  status = out_of([*command[: command.index("--")], "--status", "--", *TINY[1:]], slurm)
  assert "2 of 2 complete" in status.stdout
  assert [p.read_text() for p in (sweep / "logs").glob("*.exit")] == ["0\n"] * 2


def test_two_tasks_are_one_run_and_a_preempted_job_resumes(slurm, tmp_path):
  """srun starts two JAX processes; SIGTERM makes them save, requeue and complete."""
  workdir, log = tmp_path / "run", tmp_path / "job.log"
  submit = ["sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}"]
  flags = [*TINY, "--config.steps=6", "--config.eval.every=6", f"--workdir={workdir}"]
  job = out_of([*submit, "launch/slurm.sbatch", *flags], slurm).stdout.strip()
  assert job.isdigit()

  def seen(path):
    def look():
      assert out_of(["squeue", "-h", "-j", job], slurm).stdout.strip(), log.read_text()
      return path.exists()

    return look

  wait_for(seen(workdir / "checkpoints" / "1"), 900, "a first checkpoint")
  out_of(["scancel", "--signal=TERM", job], slurm)
  wait_for(lambda: "back into the queue" in log.read_text(), 300, "the requeue")
  time.sleep(5)  # SLURM refuses a start in the second in which it revoked the job's credential
  out_of(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm)
  wait_for(gone(job, slurm), 900, "the end of the job")
  text = log.read_text()
  assert (workdir / "summary.json").exists(), text
  assert "resuming after step" in text and "'data': 2" in text


def test_a_dead_host_is_started_again_and_a_cancelled_job_is_not(slurm, tmp_path):
  """In place of the training: a program that aborts once, then waits for SIGTERM and saves."""
  python, log, starts = (tmp_path / name for name in ("python", "job.log", "starts"))
  python.write_text(f"""#!/bin/bash
echo >>{starts}
if (($(wc -l <{starts}) == 1)); then kill -ABRT $$; fi
trap 'echo saved; exit 75' TERM
echo ready
while :; do sleep 0.2; done
""")
  python.chmod(0o755)
  env = dict(slurm, RLSAFETY_PYTHON=str(python))
  submit = ["sbatch", "--parsable", f"--output={log}", "launch/slurm.sbatch", "--config=c.py"]
  job = out_of(submit, env).stdout.strip()

  def begun_again():
    out_of(["scontrol", "update", f"JobId={job}", "StartTime=now"], env)
    return "ready" in log.read_text()

  wait_for(lambda: log.exists() and "ended with 134, back into" in log.read_text(), 60, "requeue")
  time.sleep(5)  # as above
  wait_for(begun_again, 60, "a second start")
  out_of(["scancel", job], env)
  wait_for(lambda: "ended with 75" in log.read_text(), 60, "the end")
  time.sleep(3)
  assert gone(job, env)() and "saved" in log.read_text()
  assert len(starts.read_text().splitlines()) == 2
