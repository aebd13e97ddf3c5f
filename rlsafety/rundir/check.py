"""What a run directory must hold at a step: a log that lost lines is named, not missed.

A resumed run goes on from a checkpoint and cannot write again what came before it, but for the
evaluation at that very step. A complete run can have its adapter and its report written again.
"""

import collections
import hashlib
import io
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rlsafety import files
from rlsafety.errors import UserError

SUMMARY = "eval/summary.jsonl"
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def lines_of_steps(path: pathlib.Path) -> tuple[dict[int, int], str]:
  """({step: lines} of a log, the first line that is none, or "")."""
  counts: dict[int, int] = collections.Counter()
  if not path.exists():
    return counts, ""
  broken = ""
  for number, line in files.lines(path):
    try:
      record = files.parse_json(line, f"line {number}")
      if not line.endswith(b"\n") or not _is_step(record["step"]):
        raise ValueError("is torn, or its step is no whole number")
      counts[record["step"]] += 1
    except (ValueError, KeyError, TypeError) as error:
      broken = broken or f"line {number} is damaged ({type(error).__name__})"
  return counts, broken


def _is_step(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def expected(
  step: int, evaluations: Sequence[int], own: int, replies: Mapping[str, int]
) -> dict[str, Mapping[int, int]]:
  """{log: {step: lines}} of a run after update `step`.

  evaluations: the steps that were evaluated; own: own replies of an update, 0 where it learns
  from records alone; replies: of an evaluation, by folder.
  """
  updates = range(1, step + 1)
  wanted: dict[str, Mapping[int, int]] = {
    "metrics.jsonl": dict.fromkeys(updates, 1),
    "timing.jsonl": dict.fromkeys(updates, 1),
    "rollouts/train.jsonl": dict.fromkeys(updates, own) if own else {},
    SUMMARY: dict.fromkeys(evaluations, 1),
  }
  for folder, count in replies.items():
    for at in evaluations:
      wanted[f"{folder}/step_{at:06d}.jsonl"] = {at: count}
  return wanted


def heldout_replies(path: pathlib.Path) -> int:
  """Replies of an evaluation, as the first readable line of eval/summary.jsonl says; else 0."""
  file = path / SUMMARY
  for number, line in files.lines(file) if file.exists() else ():
    try:
      record = files.parse_json(line, f"line {number}")
      return int(record["prompts"]) * int(record["samples"])
    except (ValueError, KeyError, TypeError):
      continue
  return 0


def faults(path: pathlib.Path, wanted: Mapping[str, Mapping[int, int]]) -> Iterator[tuple]:
  """(file, step, what is wrong) for every log that does not hold what it must; later steps and
  a torn last line do not count: a resumed run drops them."""
  for name, steps in wanted.items():
    found, broken = lines_of_steps(path / name)
    bad = [at for at, count in steps.items() if found.get(at, 0) != count]
    if bad:
      at = bad[0]
      more = f", and of {len(bad) - 1} other steps" if len(bad) > 1 else ""
      why = f" ({broken})" if broken else ""
      yield name, at, f"has {found.get(at, 0)} of {steps[at]} lines of step {at}{more}{why}"


def refuse(path: pathlib.Path, found: Sequence[tuple]) -> None:
  """Raises UserError that names what is missing or changed, if anything is."""
  if found:
    told = "; ".join(f"{name} {what}" for name, _, what in found[:4])
    raise UserError(
      f"{path}: this run's files are not what it wrote: {told}; restore them from a copy, or start "
      "the run again in another --workdir"
    )


def digests(path: pathlib.Path) -> dict[str, str]:
  """{file: sha256} of a run's logs and adapter, which nothing changes once it is complete."""
  found = {}
  for pattern in ("*.jsonl", "rollouts/*.jsonl", "eval/**/*.jsonl", "eval/*/about.json", *ADAPTER):
    for file in sorted(path.glob(pattern)):
      with open(file, "rb") as f:
        found[str(file.relative_to(path))] = hashlib.file_digest(f, "sha256").hexdigest()
  return found


def changed(path: pathlib.Path, stored: Mapping[str, str]) -> list[tuple]:
  """`faults` of a complete run's files beside the `digests` that it ended with."""
  now = digests(path)
  what = {name: "is not what the run ended with" if name in now else "is gone" for name in stored}
  return [(name, None, what[name]) for name in stored if now.get(name) != stored[name]]


def marks(path: pathlib.Path, names: Iterable[str], seen: dict) -> dict[str, list[list]]:
  """{log: [[step of its last line, bytes, sha256 of them], ...]}, kept with a checkpoint.

  eval/summary.jsonl has a mark at every line, as its last one may be lost and made again; any other
  log has one for the whole of it. names: of logs. seen: from earlier calls: what was read then is
  not read again.
  """
  found = {}
  for name in names:
    whole, size, told = seen.setdefault(name, (hashlib.sha256(), 0, []))
    line = b""
    with open(path / name, "rb") if (path / name).exists() else io.BytesIO() as file:
      file.seek(size)
      for line in file:
        whole.update(line)
        size += len(line)
        if name == SUMMARY:
          told = [*told, [_step_of(line), size, whole.hexdigest()]]
    if line and name != SUMMARY:
      told = [[_step_of(line), size, whole.hexdigest()]]
    seen[name] = whole, size, told
    found[name] = told
  return found


def _step_of(line: bytes) -> int | None:
  try:
    return files.parse_json(line, "line")["step"]
  except (ValueError, KeyError, TypeError):
    return None  # cut short by a full disk


def altered(path: pathlib.Path, told: Mapping[str, Sequence]) -> Iterator[tuple]:
  """`faults` of logs that do not begin with the bytes that `marks` told."""
  for name, marked in told.items():
    whole, at = hashlib.sha256(), 0
    with open(path / name, "rb") if (path / name).exists() else io.BytesIO() as file:
      for step, size, digest in marked:
        while piece := file.read(min(size - at, 1 << 20)):
          whole.update(piece)
          at += len(piece)
        if whole.hexdigest() != digest:
          yield name, step, f"was changed after step {step} was written"
          break


def rebuildable(path: pathlib.Path) -> list[str]:
  """Files of a complete run that are missing or cut and follow from the rest of it."""
  missing = [name for name in ADAPTER if not _whole(path / name)]
  page = path / "report.html"
  if not page.is_file() or b"</html>" not in page.read_bytes()[-200:]:
    missing.append("report.html")
  return missing


def _whole(file: pathlib.Path) -> bool:
  """Whether a JSON or safetensors file is as long as it says."""
  try:
    if file.suffix == ".json":
      files.read_json(file)
      return True
    with open(file, "rb") as f:
      header = int.from_bytes(f.read(8), "little")
      told = files.parse_json(f.read(min(header, files.MAX_BYTES)), str(file))
    end = max((v["data_offsets"][1] for k, v in told.items() if k != "__metadata__"), default=0)
    return file.stat().st_size == 8 + header + end
  except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
    return False
