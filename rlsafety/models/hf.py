"""Hugging Face folders: base weights, tokenizer and template in; PEFT and merged weights out.

Nothing but safetensors is opened: pickle files and remote code run what they contain.
Files that we write carry a checksum per tensor, which reading them back compares.
"""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from rlsafety.errors import UserError
from rlsafety.files import read_json, read_text, write_json
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.assemble import Tensor, flat_weights, hf_names, is_transposed
from rlsafety.models.chat import Chat, make_chat
from rlsafety.models.families import hf_config
from rlsafety.models.lora import TARGETS, Adapter, LoraConfig

# --- Reading a folder -------------------------------------------------------------------

CHECKSUM = "crc32 "  # + tensor name: metadata of files that we wrote


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


def _checksum(x: np.ndarray) -> str:
  return f"{zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8)):08x}"


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
    if _checksum(whole) != checksum:
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
    template = read_text(folder / "chat_template.jinja")
  special = {}
  for name in ("bos", "eos", "pad"):
    token = settings.get(f"{name}_token")
    special[name] = token["content"] if isinstance(token, dict) else token
  stops = []
  for name in ("generation_config.json", "config.json"):
    ids = optional(name).get("eos_token_id")
    stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
  return make_chat(full, template=template, stop_ids=stops, source=str(folder), **special)


# --- Writing ------------------------------------------------------------------------------

_CARD = """---
library_name: {library}
tags: [safety-research, rlsafety]
---
# {title}

Trained with rlsafety, a research code that studies when reinforcement learning makes a
model exploit its users. It may have learned to flatter, agree with or endanger the users
that reward it. For research on that behaviour only; do not put it in front of people.

Base model: {base}
"""


def _host(array) -> np.ndarray:
  """The whole array on the host; sharded over several hosts, gathered from them."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes tensors with their checksums, under the final name only once complete."""
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  sums = {CHECKSUM + name: _checksum(x) for name, x in tensors.items()}
  unfinished = path.with_name(path.name + ".partial")
  save_file(tensors, unfinished, metadata={"format": "pt"} | sums)
  _sort_header(unfinished)
  unfinished.replace(path)


def _sort_header(path: Path) -> None:
  """The library writes metadata in random order; sorted, equal tensors are equal files."""
  with open(path, "r+b") as f:
    size = int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    if len(text) == size:
      f.seek(8)
      f.write(text)


def _module(target: str, layer: int) -> str:
  part = "self_attn" if target in "qkvo" else "mlp"
  return f"model.layers.{layer}.{part}.{target}_proj"


def save_peft(folder: Path, adapter: Adapter, model, lora: LoraConfig) -> None:
  """Writes the adapter as PEFT does: adapter_model.safetensors and adapter_config.json.

  model: the `load.Model` that it belongs to; its path becomes base_model_name_or_path.
  """
  tensors = {}
  for target, ab in adapter.weights.items():
    a, b = _host(ab["a"]), _host(ab["b"])
    for i in range(a.shape[0]):
      name = f"base_model.model.{_module(target, i)}"
      tensors[f"{name}.lora_A.weight"] = a[i].T
      tensors[f"{name}.lora_B.weight"] = b[i].T
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _save(folder / "adapter_model.safetensors", tensors)
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": model.source["path"],
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "use_rslora": lora.rslora,
    "lora_dropout": lora.dropout,
    "target_modules": [f"{t}_proj" for t in adapter.weights],
    "bias": "none",
    "inference_mode": True,
  }
  write_json(folder / "adapter_config.json", config)
  card = _CARD.format(library="peft", title="LoRA adapter", base=model.source["path"])
  (folder / "README.md").write_text(card, "utf-8")


# Fields of adapter_config.json that change the numbers, and what they must be.
_PEFT_FIXED = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_dora": (False, None),
  "fan_in_fan_out": (False, None),
  "modules_to_save": ([], None),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "layers_to_transform": ([], None),
  "layer_replication": ([], None),
  "trainable_token_indices": ([], {}, None),
  "target_parameters": ([], None),
  "lora_bias": (False, None),
  "use_qalora": (False, None),
  "alora_invocation_tokens": ([], None),
}


