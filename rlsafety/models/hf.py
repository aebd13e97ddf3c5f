"""Base weights from safetensors, tensor by tensor onto their shards.

Both readers (this file and `gguf`) give `{Hugging Face name: Tensor}`; `assemble` turns
that into the params of `transformer`, reading only what each shard needs. Nothing but
safetensors and GGUF is ever opened: pickle files and remote code run what they contain.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from rlsafety.errors import UserError
from rlsafety.models.chat import Chat, make_chat
from rlsafety.models.transformer import ModelConfig, is_weight, weights


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One stored tensor: read(rows, columns) gives that part, columns only for matrices."""

  file: str
  shape: tuple[int, ...]
  read: Callable[..., np.ndarray]


# --- Reading a folder -------------------------------------------------------------------

CHECKSUM = "crc32 "  # + tensor name: metadata of files that we wrote


def read_json(path: Path) -> dict:
  try:
    value = json.loads(path.read_text("utf-8"))
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except ValueError as error:
    raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from error
  if not isinstance(value, dict):
    raise UserError(f"{path}: must hold a JSON object")
  return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
  """{name: Tensor} of a folder's safetensors, single or sharded with an index."""
  index = folder / "model.safetensors.index.json"
  if index.exists():
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
      raise UserError(f"{index}: weight_map must map tensor names to files")
    shards = sorted(set(table.values()))
    if bad := [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]:
      raise UserError(f"{index}: {bad[0]!r} is no safetensors file of this folder")
  elif (folder / "model.safetensors").exists():
    table, shards = None, ["model.safetensors"]
  else:
    other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {other[0]} is a pickle file, which can run code and is refused" if other else ""
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
  tensors = {}
  for shard in shards:
    found = open_file(folder / shard)
    for name, tensor in found.items():
      if name in tensors or (table is not None and table.get(name) != shard):
        raise UserError(f"{folder / shard}: tensor {name} is not where {index.name} says")
      tensors[name] = tensor
  for name in sorted(set(table or ()) - set(tensors)):
    raise UserError(f"{folder / table[name]}: tensor {name} is missing, though {index.name} has it")
  return _text_part(tensors)


def _text_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
  """Of a Gemma 3 with a vision tower, the language model under its plain names."""
  if not any("language_model." in name for name in tensors):
    return tensors
  vision = ("vision_tower.", "multi_modal_projector.")
  plain = {}
  for name, tensor in tensors.items():
    if not name.removeprefix("model.").startswith(vision):
      name = name.replace("language_model.model.", "model.").replace("language_model.", "")
      plain[name] = tensor
  return plain


