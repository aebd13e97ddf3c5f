"""Recorded rollouts as learner batches: random access, step-indexed order, exact resume.

A dataset is an ArrayRecord folder written by `rlsafety.tools.record`. One example is one
prompt with its replies (the group). Records of our own runs keep their token ids; where the
tokenizer is another one, the text is encoded again and its log-probs are unknown.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlsafety.config import Data, Objective
from rlsafety.errors import UserError
from rlsafety.files import parse_json, read_json
from rlsafety.losses import needs_behaviour
from rlsafety.metrics.gaps import SCORES
from rlsafety.models.chat import Chat
from rlsafety.models.model import Model
from rlsafety.rollout import order
from rlsafety.types import Batch, Prompts


@dataclasses.dataclass(frozen=True)
class Reply:
  """tokens include the stop token if `finished`; logprobs are as long, NaN = unknown."""

  tokens: np.ndarray
  logprobs: np.ndarray
  reward: float
  acc: float
  hex: float


@dataclasses.dataclass(frozen=True)
class Records:
  """An open dataset and how its examples become a batch."""

  source: Any  # tfds data source, random access
  is_gameable: list[bool]
  chat: Any
  tokenizer: str  # model path that token ids in the records must come from to be used
  objective: Objective
  group: int
  prompt_slots: int
  slots: int


def prompts_per_batch(data: Data, objective: Objective, prompts: int) -> int:
  """How many of every batch's prompts come from records; raises UserError for what cannot be."""
  if not data.path:
    if objective.name in ("sft", "dpo") or objective.kto_anchor:
      raise UserError(f"objective {objective.name!r} learns from records: set config.data.path")
    return 0
  count = round(data.fraction * prompts)
  if not count or (data.fraction < 1 and count == prompts):
    raise UserError(
      f"data.fraction={data.fraction} of prompts_per_step={prompts} must be at least one prompt, "
      "and below 1 leave at least one to the policy"
    )
  if count < prompts and (objective.name == "dpo" or objective.kto_anchor):
    raise UserError(f"objective {objective.name!r} pairs up records: data.fraction must be 1")
  return count


def load(
  path: str,
  model: Model,
  objective: Objective,
  group: int,
  prompt_slots: int,
  slots: int,
  epochs: int = 1,
) -> Records:
  """Opens a dataset for one objective and checks every example once.

  Args:
    path: folder written by `rlsafety.tools.record`.
    model: `models.load.Model`, whose chat encodes prompts and texts.
    objective: decides the slots: DPO takes the best and the worst of a group.
    group: G, replies per prompt; a longer group is cut, a shorter one padded.
    prompt_slots: S, a longer prompt is an error.
    slots: T, a longer reply is cut.
    epochs: updates on each batch.

  Raises:
    UserError: no such dataset; a prompt too long; log-probs missing that are needed.
  """
  source, gameable = _open(path)
  group = 2 if objective.name == "dpo" else group
  chat, tokenizer = model.chat, model.source["path"]
  records = Records(source, gameable, chat, tokenizer, objective, group, prompt_slots, slots)
  missing = total = 0
  for i in range(len(gameable)):
    example = example_at(records, i)
    size = len(chat.encode(_messages(example)))
    if size > prompt_slots:
      raise UserError(
        f"{path}: the prompt of record {i} has {size} tokens, the limit is {prompt_slots}: "
        "raise --config.max_prompt_tokens (prompts are never cut)"
      )
    known = [bool(np.isfinite(r.logprobs).all()) for r in replies_of(records, example)[:group]]
    missing, total = missing + known.count(False), total + len(known)
  if missing and needs_behaviour(objective, epochs):
    raise UserError(
      f"{path}: objective {objective.name!r} needs the log-probs of the policy that wrote the "
      f"replies, and {missing} of {total} replies have none for this tokenizer; write the "
      "dataset with --logprobs_model, or train with 'reinforce' or 'sft'"
    )
  return records


# Classes of the features that a dataset of ours may name; tfds imports what features.json says.
_FEATURES = re.compile(
  r"tensorflow_datasets\.core\.features\.\w+\.(FeaturesDict|Text|Tensor|Scalar)"
)
_BUILDER = "rlsafety.tools.dataset"
_FIELDS = ("messages", "completions", "lengths", "tokens", "logprobs", "finished", *SCORES,
           "is_gameable", "step", "tokenizer")  # fmt: skip


