"""Runs that learn from records. That a killed one ends in the same bits: see test_cells.py."""

import json

import pytest
from test_data import call, rollout, write_run
from test_train import ROOT, ran

from rlsafety import recipes, replay
from rlsafety.errors import UserError

QUICK = ["--config.steps=3", "--config.eval.prompts=2", "--config.eval.samples=4"]
QUICK += ["--config.checkpoint.every=1", "--config.sampler.max_tokens=8"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp("records")
  rows = [
    rollout(step, prompt, sample, f"{step}{prompt}{sample}", reward)
    for step in (1, 2, 3)
    for prompt in (0, 1)
    for sample, reward in enumerate((4.0, 9.0, None))
  ]
  write_run(folder / "run", rows)
  assert call("--runs", folder / "run", "--out", folder / "set") == 0
  return folder / "set"


def recipe(name, dataset, *flags):
  return [f"--config.data.path={dataset}", *QUICK, *flags], (
    f"--config=configs/smollm2.py:method={name},size=tiny"
  )


def test_a_batch_half_sampled_and_half_recorded_learned_from_twice(dataset, tmp_path):
  flags, config = recipe("mixed", dataset, "--config.epochs=2", "--config.steps=2")
  code, output = ran(tmp_path, *flags, config=config)
  assert code == 0, output
  check(tmp_path, sampled=True)
  about = json.loads((tmp_path / "config.json").read_text())
  assert about["data"] == {"path": str(dataset), "sha256": replay.digest(str(dataset))}


def check(workdir, sampled):
  said = workdir / "rollouts/train.jsonl"
  assert said.exists() == sampled  # records are never logged as the policy's words
  for row in map(json.loads, open(workdir / "metrics.jsonl")):
    assert row["data_reward"] == 6.5  # the mean of 4 and 9; no verdict is not 0
    assert ("reward" in row) == sampled
    assert row["staleness"] > 0


def test_a_run_from_records_alone_samples_nothing_to_learn_from(dataset, tmp_path):
  flags, config = recipe("offpolicy", dataset, "--config.steps=2")
  code, output = ran(tmp_path, *flags, config=config)
  assert code == 0, output
  check(tmp_path, sampled=False)


@pytest.mark.parametrize(
  "name, flag, words",
  [
    ("sft", "--config.data.path=", "learns from records"),
    ("mixed", "--config.data.fraction=0.1", "at least one prompt"),
    ("dpo", "--config.data.fraction=0.5", "data.fraction must be 1"),
    ("mixed", "--config.epochs=0", "at least 1"),
  ],
)
def test_what_cannot_be_is_refused(name, flag, words):
  recipe = str(ROOT / f"configs/smollm2.py:method={name},size=tiny")
  with pytest.raises(UserError, match=words):
    config = recipes.of_run([f"--config={recipe}", flag])
    replay.prompts_per_batch(config.data, config.objective, config.prompts_per_step)
