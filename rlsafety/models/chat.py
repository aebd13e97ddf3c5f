"""Messages to token ids and back, so that no content can pose as structure.

A chat template is rendered with placeholders where the contents go; the frame between
them is tokenised with all control tokens, each content with none, and the ids are
spliced. A user, a reply or a wish that spells out a control token is therefore plain
text to every model, policy and judge alike. Some older models mark turns by ordinary text
("[/INST]"): in a content such a mark is tokenised letter by letter, so that its ids are
never those of the frame.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.models import templates

ROLES = ("system", "user", "assistant")
# Ordinary text by which frames mark turns, where no control token does.
_TEXT_MARKS = re.compile(
  r"\[/?\|?[A-Za-z_][\w ]{0,20}\|?\]|<</?[A-Z]{2,}>>|<\|[\w .]{1,40}\|>|</?[a-z_]{3,20}>"
  r"|#{2,4} ?[A-Z]\w+:?|\b(?:USER|ASSISTANT|SYSTEM|HUMAN|User|Assistant|System|Human):"
)
# What stands before a content on its line, as a speaker's name does: "Falcon:", "问：".
_OPENER = re.compile(r".{0,40}\w[>|\])]{0,2} ?[:：]")
MAX_ID = 1 << 24  # of a token: libraries walk from 0 to the largest


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer, its chat template, and the ids that structure a conversation.

  full: the tokenizer with its control tokens, for frames only. plain: the same without
  control tokens and without a space put in front, for contents.
  control: ids that no content may ever hold. hidden: those of them that no text shows; the others
  are ordinary words for a program, such as "<tool_call>". stop_ids end a reply, ascending.
  marks: matches the ordinary text that marks turns in this template.
  special: {"bos_token": text or None, ...}, also eos, unk, sep, pad, cls and mask.
  source: the file that the template is from, for errors.
  """

  full: Tokenizer
  plain: Tokenizer
  template: str
  special: dict[str, str | None]
  control: frozenset[int]
  hidden: frozenset[int]
  merges_system: bool  # no system role: its text goes on top of the user's turn
  stop_ids: tuple[int, ...]
  pad_id: int
  vocab_size: int
  marks: re.Pattern
  source: str

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
    """Ids of text alone: no control token, no mark of a turn, nothing put in front."""
    # A lone surrogate is no character: it becomes "?", as tokenizers cannot take it.
    text = text.encode("utf-8", "replace").decode()
    ids, end = [], 0
    for mark in self.marks.finditer(text):
      ids += self._plain_ids(text[end : mark.start()])
      for letter in mark[0]:
        ids += self._plain_ids(letter)
      end = mark.end()
    return ids + self._plain_ids(text[end:])

  def _plain_ids(self, text: str) -> list[int]:
    return self.plain.encode(text, add_special_tokens=False).ids if text else []

  def render(self, messages: Sequence[dict], generation: bool = True) -> str:
    """The conversation as text. Encoding that loses what is frame and what is content."""
    return "".join(text for text, *_ in self._pieces(messages, generation))

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, hidden ones left out."""
    kept = [int(i) for i in ids if int(i) not in self.hidden]
    return self.full.decode(kept, skip_special_tokens=False)

  def _ids(self, text: str, is_content: bool, follows: bool) -> list[int]:
    """follows: a content stands before this frame, so its text goes on mid-line."""
    if is_content:
      return self.encode_text(text)
    at = 0
    if follows:
      found = _marker(self.full).search(text)
      at = found.start() if found else len(text)
      eaten = found and found[0] in _eaters(self.full, "lstrip")
      text, at = (text[:at].rstrip() + text[at:], len(text[:at].rstrip())) if eaten else (text, at)
    head = self._plain_ids(text[:at])  # frame: its marks are meant
    return head + self.full.encode(text[at:], add_special_tokens=False).ids

  def _pieces(self, messages: Sequence[dict], generation: bool) -> list[tuple[str, bool, bool]]:
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
    special = tuple((k, v) for k, v in self.special.items() if v is not None)
    roles = tuple(m["role"] for m in messages)
    parts = templates.frame(self.template, roles, generation, special, self.source)
    pieces, trailing, follows = [], "", False
    for part in parts:
      if isinstance(part, str):
        frame = part.rstrip(" ")
        trailing = "" if frame.endswith(_eaters(self.full, "rstrip")) else part[len(frame) :]
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


# --- Tokenizers ---------------------------------------------------------------------------


@functools.lru_cache(8)
def _marker(tokenizer: Tokenizer) -> re.Pattern:
  tokens = [t.content for t in tokenizer.get_added_tokens_decoder().values() if _is_marker(t)]
  return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


@functools.lru_cache(16)
def _eaters(tokenizer: Tokenizer, side: str) -> tuple[str, ...]:
  """Markers that take the white space of the frame on one side of them, "lstrip" or "rstrip"."""
  tokens = tokenizer.get_added_tokens_decoder().values()
  return tuple(t.content for t in tokens if getattr(t, side) and _is_marker(t))


def _is_marker(token: AddedToken) -> bool:
  """Added tokens structure a text, flagged special or not; runs of white space do not."""
  return bool(token.content.replace("▁", "").strip())


def rebuilt(spec: str, source: str) -> Tokenizer:
  """The tokenizer of a text as `to_str` gives it. Not all that can be read once can be again."""
  try:
    return Tokenizer.from_str(spec)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # a panic of the Rust library is no Exception
    raise UserError(f"{source}: not a usable tokenizer ({error})") from None


def with_markers(
  full: Tokenizer, tokens: Sequence[AddedToken], source: str
) -> tuple[Tokenizer, set[str]]:
  """`full` with these tokens as markers, and which of them were ordinary ones before.

  transformers does so with every token that a config names: the frame then has them whole.
  """
  known = {t.content for t in full.get_added_tokens_decoder().values()}
  missing = [t for t in tokens if t.content not in known]
  if not missing:
    return full, set()
  ordinary = {t.content for t in missing if full.token_to_id(t.content) is not None}
  full = rebuilt(full.to_str(), source)  # the caller's own stays as it is
  for token in missing:
    (full.add_special_tokens if token.special else full.add_tokens)([token])
  return full, ordinary


def _plain(full: Tokenizer, control: set[int], ordinary: set[str], source: str) -> Tokenizer:
  """`full` without what structures a text, and without a space put in front of it.

  ordinary: tokens that were no markers in the file. Raises UserError for one of them, or for
  another id of `control`, that text needs: no content could then be without.
  """
  spec = json.loads(full.to_str())
  model = spec["model"]
  if model["type"] != "BPE":
    raise UserError(f"{source}: tokenizer model {model['type']} is not supported, only BPE")
  if model.get("dropout"):
    raise UserError(f"{source}: the tokenizer's dropout={model['dropout']} splits texts at random")
  vocab = model["vocab"]
  added = {t.content for t in full.get_added_tokens_decoder().values() if _is_marker(t)}
  ids = full.get_vocab(True)
  markers = added | {t for t, i in ids.items() if i in control}
  spec["added_tokens"] = [
    t for t in spec["added_tokens"] if t["content"] not in markers and t["content"] in vocab
  ]
  model["vocab"] = {t: i for t, i in vocab.items() if t not in markers}
  pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
  model["merges"] = [m for m in pairs if not markers & {*m, m[0] + m[1]}]
  if model.get("unk_token") in markers:
    model["unk_token"] = None
  spec["post_processor"] = spec["truncation"] = spec["padding"] = None

  def without_prefix(step: dict | None) -> dict | None:
    if step is None or step["type"] == "Prepend":
      return None
    if step["type"] == "Strip":
      raise UserError(f"{source}: the tokenizer's normalizer Strip cuts texts at their ends, which "
                      "frame and contents would have in other places")  # fmt: skip
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
  plain = rebuilt(json.dumps(spec), source)
  for marker in sorted((markers - added) | ordinary):  # a letter that is to end replies, say
    i = ids[marker]
    text = full.decode([i], skip_special_tokens=False)
    if plain.decode(plain.encode(f".{text}.", add_special_tokens=False).ids) != f".{text}.":
      raise UserError(f"{source}: token {i} ({text!r}) is to structure the text or end replies, "
                      "and no text can be written without it")  # fmt: skip
  return plain


def _frames(template: str, special: tuple, source: str) -> Iterator[list[templates.Part]]:
  """The template's conversations of several turns, with and without a system message."""
  for roles in (("user", "assistant", "user"), ("system", "user", "assistant", "user")):
    with contextlib.suppress(templates.Refusal):
      yield templates.frame(template, roles, True, special, source)


