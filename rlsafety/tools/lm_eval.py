"""Benchmarks of a model before and after training, through lm-evaluation-harness.

  python -m rlsafety.tools.lm_eval --model=PATH --tasks=bbq,crows_pairs_english --out=scores.json
  python -m rlsafety.tools.lm_eval --runs='runs/x*' --tasks=rlsafety_sycophancy --out=scores.csv

`LanguageModel` is an lm_eval model backed by our own forward and sampler: answers to one
context share its prefill, batches are split over the mesh. With --run both the base and
the trained adapter are measured. --out=FILE.json holds all numbers; --out=FILE.csv one row
per model (a loop over models fills one table), for rlsafety.study.analyze --benchmarks. Tasks
whose data is not on this machine need a network; `rlsafety_sycophancy` (ours, two answers
per question) needs none. Needs the `benchmarks` extra (lm_eval), and no torch.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlsafety import files, flags, progress, recipes, sampler, sharding
from rlsafety.config import Model as Section
from rlsafety.config import Sampler
from rlsafety.errors import UserError, run_main
from rlsafety.metrics import matched
from rlsafety.models import hf, scoring, sources, transformer
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.packing import pad
from rlsafety.rundir import read
from rlsafety.study import gather, tables
from rlsafety.tools import tasks
from rlsafety.types import Prompts

AT_ONCE = 8  # answers to a context that are scored after one prefill

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
  if __name__ != "__main__":
    raise
  sys.exit(f"rlsafety: {error}; run: pip install 'rlsafety[benchmarks]'")


@functools.partial(jax.jit, static_argnames="config")
def score_continuations(
  params: dict, adapter: Adapter | None, config: ModelConfig, prompts: Prompts,
  tokens: jax.Array, lengths: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """tokens [P, G, T] after their prompts -> log-prob [P, G] and whether greedy [P, G].

  Sums over the first `lengths` [P, G] tokens; greedy: each of them was the likeliest.
  Logits exist for one slot of all rows at a time.
  """
  states, _ = scoring.predicting_states(params, adapter, config, prompts, tokens)
  slots = jnp.moveaxis(states, 2, 0), jnp.moveaxis(tokens, 2, 0)

  def one_slot(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    state, target = xs
    logprobs = jax.nn.log_softmax(transformer.unembed(params, config, state), axis=-1)
    picked = jnp.take_along_axis(logprobs, target[..., None], -1)[..., 0]
    return picked, jnp.argmax(logprobs, -1) == target

  picked, likeliest = jax.lax.map(one_slot, slots)
  inside = jnp.arange(tokens.shape[2])[:, None, None] < lengths
  return jnp.where(inside, picked, 0.0).sum(0), jnp.all(likeliest | ~inside, axis=0)


class LanguageModel(TemplateLM):
  """lm_eval's interface to a Model of ours, with or without an adapter.

  max_length: longest context plus continuation; longer ones lose their beginning, as in
  the harness's own backends. max_new: longest generation when a task does not say.
  """

  def __init__(
    self, model: Model, adapter: Adapter | None = None, mesh: Any = None, batch: int = 8,
    max_length: int = 0, max_new: int = 256,
  ):  # fmt: skip
    super().__init__()
    self.model, self.adapter, self.max_new = model, adapter, max_new
    ways = 1 if mesh is None else mesh.size
    self.batch = -(-batch // ways) * ways
    self.max_length = max_length or model.config.max_positions
    self._put = functools.partial(sharding.put_prompts, mesh) if mesh else jax.device_put

  @property
  def eot_token_id(self) -> int:
    token = self.model.chat.special.get("eos_token")
    return self.model.chat.full.token_to_id(token) if token else self.model.chat.stop_ids[0]

  @property
  def prefix_token_id(self) -> int:
    token = self.model.chat.special.get("bos_token")
    return self.model.chat.full.token_to_id(token) if token else self.eot_token_id

  @property
  def tokenizer_name(self) -> str:
    return str(self.model.source.get("path", "rlsafety")).replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str:
    return self.model.chat.template if chat_template else ""

  def apply_chat_template(
    self, chat_history: list[dict], add_generation_prompt: bool = True
  ) -> str:
    """The rendered text; the harness encodes it, so a marker inside a question counts as one."""
    return self.model.chat.render(chat_history, add_generation_prompt)

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Ids, with what the model's file adds around a text (bos, rarely eos) unless it begins so.

    A markup in the string counts as such: the harness encodes whole conversations.
    """
    full, special = self.model.chat.full, add_special_tokens
    if special is None:
      prefix = full.decode([self.prefix_token_id], skip_special_tokens=False)
      special = not string.startswith(prefix)
    return full.encode(string, add_special_tokens=bool(special)).ids

  def _loglikelihood_tokens(
    self, requests: list[tuple], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """[(key, context ids, continuation ids)] -> [(log-prob, greedy)], one prefill a context."""
    groups = {}
    for i, (_, context, continuation) in enumerate(requests):
      keep = max(1, self.max_length + 1 - len(continuation))  # the last token is no input
      groups.setdefault(tuple(context[-keep:]), []).append((i, continuation[-self.max_length :]))
    # All answers to an empty context, of a task of whole sentences, would be one row.
    pieces = [(context, answers[i : i + AT_ONCE]) for context, answers in groups.items()
              for i in range(0, len(answers), AT_ONCE)]  # fmt: skip
    # Alike together: neighbours share a compiled shape, and little of it is padding.
    ordered = sorted(pieces, key=lambda piece: (-len(piece[1]), -len(piece[0])))
    results = [None] * len(requests)
    starts = range(0, len(ordered), self.batch)
    for start in starts if disable_tqdm else progress.bar(starts, "batches of answers"):
      rows = ordered[start : start + self.batch]
      filled = rows + [rows[-1]] * (self.batch - len(rows))
      shown = pad([context for context, _ in filled])
      count = max(len(answers) for _, answers in filled)
      longest = max(len(ids) for _, answers in filled for _, ids in answers)
      slots = -(-longest // 16) * 16
      tokens = np.zeros((self.batch, count, slots), np.int32)
      lengths = np.zeros((self.batch, count), np.int32)
      for p, (_, answers) in enumerate(filled):
        for g, (_, ids) in enumerate(answers):
          tokens[p, g, : len(ids)], lengths[p, g] = ids, len(ids)
      out = score_continuations(
        self.model.params, self.adapter, self.model.config,
        *self._put((Prompts(*shown), tokens, lengths)),
      )  # fmt: skip
      logprobs, greedy = sharding.fetch(out)
      for p, (_, answers) in enumerate(rows):
        for g, (i, _) in enumerate(answers):
          results[i] = float(logprobs[p, g]), bool(greedy[p, g])
    return results

  def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
    """Log-probs of whole texts after the prefix token. As in the harness's own backends, a bos
    that the file adds to a text is scored like its other tokens."""
    pairs, owner = [], []
    for i, request in enumerate(requests):
      windows = get_rolling_token_windows(
        self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
      )
      pairs += [(None, *make_disjoint_window(window)) for window in windows]
      owner += [i] * (len(pairs) - len(owner))
    totals = [0.0] * len(requests)
    for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(pairs), strict=True):
      totals[i] += logprob
    return totals

  def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
    """Greedy unless the task samples; text is cut at the first of its stop strings."""
    texts = [""] * len(requests)
    stops, settings = zip(*(_generation(r.args[1], self.max_new) for r in requests), strict=True)
    encoded = [self.tok_encode(request.args[0]) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(encoded[i])))
    done = 0
    for setting, group in itertools.groupby(order, key=lambda i: settings[i]):
      group = list(group)
      for start in range(0, len(group), self.batch):
        rows = group[start : start + self.batch]
        made = self._generate([encoded[i] for i in rows], *setting, first_row=done)
        done += len(rows)
        for i, text in zip(rows, made, strict=True):
          found = [text.find(stop) for stop in stops[i] if stop in text]
          texts[i] = text[: min(found)] if found else text
    return texts

  def _generate(
    self, contexts: list[list[int]], max_new: int, temperature: float, top_p: float,
    first_row: int = 0,
  ) -> list[str]:  # fmt: skip
    """first_row: which request the first context is; each draws noise of its own."""
    chat = self.model.chat
    keep = max(1, self.max_length - max_new)
    filled = [c[-keep:] for c in contexts] + [contexts[-1][-keep:]] * (self.batch - len(contexts))
    settings = Sampler(group=1, max_tokens=max_new, temperature=temperature, top_p=top_p)
    keys = sampler.row_keys(jax.random.key(0), first_row + np.arange(self.batch))
    rollouts = sampler.sample_jit(
      self.model.params, self.adapter, self.model.config,
      self._put(Prompts(*pad(filled))), keys, settings, (*chat.stop_ids,),
    )  # fmt: skip
    tokens, lengths = sharding.fetch((rollouts.tokens, rollouts.lengths))
    rows = range(len(contexts))
    return [chat.decode(tokens[i, 0, : lengths[i, 0]].tolist()) for i in rows]


