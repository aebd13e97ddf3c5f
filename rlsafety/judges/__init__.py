"""Judges rate replies; evaluators score ACC and HEX. All are batched functions of tokens.

`make_scorer` builds what a config's `judge` names, as a Scorer:
  score(scenarios, prompts, rollouts) -> ({"reward", "acc", "hex"}: [P, G] float32 on 1..10,
  NaN = no verdict; metrics {name: scalar})
The reward is the rating of the simulated user; the evaluators see user message and reply
only, no wish and no group.
"""

import dataclasses
from collections.abc import Callable, Sequence

from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError
from rlsafety.types import Prompts, Rollouts

JUDGES = ("lm", "head", "lexical", "http")


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A judge with its evaluators. description: name, AUCs and limits, for log and report."""

  function: Callable
  description: dict

  def __call__(self, scenarios: Sequence[Scenario], prompts: Prompts, rollouts: Rollouts):
    return self.function(scenarios, prompts, rollouts)

  def describe(self) -> dict:
    return self.description


def make_scorer(config, model, mesh=None) -> Scorer:
  """The scorer of a run. model: the policy's frozen base, which judges too unless
  config.judge.model names another. Raises UserError for what cannot be used."""
  from rlsafety import environments
  from rlsafety.config import base
  from rlsafety.judges import phrases, probe

  c = base().judge  # configs from before a field lack it
  c.update(config.judge)
  environment, default = config.environment.name, environments.FACTORS["reward_wording"]
  wording = config.environment.get("reward_wording", default)
  if c.name in ("head", "lexical") and wording != default:
    raise UserError(
      f"environment.reward_wording={wording!r}: judge {c.name} reads no wording and no wish, its "
      "rating follows the group alone; leave the default, or choose judge lm or http"
    )
  if c.adapter and c.name != "lm":
    raise UserError(f"judge.adapter={c.adapter!r}: only judge lm takes one, not {c.name}")
  if c.name == "head":
    heads = probe.find(environment, model, c.model)
    chunk = config.learner.chunk_tokens
    return Scorer(probe.make(model, heads, mesh, c.degenerate, chunk), probe.describe(heads))
  if c.name == "lexical":
    return Scorer(phrases.make(model.chat, environment, c.degenerate), phrases.describe())
  if c.name == "lm":
    from rlsafety.judges import lm

    judge = other_model(c.model, config, mesh) if c.model else model
    adapter = read_adapter(c.adapter, judge, mesh) if c.adapter else None
    made = lm.make(judge, model.chat, mesh, c.degenerate, adapter)
    return Scorer(made, lm.describe(judge, c.adapter))
  if c.name == "http":
    from rlsafety.judges import http

    price = http.read_price(c.price)
    limits = {k: c[k] for k in ("concurrency", "timeout_s", "deadline_s", "attempts")}
    made = http.make(c.url, c.model, model.chat, c.degenerate, price=price, **limits)
    return Scorer(made, http.describe(c.url, c.model))
  raise UserError(f"judge.name={c.name!r}: choose from {', '.join(JUDGES)}")


def other_model(path: str, config, mesh):
  """A judge's own model, in the dtype and layout of the policy's."""
  from rlsafety.models import sources

  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.path, config.model.preset = path, ""
  return sources.from_config(config, mesh)


def read_adapter(path: str, judge, mesh):
  """A PEFT folder as the judge's adapter, whole on every device: it is small."""
  import jax
  import jax.numpy as jnp

  from rlsafety import sharding
  from rlsafety.models import hf

  put = lambda x: sharding.put(mesh, x, *[None] * x.ndim) if mesh else jnp.asarray(x)  # noqa: E731
  return jax.tree.map(put, hf.load_peft(path, judge.config)[0])