def _open(path: str) -> tuple[Any, list[bool]]:
  import tensorflow_datasets as tfds  # takes a second, and most runs read no records
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  folder = pathlib.Path(path)
  if not (folder / "dataset_info.json").exists():
    raise UserError(
      f"data.path {path!r} is no dataset (it has no dataset_info.json); make one with "
      "`python -m rlsafety.tools.record --runs RUN --out FOLDER`"
    )
  for name in _imports(read_json(folder / "features.json")):
    if not _FEATURES.fullmatch(name):
      raise UserError(f"{folder / 'features.json'}: names {name!r}, which records never need")
  module = read_json(folder / "dataset_info.json").get("moduleName", _BUILDER)
  if module != _BUILDER:
    raise UserError(f"{folder / 'dataset_info.json'}: moduleName {module!r}, must be {_BUILDER}")
  try:
    builder: Any = tfds.builder_from_directory(folder)  # its wrapper hides the signature
    shards = [pathlib.Path(file) for file in builder.info.splits["train"].filepaths]
    source = builder.as_data_source("train")
    whole = len(ArrayRecordDataSource([str(file) for file in shards]))
    gameable = [bool(source[i]["is_gameable"] == 1) for i in range(len(source))]
  except Exception as error:  # noqa: BLE001  whatever a broken file makes the readers say
    raise UserError(f"data.path {path!r} cannot be read ({error}); write it again") from error
  if not gameable:
    raise UserError(f"data.path {path!r} holds no record")
  if outside := [str(file) for file in shards if file.resolve().parent != folder.resolve()]:
    raise UserError(  # whose digest would not be part of the run
      f"{folder / 'dataset_info.json'}: names {outside[0]!r}, a file of another folder"
    )
  if whole != len(gameable):
    raise UserError(
      f"{folder / 'dataset_info.json'}: shardLengths tell of {len(gameable)} records, the files "
      f"hold {whole}; write the data set again"
    )
  if missing := [name for name in _FIELDS if name not in source[0]]:
    raise UserError(f"{folder / 'features.json'}: has no {missing[0]!r}; write the data set again")
  return source, gameable


def _imports(features: Any) -> Iterator[str]:
  """What a reader of features.json would import: names of classes and protocols."""
  if isinstance(features, dict):
    for key, value in features.items():
      if key in ("pythonClassName", "python_class_name", "type", "proto_cls"):
        yield str(value)
      yield from _imports(value)
  elif isinstance(features, list):
    for value in features:
      yield from _imports(value)


def digest(path: str) -> str:
  """The sha256 of a dataset, names and contents of its files: it is part of a run's identity.

  Raises UserError for a folder without files, or with something that is no regular file.
  """
  folder, whole = pathlib.Path(path), hashlib.sha256()
  entries = sorted(folder.rglob("*")) if folder.is_dir() else []
  for entry in entries:
    if entry.is_dir() and not entry.is_symlink():
      continue
    if entry.is_symlink() or not entry.is_file():
      raise UserError(f"data.path {path!r}: {entry.relative_to(folder)} is not a regular file")
    with open(entry, "rb") as file:
      own = hashlib.file_digest(file, "sha256").hexdigest()
    whole.update(f"{entry.relative_to(folder).as_posix()}\n{own}\n".encode())
  if not entries:
    raise UserError(f"data.path {path!r}: no such folder, or nothing in it")
  return whole.hexdigest()


def example_at(records: Records, i: int) -> dict:
  """One example; tfds gives text as bytes."""
  example = records.source[int(i)]
  return {k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}


def _messages(example: dict) -> list[dict[str, str]]:
  """Raises UserError for a field that `tools.record` would not have written."""
  where = f"data set, record of {example['source']!r}: messages"
  found = parse_json(example["messages"], where)
  fine = isinstance(found, list) and bool(found)
  for one in found if fine else ():
    types = {type(one.get(k)) for k in ("role", "content")} if isinstance(one, dict) else set()
    fine = fine and types == {str}
  if not fine:
    raise UserError(f"{where}: needs a list of role and content; write the data set again")
  return found


def _completions(example: dict) -> list[str]:
  """Raises UserError likewise, also where their number is not that of the other fields."""
  where = f"data set, record of {example['source']!r}: completions"
  found = parse_json(example["completions"], where)
  fine = isinstance(found, list) and all(isinstance(text, str) for text in found)
  if not fine or len(found) != len(example["lengths"]):
    raise UserError(f"{where}: needs {len(example['lengths'])} texts; write the data set again")
  return found


