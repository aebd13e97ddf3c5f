"""Eight fake devices: how arrays are split changes no number and moves no whole weight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CONFIGS, make_model, make_prompts, objective_of

from rlsafety import learner, losses, sampler, sharding
from rlsafety.config import Learner, Lora, Optimizer, Sampler
from rlsafety.errors import UserError
from rlsafety.models import architecture, lora, scoring
from rlsafety.types import Batch

MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]


def placed(mesh, config, params, adapter):
  declared = architecture.weights(config)
  axes = jax.tree.map(lambda w: w.axes, declared, is_leaf=architecture.is_weight)
  put = lambda x, a: sharding.put(mesh, x, *a)  # noqa: E731
  params = jax.tree.map(put, params, axes)
  settings = Lora(rank=4, targets=tuple(adapter.weights))
  return params, adapter.replace(
    weights=jax.tree.map(put, adapter.weights, lora.adapter_axes(config, settings))
  )


def make_batch(config, objective, P=4, G=4, T=6, seed=0):
  rng = np.random.default_rng(seed)
  rewards = jnp.asarray(rng.uniform(1, 10, (P, G)), jnp.float32)
  lengths = jnp.asarray(rng.integers(2, T + 1, (P, G)), jnp.int32)
  return Batch(
    prompts=make_prompts(config, [6, 3, 7, 5], 7),
    tokens=jnp.asarray(rng.integers(0, config.vocab_size, (P, G, T)), jnp.int32),
    lengths=lengths,
    advantages=losses.advantages(rewards, objective),
    rewards=rewards,
    behaviour_logprobs=jnp.asarray(rng.normal(-4, 0.3, (P, G, T)), jnp.float32),
    reference_logprobs=jnp.asarray(rng.normal(-4, 0.3, (P, G, T)), jnp.float32),
    staleness=jnp.zeros((P, G), jnp.int32),
  )


def one_update(sizes, config, params, adapter, batch, objective, chunk_tokens=16):
  """Learner state and metrics after one update on a mesh of `sizes`, and the compiled update."""
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  with jax.set_mesh(mesh):
    params, adapter = placed(mesh, config, params, adapter)
    batch = sharding.put_prompts(mesh, batch)
    optimizer = learner.make_optimizer(Optimizer(learning_rate=1e-3, warmup_steps=0))
    update = functools.partial(
      learner.update,
      config=config,
      objective=objective,
      settings=Learner(microbatches=1, chunk_tokens=chunk_tokens),
      optimizer=optimizer,
    )
    state = learner.init_state(adapter, optimizer)
    compiled = jax.jit(update).lower(state, params, batch, jax.random.key(0)).compile()
    state, metrics = compiled(state, params, batch, jax.random.key(0))
    return jax.device_get((state, metrics)), compiled


def assert_close(a, b):
  (state_a, metrics_a), (state_b, metrics_b) = a, b
  for key in ("loss", "grad_norm", "entropy", "logprob"):
    np.testing.assert_allclose(metrics_a[key], metrics_b[key], rtol=1e-5, atol=1e-5)
  # After one step the moments are the gradient and its square.
  moments_a, moments_b = (optax.tree.get(s.opt_state, "mu").weights for s in (state_a, state_b))
  adapters = (state_a.adapter.weights, state_b.adapter.weights)
  some = 0
  for x, y, u, v in zip(*map(jax.tree.leaves, (moments_a, moments_b, *adapters)), strict=True):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x)
    # Adam turns a gradient of rounding noise into a whole step: compare where it is more.
    sure = np.abs(x) > 1e-3 * np.abs(x).max()
    some += sure.sum()
    np.testing.assert_allclose(u[sure], v[sure], rtol=1e-5, atol=1e-6)
  assert some > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_update_is_the_same_on_every_mesh(name):
  """Each axis by itself with one family, all of them together with the others."""
  config, meshes = CONFIGS[name], MESHES[:-1] if name == "llama" else (MESHES[0], MESHES[-1])
  params, adapter = make_model(config)
  objective = objective_of("grpo", kl="k3", kl_coef=0.1, entropy_coef=0.01)
  batch = make_batch(config, objective)
  results = [one_update(m, config, params, adapter, batch, objective)[0] for m in meshes]
  for other in results[1:]:
    assert_close(results[0], other)


@functools.partial(jax.jit, static_argnames="objective")
def loss_and_gradients(logprobs, entropy, batch, objective):
  def mean(logprobs, entropy):
    total, metrics = losses.objective(logprobs, entropy, batch, objective)
    return total / losses.denominator(batch, objective), losses.finish_metrics(metrics)

  return jax.value_and_grad(mean, (0, 1), has_aux=True)(logprobs, entropy)


@pytest.mark.parametrize("name", losses.METHODS)
def test_every_objective_is_the_same_on_a_mesh(name):
  """Loss, metrics and gradients in what a model gives; the model is the test before this one's."""
  objective, rng = objective_of(name, entropy_coef=0.01), np.random.default_rng(1)
  batch = make_batch(CONFIGS["qwen"], objective, G=2 if name == "dpo" else 4)
  logprobs = batch.behaviour_logprobs + rng.normal(0, 0.3, batch.tokens.shape).astype(np.float32)
  entropy = rng.uniform(0, 4, batch.tokens.shape).astype(np.float32)
  results = []
  for sizes in (MESHES[0], MESHES[-1]):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
      split = sharding.put_prompts(mesh, (logprobs, entropy, batch))
      results.append(jax.device_get(loss_and_gradients(*split, objective)))
  assert all(np.abs(gradient).max() > 0 for gradient in results[0][1])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_the_same_on_a_mesh(name):
  config = CONFIGS[name]
  model = make_model(config)
  batch = make_batch(config, objective_of("grpo"))
  results = []
  for sizes in (MESHES[0], MESHES[-1]):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
      params, adapter = placed(mesh, config, *model)
      split = sharding.put_prompts(mesh, (batch.prompts, batch.tokens, batch.lengths))
      scores = jax.jit(scoring.token_scores, static_argnums=2)(params, adapter, config, *split)
      results.append(jax.device_get(scores))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


