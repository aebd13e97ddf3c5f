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
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in reversed(daemons):
      try:
        daemon.wait(20)
      except subprocess.TimeoutExpired:
        daemon.kill()


def test_hello(slurm, tmp_path):
  out = subprocess.run(
    ["srun", "-n2", "--overcommit", "bash", "-c", "echo $SLURM_PROCID $SLURM_STEP_NODELIST"],
    env=slurm,
    capture_output=True,
    text=True,
    timeout=60,
  )
  print(out)
  assert out.returncode == 0
