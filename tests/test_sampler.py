"""What the sampler draws, and what it says about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, make_model, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsafety import sampler, sharding
from rlsafety.config import Sampler
from rlsafety.errors import UserError
from rlsafety.models import int8, lora, scoring, transformer
from rlsafety.types import Prompts


@pytest.fixture(scope="module")
def model():
  return LLAMA, *make_model(LLAMA)


def keys_of(prompts, key=0, first_row=0):
  return sampler.row_keys(jax.random.key(key), first_row + np.arange(len(prompts.lengths)))


def draw(model, prompts, key=0, first_row=0, stop_ids=(), **kwargs):
  config, params, adapter = model
  return sampler.sample_jit(
    params, adapter, config, prompts, keys_of(prompts, key, first_row), Sampler(**kwargs), stop_ids
  )


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 8, 0.8)])
def test_logprobs_are_the_learners_whatever_was_truncated(family, temperature, top_k, top_p):
  prompts = make_prompts(family[0], [6, 3], 7)
  r = draw(
    family, prompts, group=3, max_tokens=9, stop_ids=tuple(range(20)),
    temperature=temperature, top_k=top_k, top_p=top_p,
  )  # fmt: skip
  config, params, adapter = family
  score = functools.partial(scoring.token_scores, config=config, temperature=temperature)
  scores = jax.jit(score)(params, adapter, prompts=prompts, tokens=r.tokens, lengths=r.lengths)
  np.testing.assert_allclose(r.logprobs, scores.logprobs, atol=1e-4)


def test_stop_token_ends_a_reply_and_belongs_to_it(model):
  stops = tuple(range(30))
  r = draw(model, make_prompts(LLAMA, [6, 3, 5], 7), group=6, max_tokens=10, stop_ids=stops)
  tokens, lengths, finished = (np.asarray(x) for x in (r.tokens, r.lengths, r.finished))
  assert finished.any()
  for row, n, done in zip(tokens.reshape(-1, 10), lengths.ravel(), finished.ravel(), strict=True):
    assert (row[: n - 1] >= 30).all()  # no stop inside
    assert (row[n - 1] < 30) == done
    assert done or n == 10
    assert not row[n:].any()


def test_rows_do_not_depend_on_how_the_batch_is_cut(model):
  whole = make_prompts(LLAMA, [6, 3, 5, 7], 7)
  r = draw(model, whole, group=3, max_tokens=6)
  for start in (0, 2):
    piece = jax.tree.map(lambda x, s=start: x[s : s + 2], whole)
    part = draw(model, piece, group=3, max_tokens=6, first_row=start)
    np.testing.assert_array_equal(part.tokens, r.tokens[start : start + 2])
  other = draw(model, whole, key=1, group=3, max_tokens=6)
  assert (other.tokens != r.tokens).any()
  assert (r.tokens[:, 0] != r.tokens[:, 1]).any()  # siblings differ


def test_rows_with_adapters_of_their_own_get_what_each_gets_alone(model):
  config, params, adapter = model
  own = [jax.tree.map(lambda x, i=i: x * (1 + i), adapter) for i in range(3)]
  sizes, prompts = (2, 1, 3), make_prompts(LLAMA, [6, 3, 5, 7, 4, 2], 7)
  keys, drawing = keys_of(prompts), Sampler(group=3, max_tokens=6)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  side = lora.side_by_side(tuple(own), sizes)
  asked = lambda adapter, prompts, keys, gib: sampler.sample_all(  # noqa: E731
    params, adapter, config, prompts, keys, drawing, (), mesh, gib
  )
  two_at_once = 2.1 * sampler.cache_bytes(config, 7, drawing, mesh, jnp.float32) / 2**30
  whole, cut = asked(side, prompts, keys, 0.0), asked(side, prompts, keys, two_at_once)
  for start, n, alone in zip((0, 2, 3), sizes, own, strict=True):
    rows = slice(start, start + n)
    r = asked(alone, jax.tree.map(lambda x, r=rows: x[r], prompts), keys[rows], 0.0)
    for together in (whole, cut):
      np.testing.assert_array_equal(together.tokens[rows], r.tokens)
      np.testing.assert_allclose(together.logprobs[rows], r.logprobs, atol=1e-5)
  plain = asked(own[0], prompts, keys, 0.0)
  assert (plain.tokens[3:] != whole.tokens[3:]).any()  # the adapters do differ


def test_greedy_takes_the_most_likely_token(model):
  config, params, adapter = model
  prompts = make_prompts(LLAMA, [4], 4)
  r = draw(model, prompts, group=1, max_tokens=5, temperature=0.0)
  sequence = jnp.concatenate([prompts.tokens, r.tokens[0]], axis=1)
  n = jnp.array([9], jnp.int32)
  _, hidden = transformer.prefill(params, adapter, config, Prompts(sequence, n))
  best = jnp.argmax(transformer.unembed(params, config, hidden[0, 3:8]), -1)
  np.testing.assert_array_equal(best, r.tokens[0, 0])


def test_first_tokens_follow_the_softmax(model):
  """4,000 draws of one token: chi-square over the likely tokens within 5 sigma."""
  config, params, adapter = model
  prompts = make_prompts(LLAMA, [5], 5)
  _, hidden = transformer.prefill(params, adapter, config, prompts)
  probs = jax.nn.softmax(transformer.unembed(params, config, hidden[0, -1]) / 0.9)
  n = 4000
  r = draw(model, prompts, group=n, max_tokens=1, temperature=0.9)
  counts = np.bincount(np.asarray(r.tokens).ravel(), minlength=config.vocab_size)
  likely = np.asarray(probs) * n >= 5
  expected = np.asarray(probs)[likely] * n
  chi2 = ((counts[likely] - expected) ** 2 / expected).sum()
  k = likely.sum()
  assert abs(chi2 - k) < 5 * np.sqrt(2 * k)


def test_rare_tokens_keep_their_own_probability():
  """Tokens far below 2^-24 follow the softmax among themselves (chi-square, 2,048 tokens)."""
  rng = np.random.default_rng(4)
  rare = rng.normal(-21, 1, 2048)  # 1e-9 each, 3e-6 of the mass together
  logits = jnp.asarray(np.concatenate([np.zeros(1), np.full(2047, -60.0), rare]), jnp.float32)
  numbers = rng.random((100_000, sampler.LEVELS))
  numbers[:, 0] = 1 - 5e-7 * numbers[:, 0]  # the draws that leave the first group
  draw = jax.jit(jax.vmap(lambda u: sampler.inverse_cdf(logits, u)[0]))
  tokens = np.asarray(draw(jnp.asarray(numbers, jnp.float32)))
  assert (tokens >= 2048).all()
  expected = len(tokens) * np.exp(rare) / np.exp(rare).sum()
  squares = (np.bincount(tokens - 2048, minlength=2048) - expected) ** 2 / expected
  assert abs(squares.sum() - 2047) < 4 * np.sqrt(2 * 2047)


@given(st.integers(0, 12), st.floats(0.05, 1.0), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_the_smallest_sufficient_set(top_k, top_p, seed):
  logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
  kept = np.isfinite(np.asarray(sampler.truncated(jnp.asarray(logits), top_k, top_p)))
  order = np.argsort(-logits)
  allowed = order[: top_k or 12]
  probs = np.exp(logits[allowed] - logits.max())
  probs /= probs.sum()
  size = int(np.searchsorted(np.cumsum(probs), top_p - 1e-6) + 1)
  assert set(np.flatnonzero(kept)) == set(allowed[:size])


def test_bad_settings_name_the_field():
  for kwargs in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}):
    with pytest.raises(UserError, match=next(iter(kwargs))):
      Sampler(group=1, max_tokens=1, **kwargs)


def test_int8_cache_and_base_stay_near_the_truth(model):
  """The reported log-probs are those of the rounded model: near the exact ones, not equal."""
  config, params, adapter = model
  prompts = make_prompts(config, [6, 3], 7)
  score = jax.jit(functools.partial(scoring.token_scores, config=config))
  rounded = int8.quantise_base(params)
  for base, cache in ((params, "int8"), (rounded, ""), (rounded, "int8")):
    r = draw((config, base, adapter), prompts, group=4, max_tokens=8, cache=cache)
    exact = score(params, adapter, prompts=prompts, tokens=r.tokens, lengths=r.lengths).logprobs
    error = np.abs(np.asarray(r.logprobs - exact))
    assert 1e-6 < error.max() < 0.25 and error.mean() < 0.05


@given(st.integers(0, 1000), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_int8_rounds_to_half_a_level(seed, axis):
  x = np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32)
  q = int8.quantise(jnp.asarray(x), axis)
  level = np.abs(x).max(axis, keepdims=True) / 127
  assert (np.abs(np.asarray(q.values * q.scale) - x) <= level * 0.5001).all()


def test_byte_budget_cuts_rollouts_where_the_mesh_allows():
  mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
  wanted = Sampler(group=4, max_tokens=16)
  cut = functools.partial(sampler.prompts_at_once, LLAMA, 8, 32, wanted, mesh, jnp.float32)
  per_prompt = (32 + 4 * 16) * 2 * LLAMA.n_layers * LLAMA.n_kv_heads * LLAMA.head_dim * 4
  assert cut(0.0) == 8
  assert cut(2 * per_prompt / 2**30) == 4  # two prompts on each of two devices
  with pytest.raises(UserError, match="cache_gib"):
    cut(0.5 * per_prompt / 2**30)
  odd = functools.partial(sampler.prompts_at_once, LLAMA, 3, 32, wanted, mesh, jnp.float32)
  assert odd(0.0) == 3  # the policy's part of a mixed batch may not split over the mesh
  assert odd(per_prompt / 2**30) == 1
