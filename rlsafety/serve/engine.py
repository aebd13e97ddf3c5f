"""The thread that owns the device: takes jobs, keeps a batch of rows going, hands tokens out.

A job is one prompt and its n replies. Every turn of the loop frees the rows that nobody waits for
any more, begins the prompts that came first, as long as there are rows, and advances all rows by a
few tokens. Waiting jobs take turns at the free rows, so that one with many replies holds up no
other; a job whose adapter finds no place waits, and those behind it with it, until one is free.
"""

import collections
import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlsafety import config
from rlsafety.errors import UserError
from rlsafety.models import sources
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.serve import steps
from rlsafety.serve.adapters import Catalogue, Policy

CHUNK, TOPS = steps.CHUNK, steps.TOPS
_COMPILED = [0]  # programs that this process has compiled, or read from the cache


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
  _COMPILED[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_heard)


@dataclasses.dataclass(frozen=True)
class Piece:
  """Tokens that were drawn for reply `index` of a job, or scored in its prompt (index -1).

  tokens [N], logprobs [N] float32 nats at temperature 1 (NaN at a prompt's first token). top_ids,
  top_logprobs [N, TOPS] where the job wants alternatives. finish: why the reply ends here, "stop"
  or "length", else "". error: what went wrong; then there is nothing else, and nothing follows.
  """

  index: int
  tokens: Sequence[int] = ()
  logprobs: Sequence[float] = ()
  top_ids: Any = ()
  top_logprobs: Any = ()
  finish: str = ""
  error: str = ""


