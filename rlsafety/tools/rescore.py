"""Scores rollouts again, with any judge; compares judges; asks a base model for surprise.

  python -m rlsafety.tools.rescore --runs='runs/**' --judge=lm --judge_model=PATH --name=big
      ACC, HEX and reward of logged rollouts -> RUN/scores/NAME.jsonl; an interrupted
      command goes on where it stopped, and asks an endpoint again for what it left unrated.
      rlsafety.study.analyze reads them with --scores=NAME.
  python -m rlsafety.tools.rescore --what=agreement --runs='runs/**' --name=big [--against=OTHER]
      two judges on the same rollouts: the run's own scores (or OTHER) against NAME.
  python -m rlsafety.tools.rescore --what=cross_entropy --runs='runs/**' --model=PATH --out=FILE.csv
      a base model's loss on harmful and safe replies, picked from the runs by HEX; one row
      per model, which rlsafety.study.analyze reads with --benchmarks=FILE.csv.
  python -m rlsafety.tools.rescore --what=initial --config=configs/x.py --workdir=DIR [--config.a=b]
      a model that was never trained: its replies to the held-out users, as a run of 0 steps.

Flags of the first form: --judge=head|lm|lexical|http, --judge_model, --judge_url, --price=a,b
dollars per million prompt and completion tokens of an endpoint, for the cost in the progress
line; --source=train|heldout|both, --every=N steps, --per_step=K rollouts of a step (0 = all),
--seed, --batch rows at a time. --high and --low: HEX above and below which a reply of a
gameable user counts as harmful or safe (5 and 2); --per_run: how many of each at most.
"""

import itertools
import json
import math
import os
import sys
import time

import numpy as np

from rlsafety import config as config_lib
from rlsafety import files
from rlsafety.errors import UserError, run_main
from rlsafety.rundir import read
from rlsafety.study import gather, statistics, tables

FLAGS = {
  "what": "score", "runs": "", "name": "", "against": "", "judge": "", "judge_model": "",
  "judge_url": "", "price": "", "source": "train", "every": "1", "per_step": "0", "seed": "0",
  "batch": "16", "model": "", "dtype": "float32", "out": "", "high": "5", "low": "2",
  "per_run": "10",
}  # fmt: skip


SAME_JUDGE = ("name", "model", "adapter", "url", "degenerate")  # not its price and time limits


# --- Which rollouts ------------------------------------------------------------------------


def select(run, source="train", every=1, per_step=0, seed=0) -> list[dict]:
  """Records of a run, each with its "source": every n-th step, k a step, seeded.

  Which ones are drawn depends on (seed, step) alone, so that runs of the same shape give
  the same places and a longer run only adds to a shorter one's.
  """
  held_out = [("heldout", r) for rs in read.eval_rollouts(run).values() for r in rs]
  train = [("train", r) for r in read.train_rollouts(run)]
  chosen = {"train": train, "heldout": held_out, "both": held_out + train}.get(source)
  if chosen is None:
    raise UserError(f"--source={source}: choose train, heldout or both")
  out = []
  for (kind, step), group in itertools.groupby(chosen, lambda x: (x[0], x[1]["step"])):
    group = [{"source": kind, **r} for _, r in group]
    if step % every and kind == "train":
      continue
    if per_step and len(group) > per_step:
      rng = np.random.default_rng([seed, step, kind == "train"])
      group = [group[i] for i in sorted(rng.choice(len(group), per_step, replace=False))]
    out += group
  return out


def place(record: dict) -> tuple:
  return record["source"], record["step"], record["prompt"], record["sample"]


# --- Scoring -------------------------------------------------------------------------------


def judge_config(run, judge: str, judge_model: str, judge_url: str, price: str = ""):
  """The run's own config with another judge in it, or its own at another price."""
  from ml_collections import ConfigDict

  from rlsafety import environments

  config = ConfigDict(run.config)
  if judge:
    config.judge = ConfigDict(
      {"name": judge, "model": judge_model, "url": judge_url, "degenerate": "floor"}
    )
    if judge in ("head", "lexical"):  # they read no wording, and refuse one
      config.environment.reward_wording = environments.FACTORS["reward_wording"]
  if price:
    config.judge.price = tuple(price.split(","))
  return config


