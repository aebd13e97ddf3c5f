"""The tokenizer and chat template of a Hugging Face folder, as transformers would read them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from rlsafety.errors import UserError
from rlsafety.files import read_json, read_text
from rlsafety.models.chat import Chat, make_chat, rebuilt, with_markers

SPECIAL = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
# What transformers' classes name where a file says nothing.
_END = "<|endoftext|>"
_USUAL = {
  "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
  "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
  "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
  "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                     "pad_token": "<pad>", "mask_token": "<mask>"},
}  # fmt: skip


def read_chat(folder: Path) -> Chat:
  """The tokenizer and template of a folder, as transformers reads them.

  transformers itself makes the tokenizer only where there is no tokenizer.json (old
  SentencePiece folders). Raises UserError naming file, field and value.
  """

  def optional(name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}

  full, special = _marked(folder, optional), dict.fromkeys(SPECIAL)
  sources = ["tokenizer_config.json"]
  settings = optional(sources[0])
  if (split := settings.get("split_special_tokens")) not in (None, False):
    raise UserError(
      f"{folder / sources[0]}: split_special_tokens={split!r:.200} would take a template's marks "
      "apart; set it to false"
    )
  usual = _USUAL.get(str(settings.get("tokenizer_class")).removesuffix("Fast"), {})
  special |= {name: t for name, t in usual.items() if full.token_to_id(t) is not None}
  if "added_tokens_decoder" not in settings:  # the newer form: all is in one file
    sources.append("special_tokens_map.json")
  for file in sources:
    for name, token in optional(file).items():
      if name in special:
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str | None) or (content is None and token is not None):
          raise UserError(f"{folder / file}: {name}={token!r:.200} is no token")
        special[name] = content
  stops = []
  size = max(full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  for file in ("generation_config.json", "config.json"):
    ids = optional(file).get("eos_token_id")
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
      if not isinstance(i, int) or isinstance(i, bool):
        raise UserError(f"{folder / file}: eos_token_id={ids!r:.200} is no token id")
      if not 0 <= i < size:
        raise UserError(f"{folder / file}: eos_token_id={i} is outside the vocabulary of {size}")
      stops.append(i)
  template, source = _template(folder, optional)
  return make_chat(full, template=template, special=special, stop_ids=stops, source=source)


def _marked(folder: Path, optional: Callable[[str], dict[str, Any]]) -> Tokenizer:
  """The tokenizer, with the tokens that only the files beside it add, at the ids they state."""
  full, file = _tokenizer(folder), "tokenizer_config.json"
  decoder = optional(file).get("added_tokens_decoder")
  if decoder is None:  # the older form
    file = "added_tokens.json"
    pairs = [(i, token) for token, i in optional(file).items()]
  elif isinstance(decoder, dict):
    pairs = list(decoder.items())
  else:
    raise UserError(f"{folder / file}: added_tokens_decoder={decoder!r:.200} must be an object")
  stated, kinds = {}, ("single_word", "lstrip", "rstrip", "normalized", "special")
  spec = json.loads(full.to_str())
  there = {entry["id"]: entry for entry in spec["added_tokens"]}
  for i, token in pairs:
    about = token if isinstance(token, dict) else {"content": token}
    content = about.get("content")
    text = isinstance(content, str) and content and not re.search("[\ud800-\udfff]", content)
    if not text or not str(i).isdecimal():
      raise UserError(f"{folder / file}: {token!r:.200} with id {i!r:.40} is no added token")
    flags = {k: about[k] for k in kinds if isinstance(about.get(k), bool)}
    stated[int(i)] = AddedToken(content, **({"normalized": False} | flags))
    if there.get(int(i), {}).get("content") == content:  # this file's word counts
      there[int(i)].update(flags)
  if pairs:
    full = rebuilt(json.dumps(spec), str(folder / "tokenizer.json"))
  full, _ = with_markers(full, [stated[i] for i in sorted(stated)], str(folder / file))
  for i, token in stated.items():
    if (found := full.token_to_id(token.content)) != i:
      raise UserError(
        f"{folder / file}: token {token.content!r:.200} has id {i} here and {found} in the "
        "tokenizer: the files are of different models"
      )
  return full


def _template(folder: Path, optional: Callable[[str], dict[str, Any]]) -> tuple[str | None, str]:
  """A folder's chat template (None: it has none), and the file that it is from."""
  for name in ("tokenizer_config.json", "chat_template.json"):  # the latter of vision models
    found, source = optional(name).get("chat_template"), str(folder / name)
    if found is not None:
      break
  if (folder / "chat_template.jinja").exists():
    source = str(folder / "chat_template.jinja")
    return read_text(source), source
  if (folder / "additional_chat_templates").exists():
    raise UserError(f"{folder / 'additional_chat_templates'}: without a chat_template.jinja it is "
                    "not said which template is the usual one")  # fmt: skip
  if isinstance(found, list):  # Several by name: [{"name", "template"}, ...]
    if not all(isinstance(t, dict) and {"name", "template"} <= set(t) for t in found):
      raise UserError(f"{source}: chat_template={found!r:.200} must name templates")
    found = {str(t["name"]): t["template"] for t in found}
  if isinstance(found, dict):
    if "default" not in found:
      raise UserError(
        f"{source}: chat_template holds {', '.join(map(str, found))} and no 'default'; write the "
        f"one that is meant to {folder / 'chat_template.jinja'}"
      )
    found = found["default"]
  if not isinstance(found, str | None):
    raise UserError(f"{source}: chat_template={found!r:.200} is no template")
  return found, source


def _tokenizer(folder: Path) -> Tokenizer:
  path = folder / "tokenizer.json"
  try:
    if path.exists():
      return Tokenizer.from_file(str(path))
    # Heavy, and hardly ever needed; by its own module, for a type checker reads all of the package.
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # a panic of the Rust library is no Exception
    what = f"{path}: not a readable tokenizer"
    if not path.exists():
      what = f"{folder}: no tokenizer.json and no other usable tokenizer"
    raise UserError(f"{what} ({error})") from None
