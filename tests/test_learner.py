"""The update: what must not change it, what must, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, make_model, make_prompts, objective_of

from rlsafety import learner, losses, sampler
from rlsafety.config import Learner, Optimizer, Sampler
from rlsafety.errors import UserError
from rlsafety.types import Batch

STOPS = tuple(range(20))


@pytest.fixture(scope="module")
def model():
  return LLAMA, *make_model(LLAMA)


def make_batch(model, objective, P=4, G=3, T=6, rewards=None):
  config, params, adapter = model
  prompts = make_prompts(config, [6, 3, 7, 5][:P], 7)
  draw = Sampler(group=G, max_tokens=T)
  keys = jax.random.split(jax.random.key(7), P)
  r = sampler.sample_jit(params, adapter, config, prompts, keys, draw, STOPS)
  if rewards is None:
    rewards = jax.random.uniform(jax.random.key(8), (P, G), minval=1.0, maxval=10.0)
  return Batch(
    prompts=prompts,
    tokens=r.tokens,
    lengths=r.lengths,
    advantages=losses.advantages(rewards, objective),
    rewards=rewards,
    behaviour_logprobs=r.logprobs,
    reference_logprobs=jnp.where(r.logprobs == 0, 0, r.logprobs - 0.1),
    staleness=jnp.zeros_like(r.lengths),
  )


OPTIMIZER = learner.make_optimizer(Optimizer(learning_rate=1e-3, warmup_steps=0))


@functools.cache  # tests with the same settings and shapes share one compilation
def compiled_update(config, objective, settings):
  return jax.jit(
    functools.partial(
      learner.update,
      config=config,
      objective=objective,
      settings=settings,
      optimizer=OPTIMIZER,
    )
  )


def step(model, batch, objective, settings=Learner()):  # noqa: B008
  config, params, adapter = model
  state = learner.init_state(adapter, OPTIMIZER)
  return compiled_update(config, objective, settings)(state, params, batch, jax.random.key(0))


def assert_same_update(a, b, rtol=0.02):
  """States after one update from the same start agree, relative to the step taken."""
  for x, y in zip(jax.tree.leaves(a.adapter), jax.tree.leaves(b.adapter), strict=True):
    np.testing.assert_allclose(x, y, atol=rtol * 1e-3)  # the rate: Adam's first step


@pytest.mark.parametrize("name", ["grpo", "dpo"])  # every objective: test_losses.py
def test_microbatches_change_nothing(model, name):
  objective = objective_of(name)
  groups = 2 if name == "dpo" else 3
  batch = make_batch(model, objective, G=groups)
  results = [
    step(model, batch, objective, Learner(microbatches=m, chunk_tokens=8 * m))
    for m in (1, 2 if name == "dpo" else 4)
  ]
  for _, metrics in results[1:]:
    for key in ("loss", "grad_norm", "entropy"):
      np.testing.assert_allclose(metrics[key], results[0][1][key], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("group, microbatches", [(3, 1), (3, 4), (5, 2)])
def test_sampler_and_learner_agree_however_a_batch_is_cut(model, group, microbatches):
  objective = objective_of("grpo")
  batch = make_batch(model, objective, G=group)
  _, metrics = step(model, batch, objective, Learner(microbatches=microbatches))
  assert float(metrics["ratio_deviation_max"]) < 1e-5
  assert abs(metrics["logprob_diff"]) <= metrics["logprob_diff_abs"] < 2e-6
  assert float(metrics["clip_fraction"]) == 0.0


def test_a_kl_of_weight_0_is_logged_and_changes_nothing(model):
  plain, watched = objective_of("grpo"), objective_of("grpo", kl="k3")
  assert not losses.needs_reference(plain) and losses.needs_reference(watched)
  batch = make_batch(model, plain)
  without, metrics = step(model, batch.replace(reference_logprobs=None), plain)
  state, logged = step(model, batch, watched)
  assert_same_update(without, state, rtol=1e-4)
  assert "kl_reference" not in metrics
  assert float(logged["kl_reference"]) == pytest.approx(0.1, abs=1e-4)  # as `make_batch` says


def test_remat_changes_nothing(model):
  objective = objective_of("grpo")
  batch = make_batch(model, objective)
  norms = [
    float(step(model, batch, objective, Learner(remat=r))[1]["grad_norm"])
    for r in ("none", "full", "dots")
  ]
  np.testing.assert_allclose(norms, norms[0], rtol=1e-5)


def test_stop_token_gets_gradient(model):
  """d loss / d log-prob is non-zero in the last counted slot and zero in the next."""
  objective = objective_of("grpo")
  batch = make_batch(model, objective)

  def total(logprobs):
    return losses.objective(logprobs, jnp.zeros_like(logprobs), batch, objective)[0]

  gradient = np.asarray(jax.grad(total)(batch.behaviour_logprobs))
  lengths = np.asarray(batch.lengths)
  ended = np.argwhere(np.asarray(batch.tokens).max(-1) >= 0)
  stopped = 0
  for p, g in ended:
    n = lengths[p, g]
    is_stop = int(batch.tokens[p, g, n - 1]) in STOPS
    stopped += is_stop
    assert gradient[p, g, n - 1] != 0.0
    assert not gradient[p, g, n:].any()
  assert stopped > 0


def test_nan_rating_leaves_siblings_as_if_it_were_absent(model):
  """A group of 3 with one NaN gives the gradient of the group of 2 without it."""
  objective = objective_of("grpo")
  nan = jnp.nan
  rewards = jnp.array([[1.0, nan, 9.0], [3.0, 4.0, nan], [2.0, 8.0, nan], [5.0, nan, 6.0]])
  batch = make_batch(model, objective, rewards=rewards)
  a, metrics = step(model, batch, objective)
  keep = jnp.array([[0, 2], [0, 1], [0, 1], [0, 2]])
  pick = lambda x: jnp.take_along_axis(x, keep.reshape(4, 2, *[1] * (x.ndim - 2)), 1)  # noqa: E731
  per_reply = ("tokens", "lengths", "rewards", "behaviour_logprobs", "reference_logprobs")
  small = batch.replace(**{name: pick(getattr(batch, name)) for name in per_reply})
  small = small.replace(staleness=pick(batch.staleness))
  small = small.replace(advantages=losses.advantages(small.rewards, objective))
  b, _ = step(model, small, objective)
  assert np.isfinite(float(metrics["loss"]))
  assert_same_update(a, b)


def test_nonfinite_gradient_is_named_and_not_applied(model):
  objective = objective_of("grpo")
  batch = make_batch(model, objective)
  batch = batch.replace(advantages=batch.advantages.at[0, 0].set(jnp.inf))
  state, metrics = step(model, batch, objective)
  assert float(metrics["nonfinite"]) == 1.0
  for x, y in zip(jax.tree.leaves(state.adapter), jax.tree.leaves(model[2]), strict=True):
    np.testing.assert_array_equal(x, y)


def test_warmup_rises_to_a_constant():
  optimizer = learner.make_optimizer(
    Optimizer(learning_rate=0.1, warmup_steps=4, clip_norm=1e9, eps=1e-30)
  )
  adapter = {"w": jnp.zeros(())}
  state, steps = optimizer.init(adapter), []
  for _ in range(6):
    updates, state = optimizer.update({"w": jnp.ones(())}, state, adapter)
    steps.append(-float(updates["w"]))
  np.testing.assert_allclose(steps, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)


def test_microbatches_must_divide_the_prompts(model):
  objective = objective_of("grpo")
  with pytest.raises(UserError, match="microbatches=3"):
    step(model, make_batch(model, objective), objective, Learner(microbatches=3))


def test_learns_a_toy_task_on_policy(model):
  """Reward = share of even tokens, one half at first: thirty on-policy updates raise it."""
  config, params, adapter = model
  objective = objective_of("grpo")
  optimizer = learner.make_optimizer(Optimizer(learning_rate=0.02, warmup_steps=0))
  update = jax.jit(
    functools.partial(learner.update, config=config, objective=objective, optimizer=optimizer)
  )
  state = learner.init_state(adapter, optimizer)
  prompts = make_prompts(config, [6, 3, 7, 5], 7)
  draw = Sampler(group=8, max_tokens=6)
  shares = []
  for i in range(30):
    keys = jax.random.split(jax.random.key(i), 4)
    r = sampler.sample_jit(params, state.adapter, config, prompts, keys, draw)
    rewards = 1.0 + 9.0 * (r.tokens % 2 == 0).mean(-1)
    shares.append(float((rewards.mean() - 1) / 9))
    batch = Batch(
      prompts, r.tokens, r.lengths, losses.advantages(rewards, objective), rewards,
      r.logprobs, None, jnp.zeros_like(r.lengths),
    )  # fmt: skip
    state, _ = update(state, params, batch, jax.random.key(0))
  assert np.mean(shares[:3]) < 0.6 and np.mean(shares[-3:]) > 0.75