def open_file(path: Path) -> dict[str, Tensor]:
  """{name: Tensor} of one safetensors file; only the header is read."""
  try:
    with safe_open(path, "np") as f:
      metadata = f.metadata() or {}
      parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
      kinds = {name: (tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
  except FileNotFoundError as error:
    raise UserError(f"{path}: file is missing; the download may be incomplete") from error
  except Exception as error:  # SafetensorError, and OSError of many kinds
    raise UserError(
      f"{path}: not a readable safetensors file, truncated or corrupt ({error})"
    ) from (error)
  return {
    name: _tensor(path, name, shape, dtype, metadata.get(CHECKSUM + name))
    for name, (shape, dtype) in kinds.items()
  }


def _tensor(path: Path, name: str, shape: tuple, dtype: str, checksum: str | None) -> Tensor:
  def read(*index: slice) -> np.ndarray:
    if dtype not in ("F32", "F16", "BF16"):
      raise UserError(f"{path}: tensor {name} is {dtype}; supported: F32, F16, BF16")
    try:
      with safe_open(path, "np") as f:
        if checksum is None:
          return f.get_slice(name)[index]
        whole = f.get_tensor(name)
    except Exception as error:
      raise UserError(f"{path}: tensor {name} cannot be read ({error})") from error
    if f"{zlib.crc32(whole.reshape(-1).view(np.uint8)):08x}" != checksum:
      raise UserError(f"{path}: tensor {name} differs from what was written (checksum)")
    return whole[index]

  return Tensor(str(path), shape, read)


def read_chat(folder: Path) -> Chat:
  """The tokenizer and template of a folder, by transformers only where there is no
  tokenizer.json (old SentencePiece folders)."""
  path = folder / "tokenizer.json"
  if path.exists():
    try:
      full = Tokenizer.from_file(str(path))
    except Exception as error:
      raise UserError(f"{path}: not a readable tokenizer ({error})") from error
  else:
    from transformers import AutoTokenizer

    try:
      full = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    except Exception as error:
      raise UserError(f"{folder}: no tokenizer.json and no other usable tokenizer ({error})") from (
        error
      )

  def optional(name):
    return read_json(folder / name) if (folder / name).exists() else {}

  settings = optional("tokenizer_config.json")
  template = settings.get("chat_template")
  if isinstance(template, list):  # Several by name: [{"name", "template"}, ...]
    template = {t["name"]: t["template"] for t in template}.get("default")
  if (folder / "chat_template.jinja").exists():
    template = (folder / "chat_template.jinja").read_text("utf-8")
  special = {}
  for name in ("bos", "eos", "pad"):
    token = settings.get(f"{name}_token")
    special[name] = token["content"] if isinstance(token, dict) else token
  stops = []
  for name in ("generation_config.json", "config.json"):
    ids = optional(name).get("eos_token_id")
    stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
  return make_chat(full, template=template, stop_ids=stops, source=str(folder), **special)


# --- Params -----------------------------------------------------------------------------


def hf_names(config: ModelConfig) -> dict[str, str]:
  """Our path -> Hugging Face name; `{}` stands for the layer."""
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
  names |= {f"layers.{name}": f"model.layers.{{}}.{hf}" for name, hf in layer.items()}
  return {path: names[path] for path in flat_weights(config)}


def flat_weights(config: ModelConfig) -> dict:
  """{"embed": Weight, "layers.q": Weight, ...} in the order of the params tree."""
  leaves = jax.tree_util.tree_flatten_with_path(weights(config), is_leaf=is_weight)[0]
  return {".".join(k.key for k in path): weight for path, weight in leaves}


def is_transposed(path: str, shape: tuple) -> bool:
  """Linears and the head are stored [out, in] there and [in, out] here."""
  return path == "head" or (path.startswith("layers.") and len(shape) == 3)


def assemble(
  config: ModelConfig, tensors: dict[str, Tensor], dtype, shardings: dict | None = None
) -> dict:
  """Params of `config` in `dtype`, each array made shard by shard.

  shardings: tree like the params, or None for one device. At any time the host holds
  one shard of one array besides what is already placed. Raises UserError naming file
  and tensor where one is missing, unknown, of another shape, or holds NaN or infinity.
  """
  names, flat = hf_names(config), flat_weights(config)
  expected = {
    hf.format(i): (path, flat[path].shape[1:] if "{}" in hf else flat[path].shape)
    for path, hf in names.items()
    for i in range(config.n_layers if "{}" in hf else 1)
  }
  if config.tie_embeddings:
    tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
  where = next(iter(tensors.values())).file if tensors else "the checkpoint"
  for name, (path, shape) in expected.items():
    if name not in tensors:
      raise UserError(f"{where}: tensor {name} is missing; the download may be incomplete")
    shape = shape[::-1] if is_transposed(path, flat[path].shape) else shape
    if tensors[name].shape != shape:
      raise UserError(
        f"{tensors[name].file}: tensor {name} has shape {tensors[name].shape}, "
        f"the config says {shape}: weights and config are of different models"
      )
  for name in sorted(set(tensors) - set(expected)):
    if not name.endswith("rotary_emb.inv_freq"):  # a buffer of old exports, recomputed here
      raise UserError(
        f"{tensors[name].file}: tensor {name} has no place in this architecture, "
        "and leaving it out would change the model"
      )

  def part(name, path, index):
    """One layer's (or the only) block of an array, in our orientation."""
    index = index[::-1] if is_transposed(path, flat[path].shape) else index
    block = tensors[name].read(*index)
    if not np.isfinite(block).all():
      raise UserError(f"{tensors[name].file}: tensor {name} holds NaN or infinity: corrupt file")
    return block.T if is_transposed(path, flat[path].shape) else block

  def place(path, sharding):
    shape, hf = flat[path].shape, names[path]
    last = [None, None]  # Replicas ask for the same block one after the other.

    def block(index):
      index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
      if last[0] == index:
        return last[1]
      last[:] = [None, None]
      out = np.empty([s.stop - s.start for s in index], dtype)
      if "{}" in hf:
        for i in range(index[0].start, index[0].stop):
          out[i - index[0].start] = part(hf.format(i), path, index[1:])
      else:
        out[...] = part(hf, path, index)
      last[:] = [index, out]
      return out

    return jax.make_array_from_callback(shape, sharding, block)

  tree = jax.tree.structure(weights(config), is_leaf=is_weight)
  if shardings is None:
    targets = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(flat)
  else:
    targets = tree.flatten_up_to(shardings)
  return jax.tree.unflatten(tree, [place(p, s) for p, s in zip(flat, targets, strict=True)])
