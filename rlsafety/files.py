"""JSON and JSON Lines, read under limits and written whole: the one place that does either.

A file from elsewhere may be nested a million deep, be cut in the middle of a character, or
hold a number of 5,000 digits. Every such failure is one UserError that names the file, and
the line where there are lines. NaN and infinities are read (Python writes them) and written
as null: which numbers a field may have is for its reader to say.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlsafety.errors import UserError

MAX_BYTES = 64 << 20  # of one JSON file, or of one line
MAX_DEPTH = 64  # the deepest file of our own has 6 levels
MAX_DIGITS = 40  # tokenizers write a length limit of 31 digits (1e30 as an integer)

_LONG = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))


# --- Reading ------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str) -> Any:
  """The value of a JSON text. where: names the text in the error, as "file" or "file, line 3".

  Raises UserError for text that is no JSON or no UTF-8, nested deeper than MAX_DEPTH, with
  an integer of more than MAX_DIGITS digits, or with two values for one key. A byte order
  mark is skipped.
  """
  # A lone surrogate cannot be encoded: it goes through as it stands, JSON can spell it.
  data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
  if len(data) > MAX_BYTES:
    raise UserError(f"{where}: {len(data)} bytes are more than the limit of {MAX_BYTES}")
  # Calling Python for each integer costs seconds on a long log: only where one may be long.
  long = _LONG.search(data)
  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8-sig")
    whole = _integer if long else None
    value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_int=whole)
  except UnicodeDecodeError as error:
    raise UserError(f"{where}: not UTF-8 at byte {error.start} ({error.reason})") from None
  except RecursionError:
    raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
  except ValueError as error:
    raise UserError(f"{where}: not valid JSON ({error})") from None
  if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
    raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
  return value


def _integer(digits: str) -> int:
  if len(digits) > MAX_DIGITS:
    raise ValueError(f"a number of {len(digits)} digits, the limit is {MAX_DIGITS}")
  return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict:
  found = dict(pairs)
  if len(found) < len(pairs):
    for key, value in pairs:
      if value != found[key]:
        raise ValueError(f"{key!r} stands twice, as {value!r:.40} and {found[key]!r:.40}")
  return found


def _deeper(value: Any, limit: int) -> bool:
  """Whether lists and objects lie in one another more than `limit` deep."""
  level = [value]  # those of one depth
  for _ in range(limit):
    level = [v for v in level if isinstance(v, (dict, list))]
    level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
  return any(isinstance(v, (dict, list)) for v in level)


def _regular(path: str | Path) -> Path:
  """The path, if it is a file: a pipe would block for ever, a device never end."""
  path = Path(path)
  if not stat.S_ISREG(path.stat().st_mode):
    raise UserError(f"{path}: not a file")
  return path


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
  """A file's bytes. Raises UserError if it cannot be read or has more than `limit` bytes."""
  try:
    with open(_regular(path), "rb") as f:
      data = f.read(limit + 1)
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (OSError, ValueError) as error:  # ValueError: a path with a null character
    raise UserError(f"{path}: cannot be read ({error})") from None
  if len(data) > limit:
    raise UserError(f"{path}: larger than the limit of {limit} bytes")
  return data


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
  """A UTF-8 file's text, without a byte order mark. Raises UserError as `read_bytes`."""
  try:
    return read_bytes(path, limit).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 at byte {error.start} ({error.reason})") from None


def read_json(path: str | Path) -> dict:
  """The object of a JSON file. Raises UserError naming the file; see `parse_json`."""
  value = parse_json(read_bytes(path), str(path))
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
  """(number from 1, line with its end) of a file, without reading the whole of it.

  Raises UserError if the file cannot be read or a line has more than MAX_BYTES bytes.
  """
  try:
    with open(_regular(path), "rb") as f:
      number = 0
      while line := f.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
          raise UserError(f"{path}, line {number}: longer than the limit of {MAX_BYTES} bytes")
        yield number, line
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (OSError, ValueError) as error:
    raise (
      error if isinstance(error, UserError) else UserError(f"{path}: cannot be read ({error})")
    ) from None


def read_jsonl(path: str | Path, notes: list[str] | None = None) -> list[dict]:
  """Reads one object per line; a missing file is no lines.

  A run that was killed leaves at most its last line torn: it is skipped and named in
  `notes`. Any other broken line raises UserError with its number.
  """
  path = Path(path)
  if not os.path.exists(path):
    return []
  records: list[dict] = []
  broken, blank = None, 0
  for number, line in lines(path):
    if not line.strip():
      blank = blank or number
      continue
    if broken:
      raise broken
    if blank:
      raise UserError(f"{path}, line {blank}: empty; delete or mend that line")
    where = f"{path}, line {number}"
    try:
      record = parse_json(line.rstrip(), where)
      if not isinstance(record, dict):
        raise UserError(f"{where}: not an object")
      records.append(record)
    except UserError as error:
      broken, last = UserError(f"{error}; delete or mend that line"), number
  if broken and notes is not None:
    notes.append(f"{path.name}: torn last line skipped (line {last})")
  return records


# --- Writing ------------------------------------------------------------------------------


def plain(value: Any) -> Any:
  """Numpy and JAX values to JSON types; NaN and infinities become null."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if hasattr(value, "__array__"):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _encoded(value: Any, **layout: Any) -> bytes:
  # A lone surrogate has no UTF-8; backslashreplace spells it as JSON does.
  text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, **layout)
  return f"{text}\n".encode("utf-8", "backslashreplace")


def _write(path: Path, flags: int, data: bytes, sync: bool) -> None:
  """Writes all of `data`, whatever one system call takes; never through a symbolic link."""
  try:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
    try:
      view = memoryview(data)
      while view:
        view = view[os.write(file, view) :]
      if sync:
        os.fsync(file)
    finally:
      os.close(file)
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def write_bytes(path: str | Path, data: bytes) -> None:
  """Writes `data` under its final name only once it is complete and on the disk."""
  path = Path(path)
  partial = path.with_name(path.name + ".partial")
  _write(partial, os.O_TRUNC, data, sync=True)
  os.replace(partial, path)


def write_json(path: str | Path, value: Any) -> None:
  """Writes `value` as `write_bytes` does."""
  write_bytes(path, _encoded(value, indent=2))


def sync(path: str | Path) -> None:
  """Waits until what was appended to a file is on the disk; a missing file is none."""
  if os.path.exists(path):
    _write(Path(path), os.O_APPEND, b"", sync=True)


def append(path: str | Path, records: list[dict]) -> None:
  """Appends records as lines: in one write, and in more where that one was short."""
  _write(Path(path), os.O_APPEND, b"".join(map(_encoded, records)), sync=False)
