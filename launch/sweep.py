"""A grid of runs on this machine, SLURM, TPU slices or Kubernetes.

  python launch/sweep.py --config=configs/tiny_syco.py --sweep=runs/lr \\
    --grid=seed=0,1,2 --grid=optimizer.learning_rate=1e-4,1e-3 --jobs=2
  python launch/sweep.py ... --status        what has become of each run
  python launch/sweep.py ... --dry-run       print the commands, run nothing (on tpu and k8s the
                                             bucket is asked what is complete)

Every --grid multiplies the runs: FIELD=A,B sets --config.FIELD, and arg.NAME=A,B sets NAME in the
config's own argument (--config=FILE:NAME=A). Run directories are SWEEP/<the values>. A run whose
summary.json exists is complete and skipped; an interrupted one is resumed; so the same command
again finishes what is left. Flags after -- go to every run.

--status knows of local and SLURM runs whether they failed, and with which exit code. On tpu and k8s
it shows what the bucket tells: complete, or how long ago the run last wrote and at which step;
whether it still runs, `launch/tpu_pod.sh status` and `kubectl get jobset` know.

Backends
  local   --jobs at a time, logs in SWEEP/logs
  slurm   one array of launch/slurm.sbatch, --jobs of it at a time; --pass=--partition=gpu
  tpu     launch/tpu_pod.sh per run; --bucket, --pass=--zone=us-west4-a --pass=--device=v5e-16
  k8s     launch/k8s/render.py | kubectl apply; --bucket, --pass=--image=IMAGE --pass=--device=...
--pass hands one option to the backend's own command. On tpu and k8s SWEEP is a path in the bucket.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import hashlib
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from rlsafety import flags as command_line
from rlsafety import recipes
from rlsafety.errors import UserError, run_main

REPO = pathlib.Path(__file__).resolve().parents[1]
COLUMNS = ("reward", "hex_gap", "acc_gap")
PREEMPTED = 75  # exit code of rlsafety.train after SIGTERM: interrupted, not failed


@dataclasses.dataclass(frozen=True)
class Run:
  """name: its directory in the sweep. flags: of rlsafety.train, without --workdir."""

  name: str
  flags: tuple[str, ...]

  @property
  def label(self) -> str:
    """A short name that clusters accept."""
    return "rl-" + hashlib.sha256(self.name.encode()).hexdigest()[:10]


def expand(config: str, grid: list[str], extra: list[str]) -> list[Run]:
  """The grid's product in the order given. Raises UserError for a malformed or repeated axis."""
  axes = []
  for axis in grid:
    field, equals, values = axis.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", field) or "" in values.split(","):
      raise UserError(f"--grid={axis!r}: write FIELD=A,B, for example seed=0,1,2")
    axes.append([(field, value) for value in values.split(",")])
  fields = [axis[0][0] for axis in axes]
  if len(set(fields)) < len(fields):
    raise UserError(f"--grid names a field twice: {', '.join(fields)}")
  runs = []
  for values in itertools.product(*axes):
    arguments = [f"{f.removeprefix('arg.')}={v}" for f, v in values if f.startswith("arg.")]
    head, colon, given = config.partition(":")
    argument = ",".join(([given] if colon else []) + arguments)
    flags = [f"--config={head}:{argument}" if argument else f"--config={head}"]
    flags += [f"--config.{f}={v}" for f, v in values if not f.startswith("arg.")]
    name = "_".join(f"{f.split('.')[-1]}-{v}" for f, v in values) or pathlib.Path(head).stem
    runs.append(Run(re.sub(r"[^\w.+-]", "-", name), (*flags, *extra)))
  names = [run.name for run in runs]
  if len(set(names)) < len(names):
    raise UserError("two runs of this grid would share a directory: give its values distinct names")
  return runs


def last_row(metrics: str) -> dict:
  """The last whole line of a metrics.jsonl; a torn tail of a killed run is passed over."""
  for line in reversed(metrics.splitlines()):
    try:
      return json.loads(line)
    except ValueError:
      continue
  return {}