def _generation(kwargs: dict, max_new: int) -> tuple[list[str], tuple[int, float, float]]:
  """A task's generation settings -> (stop strings, (max_new, temperature, top_p))."""
  until = kwargs.get("until") or []
  until = [until] if isinstance(until, str) else list(until)
  temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
  tokens = int(kwargs.get("max_gen_toks") or kwargs.get("max_new_tokens") or max_new)
  return until, (tokens, temperature, float(kwargs.get("top_p") or 1.0))


def measure(
  lm: TemplateLM, names: Sequence[str], include: str = "", limit: int | None = None,
  chat: bool = False,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:  # fmt: skip
  """Numbers {task: {metric: value}} of lm_eval, and {task: {metric: [one of each question]}}.

  A task's standard errors keep lm_eval's names. The second holds what is one number per question.
  """
  import lm_eval  # seconds, which --help need not wait for
  from lm_eval.tasks import TaskManager

  ours = {name: tasks.find(name) for name in names if name in tasks.NAMES}
  # Indexing the harness's own thousands of tasks takes a while: only if one is asked for.
  manager = TaskManager(include_path=include or None, include_defaults=bool(set(names) - set(ours)))
  known = [*manager.all_tasks, *tasks.NAMES]
  for name in names:
    if name not in known:
      near = flags.did_you_mean(name, known)
      raise UserError(f"--tasks: {name!r} is no task of lm_eval, of --include, or of ours{near}")
  found = lm_eval.simple_evaluate(
    model=lm, tasks=[ours.get(name, name) for name in names], task_manager=manager, limit=limit,
    apply_chat_template=chat, log_samples=True, bootstrap_iters=1_000,
  )  # fmt: skip
  numbers = {
    task: {k: v for k, v in result.items() if isinstance(v, (int, float))}
    for task, result in found["results"].items()
  }
  asked = {
    task: {m: [float(s[m]) for s in samples] for m in samples[0]["metrics"] if _scalar(samples, m)}
    for task, samples in found["samples"].items()
    if samples
  }
  return numbers, asked


def _scalar(samples: Sequence[dict], metric: str) -> bool:
  return all(isinstance(sample[metric], (int, float, np.number)) for sample in samples)


def changes(before: dict, after: dict) -> dict[str, dict[str, dict[str, float]]]:
  """{task: {metric: {change, low, high}}}, question by question, with 95 % t intervals over them.

  before, after: the second of what `measure` returns. What was not asked in both is left out. Where
  every question moved alike, as where none did, the interval is NaN: a spread of 0 in so few is no
  proof of none.
  """
  out: dict[str, dict[str, dict[str, float]]] = {}
  for task in before.keys() & after.keys():
    for metric in before[task].keys() & after[task].keys():
      moved = np.subtract(after[task][metric], before[task][metric])
      error = moved.std(ddof=1) / len(moved) ** 0.5 if len(moved) > 1 else np.nan
      effect = matched.Effect(float(moved.mean()), float(error), len(moved))
      low, high = effect.interval if error > 0 else (np.nan, np.nan)
      out.setdefault(task, {})[metric] = {"change": effect.mean, "low": low, "high": high}
  return out


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.lm_eval")
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--model", default="", help="folder, .gguf file, package:NAME or hub name")
  which.add_argument("--runs", default="", help="globs of run directories, joined by commas: base "
                     "and trained adapters")  # fmt: skip
  parser.add_argument("--tasks", required=True, help="names, with commas between")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json or FILE.csv")
  parser.add_argument("--include", default="", help="folder of task files")
  parser.add_argument("--limit", type=int, default=0, help="rows of each task; 0 for all")
  parser.add_argument("--chat", action="store_true",
                      help="wrap questions in the model's chat template")  # fmt: skip
  parser.add_argument("--batch", type=int, default=8, help="contexts at a time")
  parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
  args = flags.parse(parser, argv)
  if args.batch < 1 or args.limit < 0:
    raise UserError(f"--batch={args.batch} must be at least 1, --limit={args.limit} at least 0")
  names = [*filter(None, args.tasks.split(","))]
  if not args.runs:
    _measure_all(args, names, Section(path=args.model, dtype=args.dtype), [])
    return
  found, notes = gather.find_runs(args.runs.split(","))
  for note in notes:
    print(f"note: {note}")
  of_base: dict[Section, list[read.Run]] = {}
  for run in found:
    neutral = {"environment": {"name": "neutral"}}  # imports no other
    section = recipes.frozen({**run.config, **neutral}).model
    of_base.setdefault(dataclasses.replace(section, adapter=""), []).append(run)
  for section, runs in of_base.items():  # each base is read and measured once
    _measure_all(args, names, section, runs)


def _measure_all(
  args: argparse.Namespace, names: list[str], section: Section, runs: Sequence[read.Run]
) -> None:
  """The base and what was trained on it, written to --out one after the other."""
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    model = sources.open_model(section, mesh)

    def ask(adapter: Adapter | None) -> tuple[dict, dict]:
      lm = LanguageModel(model, adapter, mesh, args.batch)
      return measure(lm, names, args.include, args.limit or None, args.chat)

    base, before = ask(None)
    name = read.model_name(runs[0]) if runs else section.path
    _write(args.out, name, None, model, {"base": base}, {})  # at once: the next may take an hour
    for run in runs:
      trained, after = ask(hf.load_peft(run.path / "adapter", model.config)[0])
      results = {"base": base, "trained": trained}
      _write(args.out, read.model_name(run), run, model, results, changes(before, after))
  print(f"written: {args.out}")


def _write(
  out: pathlib.Path, name: str, run: read.Run | None, model: Model, results: dict, moved: dict
) -> None:
  where = str(run.path) if run else ""
  if out.suffix == ".csv":
    tables.put_row(out, {"model": name, "run": where, **_columns(results)})
  else:
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = files.read_json(out) if out.exists() else {}
    about = {"model": name, "source": model.source, "results": results, "changes": moved}
    files.write_json(out, {**kept, where or name: about})
  state = "trained" if run else "base"
  for task, metrics in results[state].items():
    print(f"{state:8} {task:28} " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
  for task, metrics in moved.items():
    for metric, m in metrics.items():
      interval = f"[{m['low']:+.4f}, {m['high']:+.4f}]"
      print(f"change   {task:28} {metric} {m['change']:+.4f} {interval}  {where}")


def _columns(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
  """{state: {task: {metric: value}}} -> {"<task>_<metric>": value}, trained ones with "_trained".

  lm_eval writes "<metric>,<filter>", with the filter "none" for most.
  """
  out = {}
  for state, found in results.items():
    for task, metrics in found.items():
      for metric, value in metrics.items():
        name, comma, kind = metric.partition(",")
        if comma and not name.endswith("_stderr"):
          parts = [task, name, *[kind] * (kind != "none"), *[state] * (state != "base")]
          out["_".join(parts)] = value
  return out


if __name__ == "__main__":
  run_main(main, sys.argv)