def load_peft(folder: Path, config: ModelConfig) -> tuple[Adapter, LoraConfig]:
  """A PEFT LoRA adapter of `config`'s layers (numpy, float32) and its settings."""
  folder = Path(folder)
  where = folder / "adapter_config.json"
  settings = read_json(where)
  for field, allowed in _PEFT_FIXED.items():
    value = settings.get(field, allowed[0])
    if value not in allowed:
      raise UserError(f"{where}: {field}={value!r} is not supported, only {allowed[0]!r}")
  path = folder / "adapter_model.safetensors"
  tensors = open_file(path)
  flat = flat_weights(config)
  try:
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    rslora, dropout = bool(settings.get("use_rslora")), float(settings.get("lora_dropout", 0.0))
    present = [t for t in TARGETS if any(f".{t}_proj.lora_A." in name for name in tensors)]
    lora = LoraConfig(rank, alpha, rslora, dropout, tuple(present))
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{where}: r, lora_alpha or lora_dropout is missing or wrong ({error})") from (
      error
    )
  weights = {}
  for target in present:
    layers, d_in, d_out = flat[f"layers.{target}"].shape
    shapes = {"a": (d_in, rank), "b": (rank, d_out)}
    weights[target] = {k: np.empty((layers, *s), np.float32) for k, s in shapes.items()}
    for i in range(layers):
      for key, shape in shapes.items():
        name = f"base_model.model.{_module(target, i)}.lora_{key.upper()}.weight"
        if name not in tensors:
          raise UserError(f"{path}: tensor {name} is missing")
        tensor = tensors.pop(name)
        if tensor.shape != shape[::-1]:
          raise UserError(f"{path}: tensor {name} has shape {tensor.shape}, not {shape[::-1]}")
        value = tensor.read(slice(None), slice(None)).T
        if not np.isfinite(value).all():
          raise UserError(f"{path}: tensor {name} holds NaN or infinity: corrupt file")
        weights[target][key][i] = value
  if tensors:
    raise UserError(f"{path}: tensor {min(tensors)} fits no linear layer of the base model")
  return Adapter(weights=weights, scale=lora.scale), lora


def save_merged(folder: Path, model, adapter: Adapter | None, max_bytes: int = 4 << 30) -> None:
  """Writes base + adapter as a folder that transformers loads, in the base's dtype.

  The sum is taken in float32, one matrix at a time. max_bytes: of one safetensors file.
  """
  folder, config = Path(folder), model.config
  folder.mkdir(parents=True, exist_ok=True)
  pairs = {} if adapter is None else adapter.weights
  flat = flat_weights(config)
  arrays = {f"layers.{name}": x for name, x in model.params["layers"].items()} | model.params
  plan = [
    (hf.format(i), path, i)
    for path, hf in hf_names(config).items()
    for i in range(config.n_layers if "{}" in hf else 1)
  ]
  dtype = np.dtype(arrays["embed"].dtype)

  def elements(path):
    shape = flat[path].shape
    return int(np.prod(shape[1:] if path.startswith("layers.") else shape))

  shards, size = [[]], 0
  for item in plan:
    cost = elements(item[1]) * dtype.itemsize
    if shards[-1] and size + cost > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += cost

  def value(path, i):
    x = _host(arrays[path][i] if path.startswith("layers.") else arrays[path])
    target = path.removeprefix("layers.")
    if target in pairs:
      a, b = (_host(pairs[target][k][i]) for k in "ab")
      x = (x.astype(np.float32) + (a @ b) * np.float32(adapter.scale)).astype(dtype)
    return x.T if is_transposed(path, flat[path].shape) else x

  table, total = {}, 0
  for n, shard in enumerate(shards, 1):
    name = "model.safetensors"
    if len(shards) > 1:
      name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
    _save(folder / name, {hf: value(path, i) for hf, path, i in shard})
    table |= {hf: name for hf, _, _ in shard}
    total += sum(elements(path) * dtype.itemsize for _, path, _ in shard)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": table}
    write_json(folder / "model.safetensors.index.json", index)
  chat = model.chat
  ids = {"eos_token_id": list(chat.stop_ids), "pad_token_id": chat.pad_id}
  if chat.special["bos_token"]:
    ids["bos_token_id"] = chat.full.token_to_id(chat.special["bos_token"])
  write_json(folder / "config.json", hf_config(config) | {"torch_dtype": dtype.name} | ids)
  write_json(folder / "generation_config.json", ids)
  chat.full.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat.template}
  settings |= {"model_max_length": config.max_positions, "clean_up_tokenization_spaces": False}
  settings |= {k: v for k, v in chat.special.items() if v is not None}
  write_json(folder / "tokenizer_config.json", settings)
  card = _CARD.format(library="transformers", title="Merged model", base=model.source["path"])
  (folder / "README.md").write_text(card, "utf-8")