def local_state(sweep: pathlib.Path, run: Run, queued: dict[str, str]) -> str:
  if (sweep / run.name / "summary.json").exists():
    return "complete"
  if run.name in queued:
    return queued[run.name]
  ended = sweep / "logs" / f"{run.name}.exit"
  code = ended.read_text().strip() if ended.exists() else "0"
  if code not in ("0", str(PREEMPTED)):
    return f"failed ({code})"
  return "interrupted" if (sweep / run.name / "metrics.jsonl").exists() else "not started"


def local_row(sweep: pathlib.Path, run: Run) -> dict:
  path = sweep / run.name / "metrics.jsonl"
  return last_row(path.read_text()) if path.exists() else {}


def slurm_states(sweep: pathlib.Path) -> dict[str, str]:
  """Run name -> state of its task, for what the queue still holds of this sweep's arrays."""
  try:
    arrays = [line.split("\t") for line in (sweep / "arrays.tsv").read_text().splitlines()]
  except OSError:
    return {}
  names = {job: runs for job, *runs in arrays}
  query = ["squeue", "--noheader", "--array", f"--jobs={','.join(names)}", "--format=%F %K %T"]
  try:
    answer = subprocess.run(query, capture_output=True, text=True)
  except FileNotFoundError:
    raise UserError("squeue is not installed on this machine: ask from a login node") from None
  if answer.returncode and "Invalid job id" not in answer.stderr:  # that one is long gone
    raise UserError(f"squeue failed: {answer.stderr}")
  rows = (line.split() for line in answer.stdout.splitlines())
  return {names[job][int(task)]: state.lower() for job, task, state in rows if task.isdigit()}


def gcloud_storage(*arguments: str) -> str:
  try:
    answer = subprocess.run(["gcloud", "storage", *arguments], capture_output=True, text=True)
  except FileNotFoundError:
    raise UserError("gcloud is not installed: it tells which runs are complete") from None
  if answer.returncode and "matched no objects" not in answer.stderr:
    raise UserError(f"gcloud storage {arguments[0]} failed: {answer.stderr}")
  return answer.stdout


def bucket_files(bucket: str, sweep: str) -> dict[str, dict[str, datetime.datetime]]:
  """Run name -> {file: when it was written}, of the JSON files of runs in the bucket."""
  found = {}
  row = re.compile(r"(\S+)\s+gs://\S*/([^/\s]+)/([^/\s]+\.jsonl?)$", re.M)  # time, run, file
  for time, run, file in row.findall(
    gcloud_storage("ls", "--long", f"gs://{bucket}/{sweep}/*/*.json*")
  ):
    found.setdefault(run, {})[file] = datetime.datetime.fromisoformat(time)
  return found


def bucket_state(files: dict[str, datetime.datetime]) -> str:
  if "summary.json" in files:
    return "complete"
  if not files:
    return "not started"
  age = datetime.datetime.now(datetime.UTC) - max(files.values())
  minutes = int(age.total_seconds() / 60)
  return f"wrote {minutes} min ago" if minutes < 120 else f"wrote {minutes // 60} h ago"


def bucket_row(bucket: str, sweep: str, run: Run) -> dict:
  path = f"gs://{bucket}/{sweep}/{run.name}/metrics.jsonl"
  return last_row(gcloud_storage("cat", "--range=-8192", path))  # the last few lines


def show(runs: list[Run], states: dict[str, str], rows: dict[str, dict]) -> None:
  width, wide = (max(map(len, texts)) for texts in (states, states.values()))
  print(f"{'run':{width}}  {'state':{wide}} {'step':>6} " + " ".join(f"{c:>9}" for c in COLUMNS))
  for run in runs:
    row = rows.get(run.name, {})
    cells = [f"{row[c]:9.3f}" if row.get(c) is not None else f"{'-':>9}" for c in COLUMNS]
    step = row.get("step", "-")
    print(f"{run.name:{width}}  {states[run.name]:{wide}} {step:>6} " + " ".join(cells))
  done = sum(state == "complete" for state in states.values())
  print(f"{done} of {len(runs)} complete")