def _check_markers(template: str, special: tuple, source: str, full: Tokenizer) -> None:
  """Raises UserError for a marker that the tokenizer looks for in its normalised form and would
  not find behind a content: transformers then takes it apart there, as ordinary text."""
  change = full.normalizer.normalize_str if full.normalizer else str
  tokens = full.get_added_tokens_decoder().values()
  moved = [t.content for t in tokens if t.normalized and change(t.content) != t.content]
  for parts in _frames(template, special, source):
    for part in parts[1:]:
      if found := [token for token in moved if isinstance(part, str) and token in part]:
        raise UserError(
          f"{source}: token {found[0]!r:.200} of the chat template is looked for as "
          f"{change(found[0])!r:.200} and not found behind a text; set its `normalized` to false"
        )


def _text_marks(template: str, special: tuple, source: str, full: Tokenizer) -> re.Pattern:
  """The marks of turns in the frames of this template that are no control tokens."""
  found, tokens = set(), _marker(full)
  for parts in _frames(template, special, source):
    for part in parts:
      if isinstance(part, str):
        found |= {m[0] for m in _TEXT_MARKS.finditer(tokens.sub(" ", part))}
        opener = tokens.sub("\n", part).rpartition("\n")[2].strip()
        if _OPENER.fullmatch(opener):
          found.add(opener)
  return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")


