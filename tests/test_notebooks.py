"""The notebooks in colabs/: their install cell, their twins, and a run of every one."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
from conftest import FAST_COMPILE
from launchers import REPO, load

notebooks = load("colabs/notebooks.py")
FOLDER = REPO / "colabs"


def cells(name):
  return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def install_cell(name):
  """The first cell of code, as text."""
  return "".join(next(c for c in cells(name) if c["cell_type"] == "code")["source"])


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_each_notebook_is_its_script(name):
  written = json.loads((FOLDER / f"{name}.ipynb").read_text())
  script = (FOLDER / f"{name}.py").read_text()
  assert written == notebooks.notebook(name, script), "run python colabs/notebooks.py"
  # Without a kernel's name papermill refuses a notebook; without ids it is not nbformat 4.5.
  assert written["metadata"]["kernelspec"]["name"] == "python3"
  ids = [cell["id"] for cell in written["cells"]]
  assert len(set(ids)) == len(ids) and all(cell["source"] for cell in written["cells"])
  assert install_cell(name) == install_cell("explore")


@pytest.fixture
def colab(tmp_path, monkeypatch):
  """A folder and an interpreter without the package; returns what the install cell calls."""
  calls = []

  def called(command, **_):
    calls.append(command)
    if command[0] == "git":
      pathlib.Path(command[-1]).mkdir()
    return subprocess.CompletedProcess(
      command, 1 if "fail" in command[-2] else 0, "", "no such host"
    )

  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("RLSAFETY_REPOSITORY", raising=False)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr(subprocess, "run", called)
  monkeypatch.setattr(sys, "path", list(sys.path))
  return calls


def test_the_install_cell_asks_for_the_address_once(colab):
  """It ran `pip install .` in the notebook's own folder and died."""
  with pytest.raises(ValueError, match="set REPOSITORY, in this cell, to the address"):
    exec(install_cell("explore"), {})
  assert not colab


def test_the_install_cell_keeps_the_runtimes_own_jax(colab, tmp_path):
  address = "https://example.org/rlsafety.git"
  exec(install_cell("explore").replace('REPOSITORY = ""', f'REPOSITORY = "{address}"'), {})
  clone, install = colab
  assert clone == ("git", "clone", "--depth=1", address, "rlsafety-code")
  assert install[1:3] == ("-m", "pip") and "--constraint=kept.txt" in install
  assert install[-2:] == ("--editable", ".")
  kept = (tmp_path / "rlsafety-code/kept.txt").read_text().splitlines()
  for name in ("jax", "jaxlib"):
    assert f"{name}=={importlib.metadata.version(name)}" in kept
  assert not [line for line in kept if not line.startswith(("jax", "libtpu"))]
  assert sys.path[0] == os.getcwd() == str(tmp_path / "rlsafety-code")


@pytest.mark.parametrize(
  ("others", "program", "wanted"),
  [({}, None, "."), ({"libtpu": "0.0.17"}, None, ".[tpu]"), ({}, "nvidia-smi", ".[cuda12]")],
)
def test_a_jax_that_is_too_old_gives_way_to_one_for_the_same_device(
  colab, tmp_path, monkeypatch, others, program, wanted
):
  """Colab's runtime 2026.01 has JAX 0.7.2: keeping it, pip could only refuse."""
  old = {"jax": "0.7.2", "jaxlib": "0.7.2"} | others
  found = [types.SimpleNamespace(name=n, version=v) for n, v in old.items()]
  monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
  monkeypatch.setattr("shutil.which", lambda name: program)
  monkeypatch.setenv("RLSAFETY_REPOSITORY", "https://example.org/rlsafety.git")
  exec(install_cell("explore"), {})
  assert colab[-1][-2:] == ("--editable", wanted)
  assert (tmp_path / "rlsafety-code/kept.txt").read_text() == ""


def test_a_session_that_has_an_older_numpy_loaded_is_to_be_restarted(colab, monkeypatch):
  monkeypatch.setenv("RLSAFETY_REPOSITORY", "https://example.org/rlsafety.git")
  older = types.SimpleNamespace(__name__="numpy", __version__="1.26.4")
  monkeypatch.setitem(sys.modules, "numpy", older)
  with pytest.raises(RuntimeError, match="Restart session"):
    exec(install_cell("explore"), {})


def test_an_install_that_fails_says_why(colab, monkeypatch):
  monkeypatch.setenv("RLSAFETY_REPOSITORY", "https://fail.example/rlsafety.git")
  with pytest.raises(RuntimeError, match="git clone .* no such host"):
    exec(install_cell("explore"), {})


def test_every_notebook_runs(tmp_path):
  """All four in one process, which compiles what they share once; nothing is shown."""
  (tmp_path / "configs").symlink_to(REPO / "configs")
  program = (
    "import runpy, sys\nfor path in sys.argv[1:]:\n  runpy.run_path(path)\n  print('ran', path)"
  )
  env = dict(os.environ, PYTHONPATH=str(REPO), MPLBACKEND="Agg", JAX_PLATFORMS="cpu")
  env["XLA_FLAGS"] = FAST_COMPILE
  paths = [str(FOLDER / f"{name}.py") for name in notebooks.NAMES]
  out = subprocess.run(
    [sys.executable, "-c", program, *paths], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert [line for line in out.stdout.splitlines() if line.startswith("ran ")] == [
    f"ran {path}" for path in paths
  ], out.stderr[-3000:]
  for said in ("BEFORE [HEX", "my_study.late_return", "political_qa", "AUC of the probe"):
    assert said in out.stdout
  made = tmp_path / "runs/notebook"
  assert len(list(made.glob("study/*/summary.json"))) == 4
  assert (made / "study_results/index.html").exists()
