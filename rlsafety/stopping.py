"""Ends a program before its last update so that nothing it computed is lost."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax

from rlsafety import cells, checkpoints, runtime
from rlsafety.cells import Cell
from rlsafety.errors import UserError


def leave(live: Sequence[Cell], told: runtime.Told) -> NoReturn:
  """Ends the process after a signal; what is on its way to the disk gets there first."""
  saved = None
  for cell in live:
    checkpoints.finish(cell.manager)
    saved = cell.manager.latest_step()
    cells.close(cell)
  what = signal.Signals(told.signal or signal.SIGTERM).name
  done = "nothing to save yet" if saved is None else f"saved step {saved}"
  runtime.progress().info("%s: %s; the same command continues", what, done)
  sys.exit(told.exit_code)


@contextlib.contextmanager
def kept() -> Iterator[list[Cell]]:
  """Yields an empty list for the cells that go on. Where a UserError ends the program, such as a
  fault in a reward of the user's own, the updates that they made until then are saved, and the same
  command continues behind them."""
  live: list[Cell] = []
  try:
    yield live
  except UserError:
    if jax.process_count() == 1:  # of several one alone may be here, and a save waits for all
      for cell in live:
        checkpoints.finish(cell.manager)
      made = [c for c in live if c.step > 0 and c.manager.latest_step() != c.step]
      cells.save(made, wait=True)
      for cell in live:  # in a notebook the next try finds no lock
        cells.close(cell)
    raise
