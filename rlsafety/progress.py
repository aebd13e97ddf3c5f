"""How far a long loop is: a bar in a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
from tqdm import tqdm

EVERY = 30.0  # seconds between two lines in a log; a shorter loop leaves none

Item = TypeVar("Item")


def bar(items: Sequence[Item], what: str) -> Iterator[Item]:
  """The items one by one; process 0 says on stderr how many of them are done."""
  if jax.process_index() or not items:
    yield from items
  elif sys.stderr.isatty():
    yield from tqdm(items, desc=what, leave=False, file=sys.stderr)
  else:
    began = said = time.monotonic()
    for done, item in enumerate(items):
      now = time.monotonic()
      if done and now - said >= EVERY:
        left = (now - began) / done * (len(items) - done)
        print(f"{what}: {done} of {len(items)}, {left / 60:.1f} min left", file=sys.stderr)
        said = now
      yield item
