"""The TPU loop, launch/tpu_pod.sh with launch/tpu_worker.sh, against a stand-in of gcloud."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from launchers import REPO, core, executable, installed_wheel, machine, root, sh, stand_in, wheel


@pytest.fixture
def cloud(tmp_path):
  return stand_in(tmp_path)


POD = ("--name=run-1", "--zone=us-west4-a", "--device=v5e-16", "--bucket=gs://b", "--poll=0")


@pytest.mark.parametrize("code, slice_lost", [(75, False), (75, True), (134, False)])
def test_tpu_run_survives_a_preemption_and_a_dead_host(cloud, code, slice_lost):
  # The first start of the training ends early, the second one completes.
  executable(
    cloud.folder / "trainer",
    f"""\
    #!/bin/bash
    echo "args: $*"
    if [[ ! -e {cloud.folder}/was-here ]]; then
      touch {cloud.folder}/was-here
      {f"echo SUSPENDED >{cloud.folder}/state" if slice_lost else ""}
      exit {code}
    fi
    echo step 300
    """,
  )
  out = cloud(
    "train", *POD, "--spot", "--delete-when-done", "--", "--config=c.py", "--config.seed=5"
  )
  assert out.returncode == 0, out.stderr
  why = "unreachable" if slice_lost else f"exit {code}"
  assert f"interrupted ({why}), restart 1" in out.stderr
  assert "args: -m rlsafety.train --config=c.py --config.seed=5 --workdir=../bucket/runs/run-1" in (
    out.stdout
  )
  assert "step 300" in out.stdout and "--config.platform=tpu" in out.stdout
  create, delete = ([c for c in cloud.calls() if verb in c[:4]] for verb in ("create", "delete"))
  assert "--spot" in create[0] and "--accelerator-type=v5litepod-16" in create[0]
  assert "--runtime-version=v2-alpha-tpuv5-lite" in create[0] and "--force" in delete[-1]
  assert len(create) == 1 + slice_lost and not (cloud.folder / "state").exists()


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED"])
def test_lost_slice_is_deleted_and_made_anew(cloud, lost):
  executable(cloud.folder / "trainer", "#!/bin/bash\necho trained\n")
  (cloud.folder / "state").write_text(lost)
  out = cloud("train", *POD, "--", "--config=c.py")
  assert out.returncode == 0, out.stderr
  verbs = [c[3] for c in cloud.calls() if c[2] == "queued-resources" and c[3] != "describe"]
  assert verbs == ["delete", "create"]
  now, run, cost = cloud("status", *POD).stdout.splitlines()
  assert (now, run) == ("slice: ACTIVE", "run: exit 0")
  assert re.fullmatch(r"cost: \d+\.\d h x 16 chips x \$1.20 = \$\d+\.\d\d at .*`delete`", cost)
  # The same command again joins what is there: it neither creates nor trains.
  before = len([c for c in cloud.calls() if c[3] in ("create", "scp")])
  assert cloud("train", *POD, "--", "--config=c.py").returncode == 0
  assert len([c for c in cloud.calls() if c[3] in ("create", "scp")]) == before


@pytest.mark.parametrize("code, starts, delete", [(2, 1, False), (2, 1, True), (1, 6, True)])
def test_a_failed_run_says_so_and_obeys_the_delete_flag(cloud, code, starts, delete):
  executable(
    cloud.folder / "trainer",
    f"#!/bin/bash\necho rlsafety: no | tee -a {cloud.folder}/log\nexit {code}\n",
  )
  out = cloud("train", *POD, *["--delete-when-done"] * delete, "--", "--config=c.py")
  assert out.returncode == 2 and f"the run failed (exit {code})" in out.stderr
  assert "rlsafety: no" in out.stdout
  assert (cloud.folder / "log").read_text() == "rlsafety: no\n" * starts
  assert (cloud.folder / "state").exists() != delete
  assert ("the slice is deleted" if delete else "the slice is kept and costs money") in out.stderr


def test_a_request_that_is_not_granted_is_given_up(cloud):
  """It went on for ever: FAILED, delete, create, FAILED."""
  (cloud.folder / "not-granted").touch()
  out = cloud("train", *POD, "--valid-until-duration=6h", "--", "--config=c.py", timeout=60)
  assert out.returncode == 2 and "no slice was granted (FAILED: There is no more cap" in out.stderr
  verbs = [c[3] for c in cloud.calls() if c[2] == "queued-resources" and c[3] != "describe"]
  assert verbs == ["create", "delete"]


# --- the set-up of a VM that has Ubuntu 22.04's Python 3.10 --------------------------------------

UV = shutil.which("uv", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
# In place of the machine's pip: it brings uv as `pip install --target` does. uv itself is real
# where it makes the environment; what it would install is the trainer of the test.
PIP_BRINGS_UV = """\
if [[ $* == "-m pip install "*" --target="*" uv" ]]; then
  target=$(printf '%s\\n' "$@" | sed -n 's/--target=//p')
  mkdir -p "$target/bin"
  cp {folder}/uv "$target/bin/uv"
