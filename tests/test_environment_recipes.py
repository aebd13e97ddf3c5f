"""Every environment trains end to end from its recipe, on the tiny model, all in one program."""

import json

import pytest
from test_train import ROOT

from rlsafety import recipes, train

ENVIRONMENTS = ("action_advice", "therapy_talk", "political_qa", "neutral")
FLAGS = ["--config.steps=2", "--config.eval.every=2", "--config.eval.prompts=2"]
FLAGS += ["--config.prompts_per_step=2", "--config.sampler.group=2", "--config.eval.samples=2"]
FLAGS += ["--config.sampler.max_tokens=8", "--config.learner.microbatches=1"]
FLAGS += ["--config.max_prompt_tokens=384"]  # one for all: political_qa has 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("recipes")
  recipe = f"--config={ROOT}/configs/smollm2.py:env={{}},size=tiny"
  cells = {name: recipes.of_run([recipe.format(name), *FLAGS]) for name in ENVIRONMENTS}
  train.run_together(cells, {name: str(folder / name) for name in cells})
  return folder


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_trains(folder, name):
  records = [json.loads(line) for line in open(folder / name / "rollouts/train.jsonl")]
  assert {r["environment"] for r in records} == {name}
  assert {r["is_gameable"] for r in records} == {True, False}
  assert {"framing", "cue", "cue_strength"} <= records[0]["factors"].keys()
  assert all(r["reward"] is not None for r in records)
