"""What a run reads besides its config is part of it; exchanged between two starts it is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_train import TINY

from rlsafety import beyond, cells, recipes, sharding
from rlsafety.environments import Environment
from rlsafety.errors import UserError
from rlsafety.judges import phrases, probe, questions
from rlsafety.models import hf, lora, sources
from rlsafety.rundir import write
from rlsafety.tools.judges import fit

BASE = recipes.of_run([TINY])


@pytest.fixture(scope="module")
def policy():
  return sources.open_model(BASE.model)


def put_adapter(path, policy, seed):
  start = lora.init_adapter(policy.config, BASE.lora, jax.random.key(seed))
  hf.save_peft(path, start, policy, BASE.lora)


def put_rescaled(path, policy, seed):
  """The same adapter with another alpha."""
  put_adapter(path, policy, 0)
  settings = path / "adapter_config.json"
  values = json.loads(settings.read_text())
  settings.write_text(json.dumps(values | {"lora_alpha": values["lora_alpha"] + 2 * seed}))


def put_model(path, policy, seed):
  hf.save_merged(path, sources.random_model(policy.config, seed), None)


def put_numbers(path, policy, seed):
  """The same weights, with other numbers beside them."""
  put_model(path, policy, 0)
  settings = path / "config.json"
  values = json.loads(settings.read_text())
  settings.write_text(json.dumps(values | {"rope_theta": 10_000.0 + seed}))


def put_stops(path, policy, seed):
  """The same weights, whose replies end otherwise."""
  put_model(path, policy, 0)
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, seed]}))


def put_heads(path, policy, seed, states=1, **info):
  width, count = states * policy.config.d_model, len(probe.NAMES)
  zeros, ones = np.zeros(width, np.float32), np.ones(width, np.float32)
  weight = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
  targets = {metric: phrases.target("political_qa", metric) for metric in ("acc", "hex")}
  base = probe.fingerprint(policy.config, policy.params)
  info |= {"environment": "political_qa", "base": base, "targets": targets}
  bias = np.zeros(count, np.float32)
  fit.save(probe.Heads(probe.NAMES, (0,), zeros, ones, weight, bias, info), path)


def put_question_heads(path, policy, seed):
  asked = list(questions.of_environment("political_qa"))
  put_heads(path, policy, seed, len(asked), questions=asked)


def put_users(path, policy, seed):
  rows = [{"message": f"Question {seed} {i}?", "wish": "hopes so", "group": group}
          for i in range(16) for group in ("gameable", "non_gameable")]  # fmt: skip
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


LM = ("--config.judge.name=lm",)
INPUTS = {  # how it is written, the flags that name it, what a refusal calls it
  "judge's weights": (put_model, (*LM, "--config.judge.model={}"), "judge's weights"),
  "evaluator's weights": (put_model, (*LM, "--config.judge.evaluator_model={}"), "judge's weights"),
  "judge's numbers": (
    put_numbers, (*LM, "--config.judge.model={}"), "config, template or vocabulary .judge's"),
  "judge's stops": (put_stops, (*LM, "--config.judge.model={}"), "config, template or vocab"),
  "numbers of a judge beside another": (
    put_numbers, (*LM, "--config.judge.also=phrases=1", "--config.judge.model={}"),
    "config, template or vocabulary"),
  "judge's adapter": (put_adapter, (*LM, "--config.judge.adapter={}"), "judge's weights"),
  "its alpha": (put_rescaled, (*LM, "--config.judge.adapter={}"), "judge's weights"),
  "heads": (
    put_heads, ("--config.judge.name=probe", "--config.judge.model={}",
                "--config.environment.name=political_qa"), "judge's weights or heads",
  ),
  "evaluator's heads": (
    put_heads, (*LM, "--config.judge.evaluator=probe", "--config.judge.evaluator_model={}",
                "--config.environment.name=political_qa"), "judge's weights or heads",
  ),
  "heads on answers": (
    put_question_heads, ("--config.judge.name=questions", "--config.judge.heads={}",
                         "--config.environment.name=political_qa"), "judge's weights or heads",
  ),
  "users of beyond": (put_users, ("--config.eval.beyond=therapy_talk",), "users of eval.beyond"),
  "start": (put_adapter, ("--config.model.adapter={}",), "weights of model.adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_exchanged_between_two_starts_is_refused(kind, policy, tmp_path, monkeypatch):
  put, flags, what = INPUTS[kind]
  file = tmp_path / "input"
  config = recipes.of_run([TINY, *(flag.format(file) for flag in flags)])
  users = Environment(name="therapy_talk", users_file=str(file))
  monkeypatch.setattr(beyond, "section_of", lambda *_: dataclasses.replace(users))
  mesh = sharding.make_mesh()

  def start():
    run = write.open_run(tmp_path / "run", config)
    try:
      with jax.set_mesh(mesh):
        cell = cells.open_cell("", config, run, policy, mesh, {})
      run.start(config, -1, cell.about, {}, {})
      cell.manager.close()
    finally:
      run.close()

  put(file, policy, 0)
  start()
  put(file, policy, 0)
  start()  # the same again
  put(file, policy, 1)
  with pytest.raises(UserError, match=f"run was started with other {what}.* restore them, or give"):
    start()
