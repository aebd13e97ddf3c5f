"""One learner for every kind of data: `update(state, base, batch) -> state, metrics`.

The batch is cut along prompts into micro-batches; sums and denominators stay apart until
the end, so that the cut changes nothing but memory. Gradients are taken with respect to
the adapter only; the base is an argument, never a closure, and is not donated.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlsafety import losses, sharding
from rlsafety.config import Learner, Lora, Objective, Optimizer
from rlsafety.errors import UserError
from rlsafety.models import hf, lora, scoring
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter, Dropout
from rlsafety.types import Batch, TrainState


def make_optimizer(o: Optimizer) -> optax.GradientTransformation:
  """AdamW behind a global-norm clip; the rate rises linearly to a constant.

  Update n (from 1) of the warm-up uses n / warmup_steps of the rate. transformers'
  schedule starts from exactly 0 and so wastes its first update.
  """

  def rate(count):
    return o.learning_rate * jnp.minimum(1.0, (count + 1) / max(1, o.warmup_steps))

  return optax.chain(
    optax.clip_by_global_norm(o.clip_norm),
    optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay),
  )


def init_state(adapter: Adapter, optimizer: optax.GradientTransformation) -> TrainState:
  # A pytree is what optax takes; its type says arrays alone.
  return TrainState(adapter, optimizer.init(adapter))  # pyright: ignore[reportArgumentType]


def starting_state(
  settings: Lora,
  config: ModelConfig,
  optimizer: Optimizer,
  key: jax.Array,
  adapter: str = "",
) -> TrainState:
  """Adapter and optimiser state, made in place on the mesh: never whole on one device.

  adapter: a PEFT folder to start from; its LoRA settings must be `settings`.
  """
  loaded = None
  if adapter:
    loaded, found = hf.load_peft(pathlib.Path(adapter), config)
    for field in ("rank", "alpha", "rslora", "targets"):
      if getattr(found, field) != getattr(settings, field):
        raise UserError(
          f"model.adapter={adapter}: its {field} is {getattr(found, field)}, "
          f"lora.{field} is {getattr(settings, field)}; set --config.lora.{field} to match"
        )
  return _starting(settings, config, optimizer)(key, loaded)


@functools.lru_cache
def _starting(settings: Lora, config: ModelConfig, optimizer: Optimizer) -> Callable:
  """`starting_state`'s program, one for cells of all seeds."""
  axes = lora.adapter_axes(config, settings)

  def init(key: jax.Array, start: Adapter | None) -> TrainState:
    adapter = start or lora.init_adapter(config, settings, key)
    state = init_state(adapter, make_optimizer(optimizer))
    pin = lambda x, a: sharding.constrain(x, *a)  # noqa: E731
    return jax.tree.map(pin, state, state_axes(state, axes))

  return jax.jit(init)


def state_axes(state: TrainState, adapter_axes: dict) -> TrainState:
  """Logical axes of each array of a state: moments lie like the adapter weight they belong to.

  adapter_axes: `lora.adapter_axes`. What belongs to no weight, such as a count, is whole.
  """

  def axes_of(path, x):
    keys = [getattr(part, "key", None) for part in path]
    target = next((key for key in keys if key in adapter_axes), None)
    return adapter_axes[target][keys[-1]] if target else (None,) * x.ndim

  return jax.tree_util.tree_map_with_path(axes_of, state)


