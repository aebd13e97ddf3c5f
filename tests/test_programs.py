"""Every program looks the same: help, and arguments that do not exist."""

import argparse
import importlib
import pathlib

import pytest

import rlsafety
from rlsafety.errors import UserError

ROOT = pathlib.Path(rlsafety.__file__).parent
PROGRAMS = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
  for path in sorted(ROOT.rglob("*.py"))
  if "run_main(main, sys.argv)" in path.read_text()
]


@pytest.fixture(params=PROGRAMS)
def program(request):
  """(name below rlsafety, main)"""
  name = f"rlsafety.{request.param}"
  found = importlib.import_module(name)
  if not hasattr(found, "main"):
    found = importlib.import_module(f"{name}.__main__")
  return request.param, found.main


def test_help_is_the_docstring_and_every_argument_is_explained(program, capsys, monkeypatch):
  name, main = program
  parsers, print_help = [], argparse.ArgumentParser.print_help
  monkeypatch.setattr(
    argparse.ArgumentParser, "print_help", lambda p: (parsers.append(p), print_help(p))
  )
  with pytest.raises(SystemExit) as exit:
    main([name, "--help"])
  assert exit.value.code in (0, None)
  shown = capsys.readouterr().out
  assert f"usage: python -m rlsafety.{name}" in shown
  assert importlib.import_module(main.__module__).__doc__.strip() in shown
  unexplained = [a.dest for a in parsers[0]._actions if not (a.help or a.choices)]
  assert not unexplained


def test_an_unknown_argument_names_the_nearest(program):
  name, main = program
  with pytest.raises(UserError, match="required|did you mean --help"):
    main([name, "--hepl"])
