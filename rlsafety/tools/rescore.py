"""Scores the rollouts of finished runs again, with any judge.

  python -m rlsafety.tools.rescore --runs='runs/**' --judge=lm --judge_model=PATH --name=big

Writes ACC, HEX and reward of logged rollouts to RUN/scores/NAME.jsonl; an interrupted command
goes on where it stopped, and asks an endpoint again for what it left without a verdict.
rlsafety.study.analyze reads them with --scores=NAME, rlsafety.tools.agreement compares them.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from rlsafety import environments, files, flags, judges, recipes, rollout, sharding
from rlsafety.addresses import masked
from rlsafety.config import Config, to_json
from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError, run_main
from rlsafety.judges import Judge
from rlsafety.metrics import gaps
from rlsafety.models import sources
from rlsafety.models.chat import Chat
from rlsafety.packing import pad
from rlsafety.rundir import read
from rlsafety.rundir.read import Run
from rlsafety.study import gather

# Not its price and time limits.
SAME_JUDGE = ("name", "model", "adapter", "heads", "url", "degenerate")
PLACE = ("source", "step", "prompt", "sample")  # of a rollout in its run


# --- Which rollouts ------------------------------------------------------------------------


def select(
  run: Run, source: str = "train", every: int = 1, per_step: int = 0, seed: int = 0
) -> list[dict]:
  """Records of a run, each with its "source": every n-th step, k a step, seeded.

  Which ones are drawn depends on (seed, step) alone, so that runs of the same shape give
  the same places and a longer run only adds to a shorter one's.
  """
  held_out = [("heldout", r) for rs in read.eval_rollouts(run).values() for r in rs]
  train = [("train", r) for r in read.train_rollouts(run)]
  chosen = {"train": train, "heldout": held_out, "both": held_out + train}[source]
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


def place(record: Mapping) -> tuple:
  return tuple(record[name] for name in PLACE)


# --- Scoring -------------------------------------------------------------------------------


def judge_config(
  run: Run, judge: str = "", model: str = "", url: str = "", price: str = "", environment: str = ""
) -> Config:
  """The run's own config with another judge in it, or its own at another price.

  A run directory may be a stranger's: it neither chooses an address that is sent replies and a
  key, nor a module that is imported. Raises UserError where it would have to.
  """
  values = dict(run.config)
  name = read.environment_name(run)
  if name not in environments.ENVIRONMENTS and name != environment:
    raise UserError(
      f"{run.path}/config.json: environment.name={name!r} is a module to import, which a file does "
      f"not decide; add --environment={name} if it is yours"
    )
  named = [values["judge"].get("name"), values["judge"].get("evaluator")]
  named += [str(text).partition("=")[0] for text in values["judge"].get("also") or ()]
  dotted = [str(n) for n in named if n and "." in str(n)]
  if not judge and dotted:
    raise UserError(
      f"{run.path}/config.json: its judge is the function {dotted[0]}, which a file does not "
      f"decide to import; add --judge={dotted[0]} if it is yours"
    )
  if not judge and "http" in named:  # as evaluator or further reward too
    url = masked(str(values["judge"].get("url", "")))
    raise UserError(
      f"{run.path}/config.json: its judge is the endpoint {url}, and a key and replies go only "
      "where a command says; give --judge=http --judge_url=... "
      "--judge_model=..."
    )
  if judge:
    values["judge"] = {"name": judge, "model": model, "url": url}
    if judge in ("probe", "phrases", "questions"):  # they read no wording, and refuse one
      wording = environments.FACTORS["reward_wording"]
      values["environment"] = {**values["environment"], "reward_wording": wording}
  if price:
    values["judge"] = {**values["judge"], "price": tuple(price.split(","))}
  return recipes.frozen(values)


def score_run(
  run: Run,
  name: str,
  config: Config,
  opened: Judge,
  chat: Chat,
  records: Sequence[dict],
  batch: int = 16,
  say: Callable[[str], None] = print,
) -> dict[str, float]:
  """Scores `records` into RUN/scores/NAME.jsonl; returns {"scored", "unscorable", "old"}.

  chat: of who wrote the replies. What the file holds already is kept, if it was made by the
  same judge; a different one under the same name is refused. Rows that an endpoint left
  without a verdict are asked for again: it may have been down, and a model on this machine
  would only repeat itself.
  """
  path = run.path / "scores" / f"{name}.jsonl"
  if not path.resolve().is_relative_to(run.path.resolve() / "scores"):
    raise UserError(f"{path}: leads out of the run, by a symbolic link; delete the link")
  judge = {k: v for k, v in to_json(config)["judge"].items() if k in SAME_JUDGE}
  about = {"judge": opened.about, "config": judge}
  header, remote = path.with_suffix(".json"), judge["name"] == "http"
  if header.exists() and path.exists() and files.read_json(header) != about:
    raise UserError(f"{header}: these scores are another judge's; give another --name")
  path.parent.mkdir(exist_ok=True)
  files.write_json(header, about)
  notes: list[str] = []
  found = files.read_jsonl(path, notes)
  old = [r for r in found if not remote or None not in (r[k] for k in gaps.SCORES)]
  if notes or len(old) < len(found):  # also a torn last line: write the whole ones again
    path.unlink()
    files.append(path, old)
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
  missing = dict.fromkeys(gaps.SCORES, 0)
  slots = max((r["length"] for r in records), default=1)
  for start in range(0, len(todo), batch):
    rows = todo[start : start + batch]
    size = len(rows) if remote else batch  # an endpoint is not paid for filling
    scores, metrics = _score(rows, users, opened, chat, size, slots)
    lines = [
      {name: r[name] for name in PLACE} | {k: scores[k][i] for k in gaps.SCORES}
      for i, r in enumerate(rows)
    ]
    files.append(path, lines)
    for name in missing:
      missing[name] += sum(math.isnan(line[name]) for line in lines)
    for key in ("judge_prompt_tokens", "judge_completion_tokens", "judge_cost"):
      if key in metrics:
        totals[key] = totals.get(key, 0.0) + float(metrics[key])
    seen = start + len(rows)
    # A score that no reply got is none of this judge's.
    unscorable = max((n for n in missing.values() if n < seen), default=seen)
    left = (time.monotonic() - began) / seen * (len(todo) - seen)
    spent = "".join(f", {k.removeprefix('judge_')} {v:.6g}" for k, v in totals.items())
    say(f"{run.path}: {seen}/{len(todo)}, {unscorable} unscorable{spent}, left {left / 60:.1f} min")
  return {"scored": len(todo), "unscorable": unscorable, "old": len(old), **totals}


def _score(
  rows: list[dict], users: dict[str, Scenario], opened: Judge, chat: Chat, batch: int, slots: int
) -> tuple[dict[str, np.ndarray], Mapping]:
  """One batch as [P, 1] rollouts, filled up with its last row so that shapes stay the same."""
  filled = rows + [rows[-1]] * (batch - len(rows))
  tokens, lengths = pad([r["tokens"] for r in filled], slots)
  replies = rollout.cleaner(chat)(tokens[:, None], lengths[:, None])
  scores, metrics = opened.score([users[r["scenario_id"]] for r in filled], replies)
  return {k: v[: len(rows), 0] for k, v in sharding.fetch(scores).items()}, metrics


# --- Command line ---------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.rescore")
  parser.add_argument("--runs", required=True, help="globs of run directories, joined by commas")
  parser.add_argument(
    "--name", required=True, type=flags.plain_word, help="what to call these scores"
  )
  parser.add_argument(
    "--judge",
    default="",
    help="lm, questions, probe, phrases, http or your own; default: the run's",
  )
  parser.add_argument("--judge_model", default="", help="as config.judge.model")
  parser.add_argument("--judge_url", default="", help="as config.judge.url")
  parser.add_argument("--environment", default="", help="module of the runs' own environment")
  parser.add_argument(
    "--price", default="", help="a,b: an endpoint's dollars per million prompt, completion tokens"
  )
  parser.add_argument("--source", choices=["train", "heldout", "both"], default="train")
  parser.add_argument("--every", type=int, default=1, help="only every n-th training step")
  parser.add_argument("--per_step", type=int, default=0, help="rollouts of a step, 0 = all")
  parser.add_argument("--seed", type=int, default=0, help="of the choice of these")
  parser.add_argument("--batch", type=int, default=16, help="rollouts at a time")
  args = flags.parse(parser, argv)
  known = ("", "lm", "questions", "probe", "phrases", "http")
  if args.judge not in known and "." not in args.judge:
    raise UserError(f"--judge={args.judge}: unknown{flags.did_you_mean(args.judge, known)}")
  found, notes = gather.find_runs(args.runs.split(","))
  for note in notes:
    print(f"note: {note}")
  mesh = sharding.make_mesh()
  batch = -(-args.batch // jax.device_count()) * jax.device_count()
  loaded = {}
  with jax.set_mesh(mesh):
    for run in found:
      config = judge_config(
        run, args.judge, args.judge_model, args.judge_url, args.price, args.environment
      )
      about = [run.config["model"], run.config["environment"]["name"], to_json(config)["judge"]]
      key = json.dumps(about)
      if key not in loaded:
        loaded.clear()  # one model at a time
        model = sources.open_model(config.model, mesh)
        opened = judges.open_judge(config.judge, config.environment, model, mesh)
        loaded[key] = opened, model.chat
      records = select(run, args.source, args.every, args.per_step, args.seed)
      if records:
        opened, chat = loaded[key]
        done = score_run(run, args.name, config, opened, chat, records, batch)
        print(f"{run.path}/scores/{args.name}.jsonl: {json.dumps(done)}")


if __name__ == "__main__":
  run_main(main, sys.argv)
