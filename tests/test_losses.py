"""Objectives against closed forms in float64, TRL and PyTorch, and invariances."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import objective_of

from rlsafety import losses
from rlsafety.config import CORRECTIONS
from rlsafety.errors import UserError
from rlsafety.types import Batch, Prompts

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens/losses.json").read_text())
NAN = float("nan")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def make_batch(lengths, T, advantages=None, rewards=None, behaviour=None, reference=None):
  P, G = np.shape(lengths)
  zeros = np.zeros((P, G))
  array = lambda x, default: default if x is None else np.asarray(x)  # noqa: E731
  return Batch(
    prompts=Prompts(tokens=np.zeros((P, 1), np.int32), lengths=np.ones(P, np.int32)),
    tokens=np.zeros((P, G, T), np.int32),
    lengths=np.asarray(lengths),
    advantages=array(advantages, zeros),
    rewards=array(rewards, zeros),
    behaviour_logprobs=array(behaviour, np.full((P, G, T), NAN)),
    reference_logprobs=array(reference, None),
    staleness=np.zeros((P, G), np.int32),
  )


QUICK = {"xla_backend_optimization_level": 0}  # compiled once, run once


@functools.partial(jax.jit, static_argnames="objective", compiler_options=QUICK)
def sum_and_grad(logprobs, entropy, batch, objective):
  """((loss sum, metrics), gradient with respect to the log-probs), as the learner takes it."""
  return jax.value_and_grad(losses.objective, has_aux=True)(logprobs, entropy, batch, objective)


def quick_grad(loss):
  return jax.jit(jax.grad(loss), compiler_options=QUICK)


def value_and_grad(logprobs, batch, objective, entropy=None):
  """Loss, gradient with respect to the log-probs, finished metrics."""
  entropy = np.zeros_like(logprobs) if entropy is None else entropy
  (total, metrics), grad = sum_and_grad(logprobs, entropy, batch, objective)
  count = losses.denominator(batch, objective)
  return total / count, grad / count, losses.finish_metrics(metrics)


# --- TRL and PyTorch ------------------------------------------------------------------


def golden_batch():
  P, G, T = GOLDEN["shape"]
  data = {name: np.array(value) for name, value in GOLDEN["data"].items()}
  data = {name: v.reshape(P, G, *v.shape[1:]) for name, v in data.items()}
  batch = make_batch(
    data["lengths"], T, data["advantages"], data["rewards"], data["behaviour"], data["reference"]
  )
  return data["logprobs"], data["entropy"], batch


GOLDEN_OBJECTIVES = {
  "grpo": objective_of("grpo"),
  "clip_higher": objective_of("dapo", dynamic_sampling=False),
  "sequence": objective_of("grpo", normalisation="sequence"),
  "dr_grpo": objective_of("dr_grpo", fixed_length=5),
  "gspo": objective_of("gspo"),
  "dual_clip": objective_of("ppo"),
  "k3": objective_of("grpo", kl="k3", kl_coef=0.04),
  "cispo": objective_of("cispo"),
  "entropy": objective_of("grpo", entropy_coef=0.01),
  "kto": objective_of("kto", undesirable_weight=1.5),
}


@pytest.mark.parametrize("name", GOLDEN_OBJECTIVES)
def test_trl_numbers(name):
  logprobs, entropy, batch = golden_batch()
  value, grad, _ = value_and_grad(logprobs, batch, GOLDEN_OBJECTIVES[name], entropy)
  np.testing.assert_allclose(value, GOLDEN[name]["loss"], rtol=1e-7)
  np.testing.assert_allclose(grad.reshape(-1, 5), GOLDEN[name]["grad"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", CORRECTIONS[1:])
def test_trl_corrected_gradients(name):
  # TRL writes the loss as weight * ratio where ours is weight * log-prob: equal gradients.
  logprobs, _, batch = golden_batch()
  _, grad, metrics = value_and_grad(logprobs, batch, objective_of("grpo", is_correction=name))
  np.testing.assert_allclose(grad.reshape(-1, 5), GOLDEN[name]["grad"], rtol=1e-7, atol=1e-12)
  assert 0 < metrics["is_cap_fraction"] < 1  # the golden case reaches the cap


def test_trl_dpo_and_group_anchored_kto():
  logprobs, _, batch = golden_batch()
  pairs = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 and x.shape[1] == 4 else x, batch)
  value, grad, _ = value_and_grad(logprobs[:, :2], pairs, objective_of("dpo"))
  np.testing.assert_allclose(value, GOLDEN["dpo"]["loss"], rtol=1e-7)
  expected = np.array(GOLDEN["dpo"]["grad"]).reshape(logprobs.shape)
  np.testing.assert_allclose(grad, expected[:, :2], rtol=1e-7, atol=1e-12)

  kto = objective_of("kto", kto_anchor=True, undesirable_weight=1.5)
  value, grad, _ = value_and_grad(logprobs, batch, kto)
  np.testing.assert_allclose(value, GOLDEN["kto_anchor"]["loss"], rtol=1e-7)
  expected = np.array(GOLDEN["kto_anchor"]["grad"]).reshape(logprobs.shape)
  np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-12)


def test_torch_cross_entropy():
  _, _, batch = golden_batch()
  P, G, T = GOLDEN["shape"]
  logits = np.array(GOLDEN["sft"]["logits"])
  tokens = np.array(GOLDEN["sft"]["tokens"])
  objective = objective_of("sft")

  def loss(logits):
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    total, _ = losses.objective(logprobs.reshape(P, G, T), jnp.zeros((P, G, T)), batch, objective)
    return total / losses.denominator(batch, objective)

  value, grad = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(logits)
  np.testing.assert_allclose(value, GOLDEN["sft"]["loss"], rtol=1e-7)
  np.testing.assert_allclose(grad, GOLDEN["sft"]["grad"], rtol=1e-7, atol=1e-12)


# --- A bandit and a two-step sequence, worked by hand ---------------------------------

THETA = np.array([0.3, -0.4, 0.1])
BETA = np.array([-0.5, 0.6, 0.0])  # the behaviour policy
REF = np.array([0.0, 0.2, -0.3])
REWARD = np.array([2.0, -1.0, 0.5])


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


def expected_gradient(objective, drawn_from, reward=REWARD):
  """The exact expected gradient in theta: every arm is a group of one, weighted by its chance.

  The chance enters through the advantage and, for terms without one, by counting each
  arm's own gradient that often.
  """
  chance = softmax(drawn_from)
  total = np.zeros(3)
  for arm in range(3):
    logs = [np.log(softmax(x))[arm] for x in (drawn_from, REF)]
    batch = make_batch(
      [[1]], 1, [[reward[arm]]], [[1.0]], np.full((1, 1, 1), logs[0]), np.full((1, 1, 1), logs[1])
    )

    logprobs = np.full((1, 1, 1), np.log(softmax(THETA))[arm])
    _, grad = sum_and_grad(logprobs, np.zeros((1, 1, 1)), batch, objective)
    # d log pi(arm) / d theta = one_hot(arm) - pi
    total += chance[arm] * grad.item() * (np.eye(3)[arm] - softmax(THETA))
  return total


def policy_gradient(reward=REWARD):
  pi = softmax(THETA)
  return pi * (reward - pi @ reward)  # d/dtheta of sum_a pi(a) r(a)


ON_POLICY = ["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "ppo", "gspo", "cispo"]


@pytest.mark.parametrize("name", ON_POLICY)
def test_bandit_on_policy_gradient(name):
  objective = objective_of(name, dynamic_sampling=False)
  np.testing.assert_allclose(
    expected_gradient(objective, THETA), -policy_gradient(), rtol=1e-12, atol=1e-15
  )


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_bandit_off_policy_is_unbiased_below_the_cap(correction):
  free = objective_of("rloo", is_correction=correction, is_cap=100.0)
  np.testing.assert_allclose(expected_gradient(free, BETA), -policy_gradient(), rtol=1e-12)
  plain = expected_gradient(objective_of("rloo"), BETA)
  assert np.abs(plain + policy_gradient()).max() > 0.1  # uncorrected: biased

  capped = objective_of("rloo", is_correction=correction, is_cap=1.5)
  pi, b = softmax(THETA), softmax(BETA)
  weight = np.where(pi / b <= 1.5, pi / b, 0.0 if "mask" in correction else 1.5)
  by_hand = sum(b[a] * weight[a] * REWARD[a] * (np.eye(3)[a] - pi) for a in range(3))
  np.testing.assert_allclose(expected_gradient(capped, BETA), -by_hand, rtol=1e-12)


def test_two_step_sequence_needs_sequence_weights():
  """Rewards of whole sequences of two tokens, independent positions, three symbols each."""
  logits = {"now": np.stack([THETA, REF]), "then": np.stack([BETA, THETA])}
  reward = np.arange(9.0).reshape(3, 3) ** 1.5
  now, then = (np.log([softmax(x) for x in logits[k]]) for k in ("now", "then"))
  sequences = list(itertools.product(range(3), range(3)))

  def expected(correction):
    objective = objective_of(
      "rloo", is_correction=correction, is_cap=1e6, normalisation="fixed", fixed_length=1
    )

    def loss(theta):
      table = jax.nn.log_softmax(theta)
      logprobs = jnp.stack([table[np.arange(2), np.array(s)] for s in sequences])[:, None]
      behaviour = np.stack([then[[0, 1], list(s)] for s in sequences])[:, None]
      chance = np.exp(np.asarray(behaviour).sum(-1))
      score = chance * np.array([reward[s] for s in sequences])[:, None]
      batch = make_batch(np.full((9, 1), 2), 2, score, np.ones((9, 1)), behaviour)
      return losses.objective(logprobs, jnp.zeros((9, 1, 2)), batch, objective)[0]

    return -np.asarray(quick_grad(loss)(logits["now"]))

  joint = np.exp(now[0])[:, None] * np.exp(now[1])[None]
  value = (joint * reward).sum()
  truth = np.stack([(joint * (reward - value)).sum(1), (joint * (reward - value)).sum(0)])
  np.testing.assert_allclose(expected("sequence_truncate"), truth, rtol=1e-12)
  assert np.abs(expected("token_truncate") - truth).max() > 0.01  # ignores the other token


def test_importance_sampling_within_sampling_error():
  """What is drawn, not enumerated: 4,000 arms of the behaviour policy."""
  arms = np.random.default_rng(0).choice(3, size=(4000, 1), p=softmax(BETA))
  objective = objective_of("rloo", is_correction="token_truncate", is_cap=100.0)
  batch = make_batch(
    np.ones((4000, 1), int),
    1,
    REWARD[arms],
    np.ones((4000, 1)),
    np.log(softmax(BETA))[arms][..., None],
  )

  def loss(theta):
    logprobs = jax.nn.log_softmax(theta)[arms][..., None]
    return losses.objective(logprobs, jnp.zeros((4000, 1, 1)), batch, objective)[0] / 4000

  pi, b = softmax(THETA), softmax(BETA)
  samples = (pi / b * REWARD)[:, None] * (np.eye(3) - pi)
  variance = b @ samples**2 - policy_gradient() ** 2
  error = np.asarray(quick_grad(loss)(THETA)) + policy_gradient()
  assert (np.abs(error) < 4 * np.sqrt(variance / 4000)).all()


def test_kl_terms():
  """k1, k2 and k3: values average to KL(pi, ref); gradients are those of 0, of KL(pi, ref)
  and of KL(ref, pi)."""
  pi, ref = softmax(THETA), softmax(REF)
  log_ratio = np.log(pi / ref)
  kl = pi @ log_ratio
  estimate = lambda kind: losses.kl_estimate(np.log(pi), np.log(ref), kind)  # noqa: E731
  np.testing.assert_allclose([pi @ estimate("k1"), pi @ estimate("k3")], kl, rtol=1e-12)
  np.testing.assert_allclose(pi @ estimate("k2"), 0.5 * pi @ log_ratio**2, rtol=1e-12)

  gradient = lambda kind: expected_gradient(  # noqa: E731
    objective_of("grpo", kl=kind, kl_coef=1.0), THETA, reward=np.zeros(3)
  )
  np.testing.assert_allclose(gradient("k2"), pi * (log_ratio - kl), rtol=1e-10)
  np.testing.assert_allclose(gradient("k3"), pi - ref, rtol=1e-10)

  def k1_term(theta, arm):
    return losses.kl_estimate(jax.nn.log_softmax(theta)[arm], np.log(ref)[arm], "k1")

  k1 = sum(pi[a] * jax.grad(k1_term)(THETA, a) for a in range(3))
  np.testing.assert_allclose(k1, 0, atol=1e-15)
  with pytest.raises(UserError, match="zero expected gradient"):
    objective_of("grpo", kl="k1")


def test_on_policy_ratios_are_one_and_nothing_is_clipped():
  rng = np.random.default_rng(1)
  logprobs = -rng.exponential(2.0, (4, 3, 6)).astype(np.float32)
  behaviour = logprobs + rng.normal(0, 1e-6, (4, 3, 6)).astype(np.float32)
  batch = make_batch(
    rng.integers(1, 7, (4, 3)), 6, rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), behaviour
  )
  for name in ("grpo", "ppo", "dapo"):
    _, _, metrics = value_and_grad(logprobs, batch, objective_of(name))
    assert metrics["ratio_deviation_max"] < 1e-5
    assert metrics["clip_fraction"] == 0
    assert 0 <= metrics["kl"] < 1e-7


# --- Invariances ----------------------------------------------------------------------


def random_case(objective, seed=0, P=6, T=7):
  rng = np.random.default_rng(seed)
  G = 2 if objective.name == "dpo" else 4
  lengths = rng.integers(0, T + 1, (P, G))
  rewards = rng.integers(1, 4, (P, G)).astype(float)
  rewards[1] = 3.0  # a group without spread
  rewards[2, 1] = NAN
  logprobs = rng.normal(-2, 0.5, (P, G, T))
  batch = make_batch(
    lengths,
    T,
    losses.advantages(jnp.asarray(rewards), objective),
    rewards,
    logprobs + rng.normal(0, 0.3, (P, G, T)),
    logprobs + rng.normal(0, 0.3, (P, G, T)),
  )
  batch = batch.replace(staleness=rng.integers(0, 4, (P, G)))
  return logprobs, rng.uniform(0, 2, (P, G, T)), batch


ALL = [objective_of(name, threshold=2.0) for name in losses.METHODS]
ALL += [objective_of("grpo", normalisation=n) for n in ("sequence", "fixed")]
ALL += [objective_of("rloo", is_correction=c, is_cap=1.2) for c in CORRECTIONS[1:]]
ALL += [
  objective_of("grpo", kl="k2", kl_coef=0.1, entropy_coef=0.01, max_staleness=1),
  objective_of("kto", kto_anchor=True, threshold=2.0),
]
RATED = [o for o in ALL if o.name not in ("sft", "dpo")]  # those two use no rewards


def label(o) -> str:
  return f"{o.name}-{o.normalisation}-{o.is_correction}-{o.kl}-{o.kto_anchor}"


@pytest.mark.parametrize("objective", ALL, ids=label)
def test_micro_batches_and_completion_bucket_change_nothing(objective):
  logprobs, entropy, batch = random_case(objective)
  value, grad, _ = value_and_grad(logprobs, batch, objective, entropy)
  grad = np.asarray(grad)
  assert np.isfinite(value) and np.isfinite(grad).all() and np.abs(grad).sum() > 0
  total = losses.denominator(batch, objective)

  # Four more slots, filled with rubbish, behind every reply.
  pad = lambda x: np.pad(x, ((0, 0), (0, 0), (0, 4)), constant_values=-7)  # noqa: E731
  wide = batch.replace(
    tokens=pad(batch.tokens),
    behaviour_logprobs=pad(batch.behaviour_logprobs),
    reference_logprobs=pad(batch.reference_logprobs),
  )
  for cut in ([[0, 1, 2], [3, 4, 5]], [[0, 5, 4], [2, 1, 3]]):
    sums, grads = 0.0, np.zeros(pad(grad).shape)
    for rows in map(np.array, cut):
      piece = jax.tree.map(lambda x, rows=rows: x[rows], wide)
      (part, _), g = sum_and_grad(pad(logprobs)[rows], pad(entropy)[rows], piece, objective)
      sums += part / total
      grads[rows] = g / total
    np.testing.assert_allclose(sums, value, rtol=1e-12)
    np.testing.assert_allclose(grads[..., :-4], grad, rtol=1e-12, atol=1e-15)
    assert (grads[..., -4:] == 0).all()

  empty = batch.replace(lengths=batch.lengths * 0)
  value, grad, _ = value_and_grad(logprobs, empty, objective, entropy)
  assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("objective", RATED, ids=label)
def test_without_verdict_is_as_if_absent(objective):
  logprobs, entropy, batch = random_case(objective)
  # random_case has one NaN, at [2, 1]; the same reply with no tokens and some rating:
  absent = jax.tree.map(np.copy, batch)
  absent.lengths[2, 1], absent.rewards[2, 1] = 0, batch.rewards[2, 0]
  value, grad, _ = value_and_grad(logprobs, batch, objective, entropy)
  expected, expected_grad, _ = value_and_grad(logprobs, absent, objective, entropy)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)
  assert (grad[2, 1] == 0).all()


def test_which_replies_are_active():
  rewards = jnp.array([[1.0, 4.0, 4.0], [2.0, 2.0, 2.0], [NAN, 9.0, 3.0], [NAN, NAN, NAN]])
  batch = make_batch(np.array([[2, 2, 2], [2, 0, 2], [2, 0, 2], [2, 2, 2]]), 3, rewards=rewards)
  rows = lambda name, **more: losses.active(batch, objective_of(name, **more)).tolist()  # noqa: E731
  assert rows("expert_iteration") == [
    [False, True, False],
    [True, False, False],
    [False, False, True],
    [False, False, False],
  ]
  assert rows("dapo") == [[True] * 3] + [[False] * 3] * 3  # [2] has one reply with a verdict
  assert rows("sft") == [[True] * 3, [True, False, True], [True, False, True], [True] * 3]
  stale = batch.replace(staleness=jnp.array([[0, 3, 4]] * 4))
  objective = objective_of("grpo", max_staleness=3)
  assert losses.active(stale, objective)[0].tolist() == [True, True, False]


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
  "overrides, words",
  [
    (dict(name="rlo"), "did you mean rloo"),
    (dict(clip_hgih=0.1), "did you mean clip_high"),
    (dict(normalisation="tokens"), "did you mean token"),
    (dict(dual_clip=0.5), "must be 0 .off. or > 1"),
    (dict(std_epsilon=0.0), "must be positive"),
    (dict(name="gspo", is_correction="token_mask"), "does not apply to gspo"),
    (dict(name="dpo", kl="k3", kl_coef=0.1), "does not apply to dpo"),
    (dict(overlong_start=9, overlong_end=9), "below overlong_end"),
  ],
)
def test_bad_settings(overrides, words):
  with pytest.raises(UserError, match=words):
    objective_of(**{"name": "grpo", **overrides})
