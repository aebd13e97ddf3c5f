"""What the tests of the launchers share: scripts as modules, programs, and a stand-in of gcloud.

The stand-in refuses every flag outside the documented set, plays the states of a queued resource,
and runs `tpu-vm ssh` commands on this machine, so that launch/tpu_worker.sh is the real one.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import textwrap
import zipfile

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


def core() -> list[str]:
  """CORE of setup.py, without running it: what is installed may be of another day."""
  for node in ast.parse((REPO / "setup.py").read_text()).body:
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CORE":
      return ast.literal_eval(node.value)
  raise AssertionError("setup.py has no CORE")


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
    if (folder / "enter").exists():  # a root of its own
      sys.exit(subprocess.run([folder / "enter", flags["--command"]], cwd=home).returncode)
    if (folder / "vm").exists():  # the programs of a VM, in place of this machine's
      env["PATH"] = f"{{folder}}/vm"
    sys.exit(subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=env).returncode)
"""


def machine(folder, at="/usr/bin", **programs):
  """folder/vm: what PATH holds on a TPU VM, with a Python 3.10 that has neither venv nor pip; and
  `programs`, name to script, in addition or in place of what is there. at: where it finds the
  programs of this machine's /usr/bin."""
  vm = folder / "vm"
  vm.mkdir()
  absent = ("python", "pip", "gcloud", "uv", "sudo", "docker", "curl", "gcsfuse", "mountpoint")
  for path in pathlib.Path("/usr/bin").iterdir():
    if not path.name.startswith(absent):
      (vm / path.name).symlink_to(f"{at}/{path.name}")
  old = (
    "case $1 in -c) [[ $2 != *version_info* ]] ;; *) echo No module named pip >&2; exit 1 ;; esac"
  )
  told = {"python3": old, "mountpoint": "exit 1", "gcsfuse": "exit 0"} | programs
  for name, script in told.items():
    (vm / name).unlink(missing_ok=True)
    if script:
      executable(vm / name, f"#!/bin/bash\n{script}\n")
  (folder / "real-setup").touch()


ENTER = """\
#!/bin/bash
set -e
if [[ $1 != inside ]]; then exec unshare --user --map-root-user --mount "$0" inside "$1"; fi
root={folder}/root
bind() {{ mkdir -p "$root$2"; mount --rbind "$1" "$root$2"; }}
bind {folder}/vm /usr/bin
bind /usr/bin /host
for part in /usr/lib /usr/lib64 /usr/share /dev /proc {prefixes} {folder}/shared; do
  if [[ -e $part ]]; then bind "$part" "$part"; fi
done
bind {folder}/home /home/user
for part in bin lib lib64; do ln -sfn "usr/$part" "$root/$part"; done
mkdir -p "$root/tmp" "$root/etc"
exec chroot "$root" /usr/bin/env -i -C /home/user HOME=/home/user PATH=/usr/bin LANG=C.UTF-8 \\
  {settings} bash -c "$2"
"""


def root(folder, prefixes, **settings):
  """folder/enter: runs a line of shell in a root of its own that holds of this machine the
  libraries, the programs of folder/vm, the folders `prefixes` and folder/shared (where they are
  here), and folder/home as /home/user. settings: further variables. Needs user namespaces."""
  words = " ".join(shlex.quote(f"{name}={value}") for name, value in settings.items())
  text = ENTER.format(folder=folder, prefixes=" ".join(prefixes), settings=words)
  return executable(folder / "enter", text)


def wheel(folder, name, version, files=(), tag="py3-none-any", extras=()):
  """Writes a wheel into `folder`. files: name -> bytes."""
  about = f"{name.replace('-', '_')}-{version}"
  metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
  metadata += "".join(f"Provides-Extra: {extra}\n" for extra in extras)
  contents = dict(files) | {
    f"{about}.dist-info/METADATA": metadata,
    f"{about}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
  }
  record = "".join(f"{path},,\n" for path in [*contents, f"{about}.dist-info/RECORD"])
  with zipfile.ZipFile(folder / f"{about}-{tag}.whl", "w") as archive:
    for path, data in (contents | {f"{about}.dist-info/RECORD": record}).items():
      entry = zipfile.ZipInfo(path)
      entry.external_attr = 0o100755 << 16
      archive.writestr(entry, data)


def installed_wheel(folder, name):
  """A wheel of a package as it is installed here, its programs included."""
  found = importlib.metadata.distribution(name)
  files, about = {}, f"{name}-{found.version}"
  for file in found.files or ():
    if "__pycache__" in file.parts or file.name == "RECORD":
      continue
    path = f"{about}.data/scripts/{file.name}" if file.parts[0] == ".." else str(file)
    files[path] = file.locate().read_bytes()
  wheel(folder, name, found.version, files)


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