elif [[ $1 == -c && $2 != *version_info* ]]; then exit 0
else exit 1
fi
"""
FAKE_UV = """\
#!/bin/bash
echo "$*" >>{folder}/uv-calls
if [[ $1 == venv ]]; then exec {uv} "$@"; fi
[[ -e {folder}/trainer ]] || {{ echo no matching distribution; exit 1; }}
rm "$4"
cp {folder}/trainer "$4"
"""


@pytest.fixture
def old_vm(cloud, monkeypatch):
  """A VM as Google gives it, and a Python of uv's own where uv keeps them."""
  if not UV:
    pytest.skip("uv is not installed (pip install uv)")
  folder, version = cloud.folder, sys.version_info
  machine(folder, python3=PIP_BRINGS_UV.format(folder=folder))
  executable(folder / "uv", FAKE_UV.format(folder=folder, uv=UV))
  name = f"cpython-{version.major}.{version.minor}.{version.micro}-linux-x86_64-gnu"
  python = folder / "pythons" / name / "bin" / f"python{version.major}.{version.minor}"
  python.parent.mkdir(parents=True)
  python.symlink_to(os.path.realpath(sys.executable))
  monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(folder / "pythons"))
  monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
  monkeypatch.setenv("UV_CACHE_DIR", str(folder / "cache"))
  return cloud


def test_a_vm_with_python_3_10_gets_a_newer_one(old_vm):
  executable(old_vm.folder / "trainer", "#!/bin/bash\necho trained\n")
  out = old_vm("train", *POD, "--", "--config=c.py")
  assert out.returncode == 0, out.stderr
  made, installed = (old_vm.folder / "uv-calls").read_text().splitlines()
  assert made.startswith("venv ") and installed.startswith("pip install --python ")
  assert installed.endswith("--editable .[tpu]") and "trained" in out.stdout
  home = old_vm.folder / "home"
  assert (
    f"{sys.version_info.major}.{sys.version_info.minor}"
    in (home / "rlsafety-venv/pyvenv.cfg").read_text()
  )


def find_python_3_10():
  """A real one: on PATH, or where a version manager keeps it, beside ours."""
  beside = pathlib.Path(sys.base_prefix).parent.glob("*3.10*/bin/python3.10")
  for path in filter(None, [shutil.which("python3.10"), *beside]):
    code = "import pip, sys; print(sys.base_prefix)"
    out = subprocess.run([path, "-c", code], capture_output=True, text=True)
    if out.returncode == 0:
      return str(path), out.stdout.strip()
  return None


@pytest.fixture
def real_vm(cloud, tmp_path):
  """A VM whose root holds a real Python 3.10 and no other: what pip, uv and the programs there do
  is real. Packages come from a folder: uv and setuptools are themselves, the others empty but JAX,
  which says who imports it."""
  old = find_python_3_10()
  if not UV or not old:
    pytest.skip("no uv, or no Python 3.10 with pip beside this Python")
  if "/usr" in (sys.base_prefix, old[1]):
    pytest.skip("Python lies in /usr, which the root does not take over")
  if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"]).returncode:
    pytest.skip("this user may not make a root of its own (unshare --user)")
  folder, version = cloud.folder, sys.version_info
  machine(folder, at="/host", python3=f'exec {old[0]} "$@"')
  packages = folder / "shared/packages"
  packages.mkdir(parents=True)
  for name in ("uv", "setuptools"):
    installed_wheel(packages, name)
  says = "import sys\nprint('trained by', sys.version_info[:2], sys.prefix)\nsys.exit()\n"
  wheel(packages, "jax", "99", {"jax/__init__.py": says}, extras=["tpu"])
  for wanted in core():
    name, oldest = re.match(r"([\w.-]+)>=([\d.]+)", wanted).groups()
    if name != "jax":
      wheel(packages, name, oldest)
  name = f"cpython-{version.major}.{version.minor}.{version.micro}-linux-x86_64-gnu"
  python = folder / "shared/pythons" / name / "bin" / f"python{version.major}.{version.minor}"
  python.parent.mkdir(parents=True)
  python.symlink_to(os.path.realpath(sys.executable))
  root(
    folder,
    [sys.base_prefix, old[1]],
    PIP_NO_INDEX=1,
    PIP_FIND_LINKS=packages,
    UV_OFFLINE=1,
    UV_FIND_LINKS=packages,
    UV_PYTHON_INSTALL_DIR=folder / "shared/pythons",
    UV_PYTHON_DOWNLOADS="never",
  )
  return cloud


