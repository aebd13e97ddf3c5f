"""Real processes on this machine train together (CPU collectives) as several hosts would.

One process is the reference. One of two dies in the middle, one goes on alone, is preempted, and
two end it: the checkpoints of any number of hosts serve any other number, and the numbers stay.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import FAST_COMPILE

from rlsafety import runtime, train
from rlsafety.errors import UserError
from rlsafety.study import design

REPO = pathlib.Path(__file__).resolve().parents[1]
FLAGS = (
  f"--config={REPO}/configs/tiny_syco.py --config.steps=3 --config.checkpoint.every=1 "
  "--config.eval.every=3 --config.eval.prompts=4 --config.sampler.max_tokens=8 "
  "--config.learner.microbatches=1"
).split()


def launch(workdir, count, *flags, program=("rlsafety.train", *FLAGS), devices=1):
  """Starts `count` processes of one program, each with so many devices; their output goes to
  workdir-N.log."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  children = []
  for index in range(count):
    env = dict(os.environ, PYTHONPATH=str(REPO), JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = f"{FAST_COMPILE} --xla_force_host_platform_device_count={devices}"
    env |= {"NPROC": "4", "RLSAFETY_HEARTBEAT": "10"}
    command = [sys.executable, "-m", *program, *flags, f"--workdir={workdir}"]
    if count > 1:
      values = (address, count, index)
      command += [f"--{name}={x}" for (name, *_), x in zip(runtime.FLAGS, values, strict=True)]
    log = pathlib.Path(f"{workdir}-{index}.log").open("a")
    children.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=REPO))
  return children


def finish(children, seconds=900):
  end = time.monotonic() + seconds
  try:
    return [c.wait(max(0.1, end - time.monotonic())) for c in children]
  finally:
    for c in children:
      c.kill()


