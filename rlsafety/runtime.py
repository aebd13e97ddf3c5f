"""The process: progress lines, SIGTERM, the compilation cache, and other processes.

Every process runs the same program. On TPU pods and under SLURM `start` needs nothing; anywhere
else give --coordinator_address=host:port, --num_processes and --process_id, or set the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. With one process it does nothing,
so that a laptop and a pod run the same command. Failures name the host.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax._src import distributed  # the public barrier is a collective: it cannot time out

from rlsafety.errors import INTERRUPTED, UserError, first_line

PREEMPTED = 75  # exit code after SIGTERM: saved, start me again (sysexits' EX_TEMPFAIL)


def progress() -> logging.Logger:
  """The logger of a run: one line at a time on stdout, from process 0, readable in a file too."""
  log = logging.getLogger("rlsafety")
  handler = logging.StreamHandler(sys.stdout)  # a new one: notebooks and tests exchange stdout
  handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
  log.handlers, log.propagate = [handler], False
  log.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
  return log


@dataclasses.dataclass
class Told:
  """Which signal asked the run to save and end: 0 = none yet."""

  signal: int = 0

  @property
  def exit_code(self) -> int:
    return INTERRUPTED if self.signal == signal.SIGINT else PREEMPTED


@contextlib.contextmanager
def stop_signals() -> Iterator[Told]:
  """SIGTERM and the first Ctrl-C ask the run to save after its step; the second Ctrl-C ends the
  process at once with exit code 130. What signals did before is back afterwards.

  A thread reads the signals: Python's own handlers wait for a compilation to end.
  """
  told = Told()
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)

  def listen() -> None:
    while number := int.from_bytes(os.read(read_end, 1)):
      if number == signal.SIGINT and told.signal == signal.SIGINT:
        print("rlsafety: stopped by the second Ctrl-C", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
      if number == signal.SIGINT:
        print("Ctrl-C: saving after this step; once more stops at once", flush=True)
      if number in handled:
        told.signal = number

  handled = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, lambda *_: None) for number in handled}
  descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  try:
    yield told
  finally:
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.write(write_end, b"\0")
    listener.join()
    os.close(read_end)
    os.close(write_end)


def check_platform(wanted: str) -> None:
  """Raises UserError if JAX found another kind of device than the one that is asked for: a run
  that was paid for an accelerator must not go on for days on the host beside it."""
  found = jax.default_backend()
  if wanted and wanted != found:
    raise UserError(
      f"platform={wanted}: JAX found only {jax.device_count()} x {found}; install its build "
      f"(pip install 'rlsafety[{'tpu' if wanted == 'tpu' else 'cuda'}]') and check the driver, or "
      "set --config.platform="
    )


def warn_of_cpu(parameters: int, tokens: int, steps: int) -> None:
  """Says how long a model above 2 B parameters takes on a CPU, as a rough bound from below:
  passes to sample, judge and learn at 200 GFLOP/s. tokens: of one batch, prompts and replies."""
  if jax.default_backend() == "cpu" and parameters > 2e9:
    days = steps * 10 * parameters * tokens / 200e9 / 86400
    logging.getLogger("rlsafety").info("on a CPU: expect more than %.1f days", days)


def compilation_cache() -> None:
  """A second start of the same program skips XLA; JAX_COMPILATION_CACHE_DIR moves it."""
  if not jax.config.values["jax_compilation_cache_dir"]:
    folder = pathlib.Path.home() / ".cache" / "rlsafety" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# --- Other processes --------------------------------------------------------------------

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAGS = (  # of a program, in the order of VARIABLES, which they override
  ("coordinator_address", "several processes by hand: host:port of process 0"),
  ("num_processes", "how many there are"),
  ("process_id", "which of them this is, from 0"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds FLAGS to a program's parser."""
  for name, text in FLAGS:
    parser.add_argument(f"--{name}", default="", help=text)


def start(args: argparse.Namespace | None = None) -> None:
  """Joins the other processes; call it before any computation. args: with FLAGS.

  A process that dies or loses its network ends the others with an error that names it, within
  RLSAFETY_HEARTBEAT seconds (default 60): a collective would wait for it for ever.
  """
  if jax.distributed.is_initialized():
    return
  given = {v: getattr(args, name, "") for (name, _), v in zip(FLAGS, VARIABLES, strict=True)}
  arguments = _arguments({**os.environ, **{v: text for v, text in given.items() if text}})
  if arguments is None:
    return
  timeout = _number("RLSAFETY_HEARTBEAT", os.environ.get("RLSAFETY_HEARTBEAT", "60"))
  # Peers of a failed start give up after this long, and say who is missing.
  waiting = _number("RLSAFETY_START_TIMEOUT", os.environ.get("RLSAFETY_START_TIMEOUT", "300"))
  jax.distributed.initialize(
    **arguments,
    heartbeat_timeout_seconds=timeout,
    initialization_timeout=waiting,
    shutdown_timeout_seconds=timeout,
  )


def _arguments(env) -> dict | None:
  """What jax.distributed.initialize needs beyond what it finds itself; None = one process."""
  given = {name: env[name] for name in VARIABLES if env.get(name)}
  if len(given) == len(VARIABLES):
    address, count, index = (given[name] for name in VARIABLES)
    count, index = _number(VARIABLES[1], count), _number(VARIABLES[2], index)
    if not re.fullmatch(r"\S+:\d+", address) or index >= count:
      raise UserError(
        f"{'; '.join(f'{k}={v}' for k, v in given.items())}: the address is host:port, and "
        "process ids run from 0 to the number of processes - 1"
      )
    if count == 1:
      return None
    return {"coordinator_address": address, "num_processes": count, "process_id": index}
  if len(given) > 1:  # an address alone is a default that some clusters set
    missing = [name for name in VARIABLES if name not in given]
    raise UserError(f"{', '.join(given)} is set but {', '.join(missing)} is not; set all or none")
  if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:  # started by srun
    return {} if int(env.get("SLURM_NTASKS", "1")) > 1 else None
  on_tpu = any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))
  several = "," in env.get("TPU_WORKER_HOSTNAMES", "") or "TPU_PROCESS_ADDRESSES" in env
  if several or (on_tpu and env.get("JAX_PLATFORMS", "tpu").startswith("tpu")):
    return {}
  return None


def _number(name: str, text: str) -> int:
  if not text.isdigit():
    raise UserError(f"{name}={text!r}: needs a whole number")
  return int(text)


def barrier(name: str, seconds: int = 600) -> None:
  """Waits until all processes have called it under the same name.

  Raises RuntimeError naming the processes that did not come in time.
  """
  if jax.process_count() == 1:
    return
  client = distributed.global_state.client
  assert client is not None  # with several processes there is one
  try:
    client.wait_at_barrier(name, seconds * 1000)
  except Exception as error:
    _, _, listed = str(error).partition("timed out task names:")
    absent = re.findall(r"^(\d+)$", listed, re.M) or re.findall(r"Task (\d+) heart", str(error))
    who = f"process {', '.join(absent)}" if absent else "another process"
    raise RuntimeError(
      f"process {jax.process_index()} waited {seconds} s at {name!r}; missing: {who} "
      f"of {jax.process_count()} ({first_line(error)})"
    ) from None