class Programs(NamedTuple):
  """`complete` and `update`, compiled, with all bound but arrays."""

  complete: Callable[[dict, Sequence[Batch]], Batch]
  update: Callable[[TrainState, dict, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


@functools.lru_cache
def programs(
  config: ModelConfig,
  objective: Objective,
  settings: Learner,
  optimizer: Optimizer,
  temperature: float,
  dropout: float,
) -> Programs:
  """The two programs of a run; cells that are alike here share them. The update donates its state:
  memory for one adapter and its moments, not two."""
  common = {
    "config": config,
    "objective": objective,
    "settings": settings,
    "temperature": temperature,
  }
  steps = functools.partial(update, **common, optimizer=make_optimizer(optimizer), dropout=dropout)
  return Programs(jax.jit(functools.partial(complete, **common)), jax.jit(steps, donate_argnums=0))


def complete(
  base: dict,
  pieces: Sequence[Batch],
  *,
  config: ModelConfig,
  objective: Objective,
  settings: Learner = Learner(),
  temperature: float = 1.0,
) -> Batch:
  """Pieces of a batch along P, fresh or recorded, as one with all that an update needs:
  reference log-probs (if the objective has any use for them) and advantages."""
  batch = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
  pin = lambda x: sharding.constrain(x, "prompt", *[None] * (x.ndim - 1))  # noqa: E731
  batch = jax.tree.map(pin, batch)
  reference = None
  if losses.needs_reference(objective):
    reference = scoring.token_scores(
      base,
      None,
      config,
      batch.prompts,
      batch.tokens,
      batch.lengths,
      temperature=temperature,
      chunk_tokens=settings.chunk_tokens,
    ).logprobs
  rewards = losses.shaped(
    batch.rewards, objective, batch.lengths, batch.behaviour_logprobs, reference
  )
  return batch.replace(
    advantages=losses.advantages(rewards, objective), reference_logprobs=reference
  )


def update(
  state: TrainState,
  base: dict,
  batch: Batch,
  key: jax.Array,
  *,
  config: ModelConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  settings: Learner = Learner(),
  temperature: float = 1.0,
  dropout: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on one batch. `key` feeds LoRA dropout only.

  temperature: the sampler's. dropout: the rate of LoRA dropout. Jit it with `state` donated. A
  non-finite gradient or step leaves the adapter as it was and sets metrics["nonfinite"] to 1: the
  caller stops, and what was trained is not lost.
  """
  P, M = batch.tokens.shape[0], settings.microbatches
  if P % M:
    raise UserError(f"learner.microbatches={M} must divide the {P} prompts of a batch")
  total = losses.denominator(batch, objective)

  def scores_of(adapter, piece, drop):
    return scoring.token_scores(
      base,
      adapter,
      config,
      piece.prompts,
      piece.tokens,
      piece.lengths,
      temperature=temperature,
      chunk_tokens=settings.chunk_tokens,
      remat=settings.remat,
      dropout=drop,
      attention=settings.attention,
      learn_entropy=objective.entropy_coef != 0.0,
    )

  def loss(adapter, piece, drop):
    scores = scores_of(adapter, piece, drop)
    loss_sum, metrics = losses.objective(scores.logprobs, scores.entropy, piece, objective)
    return loss_sum / total, metrics

  def one_piece(gradient, xs):
    index, piece = xs
    drop = Dropout(jax.random.fold_in(key, index), dropout) if dropout > 0.0 else None
    (value, metrics), g = jax.value_and_grad(loss, has_aux=True)(state.adapter, piece, drop)
    return jax.tree.map(jnp.add, gradient, g), (value, metrics)

  # Micro-batch m takes prompts m, m + M, ...: the split over devices stays as it is.
  pieces = jax.tree.map(lambda x: x.reshape(P // M, M, *x.shape[1:]).swapaxes(0, 1), batch)
  zeros = jax.tree.map(jnp.zeros_like, state.adapter)
  gradient, (values, metrics) = jax.lax.scan(one_piece, zeros, (jnp.arange(M), pieces))
  folded = {  # (sum, weight) per micro-batch, [M] each
    name: (totals.max() if name.endswith("_max") else totals.sum(), weights.sum())
    for name, (totals, weights) in metrics.items()
  }
  metrics = losses.finish_metrics(folded)

  norm = optax.global_norm(gradient)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapter)
  ok = jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
  adapter = optax.apply_updates(state.adapter, updates)
  keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
  new_state = TrainState(
    adapter=jax.tree.map(keep, adapter, state.adapter),
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
  )
  metrics |= {"loss": jnp.sum(values), "grad_norm": norm, "nonfinite": 1.0 - ok}
  return new_state, metrics