def test_a_root_with_a_real_python_3_10_alone_comes_to_train(real_vm):
  out = real_vm("train", *POD, "--delete-when-done", "--", "--config=c.py")
  assert out.returncode == 0, out.stderr
  here = f"({sys.version_info.major}, {sys.version_info.minor})"
  assert f"trained by {here} /home/user/rlsafety-venv" in out.stdout
  assert "rlsafety.train: loading" in out.stdout  # it is this package, not a stand-in


def test_an_installation_that_fails_is_tried_three_times(old_vm):
  out = old_vm("train", *POD, "--delete-when-done", "--", "--config=c.py")
  assert out.returncode == 2 and "the set-up failed 3 times" in out.stderr
  assert "no matching distribution" in out.stderr
  calls = (old_vm.folder / "uv-calls").read_text().splitlines()
  assert len([c for c in calls if c.startswith("pip")]) == 3
  assert not (old_vm.folder / "state").exists()


SUDO = 'while [[ $1 == -* ]]; do shift; done; exec "$@"'
NEVER = {
  "no Python and no pip": ({}, [], "no Python 3.11 or newer found"),
  "no gcsfuse": ({"gcsfuse": ""}, [], "gcsfuse is not on this VM image"),
  "no such image": ({"sudo": SUDO, "docker": "exit 1"}, ["--image=i"], "could not pull i"),
  "no token": ({"gcloud": "exit 1"}, ["--hf-secret=hf"], "the secret hf cannot be read here"),
}


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("why", NEVER)
def test_a_set_up_that_can_never_succeed_ends_at_once(cloud, why, delete):
  """It was called unreachable and tried 21 times on a paid slice."""
  programs, options, message = NEVER[why]
  machine(cloud.folder, **programs)
  options = [*options, *["--delete-when-done"] * delete]
  out = cloud("train", *POD, *options, "--", "--config=c.py", timeout=60)
  assert out.returncode == 2 and message in out.stderr, out.stderr
  assert "the set-up can never succeed" in out.stderr
  tries = [c for c in cloud.calls() if "tpu_worker.sh setup" in " ".join(c)]
  assert len(tries) == 1 and (cloud.folder / "state").exists() != delete


DOCKER = """\
echo "docker $*" >>{folder}/docker-calls
case $1 in
  run) exec {folder}/trainer "${{@:$(($# - 5))}}" ;;
  kill) kill -TERM "$(cat {folder}/pid)" ;;
esac
"""


def test_the_bucket_is_mounted_so_that_all_workers_see_it_and_folders_are_renamed_at_once(cloud):
  """gcsfuse's own defaults on these machines: names are cached for ever, renames may be copies."""
  called = f'echo "$*" >>{cloud.folder}/gcsfuse-calls'
  machine(cloud.folder, gcsfuse=called, sudo=SUDO, docker="exit 1")
  for options in ([], ["--image=i"]):
    cloud("train", *POD, *options, "--delete-when-done", "--", "--config=c.py", timeout=60)
  calls = (cloud.folder / "gcsfuse-calls").read_text().splitlines()
  assert len(calls) == 2 and calls[1].startswith("-o allow_other ")
  for call in calls:
    assert " b " in f"{call} " and "--metadata-cache-ttl-secs=0 --rename-dir-limit=0" in call


def test_a_gated_model_in_a_container(cloud):
  """The token goes from Secret Manager into the training's environment, and nowhere else."""
  machine(
    cloud.folder,
    sudo=SUDO,
    docker=DOCKER.format(folder=cloud.folder),
    gcloud='[[ "$*" == "secrets versions access latest --secret=hf" ]] && echo hf_s3cret',
  )
  seen = "[[ $HF_TOKEN == hf_s3cret ]] && echo has the token"
  executable(cloud.folder / "trainer", f"#!/bin/bash\n{seen}\necho $*\n")
  options = ["--image=example/rlsafety:1", "--hf-secret=hf"]
  out = cloud("train", *POD, *options, "--", "--config=c.py", env={"HF_TOKEN": "hf_mine"})
  assert out.returncode == 0, out.stderr
  assert "has the token" in out.stdout
  assert "python -m rlsafety.train --config=c.py --workdir=../bucket/runs/run-1" in out.stdout
  calls = (cloud.folder / "docker-calls").read_text()
  assert "pull --quiet example/rlsafety:1" in calls and " --env HF_TOKEN " in calls
  assert f"--volume {cloud.folder}/home/bucket:/bucket" in calls
  everywhere = [calls, out.stdout, out.stderr, (cloud.folder / "calls.jsonl").read_text()]
  everywhere += [p.read_text() for p in (cloud.folder / "home/rlsafety-runs").iterdir()]
  assert not [text for text in everywhere if "hf_s3cret" in text or "hf_mine" in text]