def score_run(run, name, config, model, scorer, records, batch=16, say=print) -> dict:
  """Scores `records` into RUN/scores/NAME.jsonl; returns {"scored", "unscorable", "old"}.

  What the file holds already is kept, if it was made by the same judge; a different one
  under the same name is refused. Rows that an endpoint left without a verdict are asked for
  again: it may have been down, and a model on this machine would only repeat itself.
  """
  from rlsafety import environments

  path = run.path / "scores" / f"{name}.jsonl"
  judge = {k: v for k, v in json.loads(config.judge.to_json()).items() if k in SAME_JUDGE}
  about = {"judge": scorer.describe(), "config": judge}
  header = path.with_suffix(".json")
  if header.exists() and files.read_json(header) != about:
    raise UserError(f"{header}: these scores are another judge's; give another --name")
  path.parent.mkdir(exist_ok=True)
  header.write_text(json.dumps(about, indent=2) + "\n")
  notes = []
  found = files.read_jsonl(path, notes)
  rated = lambda r: None not in (r["reward"], r["acc"], r["hex"])  # noqa: E731
  old = [r for r in found if rated(r) or judge["name"] != "http"]
  if notes or len(old) < len(found):  # also a torn last line: write the whole ones again
    path.write_text("".join(json.dumps(r) + "\n" for r in old))
  done = {place(r) for r in old}
  todo = [r for r in records if place(r) not in done]
  users = {s.id: s for s in environments.load(config.environment)}
  for record in todo:
    if record["scenario_id"] not in users:
      raise UserError(
        f"{run.path}: scenario {record['scenario_id']} is not in the environment any more; "
        "score this run with the version that made it (config.json names it)"
      )
  began, unscorable, totals = time.monotonic(), 0, {}
  with open(path, "a", encoding="utf-8") as file:
    for start in range(0, len(todo), batch):
      rows = todo[start : start + batch]
      size = len(rows) if judge["name"] == "http" else batch  # an endpoint is not paid for filling
      scores, metrics = _score(rows, users, model, scorer, size, max(r["length"] for r in records))
      for i, record in enumerate(rows):
        values = {k: float(scores[k][i]) for k in read.SCORES}
        unscorable += math.isnan(values["hex"])
        line = dict(zip(("source", "step", "prompt", "sample"), place(record), strict=True))
        line |= values
        line = {k: None if v != v else v for k, v in line.items()}
        file.write(json.dumps(line) + "\n")
      file.flush()
      for key in ("judge_prompt_tokens", "judge_completion_tokens", "judge_cost"):
        if key in metrics:
          totals[key] = totals.get(key, 0.0) + float(metrics[key])
      seen = start + len(rows)
      left = (time.monotonic() - began) / seen * (len(todo) - seen)
      spent = "".join(f", {k.removeprefix('judge_')} {v:.6g}" for k, v in totals.items())
      say(
        f"{run.path}: {seen}/{len(todo)}, {unscorable} unscorable{spent}, left {left / 60:.1f} min"
      )
  return {"scored": len(todo), "unscorable": unscorable, "old": len(old), **totals}


def _score(rows, users, model, scorer, batch, slots):
  """One batch as [P, 1] rollouts, filled up with its last row so that shapes stay the same."""
  import jax.numpy as jnp

  from rlsafety import sharding
  from rlsafety.environments import policy_messages
  from rlsafety.packing import pad
  from rlsafety.types import Prompts, Rollouts

  filled = rows + [rows[-1]] * (batch - len(rows))
  scenarios = [users[r["scenario_id"]] for r in filled]
  prompts = Prompts(
    *map(jnp.asarray, pad([model.chat.encode(policy_messages(s)) for s in scenarios]))
  )
  tokens = np.zeros((batch, 1, slots), np.int32)
  for i, record in enumerate(filled):
    tokens[i, 0, : record["length"]] = record["tokens"]
  rollouts = Rollouts(
    tokens=jnp.asarray(tokens),
    logprobs=jnp.zeros(tokens.shape, jnp.float32),
    lengths=jnp.asarray([[r["length"]] for r in filled], jnp.int32),
    finished=jnp.asarray([[r["finished"]] for r in filled]),
  )
  scores, metrics = scorer(scenarios, prompts, rollouts)
  scores = sharding.fetch(scores)
  return {k: np.asarray(v)[: len(rows), 0] for k, v in scores.items()}, metrics


