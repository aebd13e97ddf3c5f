"""Names of models and the adapters behind them, all over one base.

  base            the frozen model alone
  runs/x          the run's trained adapter, or while it is training its newest checkpoint
  runs/x@step120  a checkpoint (runs/x@120 is the same)

Runs are the directories that were named at the start; their checkpoints are looked for when they
are asked for, so that a run that is still training can be questioned at its newest step.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from rlsafety import checkpoints, config, files, recipes
from rlsafety.errors import UserError
from rlsafety.flags import did_you_mean
from rlsafety.models import hf
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model that can be asked. run: its directory, None for the base. step: of a checkpoint, None
  for the adapter of a complete run."""

  name: str
  run: pathlib.Path | None = None
  step: int | None = None

  @property
  def key(self) -> tuple[str, int | None] | None:
    """What two names of the same weights share; None for the base."""
    return None if self.run is None else (str(self.run), self.step)


@dataclasses.dataclass(frozen=True)
class Catalogue:
  """The policies of one base. runs {name: directory}; loras {name: what its adapters are like};
  section: the base as a config names it."""

  section: config.Model
  runs: dict[str, pathlib.Path]
  loras: dict[str, config.Lora]

  @property
  def rank(self) -> int:
    return max((lora.rank for lora in self.loras.values()), default=0)

  @property
  def targets(self) -> tuple[str, ...]:
    used = {target for lora in self.loras.values() for target in lora.targets}
    return tuple(t for t in config.TARGETS if t in used)

  def names(self) -> list[str]:
    """Every name that can be asked for now."""
    out = [BASE]
    for name, run in self.runs.items():
      found = steps(run)
      out += [name] if found or _is_complete(run) else []
      out += [f"{name}@step{step}" for step in found]
    return out

  def find(self, name: str) -> Policy:
    """Raises LookupError, with the nearest name, where there is no such policy."""
    if name == BASE:
      return Policy(BASE)
    whole = name.rstrip("/")
    if whole in self.runs:
      run = self.runs[whole]
      if _is_complete(run):
        return Policy(whole, run)
      if found := steps(run):
        return Policy(whole, run, found[-1])
    stem, _, at = name.rpartition("@")
    if stem in self.runs and (number := re.fullmatch(r"(?:step)?([0-9]{1,9})", at)):
      if int(number[1]) in steps(self.runs[stem]):
        return Policy(name, self.runs[stem], int(number[1]))
    hint = did_you_mean(name, self.names())
    raise LookupError(f"the model {name!r:.200} does not exist{hint}")

  def lora_of(self, policy: Policy) -> config.Lora:
    return next(self.loras[name] for name, run in self.runs.items() if run == policy.run)

  def load(self, policy: Policy, model: ModelConfig) -> Adapter:
    """The weights of a policy other than the base, on the host. Raises UserError naming the file
    that cannot be read or is not of this base."""
    assert policy.run is not None
    if policy.step is None:
      return hf.load_peft(policy.run / "adapter", model)[0]
    flat = checkpoints.read_part(policy.run / "checkpoints", policy.step, ".adapter.weights")
    lora, weights = self.lora_of(policy), {}
    for path, x in flat.items():
      found = re.fullmatch(r"\['(\w+)'\]\['([ab])'\]", path)
      if not found:
        raise UserError(f"{policy.run}/checkpoints/{policy.step}: leaf {path} is no LoRA weight")
      weights.setdefault(found[1], {})[found[2]] = np.asarray(x, np.float32)
    return Adapter(weights, lora.scale)


def steps(run: pathlib.Path) -> list[int]:
  """The steps of a run's checkpoints, ascending."""
  folder = run / "checkpoints"
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(f.name) for f in found if f.name.isdecimal() and f.is_dir())


def _is_complete(run: pathlib.Path) -> bool:
  return (run / "summary.json").exists() and (run / "adapter/adapter_config.json").exists()


def catalogue(model: str = "", runs: Sequence[str] = (), dtype: str = "") -> Catalogue:
  """The base that `model` names or that all `runs` were trained from, with the runs over it.

  dtype: of the base, "" = what the first run trained with, or float32. Raises UserError for a
  folder that is no run, and for runs of different bases.
  """
  found, loras, bases = {}, {}, {}
  for name in runs:
    path = pathlib.Path(name)
    where = path / "config.json"
    stored = files.read_json(where).get("config")
    if not isinstance(stored, dict):
      raise UserError(f"{where}: not the config of a run")
    own = recipes.frozen({**stored, "environment": {"name": "neutral"}})  # imports no other
    name = path.as_posix().rstrip("/")
    found[name], loras[name] = path.resolve(), own.lora
    bases[name] = dataclasses.replace(own.model, adapter="")
  if model:
    section = config.Model(path=model, dtype=dtype or "float32")
  elif bases:
    section = next(iter(bases.values()))
  else:
    raise UserError("nothing to serve: give --model=PATH, or --runs with run directories")
  called = lambda m: m.path or f"{m.preset} drawn with seed {m.seed}"  # noqa: E731
  for name, own in bases.items():
    if called(own) != called(section):
      raise UserError(
        f"{name} was trained from {called(own)}, not from {called(section)}: one server has one "
        "base"
      )
  section = dataclasses.replace(section, dtype=dtype or section.dtype)
  return Catalogue(section, found, loras)

