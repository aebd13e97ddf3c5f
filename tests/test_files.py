"""files: JSON under limits; every failure is one line that names the file."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsafety import files
from rlsafety.errors import UserError, run_main

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.text() | st.floats(),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
  max_leaves=20,
)


@given(VALUES)
def test_written_and_read_is_the_same(tmp_path_factory, value):
  folder = tmp_path_factory.mktemp("same")
  files.write_json(folder / "x.json", {"v": value})
  assert files.read_json(folder / "x.json") == files.plain({"v": value})
  files.append(folder / "x.jsonl", [{"v": value}, {"n": np.float32(0.5)}])
  files.append(folder / "x.jsonl", [{"v": float("nan")}])
  rows = [files.plain({"v": value}), {"n": 0.5}, {"v": None}]
  assert files.read_jsonl(folder / "x.jsonl") == rows


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE.-tfn\\u ', max_size=60))
def test_any_text_is_read_as_json_reads_it_or_refused_in_one_line(text):
  try:
    value = files.parse_json(text, "some.json")
  except UserError as error:
    assert str(error).startswith("some.json: ") and "\n" not in str(error)
  else:
    assert repr(value) == repr(json.loads(text))


@pytest.mark.parametrize(
  "text, says",
  [
    ("[" * 1_000_000, "nested deeper"),
    ('{"a":' * 1_000_000, "nested deeper"),
    ("[" * 65 + "]" * 65, "nested deeper than 64"),
    ('{"a": ' + "7" * 5000 + "}", "a number of 5000 digits"),
    ('{"a": [-' + "7" * 41 + "]}", "a number of 42 digits, the limit is 40"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    ('{"eos": 1, "eos": 2}', "'eos' stands twice, as 1 and 2"),
    ('{"a": 1', "not valid JSON"),
    ("[1]", "expected a JSON object, found list"),
    (b'{"a": "' + b"x" * (64 << 20) + b'"}', "larger than the limit"),
  ],
)
def test_hostile_files_are_named(tmp_path, text, says):
  path = tmp_path / "config.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError, match=f"config.json: .*{says}"):
    files.read_json(path)


@pytest.mark.parametrize("read", [files.read_json, lambda path: list(files.lines(path))])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, read):
  os.mkfifo(tmp_path / "pipe")
  before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
  signal.alarm(10)
  try:
    for name, says in (("pipe", "not a file"), (".", "not a file"), ("absent", "no such file")):
      with pytest.raises(UserError, match=says):
        read(tmp_path / name)
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_limits_in_bytes_of_an_answer_and_of_a_line(tmp_path, monkeypatch):
  """What is no file has a limit too; a log may be larger than one, its lines may not."""
  monkeypatch.setattr(files, "MAX_BYTES", 9)
  for text in ('"ééé"', '["1234"]', b"123456789"):
    assert files.parse_json(text, "answer") == json.loads(text)
  for text in ('"éééé"', b"1234567890"):
    with pytest.raises(UserError, match="^answer: 10 bytes are more than the limit of 9$"):
      files.parse_json(text, "answer")
  path = tmp_path / "x.jsonl"
  path.write_bytes(b"12345678\n" * 3 + b"123456789\n")
  read = files.lines(path)
  assert [next(read) for _ in range(3)] == [(n, b"12345678\n") for n in (1, 2, 3)]
  with pytest.raises(UserError, match="x.jsonl, line 4: longer than the limit of 9 bytes"):
    next(read)


def test_common_oddities_are_read(tmp_path):
  path = tmp_path / "x.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1, "max": 1000000000000000019884624838656}')
  assert files.read_json(path) == {"a": 1, "max": int(1e30)}


def test_only_the_last_line_may_be_torn(tmp_path):
  path = tmp_path / "x.jsonl"
  assert files.read_jsonl(path) == []
  path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])  # cut within a character
  notes = []
  assert files.read_jsonl(path, notes) == [{"a": 1}]
  assert notes == ["x.jsonl: torn last line skipped (line 2)"]
  for middle in (b'{"a"', b"", b"3", b"\xff", b"[" * 99_999):
    path.write_bytes(b'{"a": 1}\n' + middle + b'\n{"a": 2}\n\n')
    with pytest.raises(UserError, match="x.jsonl, line 2: .*delete or mend that line"):
      files.read_jsonl(path)


def test_nothing_is_written_through_a_link_and_short_writes_go_on(tmp_path, monkeypatch):
  (tmp_path / "x.jsonl").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "y.json.partial").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="x.jsonl: cannot be written"):
    files.append(tmp_path / "x.jsonl", [{}])
  with pytest.raises(UserError, match="y.json.partial: cannot be written"):
    files.write_json(tmp_path / "y.json", {})
  assert not (tmp_path / "elsewhere").exists()
  write = os.write
  monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
  records = [{"text": "word " * 20}] * 3
  files.append(tmp_path / "z.jsonl", records)
  assert files.read_jsonl(tmp_path / "z.jsonl") == records


# --- How programs end ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("raised", "code", "says"),
  [
    (UserError("a\nb"), 2, "rlsafety: a b\n"),
    (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2,
     "rlsafety: x/y: No space left on device\n"),
    (OSError(errno.EROFS, "Read-only file system"), 2,
     "rlsafety: Read-only file system\n"),
  ],
)  # fmt: skip
def test_what_ends_a_program_is_one_line(capsys, raised, code, says):
  def main(argument):
    raise raised

  with pytest.raises(SystemExit) as end:
    run_main(main, "x")
  assert end.value.code == code and capsys.readouterr().err == says


def test_a_fault_of_ours_keeps_its_traceback():
  def main(error):
    raise error

  for fault in (RuntimeError("x"), OSError(errno.ENOENT, "No such file", "x")):
    with pytest.raises(type(fault)):
      run_main(main, fault)


@pytest.mark.parametrize("when", ["import", "main", "exit"])
def test_ctrl_c_is_one_line_from_the_first_import_to_the_last_exit_handler(when):
  """As in `python -m rlsafety.x`; an exception in an exit handler would be named and forgotten."""
  program = f"""
import atexit, os, signal, sys
sys.argv = ["-m"]
from rlsafety import errors
def stop(*when):
  if {when!r} in when:
    os.kill(os.getpid(), signal.SIGINT)
atexit.register(stop, "exit")
stop("import")
errors.run_main(stop, "main")
"""
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (ended.returncode, ended.stderr.splitlines()[1:]) == (130, ["rlsafety: stopped by Ctrl-C"])
