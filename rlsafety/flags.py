"""Command lines: one parser for every program, so that all of them look and fail alike.

A program writes `args = flags.parser(__doc__, "tools.export")`, adds its arguments with argparse
and calls `flags.parse(parser, argv)`. Help is the module's own docstring and the list of its
arguments. Bad input is one line that suggests the nearest name, and exit code 2.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from rlsafety.errors import UserError


class _OneLine(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the arguments)")


def parser(doc: str | None, program: str) -> argparse.ArgumentParser:
  """An empty parser whose help starts with `doc`; program: its module below rlsafety."""
  return _OneLine(
    prog=f"python -m rlsafety.{program}",
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """argv, the program's own name first, as a namespace. Raises UserError in one line."""
  args, unknown = parser.parse_known_args(list(argv[1:]))
  refuse(parser, unknown)
  return args


def refuse(
  parser: argparse.ArgumentParser, unknown: Sequence[str], meant: Mapping[str, str] | None = None
) -> None:
  """Raises UserError naming the first of `unknown` and the argument that is nearest to it.

  meant: {short name: argument} of further arguments that people write without their prefix.
  """
  if unknown:
    word = unknown[0].partition("=")[0]
    if meant and word.lstrip("-") in meant:
      found = meant[word.lstrip("-")]
      raise UserError(f"unknown argument {unknown[0]!r}; did you mean {found}?")
    if not word.startswith("-"):
      raise UserError(
        f"unknown argument {unknown[0]!r}: a value without a flag; several values of one flag are "
        "joined by commas, and a glob is quoted: --runs='runs/a*,runs/b'"
      )
    known = [option for action in parser._actions for option in action.option_strings]
    raise UserError(f"unknown argument {unknown[0]!r}{did_you_mean(word, known)}")


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
  """The hint "; did you mean X?" with the nearest of `known`, or `otherwise` if none is near."""
  near = difflib.get_close_matches(word, list(known), 1, 0.5)
  return f"; did you mean {near[0]}?" if near else otherwise


def plain_word(text: str) -> str:
  """An argument that becomes part of a file's name: letters, digits, "_", "-" and inner dots."""
  if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", text):
    raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, _, - and inner dots only")
  return text