def wait_for_step(workdir, step, children, seconds=900):
  end = time.monotonic() + seconds
  path = workdir / "checkpoints" / str(step)
  while not path.exists():
    assert time.monotonic() < end, f"no checkpoint of step {step}"
    assert all(c.poll() is None for c in children), "a process ended too early"
    time.sleep(0.05)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def assert_same_numbers(workdir, reference):
  found, wanted = rows(workdir), rows(reference)
  assert [r["step"] for r in found] == [1, 2, 3]
  for a, b in zip(found, wanted, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
  said = [(pathlib.Path(w) / "rollouts/train.jsonl").read_text() for w in (workdir, reference)]
  tokens = [[json.loads(line)["tokens"] for line in text.splitlines()] for text in said]
  assert tokens[0] == tokens[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one") / "run"
  assert finish(launch(workdir, 1)) == [0]
  return workdir


def test_two_processes_lose_one_one_goes_on_and_is_preempted_and_two_end(tmp_path, reference):
  workdir = tmp_path / "run"
  # Every array of the state is split over all four devices, and no process holds a whole one.
  children = launch(workdir, 2, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=2)
  wait_for_step(workdir, 1, children)
  children[1].kill()
  killed = time.monotonic()
  codes = finish(children, 300)
  assert time.monotonic() - killed < 60  # a heartbeat of 10 s, and the end of the other process
  assert codes[1] == -signal.SIGKILL and codes[0] != 0
  said = pathlib.Path(f"{workdir}-0.log").read_text()
  # The error names who died, whether it was missed by a heartbeat or at a barrier.
  assert re.search(r"task[ :]*1\b|heartbeats\):\s*1\b", said, re.I), said
  assert not (workdir / "summary.json").exists()
  shutil.rmtree(workdir / "checkpoints/2", ignore_errors=True)  # it may have come so far
  children = launch(workdir, 1)
  wait_for_step(workdir, 2, children)
  children[0].send_signal(signal.SIGTERM)
  assert finish(children) == [75]
  assert finish(launch(workdir, 2, "--config.mesh.fsdp=2")) == [0, 0]
  assert_same_numbers(workdir, reference)


STUDY = """
from rlsafety import recipes
from rlsafety.study.design import Question, Study, crossed

def get_study(ways="2"):
  c = recipes.frozen(recipes.load_recipe("{repo}/configs/tiny_syco.py"))
  flags = dict(flag.removeprefix("--config.").split("=") for flag in {flags})
  sizes = {{k: int(v) for k, v in flags.items()}}
  c = recipes.replaced(c, sizes | {{"mesh.fsdp": int(ways), "mesh.tensor": int(ways)}})
  cells = crossed(c, {{"seed": (5, 6)}})
  return Study("two", cells, (Question("gap rises", tuple(cells)),))
"""


def test_two_processes_train_two_cells_together_as_one_does(tmp_path):
  file, workdir = tmp_path / "study.py", tmp_path / "study"
  file.write_text(STUDY.format(repo=REPO, flags=FLAGS[1:]))
  one = design.load(f"{file}:1").cells  # in this process, on one device
  train.run_together(one, {name: str(tmp_path / "one" / name) for name in one})
  program = ("rlsafety.study.run", f"--study={file}")
  assert finish(launch(workdir, 2, program=program, devices=2)) == [0, 0]  # on four
  for name in one:
    assert_same_numbers(workdir / name, tmp_path / "one" / name)
  said = [pathlib.Path(f"{workdir}-{i}.log").read_text() for i in range(2)]
  assert said[0].count("answer\ngap rises") == 1 and "gap rises" not in said[1]


def test_who_starts_alone_and_who_joins():
  given = dict(zip(runtime.VARIABLES, ("h:1", "2", "1"), strict=True))
  arguments = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
  assert runtime._arguments(given) == arguments
  assert runtime._arguments({**given, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
  assert runtime._arguments({}) is None
  srun = {"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
  assert runtime._arguments(srun) == {}
  assert runtime._arguments({**srun, "SLURM_NTASKS": "1"}) is None
  for bad in (
    {"JAX_PROCESS_ID": "2"},
    {"JAX_NUM_PROCESSES": "x"},
    {"JAX_COORDINATOR_ADDRESS": "h"},
  ):
    with pytest.raises(UserError, match=next(iter(bad))):
      runtime._arguments({**given, **bad})
  del given["JAX_PROCESS_ID"]
  with pytest.raises(UserError, match="JAX_PROCESS_ID is not"):
    runtime._arguments(given)


BARRIER = """
import collections, sys, time, jax
import numpy as np
from rlsafety import runtime
from rlsafety.judges import http
from rlsafety.judges.endpoint import Asked, Endpoint
runtime.start()
runtime.barrier("both are here", 60)

async def answer(endpoint, requests):
  words = f"no from {jax.process_index()}" if jax.process_index() else ""
  return Asked(np.array(requests, np.float32), collections.Counter(asked=len(requests)), words)

http.ask_all = answer
asked = http.ask_everywhere(Endpoint("", "", ""), [1, 2, 3, 4, 5], {})
assert asked.scores.tolist() == [1, 2, 3, 4, 5] and asked.counts == {"asked": 5}, asked
assert asked.words == "no from 1", asked
if jax.process_index() == 1:
  time.sleep(8)
else:
  runtime.barrier("end of step 3", 3)
"""


def test_endpoints_are_asked_in_shares_and_a_barrier_names_who_is_missing():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  children = []
  for index in "01":
    env = dict(os.environ, PYTHONPATH=str(REPO), JAX_PLATFORMS="cpu", XLA_FLAGS="")
    env |= dict(zip(runtime.VARIABLES, (address, "2", index), strict=True))
    env |= {"RLSAFETY_HEARTBEAT": "10"}
    children.append(
      subprocess.Popen([sys.executable, "-c", BARRIER], env=env, stderr=subprocess.PIPE, text=True)
    )
  _, error = children[0].communicate(timeout=600)
  children[1].kill()
  assert children[0].returncode != 0
  assert "process 0 waited 3 s at 'end of step 3'; missing: process 1 of 2" in error
