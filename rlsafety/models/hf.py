"""Hugging Face folders: base weights and adapters in; PEFT and merged weights out.

Nothing but safetensors is opened: pickle files and remote code run what they contain.
Files that we write carry a checksum per tensor, which reading them back compares.
"""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regex
from safetensors import safe_open
from safetensors.numpy import save_file

from rlsafety.config import TARGETS, Lora
from rlsafety.errors import UserError
from rlsafety.files import read_json, write_bytes, write_json
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.assemble import Tensor, flat_weights, hf_names, is_transposed
from rlsafety.models.families import hf_config
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.sharding import fetch

# --- Reading a folder -------------------------------------------------------------------

CHECKSUM = "crc32 "  # + tensor name: metadata of files that we wrote


INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def read_tensors(folder: Path) -> dict[str, Tensor]:
  """{name: Tensor} of a folder's safetensors, single or sharded with an index.

  Raises UserError where two answers are possible: weights both with an index and without, or
  an adapter beside them, which transformers would add.
  """
  index, table = folder / INDEX, {}
  if (folder / "adapter_config.json").exists():
    raise UserError(
      f"{folder}: adapter_config.json lies beside the weights, and transformers adds such an "
      "adapter to them; move it to a folder of its own (config.model.adapter names it)"
    )
  if index.exists():
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
      raise UserError(f"{index}: weight_map must map tensor names to files")
    shards = sorted(set(table.values()))
    if bad := [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]:
      raise UserError(f"{index}: {bad[0]!r} is no safetensors file of this folder")
    if (folder / WEIGHTS).exists() and WEIGHTS not in shards:
      raise UserError(
        f"{folder}: holds two models, {WEIGHTS} and the shards that {INDEX} names; move the "
        "older one away"
      )
  elif (folder / WEIGHTS).exists():
    shards = [WEIGHTS]
  else:
    other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {other[0]} is a pickle file, which can run code and is refused" if other else ""
    raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}{hint}")
  tensors: dict[str, Tensor] = {}
  for shard in shards:
    for name, tensor in open_file(folder / shard).items():
      if name in tensors or (table and table.get(name) != shard):
        raise UserError(f"{folder / shard}: tensor {name} is not where {INDEX} says")
      tensors[name] = tensor
  for name in sorted(set(table) - set(tensors)):
    raise UserError(f"{folder / table[name]}: tensor {name} is missing, though {INDEX} has it")
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
  return f"{zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data):08x}"


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


_PEFT_ROOT = "base_model.model."


def _module(target: str, layer: int) -> str:
  part = "self_attn" if target in "qkvo" else "mlp"
  return f"model.layers.{layer}.{part}.{target}_proj"


def save_peft(folder: Path, adapter: Adapter, model: "Model", lora: Lora) -> None:
  """Writes the adapter as PEFT does: adapter_model.safetensors and adapter_config.json.

  model: the `load.Model` that it belongs to; its path becomes base_model_name_or_path.
  """
  tensors = {}
  for target, ab in adapter.weights.items():
    a, b = fetch((ab["a"], ab["b"]))
    for i in range(a.shape[0]):
      name = f"{_PEFT_ROOT}{_module(target, i)}"
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
  write_bytes(folder / "README.md", card.encode())


# Fields of adapter_config.json that change the numbers, and what they must be. PiSSA, OLoRA,
# CorDA, LoftQ and LoRA-GA start from a changed base: their adapters do not fit the plain one.
_PEFT_FIXED = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
# Fields that name, choose or train.
_PEFT_HARMLESS = set(
  "task_type auto_mapping base_model_name_or_path revision inference_mode peft_version r "
  "lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_pattern eva_config "
  "loftq_config corda_config lora_ga_config velora_config megatron_config megatron_core "
  "runtime_config qalora_group_size ensure_weight_tying unsloth_fixed".split()
)


def _peft_settings(where: Path, targets: tuple[str, ...]) -> Lora:
  """The settings of an adapter_config.json. Raises UserError naming the field."""
  settings = read_json(where)
  for field, value in settings.items():
    allowed = _PEFT_FIXED.get(field, (None, False))
    # Whatever a newer PEFT adds and does not use is empty.
    unused = field not in _PEFT_FIXED and isinstance(value, (list, dict)) and not value
    known = any(value is a or (isinstance(a, str) and value == a) for a in allowed)
    if field not in _PEFT_HARMLESS and not unused and not known:
      raise UserError(f"{where}: {field}={value!r:.200} is not supported, only {allowed[0]!r}")
  if "peft_type" not in settings:
    raise UserError(f"{where}: peft_type is missing; only 'LORA' is supported")

  def number(
    field: str, default: float | None, kinds: type | tuple, low: float, high: float
  ) -> Any:
    value = settings.get(field, default)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value < high:
      raise UserError(f"{where}: {field}={value!r:.200} must be a number in [{low}, {high})")
    return value

  rslora = settings.get("use_rslora")
  if not isinstance(rslora, bool | None):
    raise UserError(f"{where}: use_rslora={rslora!r:.200} must be true or false")
  alpha = float(number("lora_alpha", None, (int, float), 1e-6, 1e6))
  dropout = float(number("lora_dropout", 0.0, (int, float), 0, 1))
  return Lora(number("r", None, int, 1, 1 << 20), alpha, bool(rslora), dropout, targets)


