"""rlsafety: when does on-policy RL make an instruction-tuned LLM exploit its users?"""

import gc
import os
import signal
import sys
import threading

__version__ = "0.1.0"


def stop_at_once(*_: object) -> None:
  """Ends the process at Ctrl-C: no exception, which imports and exit handlers would swallow."""
  os.write(2, b"rlsafety: stopped by Ctrl-C\n")
  os._exit(130)


def _program() -> str:
  """The program of ours that starts: `python -m rlsafety.x` or `python launch/x.py`, else ""."""
  if sys.argv[:1] == ["-m"]:
    return next((word for word in sys.orig_argv if word.startswith("rlsafety.")), "rlsafety")
  launch = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "launch", "")
  script = os.path.abspath(sys.argv[0] if sys.argv else "")
  return os.path.basename(script) if script.startswith(launch) else ""


# It imports for seconds before its own first line, and JAX takes a while to leave;
# `errors.run_main` catches Ctrl-C between the two.
if threading.current_thread() is threading.main_thread() and (program := _program()):
  signal.signal(signal.SIGINT, stop_at_once)
  print(f"{program}: loading", file=sys.stderr, flush=True)
  # Imports and JAX's tracing make objects that stay: to look for garbage after every 700 of them
  # takes a tenth of a short run.
  gc.set_threshold(50_000, 10, 10)