@dataclasses.dataclass(eq=False)
class Job:
  """One prompt, `ids`, and what is wanted of a policy.

  seeds: one for each reply. max_tokens: of a reply; 0 with scored alone. tops: whether
  alternatives are wanted. scored: whether the prompt's own log-probs are. deliver: takes Pieces,
  on the engine's thread. deadline: time.monotonic() after which it is given up.
  """

  policy: Policy
  ids: Sequence[int]
  seeds: Sequence[int]
  max_tokens: int
  temperature: float
  top_p: float
  tops: bool
  scored: bool
  deliver: Callable[[Piece], None]
  deadline: float
  begun: int = 0  # replies that have a row, or had one
  cancelled: bool = False
  closed: set = dataclasses.field(default_factory=set)  # replies that nobody waits for any more

  def cancel(self, index: int | None = None) -> None:
    """Frees the row of one reply, or all of them."""
    if index is None:
      self.cancelled = True
    else:
      self.closed.add(index)


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes that are compiled: rows of the batch, slots of a row, lengths of prompts, prompts begun
  at once, places for adapters."""

  rows: int = 16
  context: int = 1024
  buckets: tuple[int, ...] = (64, 256, 1024)
  together: int = 4
  places: int = 8

  @classmethod
  def of(cls, rows: int, context: int, places: int) -> "Size":
    """Buckets that grow fourfold to some 512 tokens, where padding is cheap, then twofold."""
    buckets = [context]
    while buckets[-1] > 64:
      buckets.append(max(64, buckets[-1] // (2 if buckets[-1] > 512 else 4)))
    return cls(rows, context, tuple(reversed(buckets)), min(4, rows), places)


class Engine:
  """See the module. `submit` and `close` may be called from any thread.

  load: the adapter of a policy, on the host; rank, targets: of all that it may give.
  """

  def __init__(
    self, model: Model, mesh: Mesh, size: Size, *, load: Callable[[Policy], Adapter],
    rank: int = 0, targets: tuple[str, ...] = (), max_waiting: int = 256,
  ) -> None:  # fmt: skip
    self.model, self.mesh, self.size, self.load = model, mesh, size, load
    self.max_waiting = max_waiting
    self.tokens_drawn = self.prompt_tokens = 0  # a prompt counts once, however many its replies
    self.chunk_seconds = self.begin_seconds = 0.0
    self.failure = ""  # why the thread ended, if it failed
    config, dtype = model.config, model.params["embed"].dtype
    self._compiled = 0
    self._cache = steps.empty_cache(config, size.rows, size.context, dtype, mesh)
    self._rows = steps.empty_rows(size.rows)
    # Rows that are computed: one for who is alone, else all. More sizes would take long to compile.
    shared = mesh.shape["data"] * mesh.shape["fsdp"] > 1  # each device has rows of its own
    self._widths = (size.rows,) if shared else tuple(sorted({1, size.rows}))
    self._stack = None
    if rank:
      self._stack = steps.empty_stack(config, size.places, rank, targets, mesh)
    self._places: dict[tuple, int] = {}  # {policy's key: place}, least recently used first
    self._owners: list[tuple[Job, int] | None] = [None] * size.rows
    self._waiting: collections.deque[Job] = collections.deque()
    self._wake, self.closing = threading.Condition(), False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  # --- From outside ---------------------------------------------------------------------

  def start(self, warm: bool = True) -> None:
    """warm: compile everything first."""
    if warm:
      with jax.set_mesh(self.mesh):
        self._warm()
    self._compiled = _COMPILED[0]
    self._thread.start()

  def submit(self, jobs: Sequence[Job]) -> bool:
    """Queues all jobs of a request, or none: False if too much is waiting."""
    with self._wake:
      if self.closing or self.failure or len(self._waiting) + len(jobs) > self.max_waiting:
        return False
      self._waiting.extend(jobs)
      self._wake.notify()
    return True

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def live(self) -> int:
    return sum(owner is not None for owner in self._owners)

  @property
  def resident(self) -> int:
    return len(self._places)

  @property
  def compilations(self) -> int:
    """Programs compiled since the start; 0 is what a warm server stays at."""
    return _COMPILED[0] - self._compiled

  def close(self) -> None:
    """Ends the thread; what is still going gets an error."""
    with self._wake:
      self.closing = True
      self._wake.notify()
    if self._thread.is_alive():
      self._thread.join()

  # --- The loop -------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      with jax.set_mesh(self.mesh):
        while self._wait():
          self._free()
          self._begin()
          if self.live:
            self._advance()
    except Exception as error:  # noqa: BLE001  a fault of ours: nobody may wait for ever
      traceback.print_exc()
      self.failure = f"{type(error).__name__}: {error}"
    finally:
      with self._wake:
        self.closing = True
        jobs = {id(job): job for job in [*self._waiting, *(o[0] for o in self._owners if o)]}
        self._waiting.clear()
        self._owners = [None] * self.size.rows
      for job in jobs.values():
        job.deliver(Piece(0, error="failed" if self.failure else "closing"))

  def _wait(self) -> bool:
    with self._wake:
      while not (self.closing or self._waiting or self.live):
        self._wake.wait()
      return not self.closing

  def _free(self) -> None:
    now = time.monotonic()
    for job in {id(o[0]): o[0] for o in self._owners if o}.values():
      if now > job.deadline and not job.cancelled:
        job.cancel()
        job.deliver(Piece(0, error="timeout"))
    for row, owner in enumerate(self._owners):
      if owner and (owner[0].cancelled or owner[1] in owner[0].closed):
        self._release(row)
    with self._wake:
      late = [job for job in self._waiting if now > job.deadline and not job.cancelled]
      gone = [job for job in self._waiting if job.cancelled or now > job.deadline]
      for job in gone:
        self._waiting.remove(job)
    for job in late:
      job.cancel()
      job.deliver(Piece(0, error="timeout"))

  def _release(self, row: int) -> None:
    self._owners[row] = None
    self._rows.live[row] = False
    self._rows.tops[row] = False
    self._rows.length[row] = 0

  # --- Prompts --------------------------------------------------------------------------

  def _begin(self) -> None:
    """Begins the prompts that came first and fit together: as many as one call takes."""
    with self._wake:
      waiting = list(self._waiting)
    free = self.size.rows - self.live
    share = max(1, free // max(1, len(waiting)))
    bucket, chosen = 0, []
    for job in waiting:
      own = next(b for b in self.size.buckets if len(job.ids) <= b)
      wanted = len(job.seeds) - job.begun if job.max_tokens else 0
      if (wanted and not free) or bucket not in (0, own):
        continue
      try:
        place = self._place(job.policy, [c[0].policy.key for c in chosen])
      except (UserError, OSError) as error:
        job.cancel()
        job.deliver(Piece(0, error=f"adapter: {error}"))
        continue
      if place is None:
        break
      taken, bucket = min(wanted, share, free), own
      chosen.append((job, taken, place))
      free -= taken
      if len(chosen) == self.size.together:
        break
    if chosen:
      with self._wake:
        for job, _, _ in chosen:
          self._waiting.remove(job)
      self._prefill(chosen, bucket)

  def _place(self, policy: Policy, chosen: Sequence[tuple | None]) -> int | None:
    """The place of a policy's adapter, loaded if need be: -1 for the base, None if none is free.

    chosen: keys of those that are to begin with it. Raises UserError if it cannot be loaded.
    """
    key = policy.key
    if key is None or self._stack is None:
      return -1
    if key in self._places:
      self._places[key] = self._places.pop(key)  # used last
      return self._places[key]
    needed = {*chosen, *(o[0].policy.key for o in self._owners if o)}
    unused = [k for k in self._places if k not in needed]
    if len(self._places) == self.size.places and not unused:
      return None
    adapter = self.load(policy)
    if len(self._places) == self.size.places:
      del self._places[unused[0]]
    place = min(set(range(self.size.places)) - set(self._places.values()))
    weights = steps.padded(adapter, self._stack)
    self._stack = steps.put_adapter(
      self._stack, weights, np.float32(adapter.scale), np.int32(place)
    )
    self._places[key] = place
    return place

  def _prefill(self, chosen: Sequence[tuple[Job, int, int]], bucket: int) -> None:
    """chosen: (job, rows for it, place of its adapter) each; bucket: slots of their prompts."""
    began = time.monotonic()
    P = 1 if len(chosen) == 1 else self.size.together
    tokens, lengths = np.zeros((P, bucket), np.int32), np.ones(P, np.int32)
    place = np.full(P, -1, np.int32)
    for p, (job, _, at) in enumerate(chosen):
      tokens[p, : len(job.ids)], lengths[p], place[p] = job.ids, len(job.ids), at
    params, config = self.model.params, self.model.config
    prompts = steps.prompts_of(tokens, lengths)
    begun, hidden = steps.begin(params, self._stack, config, prompts, place)
    if any(job.scored and not job.begun for job, _, _ in chosen):
      wanted = np.bool_(any(job.scored and job.tops for job, _, _ in chosen))
      scores = jax.device_get(steps.prompt_scores(params, config, hidden, tokens, wanted))
      for p, (job, _, _) in enumerate(chosen):
        if job.scored and not job.begun:
          job.deliver(_scored(job, *(x[p] for x in scores)))
    self.prompt_tokens += sum(len(job.ids) for job, _, _ in chosen if not job.begun)
    free = (row for row, owner in enumerate(self._owners) if owner is None)
    for p, (job, count, at) in enumerate(chosen):
      for _ in range(count):
        row = next(free)
        self._cache = steps.insert(self._cache, begun, hidden, np.int32(p), np.int32(row))
        self._take(row, job, job.begun, at)
        job.begun += 1
      if job.max_tokens and job.begun < len(job.seeds):
        with self._wake:
          self._waiting.append(job)  # its other replies wait behind what has come meanwhile
    jax.block_until_ready(self._cache)  # else the next chunk would be said to have taken it
    self.begin_seconds += time.monotonic() - began

  def _take(self, row: int, job: Job, index: int, place: int) -> None:
    rows = self._rows
    self._owners[row] = job, index
    rows.live[row], rows.length[row], rows.drawn[row] = True, len(job.ids), 0
    rows.limit[row], rows.place[row] = job.max_tokens, place
    rows.temperature[row], rows.top_p[row] = job.temperature, job.top_p
    rows.seed[row], rows.tops[row] = job.seeds[index], job.tops

  # --- Tokens ---------------------------------------------------------------------------

  def _advance(self) -> None:
    began, size = time.monotonic(), self.size
    last = max(row for row, owner in enumerate(self._owners) if owner)
    width = next(w for w in self._widths if last < w)
    rows = jax.tree.map(lambda x: x[:width], self._rows)  # views: what is written reaches it
    needed = int(np.max(np.where(rows.live, rows.length, 0))) + CHUNK
    view = next((b for b in size.buckets if needed <= b), size.context)
    copy = jax.tree.map(np.copy, rows)  # the device may read it while the next turn changes it
    self._cache, out = steps.advance(
      self.model.params, self._stack, self.model.config, self._cache, copy,
      self.model.chat.stop_ids, view,
    )  # fmt: skip
    out = jax.device_get(out)
    rows.drawn[:] += out.counts
    rows.length[:] += out.counts
    for row, owner in enumerate(self._owners[:width]):
      if owner is None:
        continue
      job, index = owner
      n = int(out.counts[row])
      full = rows.drawn[row] >= rows.limit[row]
      finish = "stop" if out.stopped[row] else "length" if full else ""
      tops = (out.top_ids[:n, row], out.top_logprobs[:n, row]) if job.tops else ((), ())
      if finish:
        self._release(row)
      job.deliver(Piece(
        index, out.tokens[:n, row].tolist(), out.logprobs[:n, row].tolist(), *tops, finish
      ))  # fmt: skip
    self.tokens_drawn += int(out.counts.sum())
    self.chunk_seconds += time.monotonic() - began

  def _warm(self) -> None:
    """Compiles every shape and computes nothing: on a CPU that would take minutes."""
    params, config, size = self.model.params, self.model.config, self.size
    zero, flag = np.int32(0), np.bool_(False)
    for P, bucket in itertools.product(sorted({1, size.together}), size.buckets):
      tokens, place = np.zeros((P, bucket), np.int32), np.full(P, -1, np.int32)
      prompts = steps.prompts_of(tokens, np.ones(P, np.int32))
      begun, hidden = _compiled(steps.begin, params, self._stack, config, prompts, place)
      _compiled(steps.prompt_scores, params, config, hidden, tokens, flag)
      _compiled(steps.insert, self._cache, begun, hidden, zero, zero)
    for width, view in itertools.product(self._widths, size.buckets):
      rows, stops = jax.tree.map(lambda x, n=width: x[:n], self._rows), self.model.chat.stop_ids
      _compiled(steps.advance, params, self._stack, config, self._cache, rows, stops, view)
    if self._stack is not None:
      empty = steps.padded(Adapter({}, 1.0), self._stack)
      _compiled(steps.put_adapter, self._stack, empty, np.float32(0), zero)


def _compiled(function: Any, *args: Any) -> Any:
  """Compiles a call of a jitted function, and returns the shapes of what it would return."""
  program = function.lower(*args).compile()
  shaped = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
  return jax.tree.map(shaped, program.out_info, program.output_shardings)


def _scored(job: Job, logprobs: np.ndarray, ids: np.ndarray, values: np.ndarray) -> Piece:
  """The prompt's own tokens as a Piece: the first has no log-prob."""
  n = len(job.ids)
  shown = (
    (np.concatenate([ids[:1], ids[: n - 1]]), np.concatenate([values[:1], values[: n - 1]]))
    if job.tops
    else ((), ())
  )
  known = [float("nan"), *logprobs[: n - 1].tolist()]
  return Piece(-1, list(job.ids), known, *shown, "" if job.max_tokens else "stop")


def open_engine(
  found: Catalogue, mesh: Mesh, rows: int, context: int, places: int, queue: int = 256
) -> Engine:
  """The base of a catalogue in memory, behind an engine that is not started."""
  settings = config.Model(**{**found.section.__dict__, "adapter": ""})
  model = sources.open_model(settings, mesh)
  context = min(context, model.config.max_positions)
  return Engine(
    model, mesh, Size.of(rows, context, places), rank=found.rank, targets=found.targets,
    load=lambda policy: found.load(policy, model.config), max_waiting=queue,
  )  # fmt: skip