def run_local(runs: list[Run], sweep: pathlib.Path, jobs: int) -> None:
  """Runs them here; a failed run leaves its exit code and log, and the others go on."""
  logs = sweep / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  children, stopping = set(), []

  def stop(signum, _):
    stopping.append(signum)
    for child in list(children):
      child.terminate()  # they save, and the same command resumes them

  def work(run: Run) -> None:
    if stopping:
      return
    command = [sys.executable, "-m", "rlsafety.train", *run.flags, f"--workdir={sweep / run.name}"]
    (logs / f"{run.name}.exit").unlink(missing_ok=True)  # of an earlier attempt
    with (logs / f"{run.name}.log").open("a") as log:
      child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
      children.add(child)
      code = child.wait()
      children.discard(child)
    (logs / f"{run.name}.exit").write_text(f"{code}\n")
    print(f"{run.name}: {'done' if code == 0 else f'exit {code}, see {log.name}'}", flush=True)

  before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      list(pool.map(work, runs))
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def slurm_file(sweep: pathlib.Path) -> pathlib.Path:
  """Where the next array's runs are written: tasks that still wait read their own array's file."""
  arrays = (sweep / f"array-{n}.tsv" for n in itertools.count(1))
  return next(path for path in arrays if not path.exists())


def slurm_row(flags: Sequence[str]) -> str:
  """A line of slurm.sbatch's file of runs: a tab between two flags, none within one."""
  escaped = (f.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n") for f in flags)
  return "\t".join(escaped)


def slurm_command(runs: list[Run], file: pathlib.Path, jobs: int, options: list[str]) -> list[str]:
  array = f"--array=0-{len(runs) - 1}%{jobs}"
  script = str(REPO / "launch" / "slurm.sbatch")
  output = f"--output={file.parent.resolve()}/logs/slurm-%A_%a.log"
  return ["sbatch", "--parsable", array, output, *options, script, f"--runs={file}"]


def submit_slurm(runs: list[Run], file: pathlib.Path, command: list[str]) -> None:
  sweep = file.parent
  (sweep / "logs").mkdir(parents=True, exist_ok=True)
  rows = [slurm_row((*run.flags, f"--workdir={sweep / run.name}")) for run in runs]
  with file.open("x") as f:  # never over another array's
    f.write("\n".join(rows) + "\n")
  try:
    answer = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    raise UserError("sbatch is not installed on this machine: submit from a login node") from None
  if answer.returncode:
    file.unlink()
    raise UserError(f"sbatch refused the array: {answer.stderr}")
  job = answer.stdout.strip().split(";")[0]
  with (sweep / "arrays.tsv").open("a") as f:
    f.write("\t".join([job, *(run.name for run in runs)]) + "\n")
  print(f"submitted array {job} of {len(runs)} runs")


def tpu_command(run: Run, sweep: str, bucket: str, options: list[str]) -> list[str]:
  script = str(REPO / "launch" / "tpu_pod.sh")
  where = [f"--name={run.label}", f"--bucket={bucket}", "--delete-when-done"]
  workdir = f"--workdir=../bucket/{sweep}/{run.name}"
  return [script, "train", *where, *options, "--", *run.flags, workdir]


def k8s_command(run: Run, sweep: str, bucket: str, options: list[str]) -> list[str]:
  script = str(REPO / "launch" / "k8s" / "render.py")
  where = [f"--name={run.label}", f"--bucket={bucket}"]
  workdir = f"--workdir=/bucket/{sweep}/{run.name}"
  return [sys.executable, script, *where, *options, "--", *run.flags, workdir]


def apply_k8s(command: list[str]) -> None:
  manifest = subprocess.run(command, capture_output=True, text=True)
  if manifest.returncode:
    raise UserError(manifest.stderr.splitlines()[-1].removeprefix("rlsafety: "))
  try:
    subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest.stdout, text=True, check=True)
  except FileNotFoundError:
    raise UserError("kubectl is not installed") from None
  except subprocess.CalledProcessError as error:
    raise UserError(f"kubectl apply ended with {error.returncode}, see above") from None


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = command_line.parser(__doc__, "")
  parser.prog = "python launch/sweep.py"
  parser.add_argument("--config", required=True)
  parser.add_argument("--sweep", required=True, help="directory of the runs")
  parser.add_argument("--grid", action="append", default=[], metavar="FIELD=A,B")
  parser.add_argument("--backend", choices=("local", "slurm", "tpu", "k8s"), default="local")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (local, slurm, tpu)")
  parser.add_argument("--bucket", default="", help="Cloud Storage bucket (tpu, k8s)")
  parser.add_argument("--pass", action="append", default=[], dest="options", metavar="OPTION")
  parser.add_argument("--status", action="store_true", help="show every run and end")
  parser.add_argument("--dry-run", action="store_true")
  at = argv.index("--") if "--" in argv else len(argv)
  return command_line.parse(parser, ["sweep", *argv[:at]]), argv[at + 1 :]


