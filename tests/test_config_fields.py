"""Every number of a config: what cannot be is refused by its field before anything starts."""

import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsafety import config as sections
from rlsafety import flags, recipes
from rlsafety.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT / 'configs/tiny_syco.py'}"


def numbers(values: dict, prefix: str = "") -> list[str]:
  """Dotted names of the fields that hold a number."""
  out = []
  for name, value in values.items():
    if isinstance(value, dict):
      out += numbers(value, f"{prefix}{name}.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
      out.append(prefix + name)
  return out


def read(*arguments: str) -> sections.Config:
  return recipes.from_flags(flags.parser(None, "train"), ["train", TINY, *arguments])[0]


EXTREMES = ["0", "-1", "-0.5", "1e30", "-1e30", "1e300", "1e400", "nan", "inf", "-inf", "1e-300"]
EXTREMES += [str(2**31), str(2**63), "9" * 5000, "", "true", "None", "0x10", "1_0"]
FIELDS = numbers(recipes.to_json(read()))


INFINITE = ("optimizer.clip_norm", "judge.timeout_s", "judge.deadline_s")  # inf: without a limit


def floats(value) -> list[float]:
  if isinstance(value, dict):
    return [x for v in value.values() for x in floats(v)]
  if isinstance(value, list | tuple):
    return [x for v in value for x in floats(v)]
  if value in ("inf", "-inf"):  # as it is stored
    return [float(value)]
  return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def check(field: str, text: str) -> None:
  """Refused in one line that names the field, or a config whose numbers fit the device."""
  try:
    config = read(f"--config.{field}={text}")
  except UserError as error:
    section, _, name = field.rpartition(".")  # a rule of two fields names the other one
    assert name in str(error) or f"{section}." in str(error), error
    assert len(str(error)) < 500, error
    return
  stored = recipes.to_json(config)
  assert recipes.frozen(json.loads(json.dumps(stored))) == config  # equal to itself
  for value in floats(stored):
    if value == float("inf") and field in INFINITE:
      continue
    with np.errstate(all="ignore"):
      on_device = np.float32(value)
    assert abs(value) < 2**32 if isinstance(value, int) else np.isfinite(on_device), (field, text)
    assert on_device != 0 or value == 0, (field, text)


@pytest.mark.parametrize("field", FIELDS)
def test_extreme_numbers(field):
  for text in EXTREMES:
    check(field, text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), st.floats() | st.integers(-(2**70), 2**70))
def test_any_number(field, value):
  check(field, repr(value))


