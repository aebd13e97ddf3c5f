"""The tokenizer of a GGUF file: tokens, merges and scores in the form of `tokenizers`."""

import math

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from rlsafety.errors import UserError
from rlsafety.models.gguf import File

# Pre-tokenizers of byte-level BPE files: the pattern that splits text before any merge.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITS = {
  "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
  "llama-bpe": [LLAMA3],
  "llama3": [LLAMA3],
  "qwen2": [QWEN2],
  "gpt-2": [GPT2],
}

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
MAX_PIECE = 1024  # every way to cut a piece in two is looked at


def read_tokenizer(file: File) -> tuple[Tokenizer, dict]:
  """The tokenizer, and for `make_chat` {"special", "template", "stop_ids"}."""
  tokens = file.list_of("tokenizer.ggml.tokens", str)
  if (longest := max(map(len, tokens), default=0)) > MAX_PIECE:
    raise UserError(f"{file.path}: tokenizer.ggml.tokens has a token of {longest} characters, the "
                    f"limit is {MAX_PIECE}")  # fmt: skip
  kinds = file.list_of("tokenizer.ggml.token_type", int, len(tokens))
  if unknown := set(kinds) - set(range(NORMAL, BYTE + 1)):
    raise UserError(f"{file.path}: tokenizer.ggml.token_type holds {min(unknown)}, which is none "
                    f"of {NORMAL} to {BYTE}")  # fmt: skip
  if len(set(tokens)) != len(tokens):
    raise UserError(f"{file.path}: tokenizer.ggml.tokens has a token twice")

  def id_of(key: str) -> int | None:
    i = file.get(f"tokenizer.ggml.{key}_token_id", int)
    if i is not None and not 0 <= i < len(tokens):
      raise UserError(f"{file.path}: tokenizer.ggml.{key}_token_id={i}, of {len(tokens)} tokens")
    return i

  def token(key: str) -> str | None:
    i = id_of(key)
    return None if i is None else tokens[i]

  names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
  special = {f"{ours}_token": token(theirs) for ours, theirs in names.items()}
  model = file.need("tokenizer.ggml.model", str)
  if model == "gpt2":
    tokenizer = _byte_level(file, tokens)
  elif model == "llama":
    tokenizer = _sentencepiece(file, tokens, kinds, special["unk_token"])
  else:
    raise UserError(f"{file.path}: tokenizer.ggml.model={model!r}; supported: gpt2, llama")
  for is_control in (True, False):
    wanted = (CONTROL, UNKNOWN) if is_control else (USER,)
    added = [t for t, kind in zip(tokens, kinds, strict=True) if kind in wanted]
    added = [AddedToken(t, special=is_control, normalized=False) for t in added]
    (tokenizer.add_special_tokens if is_control else tokenizer.add_tokens)(added)
  # Without the flag, as llama.cpp: SentencePiece models and Llama 3 begin with bos.
  begins = model == "llama" or file.get("tokenizer.ggml.pre", str) in ("llama-bpe", "llama3")
  begins = file.get("tokenizer.ggml.add_bos_token", bool, begins)
  ends = file.get("tokenizer.ggml.add_eos_token", bool, False)
  for name, added in (("bos", begins), ("eos", ends)):
    if added and special[f"{name}_token"] is None:
      raise UserError(f"{file.path}: tokenizer.ggml.{name}_token_id is missing, though add_{name}"
                      "_token or the kind of tokenizer adds it to a text")  # fmt: skip
  before = [special["bos_token"]] if begins else []
  after = [special["eos_token"]] if ends else []
  if before or after:
    ids = [(t, tokens.index(t)) for t in dict.fromkeys([*before, *after])]
    single = [f"{t}:0" for t in before] + ["$A:0"] + [f"{t}:0" for t in after]
    try:
      tokenizer.post_processor = processors.TemplateProcessing(single, [*single, "$B:1"], ids)
    except Exception as error:
      raise UserError(f"{file.path}: bos or eos cannot be added to a text ({error})") from error
  template = file.get("tokenizer.chat_template", str)
  # llama.cpp ends a reply at the end of a turn and of a message too.
  stops = [i for key in ("eot", "eom") if (i := id_of(key)) is not None]
  return tokenizer, {"special": special, "template": template, "stop_ids": stops}


def _byte_level(file: File, tokens: list[str]) -> Tokenizer:
  pre = file.get("tokenizer.ggml.pre", str, "")
  if pre not in _SPLITS:
    raise UserError(
      f"{file.path}: tokenizer.ggml.pre={pre!r}; supported: {', '.join(_SPLITS)}. "
      "Use the model's Hugging Face folder instead"
    )
  merges = [tuple(m.split(" ", 1)) for m in file.list_of("tokenizer.ggml.merges", str)]
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


def _sentencepiece(
  file: File, tokens: list[str], kinds: list[int], unknown: str | None
) -> Tokenizer:
  """SentencePiece BPE: a pair may merge where the result is a piece, best score first."""
  scores = file.list_of("tokenizer.ggml.scores", float, len(tokens))
  if bad := [s for s in scores if not math.isfinite(s)]:
    raise UserError(f"{file.path}: tokenizer.ggml.scores holds {bad[0]}")
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
  unk = unknown
  if unk is None:
    unk = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
  bpe = models.BPE(vocab, [p[1:] for p in pairs], unk_token=unk, fuse_unk=True, byte_fallback=True)
  tokenizer = Tokenizer(bpe)
  spaces = normalizers.Replace(" ", "▁")
  prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
  tokenizer.normalizer = (
    normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
  )
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
  return tokenizer