def make_chat(
  full: Tokenizer,
  *,
  template: str | None = None,
  special: Mapping[str, str | None] | None = None,
  stop_ids: Sequence[int] = (),
  source: str = "tokenizer",
) -> Chat:
  """A Chat from a tokenizer and what its config says. Missing template: by vocabulary.

  special: named tokens, "bos_token" and so on. stop_ids: besides the eos token and the token
  that the template puts after a reply. source: the file of the template, for errors.
  Raises UserError naming it for a template that cannot be rendered, and for tokens that are
  not there or that no text can do without.
  """
  ids = full.get_vocab(with_added_tokens=True)
  vocab_size = max(ids.values(), default=-1) + 1
  if vocab_size > MAX_ID:
    raise UserError(f"{source}: token id {vocab_size - 1} is more than the limit of {MAX_ID}")
  full.no_padding()
  full.no_truncation()
  if template is None:
    known = [t for name, t in templates.BY_TOKEN.items() if name in ids]
    template = known[0] if known else templates.PLAIN
  special = dict.fromkeys(("bos_token", "eos_token", "pad_token")) | dict(special or {})
  for name, token in special.items():
    if token is not None and token not in ids:
      raise UserError(f"{source}: {name} {token!r:.200} is not in the vocabulary")
  named = tuple((k, v) for k, v in special.items() if v is not None)
  markers = [AddedToken(t, special=True, normalized=False) for _, t in named]
  full, ordinary = with_markers(full, markers, source)
  _check_markers(template, named, source, full)
  ending = templates.frame(template, ("user", "assistant"), False, named, source)[-1]
  eos, pad = special["eos_token"], special["pad_token"]
  stops = set(stop_ids) | ({ids[eos]} if eos is not None else set())
  if bad := [i for i in stops if not 0 <= i < vocab_size]:
    raise UserError(f"{source}: eos_token_id={bad[0]} is outside the vocabulary of {vocab_size}")
  marker = _marker(full).match(ending) if isinstance(ending, str) else None
  if marker:
    stops.add(ids[marker[0]])
  if not stops:
    raise UserError(f"{source}: no token ends a reply: no eos token, none in the chat template")
  markers = {i: t for i, t in full.get_added_tokens_decoder().items() if _is_marker(t)}
  ends = (special[f"{name}_token"] for name in ("bos", "eos", "pad"))
  hidden = stops | {ids[token] for token in ends if token is not None}
  control = hidden | set(markers)
  hidden |= {i for i, t in markers.items() if t.special}
  try:
    templates.frame(template, ("system", "user"), True, named, source)
    has_system = True
  except templates.Refusal:
    has_system = False
  return Chat(
    full=full,
    plain=_plain(full, control, ordinary, source),
    template=template,
    special=special,
    control=frozenset(control),
    hidden=frozenset(hidden),
    merges_system=not has_system,
    stop_ids=tuple(sorted(stops)),
    pad_id=min(stops) if pad is None else ids[pad],
    vocab_size=vocab_size,
    marks=_text_marks(template, named, source, full),
    source=source,
  )


def byte_chat() -> Chat:
  """A byte-level tokenizer of 512 tokens with a ChatML frame, for random models.

  `tiny_merges.json` holds the pairs that byte-pair encoding joined in the environments' messages:
  they shorten a prompt by 2.4, and with it what a run that proves machinery computes.
  """
  joined = read_json(Path(__file__).with_name("tiny_merges.json"))["merges"]
  merges = [tuple(pair) for pair in joined]
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokens = [*marks, *letters, *("".join(pair) for pair in merges)]
  full = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
  full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  full.decoder = decoders.ByteLevel()
  full.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
  special = {"eos_token": marks[2], "pad_token": marks[0]}
  return make_chat(full, template=templates.CHATML, special=special, source="byte tokenizer")
