"""Rollouts as Inspect logs, for `inspect view` and everything that reads .eval files.

Each rollout is a sample: the prompt is its input, the reply its output, and reward, HEX
and ACC are scores, so that the viewer shows them as columns; a rollout without a verdict
keeps NaN. Needs the `inspect` extra (inspect_ai); nothing here touches a network.
"""

import datetime
import pathlib

from inspect_ai import log, model, scorer

from rlsafety.errors import UserError
from rlsafety.rundir import read
from rlsafety.rundir.read import Run

PER_LOG = 3_000  # samples in one file: about 2 MB and a second to open


def write_inspect_logs(run_dir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes OUT/heldout.eval and OUT/train[_NNN].eval; returns the paths.

  Raises UserError if the run has no rollouts.
  """
  run = read.load_run(run_dir)
  held_out = [r for records in read.eval_rollouts(run).values() for r in records]
  phases = {"heldout": held_out, "train": read.train_rollouts(run)}
  if not any(phases.values()):
    raise UserError(f"{run.path}: has no rollouts in eval/ or rollouts/train.jsonl")
  out.mkdir(parents=True, exist_ok=True)
  written = []
  for phase, records in phases.items():
    for start in range(0, len(records), PER_LOG):
      name = phase if len(records) <= PER_LOG else f"{phase}_{start // PER_LOG:03d}"
      path = out / f"{name}.eval"
      log.write_eval_log(_log(run, name, records[start : start + PER_LOG]), str(path))
      written.append(path)
  return written


def _log(run: Run, name: str, records: list[dict]) -> log.EvalLog:
  """One log. Times are of the run's files, so equal runs give equal logs."""
  changed = (run.path / "config.json").stat().st_mtime
  created = datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat(timespec="seconds")
  folder = run.path.resolve().name
  environment = read.environment_name(run) or "rlsafety"
  policy = f"rlsafety/{read.model_name(run) or 'model'}"
  spec = log.EvalSpec(
    created=created,
    task=f"{environment}/{name}",
    task_id=f"{folder}-{name}",
    run_id=folder,
    dataset=log.EvalDataset(name=environment, samples=len(records)),
    model=policy,
    config=log.EvalConfig(),
    metadata={"seed": run.info.get("seed"), "git": run.info.get("git"),
              "judge": run.info.get("judge")},
  )  # fmt: skip
  return log.EvalLog(
    status="success" if run.complete else "started",
    eval=spec,
    results=log.EvalResults(total_samples=len(records), completed_samples=len(records)),
    stats=log.EvalStats(started_at=created, completed_at=created),
    samples=[_sample(policy, r) for r in records],
  )


def _sample(policy: str, record: dict) -> log.EvalSample:
  kinds = {
    "system": model.ChatMessageSystem,
    "user": model.ChatMessageUser,
    "assistant": model.ChatMessageAssistant,
  }
  prompt = [kinds[m["role"]](content=m["content"]) for m in record["messages"]]
  completion = record["completion"]
  return log.EvalSample(
    id=f"{record['scenario_id']}@{record['step']}.{record['prompt']}",
    epoch=record["sample"] + 1,
    input=prompt,
    target="",
    messages=[*prompt, model.ChatMessageAssistant(content=completion)],
    output=model.ModelOutput.from_content(policy, completion),
    scores={
      label: scorer.Score(value=read.number(record.get(label.lower())), answer=completion)
      for label in ("reward", "HEX", "ACC")
    },
    metadata={
      "step": record["step"],
      "group": "gameable" if record["is_gameable"] else "non-gameable",
      "topic": record["topic"],
      "length": record["length"],
      "finished": record["finished"],
      **{f"factor_{k}": v for k, v in record.get("factors", {}).items()},
    },
  )
