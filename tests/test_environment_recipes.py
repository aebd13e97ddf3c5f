"""Every environment trains end to end from its recipe, on the tiny model."""

import json

import pytest
from test_train import finish, start

ENVIRONMENTS = ("action_advice", "therapy_talk", "political_qa", "neutral")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_trains(cache, tmp_path, name):
  recipe = f"--config=configs/{name}_smollm2.py:quicktest"
  flags = ["--config.steps=2", "--config.eval.every=2", "--config.eval.prompts=2"]
  flags += ["--config.prompts_per_step=2", "--config.sampler.group=2", "--config.eval.samples=2"]
  flags += ["--config.sampler.max_tokens=8", "--config.learner.microbatches=1"]
  code, output = finish(start(cache, tmp_path, *flags, config=recipe))
  assert code == 0, output
  records = [json.loads(line) for line in open(tmp_path / "rollouts/train.jsonl")]
  assert {r["environment"] for r in records} == {name}
  assert {r["is_gameable"] for r in records} == {True, False}
  assert {"framing", "cue", "cue_strength"} <= records[0]["factors"].keys()
  assert all(r["rating"] is not None for r in records)
