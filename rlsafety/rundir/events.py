"""Scalars for those who watch a run elsewhere: TensorBoard, Weights & Biases, Trackio.

The run directory stays the truth: these see copies, and one that fails is left out with a line in
the log while the run goes on. A resumed run continues what it began: its id lies in `ID`.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import io
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlsafety import config
from rlsafety.config import Config, to_json
from rlsafety.errors import UserError
from rlsafety.files import read_json, write_json
from rlsafety.rundir.write import RunDir

ID = "events/id.json"  # {"id"}: made once, so that a moved run directory keeps it


@dataclasses.dataclass
class Sink:
  """One place. write(step, finite scalars), close()."""

  name: str
  write: Callable[[int, dict[str, float]], Any]
  close: Callable[[], Any]


@dataclasses.dataclass
class Events:
  """All places where the scalars of one run go."""

  sinks: list[Sink] = dataclasses.field(default_factory=list)

  def write(self, step: int, row: Mapping[str, Any], prefix: str = "") -> None:
    """Scalars of a row; what is no finite number is left out."""
    numbers = {k: v for k, v in row.items() if isinstance(v, float | int | np.number)}
    finite = {prefix + k: float(v) for k, v in numbers.items() if k != "step" and np.isfinite(v)}
    self._each(lambda sink: sink.write(step, finite))

  def close(self) -> None:
    self._each(lambda sink: sink.close())
    self.sinks.clear()

  def _each(self, call: Callable[[Sink], Any]) -> None:
    for sink in list(self.sinks):
      try:
        call(sink)
      except Exception as error:  # a library of others, and often the network: no run ends for it
        self.sinks.remove(sink)
        said = str(error).partition("\n")[0][:200]
        logging.getLogger("rlsafety").info("%s: left out from here on (%s)", sink.name, said)


def check(log: config.Log) -> None:
  """Raises UserError where a writer that the config asks for is not installed."""
  for name in ("wandb", "trackio"):
    project = getattr(log, name)
    if project and not importlib.util.find_spec(name):
      raise UserError(
        f"log.{name}={project}: the package is missing; run: pip install 'rlsafety[{name}]', or "
        f"set --config.log.{name}="
      )


def open_events(run: RunDir, settings: Config) -> Events:
  """The writers of a run that has been started: TensorBoard where its extra is installed, the
  others where the config names a project. Raises UserError for one that refuses to begin."""
  if not run.writes:
    return Events()
  log = settings.log
  check(log)
  sinks = []
  if all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard")):
    sinks.append(_tensorboard(run))
  for name, start in (("wandb", _wandb), ("trackio", _trackio)):
    if project := getattr(log, name):
      try:
        sinks.append(start(project, _id(run), run, to_json(settings)))
      except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
          f"log.{name}={project}: {said}; log in, choose its offline mode (WANDB_MODE=offline), or "
          f"set --config.log.{name}="
        ) from None
  return Events(sinks)


def _id(run: RunDir) -> str:
  file = run.path / ID
  if not file.exists():
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"id": uuid.uuid4().hex[:12]})
  return str(read_json(file)["id"])


def _tensorboard(run: RunDir) -> Sink:
  from clu import metric_writers  # imports TensorFlow, an extra

  writer = metric_writers.SummaryWriter(str(run.path / "events"))

  def write(step: int, row: dict[str, float]) -> None:
    writer.write_scalars(step, row)
    writer.flush()

  return Sink("TensorBoard", write, writer.close)


def _wandb(project: str, name: str, run: RunDir, values: dict) -> Sink:
  # By default W&B keeps 15 seconds of an offline run in memory: a kill loses them, and a run that
  # goes on from a checkpoint after them never logs them again. Versions without it ignore it.
  os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")
  import wandb  # an extra  # pyright: ignore[reportMissingImports]

  (run.path / "events").mkdir(exist_ok=True)
  opened = wandb.init(
    project=project,
    id=name,
    name=f"{run.path.resolve().name}-{name}",
    dir=str(run.path / "events"),
    config=values,
    resume="allow",
    reinit="create_new",  # cells: several runs in one process
    settings=wandb.Settings(console="off", silent=True),
  )
  return Sink("Weights & Biases", lambda step, row: opened.log(row, step=step), opened.finish)


def _trackio(project: str, name: str, run: RunDir, values: dict) -> Sink:
  import trackio  # an extra  # pyright: ignore[reportMissingImports]

  # In a context of its own: init ends the run that was begun before in the same one, and cells
  # are several.
  with contextlib.redirect_stdout(io.StringIO()):  # six lines in colours, in a log too
    opened = contextvars.Context().run(
      trackio.init,
      project=project,
      name=f"{run.path.resolve().name}-{name}",
      config=values,
      resume="allow",
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
  return Sink("Trackio", lambda step, row: opened.log(row, step=step), opened.finish)