def test_state_is_made_in_place():
  settings = Lora(rank=4)
  mesh = sharding.make_mesh(2, 2, 2)
  axes = lora.adapter_axes(CONFIGS["llama"], settings)
  with jax.set_mesh(mesh):
    state = learner.starting_state(settings, CONFIGS["llama"], Optimizer(), jax.random.key(0))
  split = 0
  for tree in (state.adapter, *(optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))):
    for target, pair in tree.weights.items():
      for name, x in pair.items():
        wanted = sharding.named(mesh, axes[target][name], x.shape)
        assert x.sharding.is_equivalent_to(wanted, x.ndim), (target, name, x.sharding)
        split += not wanted.is_fully_replicated
  assert split > 0


def test_samples_are_the_same_on_a_mesh():
  config = CONFIGS["llama"]
  model = make_model(config)
  prompts = make_prompts(config, [6, 3, 7, 5], 7)
  settings, keys = Sampler(group=3, max_tokens=6), jax.random.split(jax.random.key(3), 4)
  out = []
  for sizes in (MESHES[0], MESHES[-1]):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
      params, adapter = placed(mesh, config, *model)
      split = sharding.put_prompts(mesh, prompts)
      out.append(
        jax.device_get(
          sampler.sample_jit(params, adapter, config, split, keys, settings, (1, 2, 3))
        )
      )
  np.testing.assert_array_equal(out[0].tokens, out[1].tokens)
  np.testing.assert_allclose(out[0].logprobs, out[1].logprobs, atol=1e-4)


def test_no_collective_carries_full_logits_or_a_whole_stacked_weight():
  config = CONFIGS["llama"]
  params, adapter = make_model(config)
  objective = objective_of("grpo")
  batch = make_batch(config, objective)
  # One chunk: its 96 tokens outnumber the 32 rows of the output matrix, which may be gathered.
  compiled = one_update(MESHES[-1], config, params, adapter, batch, objective, 4096)[1]
  gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
  assert gathered  # fsdp gathers each layer's slice
  L, V = config.n_layers, config.vocab_size
  for shape in gathered:
    dims = [int(d) for d in shape.split(",") if d]
    assert len(dims) < 4, shape  # no activations [P, G, t, ...]: only weights travel
    assert dims[-1:] != [V] or np.prod(dims[:-1]) <= config.d_model, shape  # no [tokens, V]
    assert not (len(dims) == 3 and dims[0] == L and np.prod(dims[1:]) >= 32 * 16), shape


def test_sizes_that_do_not_fit_are_refused_with_sizes_that_do():
  config = CONFIGS["llama"]
  mesh = sharding.make_mesh(2, 2, 2)
  with pytest.raises(UserError, match="prompts_per_step=4 or a multiple fits"):
    sharding.check_batch(mesh, 6, 1)
  with pytest.raises(UserError, match=r"mesh.tensor=8 .* \[1, 2, 4\]"):
    sharding.check_model(sharding.make_mesh(1, 1, 8), config)
  with pytest.raises(UserError, match="8 are there"):
    sharding.make_mesh(3, 1, 1)
  sharding.check_batch(mesh, 8, 2)
  sharding.check_model(mesh, config)
