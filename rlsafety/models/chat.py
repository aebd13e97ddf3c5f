"""Messages to token ids and back, so that no content can pose as structure.

A chat template is rendered with placeholders where the contents go; the frame between
them is tokenised with all control tokens, each content with none, and the ids are
spliced. A user, a reply or a wish that spells out a control token is therefore plain
text to every model, policy and judge alike.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rlsafety.errors import UserError

ROLES = ("system", "user", "assistant")

# Templates of models that ship without one (base models, some GGUF files), chosen by
# the control token that their vocabulary has.
_CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
  "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
  "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{{ m.content | trim }}"
  "{{ '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_DEFAULTS = {"<|im_start|>": _CHATML, "<start_of_turn>": _GEMMA, "<|start_header_id|>": _LLAMA3}

# Around each placeholder: a space that frames never use, to see whether the template trims.
_PROBE = "\u2005"
_SLOT = re.compile(f"({_PROBE}?)\ue000(\\d+)\ue001({_PROBE}?)")
_TODAY = datetime.date(2024, 7, 26)  # Llama 3.1's default; a run must not depend on its date


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer, its chat template, and the ids that structure a conversation.

  full: the tokenizer with its control tokens, for frames only. plain: the same without
  control tokens and without a space put in front, for contents.
  control: ids that no content may ever hold. stop_ids end a reply, ascending.
  """

  full: Tokenizer
  plain: Tokenizer
  template: str
  special: dict  # {"bos_token", "eos_token", "pad_token"}: str or None
  control: frozenset[int]
  merges_system: bool  # no system role: its text goes on top of the user's turn
  stop_ids: tuple[int, ...]
  pad_id: int
  vocab_size: int

  def encode(self, messages: Sequence[dict], generation: bool = True) -> list[int]:
    """Ids of [{"role", "content"}, ...], with the header of the reply if `generation`."""
    return [i for piece in self._pieces(messages, generation) for i in self._ids(*piece)]

  def split(
    self, messages: Sequence[dict], slot: str, generation: bool = True
  ) -> tuple[list[int], list[int]]:
    """Ids before and after `slot`, which one content holds exactly once.

    What stands in the slot is spliced in as ids and never tokenised again.
    """
    if sum(m["content"].count(slot) for m in messages) != 1:
      raise UserError(f"the messages must hold {slot!r} exactly once")
    before, after, found = [], [], False
    for text, is_content, follows in self._pieces(messages, generation):
      if is_content and slot in text:
        head, tail = text.split(slot)
        before += self._ids(head, True, follows)
        after += self._ids(tail, True, True)
        found = True
      else:
        (after if found else before).extend(self._ids(text, is_content, follows))
    return before, after

  def encode_text(self, text: str) -> list[int]:
    """Ids of text alone: no control token, nothing put in front."""
    # A lone surrogate is no character: it becomes "?", as tokenizers cannot take it.
    text = text.encode("utf-8", "replace").decode()
    return self.plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, control tokens left out."""
    kept = [int(i) for i in ids if int(i) not in self.control]
    return self.full.decode(kept, skip_special_tokens=False)

  def _ids(self, text: str, is_content: bool, follows: bool) -> list[int]:
    """follows: a content stands before this frame, so its text goes on mid-line."""
    if is_content:
      return self.encode_text(text)
    at = 0
    if follows:
      found = _marker(self.full).search(text)
      at = found.start() if found else len(text)
    head = self.encode_text(text[:at])
    return head + self.full.encode(text[at:], add_special_tokens=False).ids

  def _pieces(self, messages, generation) -> list[tuple[str, bool, bool]]:
    """[(text, is content, follows a content), ...] of the rendered conversation."""
    for m in messages:
      if m["role"] not in ROLES:
        raise UserError(f"role {m['role']!r}: choose from {', '.join(ROLES)}")
    if self.merges_system and messages and messages[0]["role"] == "system":
      system, *messages = messages
      if not messages or messages[0]["role"] != "user":
        raise UserError("this model has no system role: a user message must follow the system's")
      text = f"{system['content']}\n\n{messages[0]['content']}"
      messages = [{"role": "user", "content": text}, *messages[1:]]
    parts = _frame(self.template, tuple(m["role"] for m in messages), generation, **self.special)
    pieces, trailing, follows = [], "", False
    for part in parts:
      if isinstance(part, str):
        frame = part.rstrip(" ")
        trailing = part[len(frame) :]
        pieces.append((frame, False, follows))
        continue
      index, strip_left, strip_right = part
      text = messages[index]["content"]
      text = text.lstrip() if strip_left else text
      text = text.rstrip() if strip_right else text
      # SentencePiece and byte-level BPE join a space to the word after it.
      pieces.append((trailing + text, True, True))
      trailing, follows = "", True
    if trailing:  # No content after the last frame: its spaces are its own.
      frame, _, follows = pieces.pop()
      pieces.append((frame + trailing, False, follows))
    return pieces


# --- Templates ----------------------------------------------------------------------------


class _Generation(Extension):
  """{% generation %} marks what transformers masks for training; here it does nothing."""

  tags = {"generation"}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise(message):
  raise jinja2.TemplateError(message)


@functools.lru_cache(64)
def _compile(template: str):
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
  environment.globals |= {"raise_exception": _raise, "strftime_now": _TODAY.strftime}
  return environment.from_string(template)


@functools.lru_cache(1024)
def _frame(template: str, roles: tuple[str, ...], generation: bool, **special) -> list:
  """The rendered frame: strings, and for each content (message, trims left, trims right)."""
  messages = [
    {"role": role, "content": f"{_PROBE}\ue000{i}\ue001{_PROBE}"} for i, role in enumerate(roles)
  ]
  special = {name: token for name, token in special.items() if token is not None}
  try:
    text = _compile(template).render(
      messages=messages, add_generation_prompt=generation, enable_thinking=False, **special
    )
  except jinja2.TemplateError as error:
    raise UserError(f"the chat template refuses roles {', '.join(roles)}: {error}") from error
  parts, end = [], 0
  for slot in _SLOT.finditer(text):
    parts += [text[end : slot.start()], (int(slot[2]), not slot[1], not slot[3])]
    end = slot.end()
  missing = set(range(len(roles))) - {part[0] for part in parts if not isinstance(part, str)}
  if missing:
    raise UserError(f"the chat template leaves out message {min(missing)} ({roles[min(missing)]})")
  return [part for part in [*parts, text[end:]] if part != ""]


def _has_system_role(template: str, special: dict) -> bool:
  try:
    return bool(_frame(template, ("system", "user"), True, **special))
  except UserError:
    return False


# --- Tokenizers ---------------------------------------------------------------------------


@functools.lru_cache(8)
def _marker(tokenizer: Tokenizer) -> re.Pattern:
  tokens = [t.content for t in tokenizer.get_added_tokens_decoder().values() if _is_marker(t)]
  return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _is_marker(token: AddedToken) -> bool:
  """Added tokens structure a text, flagged special or not; runs of white space do not."""
  return bool(token.content.replace("▁", "").strip())


def _plain(full: Tokenizer, source: str) -> Tokenizer:
  """`full` without markers and without a space put in front of the text."""
  spec = json.loads(full.to_str())
  model = spec["model"]
  if model["type"] != "BPE":
    raise UserError(f"{source}: tokenizer model {model['type']} is not supported, only BPE")
  vocab = model["vocab"]
  markers = {t.content for t in full.get_added_tokens_decoder().values() if _is_marker(t)}
  spec["added_tokens"] = [
    t for t in spec["added_tokens"] if t["content"] not in markers and t["content"] in vocab
  ]
  model["vocab"] = {t: i for t, i in vocab.items() if t not in markers}
  pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
  model["merges"] = [m for m in pairs if not markers & {*m, m[0] + m[1]}]
  if model.get("unk_token") in markers:
    model["unk_token"] = None
  spec["post_processor"] = spec["truncation"] = spec["padding"] = None

  def without_prefix(step):
    if step is None or step["type"] == "Prepend":
      return None
    if step["type"] == "Metaspace":
      return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
      return step | {"add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
      if key in step:
        step = step | {key: [s for s in map(without_prefix, step[key]) if s]}
    return step

  for key in ("normalizer", "pre_tokenizer"):
    spec[key] = without_prefix(spec[key])
  return Tokenizer.from_str(json.dumps(spec))


def make_chat(
  full: Tokenizer,
  *,
  template: str | None = None,
  bos: str | None = None,
  eos: str | None = None,
  pad: str | None = None,
  stop_ids: Sequence[int] = (),
  source: str = "tokenizer",
) -> Chat:
  """A Chat from a tokenizer and what its config says. Missing template: by vocabulary.

  stop_ids: besides `eos` and the token that the template puts after a reply.
  """
  full.no_padding()
  full.no_truncation()
  if template is None:
    known = [t for name, t in _DEFAULTS.items() if full.token_to_id(name) is not None]
    template = known[0] if known else _PLAIN
  try:
    _compile(template)
  except jinja2.TemplateError as error:
    raise UserError(f"{source}: the chat template does not compile ({error})") from error
  for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
    if token is not None and full.token_to_id(token) is None:
      raise UserError(f"{source}: {name} token {token!r} is not in the vocabulary")
  special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
  added = full.get_added_tokens_decoder()
  control = {i for i, t in added.items() if _is_marker(t)}
  control |= {full.token_to_id(t) for t in (bos, eos, pad) if t is not None}
  stops = {int(i) for i in stop_ids} | ({full.token_to_id(eos)} if eos else set())
  ending = _frame(template, ("user", "assistant"), False, **special)[-1]
  marker = _marker(full).match(ending) if isinstance(ending, str) else None
  if marker:
    stops.add(full.token_to_id(marker[0]))
  if not stops:
    raise UserError(f"{source}: no token ends a reply: no eos token, none in the chat template")
  return Chat(
    full=full,
    plain=_plain(full, source),
    template=template,
    special=special,
    control=frozenset(control | stops),
    merges_system=not _has_system_role(template, special),
    stop_ids=tuple(sorted(stops)),
    pad_id=min(stops) if pad is None else full.token_to_id(pad),
    vocab_size=max(full.get_vocab(with_added_tokens=True).values()) + 1,
  )


def byte_chat() -> Chat:
  """A byte-level tokenizer of 259 tokens with a ChatML frame, for random models."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  full = Tokenizer(models.BPE({t: i for i, t in enumerate([*marks, *letters])}, []))
  full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  full.decoder = decoders.ByteLevel()
  full.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
  return make_chat(full, template=_CHATML, eos=marks[2], pad=marks[0], source="byte tokenizer")
