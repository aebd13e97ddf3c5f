"""Params from stored tensors, each read tensor by tensor onto its shards.

Both readers (`hf`, `gguf`) give `{Hugging Face name: Tensor}`; `assemble` makes the params
of `transformer` of it, checks that every tensor has its place, and reads only what each
shard needs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlsafety import progress
from rlsafety.errors import UserError
from rlsafety.models.architecture import ModelConfig, is_weight, weights


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One stored tensor: read(rows, columns) gives that part, columns only for matrices."""

  file: str
  shape: tuple[int, ...]
  read: Callable[..., np.ndarray]


def hf_names(config: ModelConfig) -> dict[str, str]:
  """Our path, such as "embed" or "layers.0.q", -> Hugging Face name."""
  norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
  if config.post_norms:
    norms |= {
      "post_attn_norm": "post_attention_layernorm",
      "mlp_norm": "pre_feedforward_layernorm",
      "post_mlp_norm": "post_feedforward_layernorm",
    }
  layer = {name: f"{hf}.weight" for name, hf in norms.items()}
  for name in "qkvo":
    layer[name] = f"self_attn.{name}_proj.weight"
    layer[f"{name}_bias"] = f"self_attn.{name}_proj.bias"
    layer[f"{name}_norm"] = f"self_attn.{name}_norm.weight"
  for name in ("gate", "up", "down"):
    layer[name] = f"mlp.{name}_proj.weight"
  names = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
  }
  for i in range(config.n_layers):
    names |= {f"layers.{i}.{name}": f"model.layers.{i}.{hf}" for name, hf in layer.items()}
  return {path: names[path] for path in flat_weights(config)}


def flat_weights(config: ModelConfig) -> dict:
  """{"embed": Weight, "layers.0.q": Weight, ...} in the order of the params tree."""
  leaves = jax.tree_util.tree_flatten_with_path(weights(config), is_leaf=is_weight)[0]
  path_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {path_of(path): weight for path, weight in leaves}


def is_transposed(path: str, shape: tuple) -> bool:
  """Linears and the head are stored [out, in] there and [in, out] here."""
  return path == "head" or (path.startswith("layers.") and len(shape) == 2)


def assemble(
  config: ModelConfig, tensors: dict[str, Tensor], dtype: Any, shardings: dict | None = None
) -> dict:
  """Params of `config` in `dtype`, each array made shard by shard.

  shardings: tree like the params, or None for one device. At any time the host holds
  one shard of one array besides what is already placed. Raises UserError naming file
  and tensor where one is missing, unknown, of another shape, or holds NaN or infinity.
  """
  names, flat = hf_names(config), flat_weights(config)
  if config.tie_embeddings:
    tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
  where = next(iter(tensors.values())).file if tensors else "the checkpoint"
  for path, name in names.items():
    if name not in tensors:
      raise UserError(f"{where}: tensor {name} is missing; the download may be incomplete")
    shape = flat[path].shape
    shape = shape[::-1] if is_transposed(path, shape) else shape
    if tensors[name].shape != shape:
      raise UserError(
        f"{tensors[name].file}: tensor {name} has shape {tensors[name].shape}, "
        f"the config says {shape}: weights and config are of different models"
      )
  for name in sorted(set(tensors) - set(names.values())):
    if not name.endswith("rotary_emb.inv_freq"):  # a buffer of old exports, recomputed here
      raise UserError(
        f"{tensors[name].file}: tensor {name} has no place in this architecture, "
        "and leaving it out would change the model"
      )

  def place(path, sharding):
    shape, tensor = flat[path].shape, tensors[names[path]]
    transposed = is_transposed(path, shape)
    last: list[Any] = [None, None]  # Replicas ask for the same block one after the other.

    def block(index: Any) -> np.ndarray:
      index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
      if last[0] == index:
        return last[1]
      last[:] = [None, None]
      stored = tensor.read(*(index[::-1] if transposed else index))
      if not np.isfinite(stored).all():
        raise UserError(f"{tensor.file}: tensor {names[path]} holds NaN or infinity: corrupt file")
      out = np.ascontiguousarray(stored.T if transposed else stored, dtype)
      last[:] = [index, out]
      return out

    return jax.make_array_from_callback(shape, sharding, block)

  tree = jax.tree.structure(weights(config), is_leaf=is_weight)
  if shardings is None:
    targets = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(flat)
  else:
    targets = tree.flatten_up_to(shardings)
  todo = progress.bar(list(zip(flat, targets, strict=True)), "tensors of the model")
  return jax.tree.unflatten(tree, [place(*tensor) for tensor in todo])
