"""Errors that are the user's to mend, and how every program ends.

Entry points print a `UserError` as one line and exit with code 2, as they do for a disk that is
full or refuses. Ctrl-C is one line and exit code 130. Anything else is a fault of ours
and keeps its traceback.
"""

import errno
import signal
import sys
from collections.abc import Callable

from rlsafety import stop_at_once

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells have it
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
  """Bad input. The message names the file or field, the value, and what to do."""


def run_main(main: Callable[..., None], *args: object) -> None:
  """Calls main(*args); what the user can mend becomes one line on stderr and exit code 2."""
  before = signal.getsignal(signal.SIGINT)
  if before is stop_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    main(*args)
  except UserError as error:
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
