"""Errors that are the user's to mend.

Entry points print a `UserError` as one line and exit with code 2; anything else is a
fault of ours and keeps its traceback.
"""

import sys


class UserError(ValueError):
  """Bad input. The message names the file or field, the value, and what to do."""


def run_main(main, *args) -> None:
  """Calls main(*args); a UserError becomes one line on stderr and exit code 2."""
  try:
    main(*args)
  except UserError as error:
    print(f"rlsafety: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
