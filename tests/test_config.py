"""Flags of a run: typed by the recipe, refused by name, compared field by field."""

import pytest

from rlsafety import config as config_lib
from rlsafety import files
from rlsafety.errors import UserError
from rlsafety.rundir import write

TINY = "--config=configs/tiny_syco.py"


def read(*flags):
  return config_lib.read_flags(["train", TINY, *flags])


def test_values_take_the_type_of_the_field():
  config, flags = read(
    "--config.steps=1e3", "--config.lora.rslora=false", "--config.lora.targets=q,v",
    "--config.sampler.temperature=1", "--workdir", "somewhere",
  )  # fmt: skip
  assert config.steps == 1000 and type(config.steps) is int
  assert config.lora.rslora is False and config.lora.targets == ("q", "v")
  assert config.sampler.temperature == 1.0 and flags["workdir"] == "somewhere"


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.steps=1.5", "needs int"),
    ("--config.lora.rslora=perhaps", "needs bool"),
    ("--config.optimizer.learning_rate=fast", "needs float"),
    ("--config.optimizer=3", "is a group of fields"),
    ("--config.optimiser.learning_rate=1", "did you mean config.optimizer.learning_rate"),
    ("--config.steps.more=1", "no such field"),
    ("--confg=x.py", "did you mean --config"),
    ("positional", "unknown argument"),
  ],
)
def test_bad_flags_are_named(flag, message):
  with pytest.raises(UserError, match=message):
    read(flag)


def test_config_is_locked_and_survives_json():
  config, _ = read()
  with pytest.raises(AttributeError):
    config.stepz = 3
  stored = config_lib.to_json(config)
  assert config_lib.differences(stored, config_lib.to_json(config)) == []
  changed, _ = read("--config.seed=6", "--config.lora.rank=2")
  assert config_lib.differences(stored, config_lib.to_json(changed)) == [
    "lora.rank: 8 there, 2 here",
    "seed: 5 there, 6 here",
  ]


def test_logs_are_cut_to_the_restored_step(tmp_path):
  log = tmp_path / "metrics.jsonl"
  files.append(log, [{"step": s, "x": float("nan")} for s in (1, 2, 3)])
  with open(log, "a") as f:
    f.write('{"step": 4')
  write.cut_after(log, 2)
  assert log.read_text() == '{"step": 1, "x": null}\n{"step": 2, "x": null}\n'
  write.cut_after(log, -1)
  assert log.read_text() == ""