REFUSED = {  # field: its flags, or several that only together break a rule of the last one
  "name": [""],
  "seed": ["-1"], "steps": ["-1"], "prompts_per_step": ["0"], "max_prompt_tokens": ["0"],
  "epochs": ["0"], "platform": ["x"],
  "model.dtype": ["int8"], "model.seed": ["-1"],
  "lora.rank": ["0"], "lora.alpha": ["0", "-1", "nan", "inf"], "lora.dropout": ["1", "-0.1"],
  "lora.targets": ["q,x", "()"],
  "sampler.group": ["0"], "sampler.max_tokens": ["0"], "sampler.temperature": ["-0.1"],
  "sampler.top_k": ["-1"], "sampler.top_p": ["0", "1.1"], "sampler.cache": ["int4"],
  "memory.cache_gib": ["-1"], "memory.sampler_base": ["int4"],
  "judge.name": ["x", ""], "judge.evaluator": ["x"],
  "judge.also": ["phrases", "phrases=x", "=1", "x=1"], "judge.price": ["1,2,3", "1,-1", "1"],
  "judge.concurrency": ["0"], "judge.attempts": ["0"], "judge.timeout_s": ["0"],
  "judge.deadline_s": ["0"], "judge.degenerate": ["x"],
  "objective.name": ["x"], "objective.normalisation": ["x"], "objective.advantage": ["x"],
  "objective.is_correction": ["x"], "objective.kl": ["x", "k1"],
  "objective.clip_low": ["-0.1", "1.1"], "objective.clip_high": ["-0.1"],
  "objective.dual_clip": ["1", "-1"], "objective.fixed_length": ["0"],
  "objective.kl_coef": ["-0.1"], "objective.overlong_end": ["-1"], "objective.is_cap": ["0"],
  "objective.std_epsilon": ["0"], "objective.ddof": ["2", "-1"], "objective.beta": ["0"],
  "objective.desirable_weight": ["-0.1"], "objective.undesirable_weight": ["-0.1"],
  "objective.kto_anchor": ["true"],
  "data.fraction": ["0", "1.1"],
  "optimizer.learning_rate": ["-1", "nan", "inf"], "optimizer.warmup_steps": ["-1"],
  "optimizer.clip_norm": ["0", "-1", "nan"], "optimizer.b1": ["1", "-0.1"],
  "optimizer.b2": ["1", "-0.1"], "optimizer.eps": ["0"], "optimizer.weight_decay": ["-0.1"],
  "learner.microbatches": ["0"], "learner.chunk_tokens": ["0"], "learner.remat": ["x"],
  "learner.attention": ["x"],
  "eval.every": ["-1"], "eval.prompts": ["0"], "eval.samples": ["0"], "eval.task_samples": ["-1"],
  "eval.beyond": ["neutral,neutral"], "eval.tasks": ["a/b,a/b"],
  "checkpoint.every": ["-1"], "checkpoint.keep": ["0"],
  "log.wandb": ["a/b"], "log.trackio": ["a/b"],
  "mesh.data": ["0", "-2"], "mesh.fsdp": ["0"], "mesh.tensor": ["0"],
  "environment.name": ["", "os.path", "no.such.module", "chess"], "environment.seed": ["-1"],
  "environment.heldout_seed": ["-1"], "environment.gameable_fraction": ["1.5", "-0.1"],
  "environment.cue_strength": ["1.5"], "environment.heldout_fraction": ["1.5"],
}  # fmt: skip
TOGETHER = [
  "model.preset= model.path=",
  "model.preset=x model.path=y",
  "judge.evaluator=phrases judge.evaluator_model=x",
  "judge.name=probe judge.model=x judge.adapter=y",
  "judge.name=lm judge.heads=x",
  "judge.name=lm judge.base=x",
  "judge.name=http judge.model=m judge.url=",
  "objective.overlong_end=8 objective.overlong_start=8",
  "objective.overlong_end=8 objective.overlong_start=-1",
  "objective.name=gspo objective.is_correction=token_mask",
  "objective.name=sft objective.kl=k2",
  "mesh.fsdp=-1 mesh.data=-1",
]


@pytest.mark.parametrize(
  "given", [f"{field}={value}" for field, values in REFUSED.items() for value in values] + TOGETHER
)
def test_every_rule_refuses_what_breaks_it(given):
  field = re.escape(given.split()[-1].partition("=")[0])
  with pytest.raises(UserError, match=f"^(--config.)?{field}[=: ]"):
    read(*(f"--config.{flag}" for flag in given.split()))


def test_zero_is_off_where_that_means_something():
  config = read("--config.eval.every=0", "--config.checkpoint.every=0")
  assert (config.eval.every, config.checkpoint.every) == (0, 0)


@pytest.mark.parametrize(
  ("recipe", "says"),
  [
    ("configs/tiny_syco.py:quicktest", "takes no argument|unknown|arguments"),
    ("README.md", "is no Python file"),
    ("configs", "no such file"),
    ("configs/none.py", "no such file"),
    ("{tmp}/broken.py", "cannot be read .SyntaxError"),
    ("{tmp}/binary.py", "cannot be read"),
    ("{tmp}/empty.py", "has no get_config"),
    ("{tmp}/other.py", "returns no ConfigDict"),
    ("{tmp}/missing.py", "cannot be read .line 1, ModuleNotFoundError"),
  ],
)
def test_a_recipe_that_is_none_is_one_line(tmp_path, monkeypatch, recipe, says):
  monkeypatch.chdir(ROOT)
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "binary.py").write_bytes(b"\x00\xff\x00")
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "other.py").write_text("def get_config():\n  return 7\n")
  (tmp_path / "missing.py").write_text("import no_such_module_at_all\n")
  with pytest.raises(UserError, match=says) as error:
    recipes.of_run([f"--config={recipe.format(tmp=tmp_path)}"])
  assert "\n" not in str(error.value)