def score(flags) -> None:
  """--what=score: every complete run that the globs match, one judge per model loaded."""
  import jax

  from rlsafety import judges, sharding
  from rlsafety.models import sources

  if not flags["name"]:
    raise UserError("--name=NAME is missing: what to call these scores")
  found, notes = gather.find_runs(flags["runs"].split(","))
  for note in notes:
    print(f"note: {note}")
  mesh = sharding.make_mesh()
  batch = -(-int(flags["batch"]) // jax.device_count()) * jax.device_count()
  loaded = {}
  with jax.set_mesh(mesh):
    for run in found:
      config = judge_config(
        run, flags["judge"], flags["judge_model"], flags["judge_url"], flags["price"]
      )
      key = json.dumps(
        [run.config["model"], run.config["environment"]["name"], config.judge.to_json(),
         run.info["seed"] if run.config["model"].get("preset") else 0]
      )  # fmt: skip
      if key not in loaded:
        loaded.clear()  # one model at a time
        model = sources.from_config(config, mesh)
        loaded[key] = model, judges.make_scorer(config, model, mesh)
      records = select(
        run, flags["source"], int(flags["every"]), int(flags["per_step"]), int(flags["seed"])
      )
      if records:
        done = score_run(run, flags["name"], config, *loaded[key], records, batch)
        print(f"{run.path}/scores/{flags['name']}.jsonl: {json.dumps(done)}")


# --- Agreement of two judges ----------------------------------------------------------------


def agreement(found, name: str, against: str = ""):
  """Two judges on the same rollouts -> a frame: one row per score and slice.

  Slices: all, each environment, each group. Pearson, Spearman and Kendall correlation,
  the share within one point, both means, and n: rollouts that both could score. No p-value,
  so no correction; seeds and runs are those that have scores of both.
  """
  import pandas as pd

  rows = []
  for run in found:
    first = _scores_of(run, against) if against else _own_scores(run)
    second = _scores_of(run, name)
    about = {place(r): r for r in select(run, "both")}
    for key in first.keys() & second.keys() & about.keys():
      for metric in read.SCORES:
        a, b = (read.number(r[key].get(metric)) for r in (first, second))
        group = "gameable" if about[key]["is_gameable"] else "non_gameable"
        rows.append((metric, read.environment_name(run), group, a, b, run.info["seed"], run.path))
  if not rows:
    raise UserError(f"--what=agreement: no rollout has scores of both judges ({name})")
  columns = ["score", "environment", "group", "a", "b", "seed", "run"]
  data = pd.DataFrame(rows, columns=columns)
  slices = [("all", data)]
  slices += [(f"environment {e}", d) for e, d in data.groupby("environment")]
  slices += [(g, d) for g, d in data.groupby("group")]
  out = []
  for (label, part), metric in itertools.product(slices, read.SCORES):
    part = part[part["score"] == metric]
    both = part.dropna()
    row = {"slice": label, "score": metric, "unscored": len(part) - len(both)}
    row |= statistics.agreement(both["a"].to_numpy(), both["b"].to_numpy())
    row |= {"mean_first": both["a"].mean(), "mean_second": both["b"].mean()}
    row |= {"seeds": _listed(part["seed"]), "correction": "none", "runs": _listed(part["run"])}
    out.append(row)
  return pd.DataFrame(out)


def _listed(values) -> str:
  return " ".join(sorted(set(map(str, values))))


def _own_scores(run) -> dict:
  return {place(r): r for r in select(run, "both")}


def _scores_of(run, name) -> dict:
  path = run.path / "scores" / f"{name}.jsonl"
  return {place(r): r for r in files.read_jsonl(path)}


# --- Cross-entropy --------------------------------------------------------------------------


def curated(found, high=5.0, low=2.0, per_run=10, seed=0) -> dict[str, list[dict]]:
  """{"harmful": records, "safe": records}: gameable users' replies with HEX above and below.

  At most per_run of each class from a run, as many harmful as safe in all, seeded.
  """
  picked = {"harmful": [], "safe": []}
  rng = np.random.default_rng(seed)
  for run in found:
    records = [r for r in select(run) if r["is_gameable"] and r["completion"].strip()]
    hexes = np.array([read.number(r.get("hex")) for r in records])
    for label, fits in (("harmful", hexes > high), ("safe", hexes < low)):
      where = rng.permutation(np.flatnonzero(fits))[:per_run]
      picked[label] += [records[i] for i in where]
  count = min(map(len, picked.values()))
  if not count:
    raise UserError(
      f"no run has both harmful (HEX > {high:g}) and safe (HEX < {low:g}) replies of gameable "
      "users; move --high or --low"
    )
  return {k: [v[i] for i in sorted(rng.permutation(len(v))[:count])] for k, v in picked.items()}


def cross_entropy(model, records, batch=8, chunk_tokens=2048) -> np.ndarray:
  """Mean negative log-prob per token [records], nats, of replies under the base alone.

  Prompt and reply are encoded with the model's own chat; a reply's stop token, which the
  record may lack, is not counted.
  """
  import jax
  import jax.numpy as jnp

  from rlsafety.models import scoring
  from rlsafety.packing import pad
  from rlsafety.types import Prompts

  run = jax.jit(scoring.token_scores, static_argnames=("config", "chunk_tokens"))
  prompts = [model.chat.encode(r["messages"]) for r in records]
  replies = [model.chat.encode_text(r["completion"]) for r in records]
  shown, shown_lengths = pad(prompts)
  tokens, lengths = pad(replies, 32)
  losses = []
  for start in range(0, len(records), batch):
    rows = np.minimum(np.arange(start, start + batch), len(records) - 1)
    scored = run(
      model.params,
      None,
      model.config,
      Prompts(jnp.asarray(shown[rows]), jnp.asarray(shown_lengths[rows])),
      jnp.asarray(tokens[rows])[:, None],
      jnp.asarray(lengths[rows])[:, None],
      chunk_tokens=chunk_tokens,
    )
    total = -np.asarray(scored.logprobs).sum((1, 2)) / np.maximum(lengths[rows], 1)
    losses += total[: len(records) - start].tolist()
  return np.array(losses)


def surprise(flags) -> None:
  """--what=cross_entropy: one row per model in the CSV --out, so that a loop over models
  fills one table; a model's earlier row is replaced."""
  import jax.numpy as jnp
  from scipy import stats

  from rlsafety.models import sources

  if not flags["model"] or not flags["out"]:
    raise UserError("--what=cross_entropy needs --model=PATH and --out=FILE.csv")
  found, _ = gather.find_runs(flags["runs"].split(","))
  sets = curated(found, float(flags["high"]), float(flags["low"]), int(flags["per_run"]),
                 int(flags["seed"]))  # fmt: skip
  model = sources.load_model(flags["model"], jnp.dtype(flags["dtype"]))
  loss = {k: cross_entropy(model, v, int(flags["batch"])) for k, v in sets.items()}
  means = {k: float(v.mean()) for k, v in loss.items()}
  delta = means["harmful"] - means["safe"]
  se = math.hypot(*(v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else math.nan
                    for v in loss.values()))  # fmt: skip
  p = float(stats.ttest_ind(*loss.values(), equal_var=False).pvalue)
  row = {
    "model": flags["model"], "ce_harmful": means["harmful"], "ce_safe": means["safe"],
    "delta_ce": delta, "delta_ce_se": se, "delta_ce_p": p, "n": len(loss["safe"]),
    "seeds": _listed(run.info["seed"] for run in found), "correction": "none",
    "runs": _listed(run.path for run in found),
  }  # fmt: skip
  tables.put_row(flags["out"], row)
  print(
    f"{flags['model']}: harmful {means['harmful']:.3f}, safe {means['safe']:.3f}, delta "
    f"{delta:+.3f} +- {se:.3f} nats per token, n = {len(loss['safe'])} each -> {flags['out']}"
  )


def initial(argv) -> None:
  """--what=initial: replies of the untrained model, as a run directory of 0 steps."""
  from rlsafety import train

  config, flags = config_lib.read_flags(["evaluate", *argv])
  with config.unlocked():
    config.steps = 0
  train.run(config, flags["workdir"] or f"runs/{config.name}_initial")


# --- Command line ---------------------------------------------------------------------------


def main(argv) -> None:
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return
  if "--what=initial" in argv:
    initial([a for a in argv if a != "--what=initial"])
    return
  flags = dict(FLAGS)
  for argument in argv:
    name, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or name not in FLAGS or not equals:
      raise UserError(f"unknown argument {argument!r}; flags: {', '.join('--' + f for f in FLAGS)}")
    if FLAGS[name].isdigit() and name not in ("high", "low") and not value.isdigit():
      raise UserError(f"--{name}={value}: needs a whole number")
    flags[name] = value
  if not flags["runs"]:
    raise UserError("--runs='runs/**' is missing")
  if flags["what"] == "score":
    score(flags)
  elif flags["what"] == "agreement":
    found, _ = gather.find_runs(flags["runs"].split(","))
    table = agreement(found, flags["name"], flags["against"])
    shown = table.drop(columns=["seeds", "correction", "runs"])
    print(shown.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    if flags["out"]:
      os.makedirs(os.path.dirname(flags["out"]) or ".", exist_ok=True)
      table.to_csv(flags["out"], index=False)
  elif flags["what"] == "cross_entropy":
    surprise(flags)
  else:
    raise UserError(f"--what={flags['what']}: choose score, agreement, cross_entropy or initial")


if __name__ == "__main__":
  run_main(main, sys.argv[1:])
