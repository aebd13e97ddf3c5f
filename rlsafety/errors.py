"""Errors that are the user's to mend, and how every program ends.

Entry points print a `UserError` as one line and exit with code 2, as they do for a disk that is
full or refuses. Ctrl-C is one line and exit code 130. Anything else is a fault of ours
and keeps its traceback.
"""

import contextlib
import errno
import importlib
import pathlib
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType

from rlsafety import stop_at_once

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells have it
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


# Where code lies that is not the user's own: ours, Python's, installed packages'.
_NOT_OWN = (
  str(pathlib.Path(__file__).parent),
  *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
  "<frozen ",
)


class UserError(ValueError):
  """Bad input. The message names the file or field, the value, and what to do.

  details: printed above it, such as the user's own lines of a traceback.
  """

  details = ""


@contextlib.contextmanager
def own_code(name: str) -> Iterator[None]:
  """Around a call of the user's own code: what it raises is one line with the place in it, below a
  traceback that begins there. name: the field and its value, as judge.name=my_study.kindness.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    trace, is_own = error.__traceback__, lambda file: not file.startswith(_NOT_OWN)
    while trace and not is_own(trace.tb_frame.f_code.co_filename):
      trace = trace.tb_next
    places = [f for f in traceback.extract_tb(trace) if is_own(f.filename)]
    where = f"{places[-1].filename}:{places[-1].lineno}: " if places else ""
    found = UserError(f"{name}: {where}{type(error).__name__}: {first_line(error)}")
    found.details = "".join(traceback.format_exception(type(error), error, trace))
    raise found from error


def import_own(field: str, name: str, module: str) -> ModuleType:
  """A module of the user's that `field`=`name` asks for; its faults are the user's to mend."""
  with own_code(f"{field}={name}"):
    try:
      return importlib.import_module(module)
    except ModuleNotFoundError as error:
      if not f"{module}.".startswith(f"{error.name}."):
        raise  # something that it imports
      raise UserError(
        f"{field}={name}: cannot be imported ({error}); it must be on the Python path, as the "
        "folder is in which the program was started"
      ) from None


def run_main(main: Callable[..., None], *args: object) -> None:
  """Calls main(*args); what the user can mend becomes one line on stderr and exit code 2."""
  before = signal.getsignal(signal.SIGINT)
  if before is stop_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    main(*args)
  except UserError as error:
    sys.stderr.write(error.details)
    _end(str(error), 2)
  except KeyboardInterrupt:
    _end("stopped by Ctrl-C", INTERRUPTED)
  except OSError as error:
    if error.errno not in _DISK:
      raise
    where = f"{error.filename}: " if error.filename else ""
    _end(f"{where}{error.strerror}", 2)
  finally:
    if before is stop_at_once:
      signal.signal(signal.SIGINT, stop_at_once)


def first_line(error: Exception) -> str:
  """What an error of a library says, in one line."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200]


def _end(text: str, code: int) -> None:
  print(f"rlsafety: {' '.join(text.split())}", file=sys.stderr)
  sys.exit(code)
