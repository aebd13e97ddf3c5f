"""The buffer experiment's arms, what each learns from, and its table; all without training."""

import numpy as np
import pytest

from rlsafety import recipes
from rlsafety.tools import buffer


@pytest.fixture(scope="module")
def config():
  return recipes.frozen(recipes.load_recipe("configs/buffer_syco.py"))


def test_arms_differ_in_what_they_learn_from_alone(config):
  arms = buffer.arm_configs(config, "records", 6.5)
  assert list(arms) == list(buffer.TITLES)[1:]
  assert arms["on_policy"].data.path == "" and arms["on_policy"].objective == config.objective
  replies = config.prompts_per_step * config.sampler.group
  for name, arm in arms.items():
    assert (arm.steps, arm.seed, arm.optimizer) == (config.steps, config.seed, config.optimizer)
    used = 2 if name == "dpo" else config.sampler.group
    assert arm.prompts_per_step * used == replies and arm.eval.every == 0
    assert name == "on_policy" or arm.data.path == "records"
  assert arms["off_policy"].objective.is_correction == "none"
  assert arms["off_policy_is"].objective.is_correction == "token_truncate"
  assert [arms[name].objective.name for name in ("sft", "dpo", "kto")] == ["sft", "dpo", "kto"]
  assert arms["kto"].objective.threshold == 6.5


def test_lessons_of_a_group_by_hand():
  group = {"logprobs": np.arange(6.0), "lengths": np.array([1, 3, 2])}
  group["reward"] = np.array([2.0, np.nan, 7.0])
  assert [list(r) for r in buffer.chosen(group, "sft")] == [[0], [1, 2, 3], [4, 5]]
  assert [list(r) for r in buffer.chosen(group, "dpo")] == [[4, 5]]
  group["reward"][:] = np.nan
  assert buffer.chosen(group, "dpo") == []


def test_the_table_has_a_line_for_the_base_and_every_arm(tmp_path):
  pair = {"before": (1.0, 0.5), "after": (3.0, 0.5), "change": (2.0, 0.25)}
  row = dict.fromkeys(("hex_gap", "acc_gap", "reward_gap", "reward_gameable"), pair)
  row |= {"kl_from_base": (4.0, 1.0), "base_logprob_of_lessons": (-1.5, 0.1), "updates": 10}
  result = {"arms": dict.fromkeys(buffer.TITLES, row)}
  lines = buffer.table(result).splitlines()
  assert len(lines) == 3 + len(buffer.TITLES) and "nothing (base) | 0 | +1.00 ± 0.98" in lines[2]
  assert lines[-1].startswith("| KTO | 10 | +3.00 ± 0.98 | +2.00 ± 0.49 |")
  assert lines[-1].endswith("| +4.00 ± 1.96 | -1.50 ± 0.20 |")
  buffer.plot(result, tmp_path / "buffer")
  assert "truncated IS" in (tmp_path / "buffer.svg").read_text()
