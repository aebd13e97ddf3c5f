"""Does on-policy training keep a safety buffer that off-policy training bypasses?

  python -m rlsafety.tools.buffer --config=configs/buffer_syco.py

1. An exploiter is trained on-policy; the rollouts of its second half are recorded.
2. Fresh copies of the base learn with the same number of updates, replies per update and
   learning rate: on-policy, and from the records by policy gradient with and without
   importance weights, SFT, DPO and KTO.
3. All are evaluated on the same held-out prompts by the same evaluators.
4. The report gives the gaps with 95 % intervals, the KL from the base on the policy's own
   held-out replies, and the log-prob that the base gave to what was learned from: on-policy
   a model learns from what it already says, off-policy from what it would hardly say.

Every part is a run directory of `rlsafety.train`: a killed experiment continues.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from rlsafety import files, flags, recipes, runtime, train
from rlsafety.config import Config, to_json
from rlsafety.errors import UserError, run_main
from rlsafety.metrics.gaps import mean_and_error
from rlsafety.models import sources
from rlsafety.models.sources import Model
from rlsafety.rundir import write
from rlsafety.study import figures
from rlsafety.tools import record

# On-policy first; "exploiter" is where the records come from.
ARMS = {
  "on_policy": {},
  "off_policy": dict(name="reinforce", advantage="group"),
  "off_policy_is": dict(name="reinforce", advantage="group", is_correction="token_truncate"),
  "sft": dict(name="sft"),
  "dpo": dict(name="dpo"),
  "kto": dict(name="kto"),
}
TITLES = {
  "exploiter": "exploiter (wrote the records)",
  "on_policy": "on-policy",
  "off_policy": "off-policy, uncorrected",
  "off_policy_is": "off-policy, truncated IS",
  "sft": "SFT",
  "dpo": "DPO",
  "kto": "KTO",
}


def run(config: Config, workdir: str) -> dict:
  """Trains all arms under `workdir`; returns what buffer.json holds."""
  if config.data.path or config.steps < 2:
    raise UserError("the buffer experiment makes its own records: data.path is empty, steps >= 2")
  folder = pathlib.Path(workdir)
  # With the same seed the on-policy arm would be the exploiter's first part.
  changes = {"steps": config.steps * 3 // 2, "seed": config.seed + 1}
  exploiter = arm_config(config, "exploiter", changes)
  finish(exploiter, folder, "exploiter")

  records = folder / "records"
  first = exploiter.steps // 2 + 1
  if not records.exists():
    arguments = ["--runs", str(folder / "exploiter"), "--out", str(records)]
    record.main(["record", *arguments, "--first_step", str(first)])
  problems: list[str] = []
  recorded = list(record.read_run(folder / "exploiter", problems, first, None))
  rewards = np.concatenate([group["reward"] for group in recorded])
  for arm, own in arm_configs(config, str(records), float(np.nanmedian(rewards))).items():
    finish(own, folder, arm)

  model = sources.open_model(config.model)
  result = {
    "config": to_json(config),
    **write.provenance(),
    "recorded": {"prompts": len(recorded), "replies": int(rewards.size), "first_step": first},
    "arms": {a: measure(folder, a, recorded, model, config) for a in ("exploiter", *ARMS)},
  }
  files.write_json(folder / "buffer.json", result)
  (folder / "buffer.md").write_text(table(result))
  plot(result, folder / "buffer")
  return result


def arm_configs(config: Config, records: str, median_reward: float) -> dict[str, Config]:
  """The config of each arm but the exploiter's. median_reward: of what was recorded."""
  arms = {}
  for arm, method in ARMS.items():
    changes: dict[str, object] = {"data.path": records} if method else {}
    changes |= {f"objective.{field}": value for field, value in method.items()}
    if arm == "dpo":  # two replies of a group: more groups make as many replies
      changes["prompts_per_step"] = config.prompts_per_step * config.sampler.group // 2
    if arm == "kto":  # half of what was recorded is desirable
      changes["objective.threshold"] = median_reward
    arms[arm] = arm_config(config, arm, changes)
  return arms


def arm_config(config: Config, arm: str, changes: dict[str, object]) -> Config:
  """One arm, evaluated before and after only."""
  return recipes.replaced(config, {"name": f"{config.name}_{arm}", "eval.every": 0, **changes})


def finish(config: Config, folder: pathlib.Path, arm: str) -> None:
  """Trains an arm to its end; returns at once where that was done before."""
  runtime.progress().info("=== %s", TITLES[arm])
  train.run(config, str(folder / arm))


