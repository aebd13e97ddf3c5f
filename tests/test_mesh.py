"""Eight fake devices: how arrays are split changes no number and moves no whole weight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS, make_model, make_prompts

from rlsafety import advantages, learner, losses, sampler, sharding
from rlsafety.errors import UserError
from rlsafety.learner import LearnerSettings
from rlsafety.models import lora, transformer
from rlsafety.types import Batch

MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]


def placed(mesh, config, params, adapter):
  axes = jax.tree.map(lambda w: w.axes, transformer.weights(config), is_leaf=transformer.is_weight)
  put = lambda x, a: sharding.put(mesh, x, *a)  # noqa: E731
  params = jax.tree.map(put, params, axes)
  layers = transformer.weights(config)["layers"]
  settings = lora.LoraConfig(rank=4, targets=tuple(adapter.weights))
  return params, adapter.replace(
    weights=jax.tree.map(put, adapter.weights, lora.adapter_axes(layers, settings))
  )


def make_batch(config, objective, P=4, G=4, T=6, seed=0):
  rng = np.random.default_rng(seed)
  ratings = jnp.asarray(rng.uniform(1, 10, (P, G)), jnp.float32)
  lengths = jnp.asarray(rng.integers(2, T + 1, (P, G)), jnp.int32)
  return Batch(
    prompts=make_prompts(config, [6, 3, 7, 5], 7),
    tokens=jnp.asarray(rng.integers(0, config.vocab_size, (P, G, T)), jnp.int32),
    lengths=lengths,
    advantages=advantages.advantages(ratings, objective),
    ratings=ratings,
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
    optimizer = learner.make_optimizer(1e-3)
    update = functools.partial(
      learner.update,
      config=config,
      settings=LearnerSettings(objective, microbatches=1, chunk_tokens=chunk_tokens),
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
  moments = [jax.tree.leaves(state.opt_state) for state in (state_a, state_b)]
  for x, y in zip(*moments, strict=True):  # after one step: the gradient and its square
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(x).max())
  # Adam turns a gradient of rounding noise into a whole step: compare where it is more.
  adapters = [jax.tree.leaves(state.adapter) for state in (state_a, state_b)]
  for x, y in zip(*adapters, strict=True):
    assert np.mean(np.abs(x - y) > 1e-5) < 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_update_is_the_same_on_every_mesh(name):
  config = CONFIGS[name]
  params, adapter = make_model(config)
  objective = losses.make("grpo", kl="k3", kl_coef=0.1, entropy_coef=0.01)
  batch = make_batch(config, objective)
  meshes = MESHES if name == "llama" else [MESHES[0], MESHES[-1]]
  results = [one_update(m, config, params, adapter, batch, objective)[0] for m in meshes]
  for other in results[1:]:
    assert_close(results[0], other)


@pytest.mark.parametrize("name", losses.PRESETS)
def test_objective_is_the_same_on_every_mesh(name):
  settings = losses.make(name)
  batch = make_batch(CONFIGS["llama"], settings, G=2 if name == "dpo" else 4)
  logprobs = batch.behaviour_logprobs + 0.3 * np.sin(np.arange(6, dtype=np.float32))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_gradient(logprobs, batch):
    batch = batch.replace(advantages=advantages.advantages(batch.ratings, settings))
    total, metrics = losses.objective(logprobs, -logprobs, batch, settings)
    return total / losses.denominator(batch, settings), metrics

  results = []
  for sizes in (MESHES[0], MESHES[-1]):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
      split = sharding.put_prompts(mesh, (logprobs, batch))
      results.append(jax.device_get(loss_and_gradient(*split)))
  assert np.abs(results[0][1]).max() > 0
  for x, y in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_samples_are_the_same_on_every_mesh():
  config = CONFIGS["llama"]
  model = make_model(config)
  prompts = make_prompts(config, [6, 3, 7, 5], 7)
  settings = sampler.SamplerSettings(group=3, max_tokens=6, stop_ids=(1, 2, 3))
  out = []
  for sizes in (MESHES[0], MESHES[-1]):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
      params, adapter = placed(mesh, config, *model)
      split = sharding.put_prompts(mesh, prompts)
      out.append(
        jax.device_get(
          sampler.sample_jit(params, adapter, config, split, jax.random.key(3), settings)
        )
      )
  np.testing.assert_array_equal(out[0].tokens, out[1].tokens)
  np.testing.assert_allclose(out[0].logprobs, out[1].logprobs, atol=1e-4)


def test_no_collective_carries_full_logits_or_a_whole_stacked_weight():
  config = CONFIGS["llama"]
  params, adapter = make_model(config)
  objective = losses.make("grpo")
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
    sharding.check_sizes(mesh, config, 6, 1)
  with pytest.raises(UserError, match=r"mesh.tensor=8 .* \[1, 2, 4\]"):
    sharding.check_sizes(sharding.make_mesh(1, 1, 8), config, 4, 1)
  with pytest.raises(UserError, match="8 are there"):
    sharding.make_mesh(3, 1, 1)
  sharding.check_sizes(mesh, config, 8, 2)
