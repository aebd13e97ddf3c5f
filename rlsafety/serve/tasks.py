"""Inspect's tasks asked of a policy while it trains, over the base that training holds already.

`ask` runs every task of `config.eval.tasks` in this process and thread; the engine's thread draws
the replies, through the provider by which Inspect also questions finished runs. Inspect's own logs
lie in RUN/eval/inspect/step_N for `inspect view`. Sampling seeds follow the messages, so that a
run that was killed gets the same numbers again, and two steps differ by their weights alone.
"""

# pyright: reportMissingImports=false
# (Inspect is an extra, absent where the rest is checked)

import collections
import dataclasses
import importlib.metadata
import importlib.util
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import inspect_ai
import jax
import numpy as np
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model
from jax.sharding import Mesh

from rlsafety import config
from rlsafety.errors import UserError
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.serve import inspect_provider
from rlsafety.serve.adapters import BASE, Policy
from rlsafety.serve.app import Server
from rlsafety.serve.engine import Engine, Size

ROWS, CONTEXT = 8, 1024  # replies at once, and tokens of a prompt with its reply
LENGTH = 256  # tokens of a reply, where a task does not say
SECONDS = 24 * 3600.0  # of a reply, at most


@dataclasses.dataclass(frozen=True)
class Current:
  """What the provider finds: the base, and under any other name the adapter as it is now."""

  run: pathlib.Path
  step: int

  def find(self, name: str) -> Policy:
    return Policy(name) if name == BASE else Policy(name, self.run, self.step)

  def names(self) -> list[str]:
    return [BASE, f"{self.run.name}@step{self.step}"]


def check(names: Sequence[str]) -> None:
  """Raises UserError for a task whose file or package is not there, and with several processes."""
  if jax.process_count() > 1:
    raise UserError(
      f"eval.tasks={','.join(names)}: Inspect talks to one process, and this run has "
      f"{jax.process_count()}; leave eval.tasks out and question the run's checkpoints with "
      "inspect eval TASK --model rlsafety/RUN@STEP"
    )
  known = {e.name for e in importlib.metadata.entry_points(group="inspect_ai")}
  for name in names:
    file, _, _ = name.partition("@")
    if file.endswith(".py"):
      if not pathlib.Path(file).is_file():
        raise UserError(f"eval.tasks: {name}: no such file")
      continue
    package, slash, _ = name.partition("/")
    if not slash or not (package in known or importlib.util.find_spec(package)):
      raise UserError(
        f"eval.tasks: {name}: neither FILE.py@TASK nor PACKAGE/TASK of an installed package"
      )


def ask(
  settings: config.Eval, model: Model, mesh: Mesh, lora: config.Lora, adapter: Adapter,
  run: pathlib.Path, step: int,
) -> dict[str, dict]:  # fmt: skip
  """{"task/metric": {"value", "stderr", "n", "samples"}} of every task, for the summary's "tasks".

  samples: {id: value}, where their mean is the value, so that two steps can be paired. A task that
  fails has one entry under its own name, {"value": NaN, ..., "error": one line}. adapter: on the
  host. A scorer that asks for a grader and names none gets the frozen base, not the policy.
  """
  context = min(CONTEXT, model.config.max_positions)
  targets = tuple(t for t in config.TARGETS if t in lora.targets)
  engine = Engine(
    model, mesh, Size.of(ROWS, context, places=1), load=lambda _: adapter, rank=lora.rank,
    targets=targets, max_waiting=1 << 16,
  )  # fmt: skip
  engine.start(warm=False)
  current = Current(run.resolve(), step)
  server = Server(engine, current, seconds=SECONDS)  # pyright: ignore[reportArgumentType]
  logs = current.run / "eval" / "inspect" / f"step_{step:06d}"
  shutil.rmtree(logs, ignore_errors=True)  # of a run that was killed here
  out = {}
  try:
    for name in settings.tasks:
      # Any fault of a task is the task's: the run has cost more than one of its numbers.
      try:
        out |= _numbers(name, _evaluated(name, server, current, logs, settings.task_samples))
      except Exception as error:  # noqa: BLE001
        why = f"{type(error).__name__}: {error}"
        out[called(name)] = _entry(math.nan, math.nan, 0) | {"error": " ".join(why.split())[:300]}
  finally:
    engine.close()
  return out


def called(name: str) -> str:
  """What a task's numbers are called: TASK of FILE.py@TASK, and else its name."""
  file, at, task = name.partition("@")
  return task if at else file.removesuffix(".py").rpartition("/")[2] if ".py" in file else name


def _evaluated(
  name: str, server: Server, current: Current, logs: pathlib.Path, samples: int
) -> EvalLog:
  policy, base = (
    get_model(
      f"{inspect_provider.NAME}/{n}", config=GenerateConfig(max_tokens=LENGTH), memoize=False
    )
    for n in reversed(current.names())
  )
  for model in (policy, base):
    provider: Any = model.api
    provider.server, provider.rows, provider.asked = server, ROWS, collections.Counter()
  found = inspect_ai.eval(
    name, policy, model_roles={"grader": base}, log_dir=str(logs), display="none",
    limit=samples or None, score_display=False,
  )  # fmt: skip
  if not found:
    raise LookupError("Inspect found no such task")
  return found[0]


def _numbers(name: str, log: EvalLog) -> dict[str, dict]:
  if log.status != "success" or log.results is None:
    raise RuntimeError(log.error.message if log.error else f"its status is {log.status}")
  out, several = {}, len(log.results.scores) > 1
  for score in log.results.scores:
    samples = _samples(log, score.scorer, score.reducer)
    mean = np.mean(list(samples.values())) if samples else math.nan
    values = {k: m.value for k, m in score.metrics.items() if isinstance(m.value, int | float)}
    error = float(values.pop("stderr", math.nan))
    n = score.scored_samples
    n = n if n is not None else len(samples)
    for metric, value in values.items():
      of_mean = math.isclose(float(value), mean, rel_tol=1e-6, abs_tol=1e-9)
      key = "/".join([called(name), *([score.name] if several else []), metric])
      entry = _entry(float(value), error if of_mean or not samples else math.nan, n)
      out[key] = entry | ({"samples": samples} if of_mean else {})
  if not out:
    raise RuntimeError("it has no metric that is a number")
  return out


def _samples(log: EvalLog, scorer: str, reducer: str | None) -> dict[str, float]:
  """{id of a sample: its score over the epochs}, {} where a score is no number."""
  of_scorer = [r for r in log.reductions or () if r.scorer == scorer and r.reducer == reducer]
  found: Mapping[str, Any] = {str(s.sample_id): s.value for r in of_scorer for s in r.samples}
  if not all(isinstance(v, int | float) for v in found.values()):
    return {}
  return {key: float(value) for key, value in found.items()}


def _entry(value: float, stderr: float, n: int) -> dict:
  return {"value": value, "stderr": stderr, "n": n}
