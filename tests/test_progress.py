"""The first line of a program, and how a long loop tells how far it is."""

import io
import os
import subprocess
import sys
import time

import pytest
from launchers import REPO

from rlsafety import progress


@pytest.mark.parametrize(
  ("program", "name"),
  [
    *((f"-m rlsafety.{p}", f"rlsafety.{p}") for p in ("train", "tools.export", "report.render")),
    ("launch/sweep.py", "sweep.py"),
    ("launch/k8s/render.py", "render.py"),
  ],
)
def test_the_first_line_comes_before_the_heavy_imports(tmp_path, program, name):
  """They take seconds; here the first of them to be reached ends the program."""
  for heavy in ("jax", "numpy", "absl", "ml_collections", "transformers"):
    (tmp_path / f"{heavy}.py").write_text("raise SystemExit(3)")
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO)]))
  command = [sys.executable, *program.split()]
  done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
  said = done.returncode, done.stdout, done.stderr
  assert said == (3, "", f"{name}: loading\n")


def test_an_import_says_nothing():
  done = subprocess.run(
    [sys.executable, "-c", "import rlsafety"], cwd=REPO, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_log_has_plain_lines_now_and_then(monkeypatch, capsys):
  clock = iter(range(0, 1000, 12))
  monkeypatch.setattr(time, "monotonic", lambda: next(clock))
  assert list(progress.bar(range(6), "users")) == list(range(6))
  # 12 s an item: a line where half a minute has gone by since the one before, none at the end.
  assert capsys.readouterr().err == "users: 2 of 6, 1.2 min left\nusers: 5 of 6, 0.2 min left\n"


def test_a_short_loop_leaves_no_line_in_a_log(capsys):
  assert list(progress.bar("abc", "letters")) == list("abc")
  assert list(progress.bar([], "nothing")) == []
  assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_that_vanishes(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  assert list(progress.bar(range(3), "users")) == [0, 1, 2]
  shown = terminal.getvalue()
  assert "users:   0%" in shown and "\n" not in shown and shown.endswith("\r")
