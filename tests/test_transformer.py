"""The two-segment decoder against itself, run flat: one softmax, one set of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import LLAMA, make_model, make_prompts

from rlsafety import sampler
from rlsafety.config import Lora
from rlsafety.models import int8, lora, scoring, transformer
from rlsafety.types import Prompts


def completions(config, P, G, T, seed=1):
  rng = np.random.default_rng(seed)
  tokens = jnp.asarray(rng.integers(0, config.vocab_size, (P, G, T)), jnp.int32)
  return tokens, jnp.asarray(rng.integers(1, T + 1, (P, G)), jnp.int32)


def flat_logprobs(params, adapter, config, prompts, tokens, lengths):
  """Every row as one sequence of its own through `prefill`: no group, no second segment."""
  P, G, T = tokens.shape
  S = prompts.tokens.shape[1]
  slot = jnp.arange(S + T)
  n = jnp.repeat(prompts.lengths, G)[:, None]
  rows = jnp.repeat(jnp.pad(prompts.tokens, ((0, 0), (0, T))), G, 0)
  own = jnp.take_along_axis(tokens.reshape(P * G, T), jnp.clip(slot - n, 0, T - 1), 1)
  rows = jnp.where(slot < n, rows, own)
  _, hidden = transformer.prefill(params, adapter, config, Prompts(rows, n[:, 0] + T))
  at = n - 1 + jnp.arange(T)
  hidden = jnp.take_along_axis(hidden, at[..., None], 1)
  logprobs = jax.nn.log_softmax(transformer.unembed(params, config, hidden))
  logprobs = jnp.take_along_axis(logprobs.reshape(P, G, T, -1), tokens[..., None], -1)[..., 0]
  return jnp.where(jnp.arange(T) < lengths[..., None], logprobs, 0.0)


def grouped_logprobs(params, adapter, config, prompts, tokens, lengths):
  return scoring.token_scores(params, adapter, config, prompts, tokens, lengths).logprobs


grouped_jit = jax.jit(grouped_logprobs, static_argnums=2)


def test_grouped_equals_flat_in_value_and_gradient(family):
  config, params, adapter = family
  prompts = make_prompts(config, [6, 3], 7)
  tokens, lengths = completions(config, 2, 3, 5)

  weight = jax.random.normal(jax.random.key(2), tokens.shape)

  def value_and_gradient(logprobs):
    def total(adapter):
      out = logprobs(params, adapter, config, prompts, tokens, lengths)
      return (out * weight).sum(), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))(adapter)

  (_, a), grad_a = value_and_gradient(grouped_logprobs)
  (_, b), grad_b = value_and_gradient(flat_logprobs)
  np.testing.assert_allclose(a, b, atol=2e-5)
  for x, y in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()) + 1e-7)


def test_cached_decode_equals_teacher_forcing(family):
  config, params, adapter = family
  prompts = make_prompts(config, [6, 3], 7)
  tokens, _ = completions(config, 2, 3, 8)
  cache, _ = jax.jit(transformer.prefill, static_argnums=2)(params, adapter, config, prompts)
  extend = jax.jit(transformer.extend, static_argnums=2)
  hidden, _ = extend(params, adapter, config, cache, tokens)
  cache, own = sampler.by_layer(cache), sampler.init_cache(config, 2, 3, 8, jnp.float32)
  decode = jax.jit(transformer.decode, static_argnums=2)
  for i in range(8):
    state, own = decode(params, adapter, config, cache, own, tokens[..., i], jnp.asarray(i))
    np.testing.assert_allclose(state, hidden[:, :, i], atol=1e-5)


def test_queries_in_blocks_change_nothing(monkeypatch):
  """Two segments, grouped heads and a capped logit, with 6 queries at once and one by one."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  q, own, prompt = draw(2, 3, 6, 4, 8), draw(2, 2, 3, 6, 2, 8), draw(2, 2, 5, 2, 8)
  causal = np.tril(np.ones((6, 6), bool))
  shown = np.arange(5) < np.array([5, 3])[:, None, None, None]

  def loss(q, own, prompt):
    out = transformer.attend(q, (*own, causal), (*prompt, shown), scale=0.3, softcap=5.0)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  run = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  whole = run(q, own, prompt)
  monkeypatch.setattr(transformer, "LOGITS", 1)
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(run(q, own, prompt)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)


