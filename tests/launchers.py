"""What the tests of the launchers share: scripts as modules, programs, and a stand-in of gcloud.

The stand-in refuses every flag outside the documented set, plays the states of a queued resource,
and runs `tpu-vm ssh` commands on this machine, so that launch/tpu_worker.sh is the real one.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

REPO = pathlib.Path(__file__).resolve().parents[1]
TINY_RECIPE = f"--config={REPO}/configs/tiny_syco.py"


def load(path):
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, REPO / path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def sh(*command, env=None, **kwargs):
  kwargs = {"capture_output": True, "text": True, "timeout": 300, "cwd": REPO} | kwargs
  env = dict(os.environ, PYTHONPATH=str(REPO)) | (env or {})
  return subprocess.run([str(c) for c in command], env=env, **kwargs)


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(textwrap.dedent(text))
  path.chmod(0o755)
  return path


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
  "compute tpus tpu-vm describe": {"--zone"},
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
  if "tpu-vm" in command:
    print("v5litepod-16\t2026-01-01T00:00:00.123456789Z")
    sys.exit()
  if "failedData" in flags["--format"]:
    print("There is no more capacity in the zone.")
    sys.exit()
  now = state.read_text()
  print(now)
  granted = "FAILED" if (folder / "not-granted").exists() else "ACTIVE"
  state.write_text({{"ACCEPTED": "PROVISIONING", "PROVISIONING": granted}}.get(now, now))
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
  if "tpu_worker.sh setup" in flags["--command"] and not (folder / "real-setup").exists():
    python = home / "rlsafety-venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "trainer", python)
  else:
    env = dict(os.environ, HOME=str(home))
    if (folder / "vm").exists():  # the programs of a VM, in place of this machine's
      env["PATH"] = f"{{folder}}/vm"
    sys.exit(subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=env).returncode)
"""


def machine(folder, **programs):
  """folder/vm: what PATH holds on a TPU VM, with a Python 3.10 that has neither venv nor pip; and
  `programs`, name to script, in addition or in place of what is there."""
  vm = folder / "vm"
  vm.mkdir()
  absent = ("python", "pip", "gcloud", "uv", "sudo", "docker", "curl", "gcsfuse", "mountpoint")
  for path in pathlib.Path("/usr/bin").iterdir():
    if not path.name.startswith(absent):
      (vm / path.name).symlink_to(path)
  old = (
    "case $1 in -c) [[ $2 != *version_info* ]] ;; *) echo No module named pip >&2; exit 1 ;; esac"
  )
  told = {"python3": old, "mountpoint": "exit 1", "gcsfuse": "exit 0"} | programs
  for name, script in told.items():
    (vm / name).unlink(missing_ok=True)
    if script:
      executable(vm / name, f"#!/bin/bash\n{script}\n")
  (folder / "real-setup").touch()


def stand_in(folder):
  """A function that runs launch/tpu_pod.sh with the stand-in first in PATH. The slice's machine
  is folder/home, and its set-up a copy of folder/trainer unless folder/real-setup exists."""
  documented = json.dumps({c: sorted(f | WIDE) for c, f in DOCUMENTED.items()})
  text = GCLOUD.format(python=sys.executable, documented=documented, folder=str(folder))
  executable(folder / "bin/gcloud", text)
  # The trainer of a test takes any flags: they are checked where a test names a Python for it.
  env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "RLSAFETY_PYTHON": "no-python"}

  def pod(*arguments, **kwargs):
    return sh("launch/tpu_pod.sh", *arguments, env=env | kwargs.pop("env", {}), **kwargs)

  pod.folder, pod.env = folder, env
  pod.calls = lambda: [json.loads(x) for x in (folder / "calls.jsonl").open()]
  return pod
