"""Where a run directory can lie: addresses, and file systems that lack what a run relies on."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from rlsafety.errors import UserError
from rlsafety.rundir import place

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("address", ["gs://b/runs/x", "s3://b/x", "gs:/b/x", "file:///tmp/x"])
def test_an_address_is_refused_before_anything_is_made(tmp_path, monkeypatch, address):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="a folder, not an address; mount the"):
    place.check(address)
  assert not list(tmp_path.iterdir())


def test_training_into_an_address_is_one_line_and_exit_code_2(tmp_path):
  command = [sys.executable, "-m", "rlsafety.train", f"--config={REPO}/configs/tiny_syco.py"]
  env = dict(os.environ, PYTHONPATH=str(REPO))
  out = subprocess.run(
    [*command, "--workdir=gs://b/x"], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert out.returncode == 2 and "--workdir=gs://b/x: a run directory is a folder" in out.stderr
  assert len(out.stderr.splitlines()) == 2 and not list(tmp_path.iterdir())


def test_a_file_system_without_renames_or_appends_is_refused(tmp_path, monkeypatch):
  """What a bucket mounted without a hierarchical namespace, or without staging, answers."""
  assert list(place.check(str(tmp_path / "run")).iterdir()) == []  # nothing is left behind

  def refuse(*_, **__):
    raise OSError(38, "Function not implemented")

  with monkeypatch.context() as patched:
    patched.setattr(place.os, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot rename a folder there \(Function not impl"):
      place.check(str(tmp_path / "run"))
  with monkeypatch.context() as patched:
    patched.setattr(place, "open", refuse, raising=False)
    with pytest.raises(UserError, match="cannot append to a file there"):
      place.check(str(tmp_path / "run"))
  with monkeypatch.context() as patched:  # a rename that reports success and copies
    patched.setattr(place.os, "replace", lambda a, b: None)
    with pytest.raises(UserError, match="workdir .*: cannot "):
      place.check(str(tmp_path / "run"))
  assert list((tmp_path / "run").iterdir()) == []


# --- file systems that lack something: a preloaded library answers for one folder ----------------


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
  """Environment for a program to whom `MOUNT` lacks LACKS."""
  compiler = shutil.which("gcc") or shutil.which("cc")
  if not compiler or sys.platform != "linux":
    pytest.skip("no C compiler here (apt install gcc): no file system without renames and appends")
  library = tmp_path_factory.mktemp("lacking") / "lacking.so"
  source = pathlib.Path(__file__).with_name("lacking.c")
  command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
  subprocess.run(command, check=True)
  return dict(os.environ, PYTHONPATH=str(REPO), LD_PRELOAD=str(library), JAX_PLATFORMS="cpu")


REFUSED = {
  "rename": r"cannot rename a folder there \(Too many open files\)",
  "copy": r"cannot read what was written there \(it reads as something else\)",
  "append": r"cannot append to a file there \(Invalid argument\)",
  "keep": r"cannot append to a file there \(what was there is gone\)",
}


@pytest.mark.parametrize("lacks", REFUSED)
def test_what_a_file_system_lacks_is_found(tmp_path, lacking, lacks):
  program = "import sys; from rlsafety.rundir import place; place.check(sys.argv[1])"
  command = [sys.executable, "-c", program, str(tmp_path / "run")]
  env = lacking | {"MOUNT": str(tmp_path), "LACKS": lacks}
  out = subprocess.run(command, env=env, capture_output=True, text=True)
  assert out.returncode and re.search(REFUSED[lacks], out.stderr), out.stderr
  assert list((tmp_path / "run").iterdir()) == []
  # The same library, and a folder that lacks nothing.
  env["MOUNT"] = "/nowhere"
  assert subprocess.run(command, env=env).returncode == 0


def test_training_on_such_a_file_system_ends_before_anything_is_computed(tmp_path, lacking):
  runs = {}
  for lacks in ("rename", "append"):  # beside each other: most of their time they import JAX
    command = [sys.executable, "-m", "rlsafety.train", f"--config={REPO}/configs/tiny_syco.py"]
    runs[lacks] = subprocess.Popen(
      [*command, f"--workdir={tmp_path / lacks}"],
      env=lacking | {"MOUNT": str(tmp_path), "LACKS": lacks},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
  for lacks, run in runs.items():
    out, said = run.communicate(timeout=120)
    assert run.returncode == 2 and not out, said
    first, fault = said.splitlines()
    assert first == "rlsafety.train: loading" and re.search(REFUSED[lacks], fault)
    assert fault.startswith(f"rlsafety: workdir {tmp_path / lacks}: ")
    assert list((tmp_path / lacks).iterdir()) == []
