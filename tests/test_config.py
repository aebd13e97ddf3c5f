"""Flags of a run: typed by the recipe, refused by name, compared field by field."""

import dataclasses
import json
import logging
import re

import pytest

from rlsafety import files, flags, recipes, runtime
from rlsafety.config import differences, to_json
from rlsafety.errors import UserError
from rlsafety.rundir import write

TINY = "--config=configs/tiny_syco.py"


def read(*arguments):
  parser = flags.parser("Trains.", "train")
  parser.add_argument("--workdir", default="")
  return recipes.from_flags(parser, ["train", TINY, *arguments])


def test_values_take_the_type_of_the_field():
  config, args = read(
    "--config.steps=1e3", "--config.lora.rslora=false", "--config.lora.targets=q,v",
    "--config.sampler.temperature=1", "--workdir", "somewhere",
  )  # fmt: skip
  assert config.steps == 1000 and type(config.steps) is int
  assert config.lora.rslora is False and config.lora.targets == ("q", "v")
  assert config.sampler.temperature == 1.0 and args.workdir == "somewhere"


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.steps=1.5", "^--config.steps=1.5: needs int, a whole number such as 6$"),
    ("--config.lora.rslora=perhaps", "needs bool, true or false$"),
    (
      "--config.optimizer.learning_rate=fast",
      "^--config.optimizer.learning_rate=fast: needs float, a number such as 0.001$",
    ),
    # A field that the recipe leaves to the objective's name has its type all the same.
    ("--config.objective.kl_coef=low", "^--config.objective.kl_coef=low: needs float, a number$"),
    ("--config.optimizer.learning_rate", "needs float.*Missing value"),
    ("--config.optimizer=3", "is a group of fields"),
    ("--config.optimiser.learning_rate=1", "did you mean --config.optimizer.learning_rate"),
    ("--config.stpes=3", "no such field at 'stpes'; did you mean --config.steps"),
    ("--config.rank=3", "did you mean --config.lora.rank"),
    ("--config.steps.more=1", "no such field"),
    ("--confg=x.py", "did you mean --config"),
    ("positional", "unknown argument"),
    ("--steps=3", "did you mean --config.steps"),
    ("--config.optimizer.learning_rate=nan", "learning_rate=nan: must be a number"),
    ("--config.judge.name=frases", "did you mean phrases"),
  ],
)
def test_bad_flags_are_named(flag, message):
  with pytest.raises(UserError, match=message):
    read(flag)


def test_config_is_frozen_and_survives_json():
  config, _ = read()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.steps = 3
  stored = to_json(config)
  assert differences(stored, to_json(config)) == []
  changed, _ = read("--config.seed=6", "--config.lora.rank=2")
  assert differences(stored, to_json(changed)) == [
    "lora.rank: 8 there, 2 here",
    "seed: 5 there, 6 here",
  ]


def test_a_name_brings_its_own_settings_and_leaves_what_is_given():
  """Whatever the order of the flags, and from a recipe as from a flag."""
  config, _ = read("--config.objective.clip_low=0.1", "--config.objective.name=dapo")
  found = config.objective.clip_low, config.objective.clip_high, config.objective.dynamic_sampling
  assert found == (0.1, 0.28, True)
  config, _ = read("--config.environment.name=therapy_talk")
  assert config.environment.framing == "therapist" and config.environment.length == "short"
  other = recipes.replaced(config, {"environment.name": "neutral"})
  assert (other.environment.framing, other.environment.length) == ("assistant", "full")


def test_help_shows_every_field_with_its_comment(capsys):
  with pytest.raises(SystemExit) as end:
    read("--help")
  out = capsys.readouterr().out
  assert end.value.code == 0 and "--workdir" in out
  for field in recipes.all_fields(recipes.base()):
    assert re.search(rf"^  {re.escape(field)}=.* \S", out, re.M), field


def test_infinity_is_equal_to_itself_and_only_where_it_means_something():
  config, _ = read("--config.optimizer.clip_norm=inf")
  stored = json.loads(json.dumps(to_json(config)))
  assert recipes.frozen(stored) == config
  with pytest.raises(UserError, match="must be finite"):
    read("--config.lora.alpha=inf")


def test_no_key_of_an_address_is_stored_but_that_it_is_another():
  keys = "sk-one", "sk-two"
  url = "--config.judge.url=https://x.example/{}/v1"
  configs = [read("--config.judge.name=http", url.format(key))[0] for key in keys]
  stored = [to_json(config) for config in configs]
  assert not any(key in json.dumps(stored) for key in keys)
  assert len(differences(*stored)) == 1


def test_logs_are_cut_to_the_restored_step(tmp_path):
  log = tmp_path / "metrics.jsonl"
  files.append(log, [{"step": s, "x": float("nan")} for s in (1, 2, 3)])
  with open(log, "a") as f:
    f.write('{"step": 4')
  write.cut_after(log, 2)
  assert log.read_text() == '{"step": 1, "x": null}\n{"step": 2, "x": null}\n'
  write.cut_after(log, -1)
  assert log.read_text() == ""


def test_a_run_for_an_accelerator_does_not_start_without_one():
  config, _ = read("--config.platform=tpu")
  with pytest.raises(UserError, match="platform=tpu: JAX found only .* cpu"):
    runtime.check_platform(config.platform)
  runtime.check_platform("cpu")
  runtime.check_platform("")


def test_a_large_model_on_a_cpu_says_how_long_at_least(caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger("rlsafety"), "propagate", True)
  caplog.set_level(logging.INFO, "rlsafety")
  runtime.warn_of_cpu(2 * 10**9, 10_000, 300)
  assert not caplog.records
  runtime.warn_of_cpu(7 * 10**9, 10_000, 300)
  days = 300 * 10 * 7e9 * 10_000 / 200e9 / 86400  # ten operations a parameter and token
  # Twice where a program before has let this logger reach the one that caplog listens at.
  assert set(caplog.messages) == {f"on a CPU: expect more than {days:.1f} days"}