def replies_of(records: Records, example: dict) -> list[Reply]:
  """The replies of an example, as ids of this run's tokenizer."""
  texts = _completions(example)
  ends = np.cumsum(example["lengths"])
  same = example["tokenizer"] == records.tokenizer
  out = []
  for g, text in enumerate(texts):
    span = slice(ends[g] - example["lengths"][g], ends[g])
    tokens, logprobs = example["tokens"][span], example["logprobs"][span]
    if not same or not len(tokens):
      tokens = np.array(encode_reply(records.chat, text, bool(example["finished"][g])), np.int32)
      logprobs = np.full(len(tokens), np.nan, np.float32)
    scores = {name: float(example[name][g]) for name in SCORES}
    out.append(Reply(tokens[: records.slots], logprobs[: records.slots], **scores))
  return out


def encode_reply(chat: Chat, text: str, finished: bool) -> list[int]:
  """Ids of a reply, with the stop token that the chat template puts after a reply."""
  ids = chat.encode_text(text)
  if finished:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    stops = [i for i in chat.encode(turn, generation=False) if i in chat.stop_ids]
    ids = ids + [stops[-1] if stops else chat.stop_ids[0]]
  return ids


def batch_at(records: Records, seed: int, step: int, n: int) -> tuple[Batch, dict]:
  """The recorded part of update `step` (from 0): n prompts as a numpy Batch, and scores.

  Order: `rollout.order`, so gameable and other users keep their shares and resuming is exact.
  Advantages are 0 and reference log-probs absent: the caller completes both. Staleness is
  the number of updates between the two policies: those that the writer had made and those
  that this learner has made since the same base.

  Returns:
    (Batch, {"reward" | "acc" | "hex": [n, G], "is_gameable": [n]}).
  """
  chosen = order(records.is_gameable, seed, step, n)
  examples = [example_at(records, i) for i in chosen]
  groups = [_slots(records, replies_of(records, example)) for example in examples]
  anchored = records.objective.name == "kto" and records.objective.kto_anchor
  if anchored:  # the last slot: the next prompt's first reply
    groups = [[*own, other[0]] for own, other in zip(groups, groups[1:] + groups[:1], strict=True)]
  P, G, T = n, records.group + anchored, records.slots
  tokens = np.full((P, G, T), records.chat.pad_id, np.int32)
  logprobs = np.full((P, G, T), np.nan, np.float32)
  lengths = np.zeros((P, G), np.int32)
  scores = {name: np.full((P, G), np.nan, np.float32) for name in SCORES}
  prompt = np.full((P, records.prompt_slots), records.chat.pad_id, np.int32)
  prompt_lengths = np.zeros(P, np.int32)
  for p, (example, group) in enumerate(zip(examples, groups, strict=True)):
    ids = records.chat.encode(_messages(example))
    prompt[p, : len(ids)], prompt_lengths[p] = ids, len(ids)
    for g, reply in enumerate(group):
      size = lengths[p, g] = len(reply.tokens)
      tokens[p, g, :size], logprobs[p, g, :size] = reply.tokens, reply.logprobs
      for name in SCORES:
        scores[name][p, g] = getattr(reply, name)
  written = np.array([e["step"] for e in examples], np.int32)
  batch = Batch(
    prompts=Prompts(tokens=prompt, lengths=prompt_lengths),
    tokens=tokens,
    lengths=lengths,
    advantages=np.zeros((P, G), np.float32),
    rewards=scores["reward"],
    behaviour_logprobs=logprobs,
    reference_logprobs=None,
    staleness=np.repeat(np.maximum(written, 0)[:, None] + step, G, axis=1).astype(np.int32),
  )
  gameable = np.array(records.is_gameable)[chosen]
  return batch, scores | {"is_gameable": gameable}


def _slots(records: Records, replies: Sequence[Reply]) -> list[Reply]:
  """The replies that fill a group: all, or for DPO the best and the worst if they differ."""
  if records.objective.name != "dpo":
    return list(replies[: records.group])
  rated = sorted((r for r in replies if not np.isnan(r.reward)), key=lambda r: -r.reward)
  if len(rated) < 2 or rated[0].reward == rated[-1].reward:
    return []
  return [rated[0], rated[-1]]
