"""Weights and config from one GGUF file or several parts of one, without torch.

Quantised tensors are dequantised row by row as the shards ask for them. Two habits of
GGUF files are undone: llama files interleave the rows of q and k (their rotary pairs
are neighbours), and Gemma files store norm weights with the 1 already added.
"""

import dataclasses
import math
import re
import struct
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from rlsafety.errors import UserError
from rlsafety.models.assemble import Tensor

TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()

# GGUF architecture -> model_type. Mistral and Yi files call themselves llama.
ARCHITECTURES = {
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3": "gemma3_text",
}

_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_FIXED = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}

_MAGIC = b"GGUF"
_SCALARS = dict(enumerate("B b H h I i f ?".split())) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor as it lies in the file: shape (slowest axis first), type, raw rows."""

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  data: np.ndarray
  file: str


_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf")


def parts(path: Path) -> list[Path]:
  """The files of a model that gguf-split wrote as NAME-00001-of-00003.gguf; else just `path`."""
  found = _PART.fullmatch(path.name)
  if not found:
    return [path]
  stem, count = found[1], int(found[3])
  return [path.with_name(f"{stem}{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def open_file(path: str | Path) -> "File":
  """A GGUF file, joined with the others where it is the first of several.

  Raises UserError naming the part that is missing, is not the first, or is of another split.
  """
  path = Path(path)
  first = File(path)
  count = first.get("split.count", int, 1)
  files = parts(path)
  if first.get("split.no", int, 0) != 0 or len(files) != (count or 1):
    raise UserError(
      f"{path}: split.no={first.get('split.no', int, 0)} of split.count={count} is not the first "
      f"of {len(files)} files that the name says; name NAME-00001-of-{count:05d}.gguf"
    )
  for number, part in enumerate(files[1:], 1):
    if not part.exists():
      raise UserError(f"{part}: part {number + 1} of {count} is missing; fetch it too")
    other = File(part)
    if (other.get("split.no", int), other.get("split.count", int)) != (number, count):
      raise UserError(f"{part}: not part {number + 1} of {count} (split.no, split.count)")
    if twice := set(first.tensors) & set(other.tensors):
      raise UserError(f"{part}: tensor {min(twice)} is in another part too")
    first.tensors |= other.tensors
  stated = first.get("split.tensors.count", int, len(first.tensors))
  if stated != len(first.tensors):
    raise UserError(f"{path}: split.tensors.count={stated}, but {len(first.tensors)} are there")
  return first


class File:
  """One open GGUF file: metadata by key, tensors by name.

  Read here, not by `gguf.GGUFReader`, which makes an array per metadata element (a 262,144
  token vocabulary takes it 15 s) and cannot say which field or tensor is broken.
  """

  def __init__(self, path: str | Path) -> None:
    self.path = str(path)
    try:
      self._bytes = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
      raise UserError(f"{path}: cannot be read as a GGUF file ({error})") from error
    self._at, self._field = 0, "header"
    magic, version, tensors, fields = self._take("4sIQQ")
    if magic != _MAGIC or version not in (2, 3):
      raise UserError(f"{path}: not a GGUF file of version 2 or 3 (magic {magic!r}, {version})")
    self.fields = {}
    for i in range(self._count(fields)):
      self._field = f"metadata field {i}"
      key = self._string()
      self._field = f"metadata field {key}"
      self.fields[key] = self._value(*self._take("I"))
    infos = []
    for i in range(self._count(tensors)):
      self._field = f"tensor {i}"
      name = self._string()
      self._field = f"tensor {name}"
      (ndim,) = self._take("I")
      if not 1 <= ndim <= 4:
        self._corrupt(f"{ndim} dimensions")
      infos.append((name, self._take(f"{ndim}Q")[::-1], *self._take("IQ")))
    align = self.get("general.alignment", int, 32)
    if align < 1:
      raise UserError(f"{path}: general.alignment={align} must be at least 1")
    start = -(-self._at // align) * align
    self.tensors, expected = {}, 0
    for name, shape, kind, offset in infos:
      self._field = f"tensor {name}"
      if name in self.tensors:
        self._corrupt("stored twice")
      # A wrong offset or alignment would read other numbers; llama.cpp refuses them likewise.
      if offset != expected:
        self._corrupt(f"offset {offset} is not {expected}, where the one before it ends (aligned "
                      f"to general.alignment={align})")  # fmt: skip
      found = self.tensors[name] = self._stored(name, shape, kind, start + offset)
      expected = offset + -(-found.data.nbytes // align) * align

  def _stored(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Stored:
    names = {t.value: t.name for t in gguf.GGMLQuantizationType}
    if names.get(kind) not in TYPES:
      found = names.get(kind, kind)
      raise UserError(f"{self.path}: tensor {name} has type {found}; supported: {', '.join(TYPES)}")
    stored = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[stored]
    row = shape[-1] // block * size
    end = start + math.prod(shape[:-1]) * row
    if shape[-1] % block or 0 in shape or end > self._bytes.size:
      self._corrupt(f"shape {shape} of type {stored.name} does not fit in the file")
    data = self._bytes[start:end].reshape(*shape[:-1], row)
    plain = {"F32": np.float32, "F16": np.float16}.get(stored.name)
    return Stored(shape, stored, data if plain is None else data.view(plain), self.path)

  def _corrupt(self, why: str) -> NoReturn:
    raise UserError(f"{self.path}: {self._field}: {why}; truncated or corrupt, fetch it again")

  def _take(self, layout: str) -> tuple:
    size = struct.calcsize("<" + layout)
    if self._at + size > self._bytes.size:
      self._corrupt("the file ends here")
    values = struct.unpack_from("<" + layout, self._bytes.data, self._at)
    self._at += size
    return values

  def _count(self, n: int) -> int:
    if n > self._bytes.size - self._at:  # every element takes at least one byte
      self._corrupt(f"{n} elements do not fit in the file")
    return n

  def _string(self) -> str:
    size = self._count(*self._take("Q"))
    self._at += size
    try:
      return self._bytes[self._at - size : self._at].tobytes().decode()
    except UnicodeDecodeError:
      self._corrupt("text is not UTF-8")

  def _value(self, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
      return self._string()
    if kind in _SCALARS:
      value = self._take(_SCALARS[kind])[0]
      # 1e-5 was rounded to 9.99999974e-06 when it was stored: the shortest name of the same.
      return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value
    if kind != _ARRAY:
      self._corrupt(f"unknown value type {kind}")
    kind, n = self._take("IQ")
    self._count(n)
    if kind in _SCALARS:
      return list(self._take(f"{n}{_SCALARS[kind]}"))
    if depth:
      self._corrupt("arrays in arrays of arrays")
    return [self._value(kind, depth + 1) for _ in range(n)]

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    """A metadata field, `default` if absent. Raises UserError if it is not of this kind."""
    value = self.fields.get(key)
    if value is None:
      return default
    if kind is float and type(value) is int:
      return float(value)
    if type(value) is not kind:
      raise UserError(f"{self.path}: {key}={value!r:.100} must be of type {kind.__name__}")
    return value

  def need(self, key: str, kind: type) -> Any:
    if key not in self.fields:
      raise UserError(f"{self.path}: metadata field {key} is missing")
    return self.get(key, kind)

  def list_of(self, key: str, kind: type, count: int | None = None) -> list:
    """A list whose elements are of one kind, and as many as `count`."""
    values = self.need(key, list)
    if any(type(v) is not kind for v in values):
      raise UserError(f"{self.path}: {key} must hold {kind.__name__} only")
    if count is not None and len(values) != count:
      raise UserError(f"{self.path}: {key} has {len(values)} elements, of {count} tokens")
    return values


def read_config(file: File) -> dict:
  """The metadata as a Hugging Face config dict, for `families.model_config`."""
  arch = file.need("general.architecture", str)
  if arch not in ARCHITECTURES:
    raise UserError(
      f"{file.path}: general.architecture={arch!r}; supported: {', '.join(ARCHITECTURES)}"
    )
  used = set()

  def get(key: str, kind: type, default: Any = None) -> Any:
    used.add(key)
    value = file.get(f"{arch}.{key}", kind, default)
    # They are sizes, bases and factors. As in llama.cpp, no window may be written as 0.
    if kind is not str and value is not None and not 0 < value < math.inf:
      if key != "attention.sliding_window" or value != 0:
        raise UserError(f"{file.path}: {arch}.{key}={value!r} must be positive and finite")
    return value

  def need(key: str, kind: type = int) -> Any:
    file.need(f"{arch}.{key}", kind)
    return get(key, kind)

  if "token_embd.weight" not in file.tensors:
    raise UserError(f"{file.path}: tensor token_embd.weight is missing")
  if arch == "gemma3":  # without it llama.cpp and transformers make two different models
    need("rope.freq_base", float)
  heads, width, depth = need("attention.head_count"), need("embedding_length"), need("block_count")
  config = {
    "model_type": ARCHITECTURES[arch],
    "vocab_size": int(file.tensors["token_embd.weight"].shape[0]),
    "hidden_size": width,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", int, heads),
    "head_dim": get("attention.key_length", int, width // heads),
    "intermediate_size": need("feed_forward_length"),
    "max_position_embeddings": need("context_length"),
    "rms_norm_eps": need("attention.layer_norm_rms_epsilon", float),
    "hidden_act": "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu",
    "rope_theta": get("rope.freq_base", float, 10_000.0),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "rope_scaling": None,
  }
  for key, other in (
    ("attention.value_length", "head_dim"),
    ("rope.dimension_count", "head_dim"),
    ("vocab_size", "vocab_size"),
  ):
    value = get(key, int, config[other])
    if value != config[other]:
      raise UserError(f"{file.path}: {arch}.{key}={value} must equal {config[other]}")
  factor = get("rope.scaling.factor", float, 1.0)
  # A factor alone is a linear one, as llama.cpp has it.
  scaling = get("rope.scaling.type", str, "none" if factor == 1.0 else "linear")
  get("rope.scaling.original_context_length", int)
  if scaling == "linear":
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  elif scaling != "none":
    raise UserError(f"{file.path}: {arch}.rope.scaling.type={scaling!r}; supported: none, linear")
  if "rope_freqs.weight" in file.tensors:
    if scaling != "none":
      raise UserError(
        f"{file.path}: {arch}.rope.scaling.factor={factor} beside tensor rope_freqs.weight, which "
        "scales too; supported: one of them"
      )
    config["rope_scaling"] = _llama3_scaling(file, config)
  elif arch == "llama" and scaling == "none" and config["rope_theta"] == 5e5:
    if config["max_position_embeddings"] > 8192:
      raise UserError(
        f"{file.path}: llama.context_length={config['max_position_embeddings']} with "
        "llama.rope.freq_base=500000 is Llama 3.1 or later, converted before its rotary scaling "
        "was known (tensor rope_freqs.weight is missing); get a newer conversion"
      )
  window = get("attention.sliding_window", int)
  if arch == "llama" and window:
    config |= {"model_type": "mistral", "sliding_window": window}
  if arch in ("gemma2", "gemma3"):
    # The query scale is not in the file: the 27B models scale by width / heads, the others
    # by the head's size.
    big = (arch, depth) in (("gemma2", 46), ("gemma3", 62))
    config |= {
      "sliding_window": window,
      "query_pre_attn_scalar": width // heads if big else config["head_dim"],
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
      if (cap := get(key, float)) is not None:  # absent: the family's own, null would be none
        config[key] = cap
  if arch == "gemma3":
    config["rope_local_base_freq"] = get("rope.freq_base_swa", float, 10_000.0)
  unknown = [k for k in file.fields if k.startswith(f"{arch}.") and k[len(arch) + 1 :] not in used]
  if unknown:
    raise UserError(f"{file.path}: metadata {', '.join(unknown)} is not supported")
  return config


def _llama3_scaling(file: File, config: dict) -> dict:
  """Llama 3.1+ files hold one divisor per frequency: find the four numbers behind them."""
  stored = np.asarray(file.tensors["rope_freqs.weight"].data, np.float32)
  dim = config["head_dim"]
  if stored.shape != (dim // 2,) or not config["rope_theta"] > 0:
    raise UserError(
      f"{file.path}: tensor rope_freqs.weight has shape {stored.shape} and the base "
      f"{config['rope_theta']}, which is not Llama 3's rotary scaling of heads of {dim}"
    )
  scaling = {
    "rope_type": "llama3",
    "factor": float(stored.max()),
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  turns = 8192 * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
  ramp = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
  if not np.allclose(1 / ((1 - ramp) / scaling["factor"] + ramp), stored, rtol=1e-3):
    raise UserError(f"{file.path}: tensor rope_freqs.weight is not Llama 3's rotary scaling")
  return scaling


def read_tensors(file: File, config: dict) -> dict[str, Tensor]:
  """{Hugging Face name: Tensor}, dequantised to float32 when read."""
  gemma = config["model_type"].startswith("gemma")
  interleaved = file.get("general.architecture", str) == "llama"
  names = _LAYER | (
    {
      "post_attention_norm": "post_attention_layernorm",
      "ffn_norm": "pre_feedforward_layernorm",
      "post_ffw_norm": "post_feedforward_layernorm",
    }
    if config["model_type"] in ("gemma2", "gemma3_text")
    else {"ffn_norm": "post_attention_layernorm"}
  )
  tensors = {}
  for name, t in file.tensors.items():
    if name == "rope_freqs.weight":
      continue
    hf, order = _FIXED.get(name), None
    if name.startswith("blk."):
      _, layer, kind, suffix = (*name.split(".", 3), "")[:4]
      if kind in names:
        hf = f"model.layers.{layer}.{names[kind]}.{suffix}"
      if interleaved and kind in ("attn_q", "attn_k"):
        rows, half = t.shape[0], config["head_dim"] // 2
        if rows % (2 * half) == 0:  # a wrong shape is reported by `assemble`
          order = np.arange(rows).reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)
    if hf is None:
      raise UserError(f"{t.file}: tensor {name} has no place in {config['model_type']}")
    shift = 1.0 if gemma and name.endswith("norm.weight") else 0.0
    tensors[hf] = _tensor(name, t, order, shift)
  return tensors


def _tensor(name: str, t: Stored, order: np.ndarray | None, shift: float) -> Tensor:
  def read(rows: slice, *columns: slice) -> np.ndarray:
    data = t.data[rows] if order is None else t.data[order[rows]]
    try:
      values = gguf.quants.dequantize(data, t.kind)
    except Exception as error:
      raise UserError(f"{t.file}: tensor {name} cannot be dequantised ({error})") from error
    values = values[(slice(None), *columns)] if columns else values
    return values - np.float32(shift) if shift else values

  return Tensor(t.file, t.shape, read)