def test_int8_keys_and_values_are_as_what_they_stand_for():
  """Their scales are applied to logits and weights: no array of full precision is made."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  q, own, prompt = draw(2, 3, 1, 4, 8), draw(2, 2, 3, 6, 2, 8), draw(2, 2, 5, 2, 8)
  masks = np.arange(6) < 4, np.arange(5) < np.array([5, 3])[:, None, None, None]
  rounded = [[int8.quantise(x, -1) for x in pair] for pair in (own, prompt)]
  meant = [[x.values * x.scale for x in pair] for pair in rounded]
  found, wanted = (
    transformer.attend(q, (*a, masks[0]), (*b, masks[1]), scale=0.3, softcap=5.0)
    for a, b in (rounded, meant)
  )
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_padding_slots_change_nothing(family):
  config, params, adapter = family
  tokens, lengths = completions(config, 2, 3, 5)
  short = make_prompts(config, [6, 3], 7)
  filled = jnp.pad(short.tokens, ((0, 0), (0, 9)), constant_values=5)
  longer = Prompts(filled.at[1, 3:].set(11), short.lengths)
  wide = jnp.pad(tokens, ((0, 0), (0, 0), (0, 6)), constant_values=7)
  a = grouped_jit(params, adapter, config, short, tokens, lengths)
  b = grouped_jit(params, adapter, config, longer, wide, lengths)
  np.testing.assert_allclose(a, b[..., :5], atol=1e-5)
  assert not b[..., 5:].any()


def test_fresh_adapter_is_the_base_and_merging_is_the_adapter(family):
  config, params, adapter = family
  prompts = make_prompts(config, [6, 3], 7)
  tokens, lengths = completions(config, 2, 2, 4)
  score = lambda base, a: grouped_jit(base, a, config, prompts, tokens, lengths)  # noqa: E731
  fresh = lora.init_adapter(config, Lora(rank=4), jax.random.key(3))
  np.testing.assert_array_equal(score(params, fresh), score(params, None))
  np.testing.assert_allclose(
    score(lora.merged(params, adapter), None), score(params, adapter), atol=5e-5
  )
  assert not np.allclose(score(params, adapter), score(params, None), atol=1e-2)


def test_chunked_scores_match_plain_softmax(family):
  config, params, _ = family
  hidden = jax.random.normal(jax.random.key(4), (2, 3, 6, config.d_model))
  tokens, _ = completions(config, 2, 3, 6)
  plain = jax.nn.log_softmax(transformer.unembed(params, config, hidden) / 0.7)
  for chunk_tokens in (1, 12, 10_000):
    score = functools.partial(scoring.score, temperature=0.7, chunk_tokens=chunk_tokens)
    out = jax.jit(score, static_argnums=1)(params, config, hidden, tokens)
    picked = jnp.take_along_axis(plain, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.logprobs, picked, atol=1e-5)
    np.testing.assert_allclose(out.entropy, -(jnp.exp(plain) * plain).sum(-1), atol=1e-5)


def test_slopes_of_scores_are_those_of_a_plain_softmax(family):
  config, params, _ = family
  hidden = jax.random.normal(jax.random.key(4), (2, 3, 6, config.d_model))
  tokens, _ = completions(config, 2, 3, 6)
  wanted = jax.random.normal(jax.random.key(5), (2, *tokens.shape))

  def plain(hidden):
    logprobs = jax.nn.log_softmax(transformer.unembed(params, config, hidden) / 0.7)
    picked = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
    return jnp.sum(wanted[0] * picked), jnp.sum(wanted[1] * entropy)

  def own(hidden, learn_entropy):
    out = scoring.score(
      params, config, hidden, tokens,
      temperature=0.7, chunk_tokens=12, learn_entropy=learn_entropy,
    )  # fmt: skip
    return jnp.sum(wanted[0] * out.logprobs) + jnp.sum(wanted[1] * out.entropy)

  of_logprobs, of_entropy = jax.jit(jax.jacrev(plain))(hidden)
  slope = jax.jit(jax.grad(own), static_argnums=1)
  np.testing.assert_allclose(slope(hidden, False), of_logprobs, atol=1e-5)
  np.testing.assert_allclose(slope(hidden, True), of_logprobs + of_entropy, atol=1e-5)


def test_dropout_is_off_at_rate_zero_and_unbiased_above():
  config, (params, adapter) = LLAMA, make_model(LLAMA)
  x = jax.random.normal(jax.random.key(5), (4000, config.d_model))
  ab = jax.tree.map(lambda w: w[0], adapter.weights["q"])
  w = params["layers"][0]["q"] * 0
  run = lambda drop: transformer.linear(x, w, None, ab, 1.0, drop, "q")  # noqa: E731
  key = jax.random.key(6)
  np.testing.assert_array_equal(run(lora.Dropout(key, 0.0)), run(None))
  dropped = transformer.linear(jnp.ones_like(x), w, None, ab, 1.0, lora.Dropout(key, 0.3), "q")
  exact = transformer.linear(jnp.ones_like(x), w, None, ab, 1.0, None, "q")
  error = dropped.std(0) / np.sqrt(len(x))
  assert (jnp.abs(dropped.mean(0) - exact[0]) < 5 * error + 1e-6).all()


def test_a_dropout_mask_is_as_random_as_threefrys():
  """Rates of rows, columns and the whole, and agreement with neighbours, targets and keys, within
  5 standard errors of independent draws; the variance of the rows' rates is theirs too."""
  shape, rate = (3, 2, 250, 400), 0.1
  drop = lora.Dropout(jax.random.key(3), rate)
  mask = np.asarray(lora.drop_mask(drop, "q", shape)).reshape(-1, shape[-1])
  same = rate**2 + (1 - rate) ** 2
  for other in (
    lora.drop_mask(drop, "k", shape),
    lora.drop_mask(drop.replace(layer=1), "q", shape),
    lora.drop_mask(lora.Dropout(jax.random.fold_in(drop.key, 1), rate), "q", shape),
    lora.drop_mask(lora.Dropout(jax.random.key(2), rate), "q", shape),
    lora.drop_mask(drop, "q", (1600, 400))[:1500],  # as prompts and replies of one layer
    np.roll(mask, 1, 0), np.roll(mask, 1, 1), np.roll(mask, (1, 1), (0, 1)), np.roll(mask, 64, 1),
  ):  # fmt: skip
    agreed = (np.asarray(other).reshape(mask.shape) == mask).mean()
    assert abs(agreed - same) < 5 * np.sqrt(same * (1 - same) / mask.size)
  for axis, count in ((None, mask.size), (0, len(mask)), (1, shape[-1])):
    error = np.sqrt(rate * (1 - rate) / count)
    rates = np.atleast_1d(mask.mean(axis))
    assert np.abs(rates - (1 - rate)).max() < 5 * error
    if len(rates) > 1:
      assert abs(rates.std() / error - 1) < 5 / np.sqrt(2 * len(rates))
  assert lora.drop_mask(lora.Dropout(drop.key, 0.0), "q", shape).all()
  mesh = jax.make_mesh((2, 4), ("rows", "columns"))
  split = jax.NamedSharding(mesh, jax.P(None, "rows", None, "columns"))
  on_mesh = jax.jit(lora.drop_mask, static_argnums=(1, 2), out_shardings=split)(drop, "q", shape)
  np.testing.assert_array_equal(np.asarray(on_mesh).reshape(mask.shape), mask)


def test_chunks_are_the_largest_divisor_that_fits():
  assert scoring.chunk_slots(4, 8, 48, 256) == 8
  assert scoring.chunk_slots(64, 8, 256, 2048) == 4
  assert scoring.chunk_slots(64, 8, 7, 1) == 1
