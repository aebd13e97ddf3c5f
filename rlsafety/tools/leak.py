"""Asks finished runs about users outside of what they were trained in.

  python -m rlsafety.tools.leak --runs='runs/**' --out=leak/

Every run answers the held-out users of --environments at its first and last step, with the
adapters it left; replies go to RUN/eval/ENVIRONMENT, and its report is written again. Then the
matrix of rlsafety.study.leak is made. An interrupted command goes on where it stopped; answers
that config.eval.beyond left are kept.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rlsafety import beyond, environments, evaluation, flags, rollout, sharding
from rlsafety.beyond import Beyond
from rlsafety.config import Config, to_json
from rlsafety.errors import UserError, run_main
from rlsafety.judges import Judge, open_judge
from rlsafety.models import lora, sources
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.report import render
from rlsafety.rundir import read, write
from rlsafety.rundir.read import Run
from rlsafety.serve import adapters
from rlsafety.study import gather, leak
from rlsafety.tools import rescore

DEFAULT = (*environments.OUTSIDE, "political_qa", "action_advice")


def policies(run: Run, config: Config, model: Model, every: bool) -> dict[int, Adapter]:
  """{step: adapter on the host} of the first and the last step, every: of all that are left."""
  found = adapters.catalogue(runs=[str(run.path)])
  name, last = str(run.path), config.steps
  at = {step: f"{name}@{step}" for step in adapters.steps(run.path)}
  at = {step: n for step, n in at.items() if every or step == 0} | {last: name}
  try:
    out = {step: found.load(found.find(n), model.config) for step, n in sorted(at.items())}
  except LookupError as error:
    raise UserError(f"{run.path}: {error.args[0]}") from None
  if 0 not in out and not config.model.adapter:
    key = jax.random.key(0)  # of a fresh adapter, which changes nothing
    out = {0: jax.device_get(lora.init_adapter(model.config, config.lora, key)), **out}
  if 0 not in out:
    raise UserError(
      f"{run.path}: holds no checkpoint of step 0, and it did not start from the base; keep it "
      "with --config.checkpoint.keep, or name the environments in --config.eval.beyond"
    )
  return out


def ask_run(
  run: Run, config: Config, model: Model, judge: Judge, mesh: Mesh, names: Sequence[str],
  prompts: int, samples: int, every: bool,
) -> None:  # fmt: skip
  """Writes what is missing of RUN/eval/NAME."""
  room, models = model.config.max_positions - config.sampler.max_tokens, {}
  held = write.hold(run.path)
  try:
    for name in names:
      if name == config.environment.name or name in config.eval.beyond:
        continue  # asked while it trained
      one = beyond.open_beyond(name, config, model, mesh, judge, models, prompts, room)
      slots = int(one.users.lengths.max())
      users = rollout.Users(one.users.scenarios, one.users.messages, one.users.tokens[:, :slots],
                            one.users.lengths)  # fmt: skip
      folder = run.path / "eval" / name
      wanted = sorted((s.id, s.is_gameable, g) for s in users.scenarios for g in range(samples))
      for step, old in read.eval_rollouts(run, beyond=name).items():
        found = sorted((str(r.get("scenario_id")), r["is_gameable"], r["sample"]) for r in old)
        if found != wanted:
          (folder / f"step_{step:06d}.jsonl").unlink()  # of other users, or cut short
      for step, adapter in policies(run, config, model, every).items():
        file = folder / f"step_{step:06d}.jsonl"
        if file.exists():
          continue
        rows = answers(config, model, mesh, adapter, one, users, step, samples)
        write.RunDir(run.path, True, None).log_beyond(name, step, rows, one.about)
        print(f"{file}: {len(rows)} replies", flush=True)
  finally:
    held.close()


def answers(
  config: Config, model: Model, mesh: Mesh, adapter: Adapter, one: Beyond, users: rollout.Users,
  step: int, samples: int,
) -> list[dict]:  # fmt: skip
  """The records of all replies of one policy to the users of one environment."""
  settings = dataclasses.replace(config.sampler, group=samples)
  put = lambda x: sharding.put(mesh, np.asarray(x), *[None] * x.ndim)  # noqa: E731
  roll_out = functools.partial(
    rollout.roll_out, model, judges=[one.judge], settings=settings,
    cache_gib=config.memory.cache_gib, mesh=mesh,
  )  # fmt: skip
  key = jax.random.fold_in(jax.random.key(config.seed), beyond.stream(one.name))
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  ((rows, _),) = evaluation.ask(
    roll_out, [jax.tree.map(put, adapter)], [users], [key], step, chat=model.chat,
    prompts_at_once=max(config.prompts_per_step, devices), reference=model,
    chunk_tokens=config.learner.chunk_tokens,
  )  # fmt: skip
  return rows


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.leak")
  parser.add_argument("--runs", required=True, help="globs of run directories, joined by commas")
  parser.add_argument(
    "--out", required=True, type=Path, metavar="DIR", help="where the matrix goes"
  )
  parser.add_argument(
    "--environments", default=",".join(DEFAULT), help="whose users are asked; default %(default)s"
  )
  parser.add_argument("--prompts", type=int, default=60, help="of an environment; default 60")
  parser.add_argument("--samples", type=int, default=1, help="replies to each; default 1")
  parser.add_argument("--every_step", action="store_true", help="at every checkpoint that is left")
  parser.add_argument("--judge", default="", help="as tools.rescore; default: each run's own")
  parser.add_argument("--judge_model", default="", help="as config.judge.model")
  parser.add_argument("--judge_url", default="", help="as config.judge.url")
  parser.add_argument("--environment", default="", help="module of the runs' own environment")
  args = flags.parse(parser, argv)
  for name in ("prompts", "samples"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
  names = [*filter(None, args.environments.split(","))]
  for name in names:
    environments.resolved({"name": name})  # a mistyped one is named before any model is read
  found, notes = gather.find_runs(args.runs.split(","))
  for note in notes:
    print(f"note: {note}")
  mesh, loaded = sharding.make_mesh(), {}
  with jax.set_mesh(mesh):
    for run in found:
      config = rescore.judge_config(
        run, args.judge, args.judge_model, args.judge_url, environment=args.environment
      )
      about = to_json(config)
      base = {**about["model"], "adapter": ""}
      key = json.dumps([base, about["judge"], config.environment.name])
      if key not in loaded:
        same = [model for k, (model, _) in loaded.items() if json.loads(k)[0] == base]
        loaded.clear()  # one base at a time
        model = same[0] if same else sources.open_model(config.model, mesh)
        loaded[key] = model, open_judge(config.judge, config.environment, model, mesh)
      ask_run(run, config, *loaded[key], mesh, names, args.prompts, args.samples, args.every_step)
      print(render.write_report(run.path))
  leak.write([read.load_run(run.path) for run in found], args.out)
  print((args.out / "leak.md").read_text("utf-8"))
  print(f"{args.out}/leak.csv, leak.md and leak.svg written")


if __name__ == "__main__":
  run_main(main, sys.argv)