def test_a_container_saves_and_ends_too(cloud):
  machine(cloud.folder, sudo=SUDO, docker=DOCKER.format(folder=cloud.folder))
  executable(
    cloud.folder / "trainer",
    f"""\
    #!/bin/bash
    trap 'echo saved; exit 75' TERM
    echo $$ >{cloud.folder}/pid
    while :; do sleep 0.05; done
    """,
  )
  worker = REPO / "launch/tpu_worker.sh"
  env = {"HOME": str(cloud.folder / "home"), "PATH": str(cloud.folder / "vm")}
  assert sh(worker, "start", "r", "--image=i", "--", "--config=c.py", env=env).returncode == 0
  end = time.monotonic() + 20
  while not (cloud.folder / "pid").exists() and time.monotonic() < end:
    time.sleep(0.05)
  assert sh(worker, "stop", "r", env=env).returncode == 0
  assert sh(worker, "result", "r", env=env).stdout == "exit 75\n"


def test_stop_saves_and_ends(cloud):
  executable(
    cloud.folder / "trainer",
    """\
    #!/bin/bash
    trap 'echo saved; exit 75' TERM
    echo ready
    while :; do sleep 0.05; done
    """,
  )
  (cloud.folder / "state").write_text("ACTIVE")
  worker = REPO / "launch/tpu_worker.sh"
  env = {"HOME": str(cloud.folder / "home")}
  python = cloud.folder / "home/rlsafety-venv/bin/python"
  python.parent.mkdir(parents=True)
  shutil.copy(cloud.folder / "trainer", python)
  assert sh(worker, "result", "r", env=env).stdout == "none\n"
  assert sh(worker, "start", "r", "--", "--config=c.py", env=env).returncode == 0
  assert sh(worker, "result", "r", env=env).stdout == "running\n"
  assert "running already" in sh(worker, "start", "r", "--", "--config=c.py", env=env).stderr
  assert sh(worker, "stop", "r", env=env).returncode == 0
  assert sh(worker, "result", "r", env=env).stdout == "exit 75\n"
  assert "saved" in sh(worker, "follow", "r", env=env).stdout


def test_pod_only_copies_tracked_files_and_dry_run_calls_nothing(cloud):
  secret = REPO / "runs" / "never-copied.key"
  out = cloud("train", *POD, "--dry-run", "--", "--config=c.py")
  assert out.returncode == 0 and not (cloud.folder / "calls.jsonl").exists()
  assert "asking for run-1 (v5litepod-16); an hour of it: $19.20 at $1.20" in out.stderr
  executable(cloud.folder / "trainer", "#!/bin/bash\necho\n")
  try:
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("x")
    assert cloud("train", *POD, "--", "--config=c.py").returncode == 0
  finally:
    secret.unlink()
  code = cloud.folder / "home/rlsafety-code"
  assert (code / "launch/tpu_worker.sh").exists() and not (code / "runs").exists()
  head = sh("git", "rev-parse", "HEAD").stdout.strip()
  assert (code / "REVISION").read_text().strip().removesuffix("+changes") == head


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("train", "--name=Bad_Name", "--zone=z"), "--name='Bad_Name'"),
    (("train", "--name=a"), "--zone is missing"),
    (("train", "--name=a", "--zone=z", "--", "--config=c.py"), "--bucket is missing"),
    (("train", "--name=a", "--zone=z", "--bucket=b"), "no --config"),
    (("train", "--name=a", "--zone=z", "--sport"), "unknown option '--sport'"),
    (("fly",), "unknown command 'fly'"),
    (
      ("train", "--name=a", "--zone=z", "--bucket=b", "--device=v9-1", "--", "--config=c.py"),
      "device='v9-1' is not known",
    ),
  ],
)
def test_pod_refuses_bad_input(cloud, arguments, message):
  out = cloud(*arguments)
  assert out.returncode == 2 and message in out.stderr


def test_flags_are_refused_before_a_slice_is_made(cloud):
  """A mistyped field, or a batch that 16 chips cannot split, was found on the paid slice."""
  recipe = f"--config={REPO}/configs/tiny_syco.py"
  for flag, message in [
    ("--config.mesh.tensr=2", "mesh.tensr"),
    ("--config.seed=1", "v5e-16: prompts_per_step=4 .* must be a multiple of mesh data x fsdp"),
  ]:
    env = {"RLSAFETY_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    out = cloud("train", *POD, "--", recipe, flag, env=env)
    assert out.returncode == 2 and re.search(message, out.stderr), out.stderr
    assert not (cloud.folder / "state").exists()


def test_other_gcloud_failures_are_shown(cloud):
  executable(cloud.folder / "bin/gcloud", "#!/bin/sh\necho ERROR: no active account >&2; exit 1\n")
  out = cloud("status", *POD)
  assert out.returncode != 0 and "no active account" in out.stderr
