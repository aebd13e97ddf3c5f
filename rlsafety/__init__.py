"""rlsafety: when does on-policy RL make an instruction-tuned LLM exploit its users?"""

import os
import signal
import sys
import threading

__version__ = "0.1.0"


def stop_at_once(*_: object) -> None:
  """Ends the process at Ctrl-C: no exception, which imports and exit handlers would swallow."""
  os.write(2, b"rlsafety: stopped by Ctrl-C\n")
  os._exit(130)


# `python -m rlsafety.x` imports for seconds before its own first line, and JAX takes a while to
# leave; `errors.run_main` catches Ctrl-C between the two.
if sys.argv[:1] == ["-m"] and threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, stop_at_once)
  program = next((word for word in sys.orig_argv if word.startswith("rlsafety.")), "rlsafety")
  print(f"{program}: loading", file=sys.stderr, flush=True)