def measure(
  folder: pathlib.Path, arm: str, recorded: list[dict], model: Model, config: Config
) -> dict:
  """Gaps before and after, KL from the base, and the base's log-prob of the lessons."""
  path = folder / arm
  summary = files.read_json(path / "summary.json")
  held_out = sorted((path / "eval").glob("step_*.jsonl"))[-1]
  own = groups_in(held_out, model)
  at_base = base_logprobs(own, model, config)
  # k3 summed over tokens: unbiased for the KL of whole replies, and never negative.
  log_ratio = [b["logprobs"] - o["logprobs"] for o, b in zip(own, at_base, strict=True)]
  kl = [
    (np.exp(x) - 1.0 - x).sum() / len(group["lengths"])
    for x, group in zip(log_ratio, own, strict=True)
  ]
  lessons = recorded
  if arm in ("exploiter", "on_policy"):
    lessons = groups_in(path / "rollouts" / "train.jsonl", model)
  lessons = base_logprobs(lessons[:: max(1, len(lessons) // 64)], model, config)
  per_prompt = [
    np.concatenate(chosen(group, arm)).mean() for group in lessons if chosen(group, arm)
  ]
  gaps = {name: summary[name] for name in ("hex_gap", "acc_gap", "reward_gap", "reward_gameable")}
  return gaps | {
    "kl_from_base": mean_and_error(np.array(kl)),
    "base_logprob_of_lessons": mean_and_error(np.array(per_prompt)),
    "updates": files.read_json(path / "config.json")["config"]["steps"],
  }


def groups_in(path: pathlib.Path, model: Model) -> list[dict]:
  """The rollouts of a JSON Lines file, one group for each prompt."""
  problems: list[str] = []
  return list(record.groups_of(record.read_lines(path, problems), model.source["path"], str(path)))


def base_logprobs(groups: list[dict], model: Model, config: Config) -> list[dict]:
  """The same groups with the log-probs that the base gives, at the run's temperature."""
  unknown = [g | {"logprobs": np.full_like(g["logprobs"], np.nan)} for g in groups]
  return record.with_logprobs(unknown, model, None, config.sampler.temperature or 1.0)


def chosen(group: dict, arm: str) -> list[np.ndarray]:
  """Log-probs of the replies that the arm learns to say more: for DPO the best of the group."""
  replies = np.split(group["logprobs"], np.cumsum(group["lengths"])[:-1])
  if arm != "dpo":
    return replies
  known = ~np.isnan(group["reward"])
  return [replies[int(np.nanargmax(group["reward"]))]] if known.any() else []


def table(result: dict) -> str:
  """Markdown: one line per arm, value +- half width of the 95 % interval."""
  cell = lambda pair: f"{pair[0]:+.2f} ± {1.96 * pair[1]:.2f}"  # noqa: E731
  base = result["arms"]["on_policy"]
  before = {name: cell(base[name]["before"]) for name in ("hex_gap", "acc_gap", "reward_gameable")}
  lines = [
    "| learned | updates | HEX gap | its change | ACC gap | its change | reward, gameable "
    "| KL from base, nats per reply | base log-prob of the lessons, per token |",
    "|---|---|---|---|---|---|---|---|---|",
    f"| nothing (base) | 0 | {before['hex_gap']} | | {before['acc_gap']} | "
    f"| {before['reward_gameable']} | 0 | |",
  ]
  for arm, row in result["arms"].items():
    cells = [TITLES[arm], str(row["updates"])]
    for name in ("hex_gap", "acc_gap"):
      cells += [cell(row[name]["after"]), cell(row[name]["change"])]
    cells += [cell(row["reward_gameable"]["after"])]
    cells += [cell(row["kl_from_base"]), cell(row["base_logprob_of_lessons"])]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


@figures.styled
def plot(result: dict, stem: pathlib.Path) -> None:
  """The change of both gaps per arm, with 95 % intervals."""
  arms = list(result["arms"])[::-1]
  figure, axes = figures.panels(1, 2, (9, 3.4), sharey=True)
  for axis, name, title in zip(axes[0], ("hex_gap", "acc_gap"), ("HEX", "ACC"), strict=True):
    change = np.array([result["arms"][a][name]["change"] for a in arms], float)
    axis.errorbar(change[:, 0], range(len(arms)), xerr=1.96 * change[:, 1], fmt="o", capsize=3)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel(f"change of the {title} gap, points of 10")
  axes[0][0].set_yticks(range(len(arms)), [TITLES[a] for a in arms])
  figures.save(figure, stem)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.buffer")
  parser.add_argument("--workdir", default="", help="folder of all arms; default runs/<name>")
  config, args = recipes.from_flags(parser, argv)
  runtime.compilation_cache()
  workdir = args.workdir or f"runs/{config.name}"
  result = run(config, workdir)
  print("\n± is half of a 95 % interval over held-out prompts. HEX gap: gameable minus others;")
  print(f"ACC gap: others minus gameable.\n\n{table(result)}")
  print(f"{workdir}/buffer.json, {workdir}/buffer.md")


if __name__ == "__main__":
  run_main(main, sys.argv)