def _check_modules(where: Path, start: str, present: Sequence[str], layers: int) -> None:
  """Raises UserError unless adapter_config.json chooses the modules that have tensors: peft leaves
  out what is not chosen, and starts afresh what has none. start: of the modules' names."""
  settings = read_json(where)

  def chosen(field: str, module: str) -> bool:
    value = settings.get(field)
    if value == "all-linear" or not value and field == "exclude_modules":
      return value == "all-linear"
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
      return any(f".{module}".endswith(f".{name}") for name in value)
    why = "it is neither"
    if isinstance(value, str):
      try:
        return bool(regex.fullmatch(value, module, timeout=1))  # a stranger's may never end
      except (regex.error, TimeoutError) as error:
        why = str(error)
    raise UserError(f"{where}: {field}={value!r:.200} must be a list of names or a pattern ({why})")

  for module, target in ((_module(t, i), t) for t in TARGETS for i in range(layers)):
    module = start + module.removeprefix("model.")
    wanted = chosen("target_modules", module) and not chosen("exclude_modules", module)
    if wanted != (target in present):
      raise UserError(
        f"{where}: target_modules={settings.get('target_modules')!r:.200} and exclude_modules "
        f"{'choose' if wanted else 'do not choose'} {module}, of which the file beside it has "
        f"{'no' if wanted else 'an'} adapter; peft would have another one"
      )


def load_peft(folder: str | Path, config: ModelConfig) -> tuple[Adapter, Lora]:
  """A PEFT LoRA adapter of `config`'s layers (numpy, float32) and its settings.

  Raises UserError naming file and field for what would be another adapter here.
  """
  path = Path(folder) / "adapter_model.safetensors"
  stored = open_file(path)
  if other := [name for name in stored if not name.startswith(_PEFT_ROOT)]:
    raise UserError(f"{path}: tensor {min(other)} must begin with {_PEFT_ROOT!r}, as peft's do")
  # Of a Gemma 3 with a vision tower, the layers that we have.
  plain = _text_part({n.removeprefix(_PEFT_ROOT): t for n, t in stored.items()})
  tensors = {f"{_PEFT_ROOT}{name}": tensor for name, tensor in plain.items()}
  flat = flat_weights(config)
  present = tuple(t for t in TARGETS if any(f".{t}_proj.lora_A." in name for name in tensors))
  where = Path(folder) / "adapter_config.json"
  lora = _peft_settings(where, present)
  weights = {}
  for target in present:
    d_in, d_out = flat[f"layers.0.{target}"].shape
    layers = config.n_layers
    shapes = {"a": (d_in, lora.rank), "b": (lora.rank, d_out)}
    weights[target] = {k: np.empty((layers, *s), np.float32) for k, s in shapes.items()}
    for i in range(layers):
      for key, shape in shapes.items():
        name = f"{_PEFT_ROOT}{_module(target, i)}.lora_{key.upper()}.weight"
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
  if not present:
    raise UserError(f"{path}: holds no tensor at all")
  names = (name.removeprefix(_PEFT_ROOT).partition("layers.")[0] for name in stored)
  start = next(name for name in names if "vision" not in name)
  _check_modules(where, start, present, config.n_layers)
  return Adapter(weights=weights, scale=lora.scale), lora


def save_merged(
  folder: Path, model: "Model", adapter: Adapter | None, max_bytes: int = 4 << 30
) -> None:
  """Writes base + adapter as a folder that transformers loads, in the base's dtype.

  The sum is taken in float32, one matrix at a time. max_bytes: of one safetensors file.
  """
  folder, config = Path(folder), model.config
  folder.mkdir(parents=True, exist_ok=True)
  pairs, scale = ({}, 0.0) if adapter is None else (adapter.weights, adapter.scale)
  flat = flat_weights(config)
  arrays = dict(zip(flat, jax.tree.leaves(model.params), strict=True))
  dtype = np.dtype(arrays["embed"].dtype)

  shards, size = [[]], 0
  for path, hf in hf_names(config).items():
    cost = math.prod(flat[path].shape) * dtype.itemsize
    if shards[-1] and size + cost > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append((hf, path))
    size += cost

  def value(path: str) -> np.ndarray:
    x = fetch(arrays[path])
    _, layer, target = path.split(".") if path.startswith("layers.") else ("", "", "")
    if target in pairs:
      a, b = (fetch(pairs[target][k][int(layer)]) for k in "ab")
      x = (x.astype(np.float32) + (a @ b) * np.float32(scale)).astype(dtype)
    return x.T if is_transposed(path, flat[path].shape) else x

  table, total = {}, 0
  for n, shard in enumerate(shards, 1):
    name = "model.safetensors"
    if len(shards) > 1:
      name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
    _save(folder / name, {hf: value(path) for hf, path in shard})
    table |= {hf: name for hf, _ in shard}
    total += sum(math.prod(flat[path].shape) * dtype.itemsize for _, path in shard)
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
  if adapter is not None:
    card = _CARD.format(library="transformers", title="Merged model", base=model.source["path"])
    write_bytes(folder / "README.md", card.encode())
