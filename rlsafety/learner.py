"""One learner for every kind of data: `update(state, base, batch) -> state, metrics`.

The batch is cut along prompts into micro-batches; sums and denominators stay apart until
the end, so that the cut changes nothing but memory. Gradients are taken with respect to
the adapter only; the base is an argument, never a closure, and is not donated.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from rlsafety import losses
from rlsafety.errors import UserError
from rlsafety.models import scoring
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter, Dropout
from rlsafety.types import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
  """objective: what is maximised, see `losses`. temperature: the sampler's.

  microbatches: pieces of the batch, a divisor of P. chunk_tokens: tokens whose logits
  exist at once. remat: a name in `transformer.REMAT`. dropout: rate of LoRA dropout.
  """

  objective: losses.Objective
  temperature: float = 1.0
  microbatches: int = 1
  chunk_tokens: int = 2048
  remat: str = "full"
  dropout: float = 0.0
  attention: str = "einsum"  # of the prompt segment: einsum, or cudnn on NVIDIA GPUs


def make_optimizer(
  learning_rate: float,
  warmup_steps: int = 0,
  clip_norm: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """AdamW behind a global-norm clip; the rate rises linearly to a constant.

  Update n (from 1) of the warm-up uses n / warmup_steps of the rate. transformers'
  schedule starts from exactly 0 and so wastes its first update.
  """

  def rate(count):
    return learning_rate * jnp.minimum(1.0, (count + 1) / max(1, warmup_steps))

  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )


def init_state(adapter: Adapter, optimizer: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), adapter, optimizer.init(adapter))


def state_axes(state: TrainState, adapter_axes: dict):
  """Logical axes of each array of a state: moments lie like the adapter weight they belong to.

  adapter_axes: `lora.adapter_axes`. What belongs to no weight, such as a count, is whole.
  """

  def axes_of(path, x):
    keys = [getattr(part, "key", None) for part in path]
    target = next((key for key in keys if key in adapter_axes), None)
    return adapter_axes[target][keys[-1]] if target else (None,) * x.ndim

  return jax.tree_util.tree_map_with_path(axes_of, state)


def update(
  state: TrainState,
  base: dict,
  batch: Batch,
  key: jax.Array,
  *,
  config: ModelConfig,
  settings: LearnerSettings,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on one batch. `key` feeds LoRA dropout only.

  Jit it with `state` donated. A non-finite gradient leaves the adapter as it was and sets
  metrics["nonfinite"] to 1: the caller stops, and what was trained is not lost.
  """
  objective = settings.objective
  P, M = batch.tokens.shape[0], settings.microbatches
  if P % M:
    raise UserError(f"learner.microbatches={M} must divide the {P} prompts of a batch")
  total = losses.denominator(batch, objective)

  def scores_of(adapter, piece, dropout):
    return scoring.token_scores(
      base,
      adapter,
      config,
      piece.prompts,
      piece.tokens,
      piece.lengths,
      temperature=settings.temperature,
      chunk_tokens=settings.chunk_tokens,
      remat=settings.remat,
      dropout=dropout,
      attention=settings.attention,
    )

  def loss(adapter, piece, dropout):
    scores = scores_of(adapter, piece, dropout)
    loss_sum, metrics = losses.objective(scores.logprobs, scores.entropy, piece, objective)
    return loss_sum / total, metrics

  def one_piece(gradient, xs):
    index, piece = xs
    dropout = None
    if settings.dropout > 0.0:
      dropout = Dropout(jax.random.fold_in(key, index), settings.dropout)
    (value, metrics), g = jax.value_and_grad(loss, has_aux=True)(state.adapter, piece, dropout)
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
  ok = jnp.isfinite(norm)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapter)
  adapter = optax.apply_updates(state.adapter, updates)
  keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
  new_state = TrainState(
    step=state.step + 1,
    adapter=jax.tree.map(keep, adapter, state.adapter),
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
  )
  metrics |= {"loss": jnp.sum(values), "grad_norm": norm, "nonfinite": 1.0 - ok}
  return new_state, metrics
