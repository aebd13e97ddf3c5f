"""Advantages: worked numbers, TRL's and PyTorch's, and what NaN must never do."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import objective_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlsafety import losses

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens/losses.json").read_text())
jitted = jax.jit(losses.advantages, static_argnums=1)
NAN = float("nan")


def compute(rewards, kind, **overrides):
  objective = objective_of("grpo", advantage=kind, **overrides)
  return np.asarray(losses.advantages(jnp.asarray(rewards, jnp.float32), objective))


@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out", "batch"])
def test_torch_and_trl_numbers(kind):
  rewards = np.array(GOLDEN["advantages"]["rewards"], float)  # two of them null
  np.testing.assert_allclose(compute(rewards, kind), GOLDEN["advantages"][kind], rtol=2e-5)


def test_worked_group():
  # mean 4, squares 9 + 1 + 16 = 26, std sqrt(26 / 2) with ddof 1, sqrt(26 / 3) with 0
  np.testing.assert_allclose(
    compute([[1.0, 3.0, 8.0]], "group"), [np.array([-3, -1, 4]) / (13**0.5 + 1e-4)], rtol=1e-6
  )
  np.testing.assert_allclose(
    compute([[1.0, 3.0, 8.0]], "group", ddof=0),
    [np.array([-3, -1, 4]) / ((26 / 3) ** 0.5 + 1e-4)],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    compute([[1.0, 3.0, 8.0]], "leave_one_out"), [[1 - 5.5, 3 - 4.5, 8 - 2]], rtol=1e-6
  )
  np.testing.assert_array_equal(compute([[1.0, NAN, 8.0]], "none"), [[1, 0, 8]])


def by_hand(rewards, kind):
  """One row of verdicts without NaN."""
  n, mean = len(rewards), rewards.mean()
  if kind == "group":
    std = rewards.std(ddof=1) if n > 1 else 0.0
    return (rewards - mean) / (std + 1e-4)
  if kind == "leave_one_out":
    return np.array(
      [r - np.delete(rewards, i).mean() if n > 1 else 0 for i, r in enumerate(rewards)]
    )
  return rewards - mean if kind == "group_mean" else rewards


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.one_of(st.floats(1, 10, width=32), st.just(NAN))))
def test_without_verdict_is_absent(rewards):
  with jax.enable_x64(True):
    for kind in ("group", "group_mean", "leave_one_out", "none"):
      result = np.asarray(jitted(jnp.asarray(rewards, float), objective_of("grpo", advantage=kind)))
      for p, row in enumerate(rewards.astype(float)):
        known = ~np.isnan(row)
        assert (result[p][~known] == 0).all()
        if known.any():
          np.testing.assert_allclose(result[p][known], by_hand(row[known], kind), atol=1e-8)


@pytest.mark.parametrize("rating", [1.1, 3.3, 9.7])
def test_equal_ratings_give_exactly_zero(rating):
  for kind in ("group", "group_mean", "leave_one_out", "batch"):
    assert (compute(np.full((2, 7), rating), kind) == 0).all()


def test_shaped_rewards():
  rewards = jnp.array([[5.0, 5.0, 5.0, NAN]])
  lengths = jnp.array([[10, 15, 25, 30]])
  objective = objective_of("dapo", overlong_start=10, overlong_end=20, overlong_penalty=2.0)
  shaped = losses.shaped(rewards, objective, lengths)
  np.testing.assert_allclose(shaped, [[5, 4, 3, NAN]])

  objective = objective_of("rloo", kl="k1_reward", kl_coef=0.1)
  behaviour = jnp.full((1, 2, 3), -1.0)
  reference = jnp.array([[[-2.0, -2.0, -2.0], [-1.5, 99.0, 99.0]]])  # garbage after the length
  shaped = losses.shaped(
    jnp.array([[5.0, 5.0]]), objective, jnp.array([[3, 1]]), behaviour, reference
  )
  np.testing.assert_allclose(shaped, [[5 - 0.1 * 3, 5 - 0.1 * 0.5]], rtol=1e-6)


def test_spread():
  rewards = jnp.array([[2.0, 2.0], [2.0, 3.0], [2.0, NAN], [NAN, NAN]])
  np.testing.assert_array_equal(losses.has_spread(rewards), [False, True, False, False])