def main(argv: list[str]) -> int:
  options, extra = parse(argv)
  runs = expand(options.config, options.grid, extra)
  for run in runs:
    recipes.of_run(run.flags)  # a mistyped field is found before anything starts
  sweep = pathlib.Path(options.sweep)
  remote = options.backend in ("tpu", "k8s")
  if options.jobs < 1:
    raise UserError(f"--jobs={options.jobs} must be at least 1")
  if remote and not options.bucket:
    raise UserError(f"--bucket is missing: --backend={options.backend} keeps its runs there")

  queued = slurm_states(sweep) if options.backend == "slurm" else {}
  files = bucket_files(options.bucket, options.sweep) if remote else {}

  def states() -> dict[str, str]:
    if remote:
      return {run.name: bucket_state(files.get(run.name, {})) for run in runs}
    return {run.name: local_state(sweep, run, queued) for run in runs}

  def show_all() -> None:
    if not remote:
      show(runs, now, {run.name: local_row(sweep, run) for run in runs})
      return
    begun = [run for run in runs if "metrics.jsonl" in files.get(run.name, {})]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      rows = pool.map(lambda run: bucket_row(options.bucket, options.sweep, run), begun)
      show(runs, now, dict(zip((run.name for run in begun), rows, strict=True)))

  now = states()
  if options.status:
    show_all()
    return 0
  # What SLURM's queue holds already is left to it.
  left = [run for run in runs if now[run.name] != "complete" and run.name not in queued]
  print(f"{len(runs)} runs, {len(runs) - len(left)} complete or queued, {len(left)} to do")
  if not left:
    show_all()
    return 0

  if options.backend == "local":
    if options.dry_run:
      for run in left:
        work = f"--workdir={sweep / run.name}"
        print(shlex.join(["python", "-m", "rlsafety.train", *run.flags, work]))
      return 0
    run_local(left, sweep, options.jobs)
    now = states()
    show_all()
    return 0 if all(now[run.name] == "complete" for run in runs) else 1
  if options.backend == "slurm":
    file = slurm_file(sweep)
    command = slurm_command(left, file, options.jobs, options.options)
    if options.dry_run:
      print(shlex.join(command))
    else:
      submit_slurm(left, file, command)
    return 0
  make = tpu_command if options.backend == "tpu" else k8s_command
  commands = [make(run, options.sweep, options.bucket, options.options) for run in left]
  if options.dry_run:
    for command in commands:
      print(shlex.join(command))
  elif options.backend == "k8s":
    for command in commands:
      apply_k8s(command)
  else:
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      codes = list(pool.map(lambda command: subprocess.run(command).returncode, commands))
    return max(codes)
  return 0


if __name__ == "__main__":
  run_main(lambda: sys.exit(main(sys.argv[1:])))
