"""rlsafety: when does on-policy RL make an instruction-tuned LLM exploit its users?"""

import signal
import sys
import threading

__version__ = "0.1.0"

# `python -m rlsafety.x` imports for seconds before its own first line, and before `errors.run_main`
# is there to catch Ctrl-C.
if sys.argv[:1] == ["-m"] and threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  program = next((word for word in sys.orig_argv if word.startswith("rlsafety.")), "rlsafety")
  print(f"{program}: loading", file=sys.stderr, flush=True)
