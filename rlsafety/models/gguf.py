"""Weights, config, tokenizer and chat template from one GGUF file, without torch.

Quantised tensors are dequantised row by row as the shards ask for them. Two habits of
GGUF files are undone: llama files interleave the rows of q and k (their rotary pairs
are neighbours), and Gemma files store norm weights with the 1 already added.
"""

import dataclasses
import math
import struct
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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

# Pre-tokenizers of byte-level BPE files: the pattern that splits text before any merge.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITS = {
  "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2],
  "llama-bpe": [_LLAMA3],
  "llama3": [_LLAMA3],
  "qwen2": [_QWEN2],
  "gpt-2": [_GPT2],
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


class File:
  """An open GGUF file: metadata by key, tensors by name.

  Read here, not by `gguf.GGUFReader`, which makes an array per metadata element (a 262,144
  token vocabulary takes it 15 s) and cannot say which field or tensor is broken.
  """

  def __init__(self, path: str | Path):
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
    align = self.fields.get("general.alignment", 32)
    start = -(-self._at // align) * align if align else 0
    self.tensors = {}
    for name, shape, kind, offset in infos:
      self._field = f"tensor {name}"
      if name in self.tensors:
        self._corrupt("stored twice")
      self.tensors[name] = self._stored(name, shape, kind, start + offset)

  def _stored(self, name, shape, kind, start) -> Stored:
    names = {t.value: t.name for t in gguf.GGMLQuantizationType}
    if names.get(kind) not in TYPES:
      kind = names.get(kind, kind)
      raise UserError(f"{self.path}: tensor {name} has type {kind}; supported: {', '.join(TYPES)}")
    kind = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * size
    end = start + math.prod(shape[:-1]) * row
    if shape[-1] % block or 0 in shape or end > self._bytes.size:
      self._corrupt(f"shape {shape} of type {kind.name} does not fit in the file")
    data = self._bytes[start:end].reshape(*shape[:-1], row)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    return Stored(shape, kind, data if plain is None else data.view(plain))

  def _corrupt(self, why: str):
    raise UserError(f"{self.path}: {self._field}: {why}; truncated or corrupt, fetch it again")

  def _take(self, layout: str) -> tuple:
    size = struct.calcsize("<" + layout)
    if self._at + size > self._bytes.size:
      self._corrupt("the file ends here")
    values = struct.unpack_from("<" + layout, self._bytes, self._at)
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

  def _value(self, kind: int):
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
    return [self._value(kind) for _ in range(n)]

  def get(self, key: str, default=None):
    return self.fields.get(key, default)

  def need(self, key: str):
    if key not in self.fields:
      raise UserError(f"{self.path}: metadata field {key} is missing")
    return self.fields[key]


def read_config(file: File) -> dict:
  """The metadata as a Hugging Face config dict, for `families.model_config`."""
  arch = file.need("general.architecture")
  if arch not in ARCHITECTURES:
    raise UserError(
      f"{file.path}: general.architecture={arch!r}; supported: {', '.join(ARCHITECTURES)}"
    )
  used = {"vocab_size", "context_length", "rope.dimension_count", "attention.value_length"}

  def get(key, default=None):
    used.add(key)
    return file.get(f"{arch}.{key}", default)

  def need(key):
    used.add(key)
    return file.need(f"{arch}.{key}")

  if "token_embd.weight" not in file.tensors:
    raise UserError(f"{file.path}: tensor token_embd.weight is missing")
  heads, width, depth = need("attention.head_count"), need("embedding_length"), need("block_count")
  config = {
    "model_type": ARCHITECTURES[arch],
    "vocab_size": int(file.tensors["token_embd.weight"].shape[0]),
    "hidden_size": width,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "head_dim": get("attention.key_length", width // heads),
    "intermediate_size": need("feed_forward_length"),
    "max_position_embeddings": file.need(f"{arch}.context_length"),
    "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
    "hidden_act": "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu",
    "rope_theta": get("rope.freq_base", 10_000.0),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "rope_scaling": None,
  }
  for key in ("attention.value_length", "rope.dimension_count"):
    value = file.get(f"{arch}.{key}", config["head_dim"])
    if value != config["head_dim"]:
      raise UserError(f"{file.path}: {arch}.{key}={value} must equal {config['head_dim']}")
  scaling, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
  get("rope.scaling.original_context_length")
  if scaling == "linear":
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  elif scaling != "none":
    raise UserError(f"{file.path}: {arch}.rope.scaling.type={scaling!r}; supported: none, linear")
  if "rope_freqs.weight" in file.tensors:
    config["rope_scaling"] = _llama3_scaling(file, config)
  window = get("attention.sliding_window")
  if arch == "llama" and window:
    config |= {"model_type": "mistral", "sliding_window": window}
  if arch in ("gemma2", "gemma3"):
    # The query scale is not in the file: the 27B models scale by width / heads, the others
    # by the head's size.
    big = (arch, depth) in (("gemma2", 46), ("gemma3", 62))
    config |= {
      "sliding_window": window,
      "query_pre_attn_scalar": width // heads if big else config["head_dim"],
      "attn_logit_softcapping": get("attn_logit_softcapping"),
      "final_logit_softcapping": get("final_logit_softcapping"),
    }
  if arch == "gemma3":
    config["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
  unknown = [k for k in file.fields if k.startswith(f"{arch}.") and k[len(arch) + 1 :] not in used]
  if unknown:
    raise UserError(f"{file.path}: metadata {', '.join(unknown)} is not supported")
  return config


def _llama3_scaling(file: File, config: dict) -> dict:
  """Llama 3.1+ files hold one divisor per frequency: find the four numbers behind them."""
  stored = np.asarray(file.tensors["rope_freqs.weight"].data, np.float32)
  dim = config["head_dim"]
  if stored.shape != (dim // 2,):
    raise UserError(f"{file.path}: tensor rope_freqs.weight has shape {stored.shape}")
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
  interleaved = file.get("general.architecture") == "llama"
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
      raise UserError(f"{file.path}: tensor {name} has no place in {config['model_type']}")
    shift = 1.0 if gemma and name.endswith("norm.weight") else 0.0
    tensors[hf] = _tensor(file.path, name, t, order, shift)
  return tensors


def _tensor(path, name, t, order, shift) -> Tensor:
  def read(rows: slice, *columns: slice) -> np.ndarray:
    data = t.data[rows] if order is None else t.data[order[rows]]
    try:
      values = gguf.quants.dequantize(data, t.kind)
    except Exception as error:
      raise UserError(f"{path}: tensor {name} cannot be dequantised ({error})") from error
    values = values[(slice(None), *columns)] if columns else values
    return values - np.float32(shift) if shift else values

  return Tensor(path, t.shape, read)


# --- Tokenizer --------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def read_tokenizer(file: File) -> tuple[Tokenizer, dict]:
  """The tokenizer, and for `make_chat` {"special", "template"}."""
  tokens = file.need("tokenizer.ggml.tokens")
  kinds = file.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise UserError(f"{file.path}: tokenizer.ggml.tokens and token_type do not fit together")
  model = file.need("tokenizer.ggml.model")
  if model == "gpt2":
    tokenizer = _byte_level(file, tokens)
  elif model == "llama":
    tokenizer = _sentencepiece(file, tokens, kinds)
  else:
    raise UserError(f"{file.path}: tokenizer.ggml.model={model!r}; supported: gpt2, llama")
  for special in (True, False):
    wanted = (CONTROL, UNKNOWN) if special else (USER,)
    added = [t for t, kind in zip(tokens, kinds, strict=True) if kind in wanted]
    added = [AddedToken(t, special=special, normalized=False) for t in added]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)

  def token(key):
    i = file.get(f"tokenizer.ggml.{key}_token_id")
    if i is not None and i >= len(tokens):
      raise UserError(f"{file.path}: tokenizer.ggml.{key}_token_id={i}, of {len(tokens)} tokens")
    return None if i is None else tokens[i]

  names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
  special = {f"{ours}_token": token(theirs) for ours, theirs in names.items()}
  return tokenizer, {"special": special, "template": file.get("tokenizer.chat_template")}


def _byte_level(file: File, tokens: list[str]) -> Tokenizer:
  pre = file.get("tokenizer.ggml.pre", "")
  if pre not in _SPLITS:
    raise UserError(
      f"{file.path}: tokenizer.ggml.pre={pre!r}; supported: {', '.join(_SPLITS)}. "
      "Use the model's Hugging Face folder instead"
    )
  merges = [tuple(m.split(" ", 1)) for m in file.need("tokenizer.ggml.merges")]
  vocab = {t: i for i, t in enumerate(tokens)}
  try:
    whole = pre in ("llama-bpe", "llama3")  # Llama 3 takes a whole known word before any merge
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
  except Exception as error:
    raise UserError(f"{file.path}: tokenizer.ggml.merges is corrupt ({error})") from error
  splits = [
    pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in _SPLITS[pre]
  ]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(file: File, tokens: list[str], kinds: list[int]) -> Tokenizer:
  """SentencePiece BPE: a pair may merge where the result is a piece, best score first."""
  scores = file.need("tokenizer.ggml.scores")
  # User-defined pieces are matched as they stand, before any merge: not candidates.
  score = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind in (NORMAL, BYTE)}
  pairs = [
    (-score[piece], piece[:i], piece[i:])
    for piece, kind in zip(tokens, kinds, strict=True)
    if kind == NORMAL
    for i in range(1, len(piece))
    if piece[:i] in score and piece[i:] in score
  ]
  pairs.sort(key=lambda p: p[0])
  vocab = {t: i for i, t in enumerate(tokens)}
  unk = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
  unknown = file.get("tokenizer.ggml.unknown_token_id")
  unk = unk if unknown is None else tokens[unknown]
  bpe = models.BPE(vocab, [p[1:] for p in pairs], unk_token=unk, fuse_unk=True, byte_fallback=True)
  tokenizer = Tokenizer(bpe)
  spaces = normalizers.Replace(" ", "▁")
  prefix = file.get("tokenizer.ggml.add_space_prefix", True)
  tokenizer.normalizer = (
    normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
  )
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
  return tokenizer
