"""Judges: who gives the reward, and who scores ACC and HEX.

A judge is a batched function of users and replies:
  score(scenarios, replies) -> ({"reward", "acc", "hex"}: [P, G] float32 on 1..10,
  NaN = no verdict, and from some judges "verdicts" [P, G, 6] (`verdicts.VERDICTS`);
  metrics {name: scalar})
The reward is what the simulated user gives. ACC (good behaviour: dissuasion or neutrality,
whatever the environment declares) and HEX (harmful exploitation: encouragement or agreement)
come from evaluators, which see the user's message and the reply only: no wish, no group.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlsafety import addresses, config, sharding
from rlsafety.environments import FACTORS, Environment, Scenario
from rlsafety.errors import UserError
from rlsafety.judges import gate, http, lm, own, phrases, probe, questions
from rlsafety.models import hf, sources
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.types import Replies

Score = Callable[[Sequence[Scenario], Replies], tuple[Mapping[str, Any], Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Judge:
  """score: see above. about: name and limits, for log and report; "gate": of each score whether it
  passed and if not why (`gate.about`); "sha256" of what it reads from files, where it does, and
  "reading" of its own model (`sources.reading`)."""

  score: Score
  about: dict[str, Any]


def check_names(settings: config.Judge) -> None:
  """Raises UserError for a function of the user's that cannot be imported, and for an endpoint's
  address that cannot be one: before any weights are loaded."""
  further = [text.partition("=")[0] for text in settings.also]
  for name in (settings.name, settings.evaluator, *further):
    if "." in name:
      own.find(name)
  if "http" in (settings.name, *further):
    addresses.check(settings.url, settings.model)
  elif settings.evaluator == "http":
    addresses.check(settings.url, settings.evaluator_model or settings.model)


def open_judge(
  settings: config.Judge,
  environment: Environment,
  policy: Model,
  mesh: Mesh | None = None,
  chunk_tokens: int = 2048,
  models: dict[str, Model] | None = None,
) -> Judge:
  """The judge that a config names, with its evaluator and further rewards if it names any.

  policy: its frozen base judges too, unless settings.model names another model. chunk_tokens:
  tokens whose logits exist at once. models: judges' own models by path, added to: what several
  judges share is loaded once. Raises UserError for what cannot be used.
  """
  opened: dict[str, Judge] = {}
  known = {} if models is None else models

  further = [(name, float(weight)) for name, _, weight in (t.partition("=") for t in settings.also)]
  rewarding = {settings.name, *(name for name, _ in further)}
  named, own_model = settings.evaluator or settings.name, settings.evaluator_model
  evaluates = f"{named} {own_model}" if own_model else named

  def judge(name: str, key: str, s: config.Judge) -> Judge:  # once, however often it is named
    if key not in opened:
      roles = key in rewarding, key == evaluates
      opened[key] = _open(name, s, environment, policy, mesh, chunk_tokens, known, roles)
    return opened[key]

  first = judge(settings.name, settings.name, settings)
  other = dataclasses.replace(settings, name=named, model=own_model, adapter="")
  evaluator = judge(named, evaluates, other if own_model else settings)
  graded = gate.about(first.about.get("measured"))
  graded |= {k: gate.passes(evaluator.about.get("measured", {}).get(k)) for k in ("acc", "hex")}
  limits = first.about["limits"]
  if evaluator is first and settings.name in ("lm", "questions", "http"):
    limits += "; one model rewards and scores ACC and HEX: set judge.evaluator_model or .evaluator"
  if not further and evaluator is first:
    return dataclasses.replace(first, about={**first.about, "limits": limits, "gate": graded})
  for name, _ in further:
    judge(name, name, settings)
  digests = {}
  for key in ("sha256", "reading"):
    digests |= _sum([one.about[key] for one in opened.values() if key in one.about], key)

  def score(users: Sequence[Scenario], replies: Replies):
    found = {name: one.score(users, replies) for name, one in opened.items()}
    metrics = dict(found[settings.name][1])
    reward = found[settings.name][0]["reward"]
    for name, weight in further:
      part = found[name][0]["reward"]
      metrics[f"judge_reward_{name}"] = jnp.nanmean(jnp.asarray(part))
      reward = reward + weight * part
    if further:
      own_part = found[settings.name][0]["reward"]
      metrics[f"judge_reward_{settings.name}"] = jnp.nanmean(jnp.asarray(own_part))
    evaluated = {k: v for k, v in found[evaluates][0].items() if k != "reward"}
    return {"reward": reward, **evaluated}, metrics

  name = " + ".join([first.about["name"], *(f"{w:g} x {n}" for n, w in further)])
  if evaluator is not first:
    name += f"; ACC and HEX by {evaluator.about['name']}"
    limits += f"; of ACC and HEX: {evaluator.about['limits']}"
  about = {**first.about, "name": name, "limits": limits, "gate": graded, **digests}
  return Judge(score, about)


def _open(
  name: str,
  s: config.Judge,
  environment: Environment,
  policy: Model,
  mesh: Mesh | None,
  chunk_tokens: int,
  models: dict[str, Model],
  roles: tuple[bool, bool],
) -> Judge:
  """roles: whether it rewards, and whether it evaluates."""
  (rewards, evaluates), wording = roles, environment.reward_wording
  reads_wish = name not in ("probe", "phrases", "questions")
  if rewards and not reads_wish and wording != FACTORS["reward_wording"]:
    raise UserError(
      f"environment.reward_wording={wording!r}: judge {name} reads no wording and no wish, its "
      "reward follows the group alone; leave the default, or choose judge lm or http"
    )
  unusable = 1.0 if s.degenerate == "floor" else float("nan")
  if name == "probe":
    base = _own_model(s.base, policy, mesh, models)
    heads = probe.find(environment.name, base, s.model if s.name == "probe" else "")
    theirs = policy.chat if s.base else None
    score = probe.make(base, heads, mesh, unusable, chunk_tokens, theirs)
    about = probe.describe(heads) | {"sha256": heads.sha256}
    if s.base:
      about["reading"] = base.source["reading"]
    for measured_elsewhere, whose in (
      ("." in environment.name, f"users of {environment.name}"),
      (s.base not in ("", policy.source.get("path")), f"replies of {policy.source.get('path')}"),
    ):
      if measured_elsewhere:
        about.pop("measured", None)
        about["limits"] += f"; not measured on {whose}"
    return Judge(score, about)
  if name == "phrases":
    return Judge(phrases.make(policy.chat, environment.name, unusable), phrases.describe())
  if name in ("lm", "questions"):
    another = s.name != name and s.name in ("probe", "http")  # whose `model` is none of ours
    own_path = "" if another else s.model
    model = _own_model(own_path, policy, mesh, models)
    read = [model.source["sha256"]] if own_path else []  # the policy's base is the run's anyway
    beside = {"reading": model.source["reading"]} if own_path else {}
    if name == "questions":
      heads = questions.find(environment.name, model, s.heads if evaluates else "")
      found = heads if evaluates else None
      score = questions.make(
        model, policy.chat, environment.name, found, mesh, unusable, rewards=rewards
      )
      read += [heads.sha256] if heads else []
      about = questions.describe(model, heads, rewards, evaluates)
      return Judge(score, about | beside | _sum(read))
    adapter = read_adapter(s.adapter, model, mesh) if s.adapter else None
    score = lm.make(model, policy.chat, mesh, unusable, adapter)
    if adapter:
      scale = jnp.float32(adapter.scale)
      read.append(sources.checksum({"weights": adapter.weights, "scale": scale}))
    return Judge(score, lm.describe(model, s.adapter) | beside | _sum(read))
  if name == "http":
    limits = {k: getattr(s, k) for k in ("concurrency", "timeout_s", "deadline_s", "attempts")}
    score = http.make(s.url, s.model, policy.chat, unusable, price=s.price, **limits)
    return Judge(score, http.describe(s.url, s.model))
  return Judge(own.make(name, policy.chat, unusable), own.describe(name))


def _own_model(path: str, policy: Model, mesh: Mesh | None, models: dict[str, Model]) -> Model:
  """The judge's model at `path`, loaded once for all judges; "" is the policy's base."""
  if path and path not in models:
    models[path] = other_model(path, policy, mesh)
  return models[path] if path else policy


def _sum(digests: Sequence[str], key: str = "sha256") -> dict[str, str]:
  """{key: sha256 of these digests}, {} where there are none."""
  return {key: hashlib.sha256(repr(digests).encode()).hexdigest()} if digests else {}


def other_model(path: str, policy: Model, mesh: Mesh | None) -> Model:
  """A judge's own model, in the dtype and layout of the policy's, identified."""
  dtype = str(policy.params["embed"].dtype)
  return sources.identified(sources.open_model(config.Model(path=path, dtype=dtype), mesh))


def read_adapter(path: str, model: Model, mesh: Mesh | None) -> Adapter:
  """A PEFT folder as the judge's adapter, whole on every device: it is small."""
  put = lambda x: sharding.put(mesh, x, *[None] * x.ndim) if mesh else jnp.asarray(x)  # noqa: E731
  return jax.tree.map(put, hf.load_peft(path, model.config)[0])


def lines(judge: Judge) -> list[str]:
  """The judge's name and limits, the AUCs of each score that was measured, and the gate."""
  about = judge.about
  out = [f"judge: {about['name']}"]
  for score, record in about.get("measured", {}).items():
    for source, found in record["contrasts"].items():
      aucs = "; ".join(f"against {name} {x['auc']:.2f}" for name, x in found.items())
      out.append(f"  AUC of {score} on {source} replies: {aucs}")
  for score, found in about.get("gate", {}).items():
    if not found["passed"]:
      out.append(f"  {score} did not pass the gate: {'; '.join(found['why'])}")
  return [*out, f"  limits: {about['limits']}"]
