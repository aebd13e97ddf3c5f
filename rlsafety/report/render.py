"""report.html: one run as a page to read, in one file that needs no network.

`write_report(run_dir)` reads a run directory (also of a run that is still going) and
writes the page beside it: held-out scores before and after, curves, and every transcript
with filters and permalinks. Replies are hostile input: the page carries them as JSON
with `<`, `>` and `&` encoded, the script shows them as text nodes only, and a content
security policy allows that one script by its hash and no connection at all.

  python -m rlsafety.report.render RUN_DIR [RUN_DIR ...]
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import pathlib
import sys

import numpy as np

from rlsafety.errors import UserError, run_main
from rlsafety.metrics import curves
from rlsafety.rundir import read

LABELS = {
  "reward": ("Reward", "the judge's rating, 1 to 10"),
  "hex": ("HEX", "encouragement or agreement, 1 to 10"),
  "acc": ("ACC", "dissuasion or neutrality, 1 to 10"),
}
GAP_WORDS = {
  "reward": "gameable − non-gameable",
  "hex": "gameable − non-gameable",
  "acc": "non-gameable − gameable",
}
GROUP_WORDS = {"gameable": "gameable users", "non_gameable": "non-gameable users"}
HEALTH = {
  "kl": "KL to the base model, per token",
  "entropy": "entropy of the policy, nats",
  "length_mean": "reply length, tokens",
  "grad_norm": "gradient norm",
  "unscorable": "replies without a verdict",
  "logprob_diff_max": "largest sampler − learner log-prob difference",
}
COLUMNS = (*read.GROUPS, "gap")
Z95 = 1.96


def write_report(run_dir, max_rollouts: int = 10_000) -> pathlib.Path:
  """Writes run_dir/report.html and returns its path.

  max_rollouts: how many transcripts the page holds. Held-out ones come first; of the
  training rollouts it then keeps whole steps at even distances, and says so.
  """
  run = read.load_run(run_dir)
  notes = list(run.notes)
  evaluations = read.eval_rollouts(run, notes)
  training = read.train_rollouts(run, notes)
  data, omitted = transcripts(evaluations, training, max_rollouts)
  if omitted:
    notes.append(f"{omitted:,} training rollouts left out of this page to keep it light")
  page = render(
    "report.html",
    title=_title(run),
    facts=_facts(run, data),
    judge=judge_block(run.info.get("judge") or {}),
    overview=overview(run, evaluations),
    table=[
      (e["step"], [_cell(e, name, what) for name in LABELS for what in COLUMNS])
      for e in run.evaluations
    ],
    panels=_panels(run),
    health=_health(run),
    window=_window(run),
    labels=LABELS,
    notes=notes,
    data_json=embed_json(data),
    several=False,
  )
  path = run.path / "report.html"
  partial = path.with_suffix(".html.tmp")
  partial.write_text(page, encoding="utf-8")
  partial.replace(path)
  return path


def render(template: str, **values) -> str:
  """Renders a template with the style and script inlined and the script's hash allowed."""
  import jinja2

  folder = importlib.resources.files("rlsafety.report") / "templates"
  read = {name: (folder / name).read_text("utf-8") for name in ("report.css", "report.js")}
  loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8"))
  environment = jinja2.Environment(
    loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  environment.filters["num"] = _num
  digest = hashlib.sha256(read["report.js"].encode()).digest()
  return environment.get_template(template).render(
    css=read["report.css"],
    js=read["report.js"],
    script_hash="sha256-" + base64.b64encode(digest).decode(),
    **values,
  )


def embed_json(value) -> str:
  """JSON that may stand inside a <script> element whatever strings it holds."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  for char in "<>&\u2028\u2029":
    text = text.replace(char, f"\\u{ord(char):04x}")
  # Lone surrogates, which a byte-level tokenizer can leave, have no UTF-8 form.
  return text.encode("utf-8", "replace").decode("utf-8")


def transcripts(evaluations: dict, training: list[dict], max_rollouts: int):
  """The page's data: prompts once each, rollouts as rows that point at them.

  Returns ({"prompts": [...], "rollouts": [[kind, step, prompt, its number in the batch,
  sample, reward, hex, acc, length, finished, completion], ...], "shared": factors that
  every user has}, rollouts left out). kind: 0 held-out, 1 training.
  """
  held_out = [(0, r) for records in evaluations.values() for r in records]
  room = max(0, max_rollouts - len(held_out))
  omitted = 0
  if len(training) > room:
    steps = sorted({r.get("step", 0) for r in training})
    wanted = max(1, int(room / (len(training) / len(steps)))) if room else 0
    picks = np.unique(np.linspace(0, len(steps) - 1, wanted).round().astype(int))
    keep = {steps[i] for i in picks}
    kept = [r for r in training if r.get("step", 0) in keep]
    omitted, training = len(training) - len(kept), kept
  prompts, index, rows = [], {}, []
  for kind, r in held_out + [(1, r) for r in training]:
    key = json.dumps([r.get("scenario_id"), r.get("messages")], sort_keys=True)
    if key not in index:
      index[key] = len(prompts)
      prompts.append(
        {
          "id": str(r.get("scenario_id", "?")),
          "env": str(r.get("environment", "")),
          "topic": str(r.get("topic", "")),
          "gameable": bool(r.get("is_gameable")),
          "factors": {str(k): str(v) for k, v in (r.get("factors") or {}).items()},
          "messages": [
            [str(m.get("role", "")), str(m.get("content", ""))] for m in r.get("messages") or []
          ],
        }
      )
    scores = [read.number(r.get(name)) for name in ("reward", "hex", "acc")]
    rows.append(
      [kind, r.get("step", 0), index[key], r.get("prompt", 0), r.get("sample", 0)]
      + [None if not math.isfinite(s) else round(s, 2) for s in scores]
      + [r.get("length"), bool(r.get("finished", True)), str(r.get("completion", ""))]
    )
  shared = dict(set.intersection(*(set(p["factors"].items()) for p in prompts)) if prompts else ())
  for p in prompts:  # what all users share is a setting of the run, not a way to tell them apart
    p["factors"] = {k: v for k, v in p["factors"].items() if k not in shared}
  return {"prompts": prompts, "rollouts": rows, "shared": shared}, omitted


def compared(found: list, labels: list[str], max_rollouts: int = 10_000):
  """Page data of several runs: their first and last held-out replies, and whose they are.

  Returns (data or None, labels of runs left out because max_rollouts were reached).
  """
  evaluations, owner, left_out = {}, [], []
  for i, run in enumerate(found):
    by_step = read.eval_rollouts(run)
    ends = sorted({min(by_step), max(by_step)}) if by_step else []
    if len(owner) + sum(len(by_step[s]) for s in ends) > max_rollouts:
      left_out.append(labels[i])
      continue
    for step in ends:
      evaluations[i, step] = by_step[step]
      owner += [i] * len(by_step[step])
  if not owner:
    return None, left_out
  data, _ = transcripts(evaluations, [], max_rollouts)
  data["rollouts"] = [[*row, i] for row, i in zip(data["rollouts"], owner, strict=True)]
  return data | {"runs": labels}, left_out


def overview(run, evaluations: dict) -> dict | None:
  """Before, after and change of every score and gap, with standard errors over prompts."""
  if not run.evaluations:
    return None
  first, last = run.evaluations[0], run.evaluations[-1]
  before, after = (evaluations.get(e["step"], []) for e in (first, last))
  rows = []
  for name in LABELS:
    change = {}
    for group in read.GROUPS:
      pair = [_prompt_means(records, name, group == "gameable") for records in (before, after)]
      change[group] = curves.paired_change(*pair)
    cells = []
    for what in COLUMNS:
      values = [_cell(e, name, what) for e in (first, last)]
      delta, se = values[1][0] - values[0][0], math.hypot(values[0][1], values[1][1])
      if what == "gap" and all(change[g][2] > 1 for g in read.GROUPS):
        se = math.hypot(*(change[g][1] for g in read.GROUPS))
      elif what != "gap" and change[what][2] > 1:
        se = change[what][1]
      cells.append(
        {"what": what, "before": values[0], "after": values[1], "change": (delta, se),
         "notable": bool(se > 0 and abs(delta) > 2 * se)}
      )  # fmt: skip
    rows.append({"name": name, "cells": cells})
  return {"first": first, "last": last, "rows": rows, "single": first is last}


def _cell(evaluation: dict, name: str, what: str) -> tuple[float, float]:
  """(mean, standard error) as the run's own summary has them."""
  key = f"{name}_{what}"
  return read.number(evaluation.get(key)), read.number(evaluation.get(f"{key}_se"))


def _prompt_means(records, name, gameable) -> dict:
  """{prompt: mean score over its scored samples} of one group."""
  found = {}
  for r in records:
    value = read.number(r.get(name))
    if bool(r.get("is_gameable")) is gameable and math.isfinite(value):
      found.setdefault((r.get("scenario_id"), r.get("prompt")), []).append(value)
  return {key: float(np.mean(values)) for key, values in found.items()}


def judge_block(judge: dict) -> dict:
  """config.json's judge, as words and numbers.

  {"name", "limits": its own statement as a sentence, "facts": [(label, text)], "head",
  "rows": [(label, [text])]}: dicts of numbers, AUCs say, become rows of one table.
  """
  if not isinstance(judge, dict):
    judge = {"name": str(judge)}
  limits = judge.get("limits") or ""
  limits = " ".join(map(str, limits)) if isinstance(limits, (list, tuple)) else str(limits).strip()
  limits = limits[:1].upper() + limits[1:] + ("" if limits.endswith((".", "!", "?")) else ".")
  facts, rows = [], []

  def walk(value, path):
    label = " · ".join(path).replace("_", " ")
    if not isinstance(value, dict):
      if value is not None:
        facts.append((label, _num(value) if isinstance(value, float) else str(value)))
    elif value and all(isinstance(v, (int, float)) for v in value.values()):
      rows.append((label, value))
    else:
      for key, item in value.items():
        walk(item, [*path, str(key)])

  walk({k: v for k, v in judge.items() if k not in ("name", "limits")}, [])
  head = list(dict.fromkeys(key for _, row in rows for key in row))
  text = lambda v: _num(v) if isinstance(v, float) else "" if v is None else str(v)  # noqa: E731
  return {
    "name": str(judge.get("name", "")),
    "limits": limits if limits != "." else "",
    "facts": facts,
    "head": [str(h).replace("_", " ") for h in head],
    "rows": [(label, [text(row.get(h)) for h in head]) for label, row in rows],
  }


def _num(value, digits: int = 2, sign: bool = False) -> str:
  if value is None or not math.isfinite(value):
    return "–"
  text = f"{value:{'+' if sign else ''}.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
  return text.replace("-", "−")


def _title(run) -> str:
  parts = [read.model_name(run), read.environment_name(run)]
  return " · ".join(p for p in parts if p) or run.path.resolve().name


def _facts(run, data) -> list[tuple[str, str]]:
  last = run.metrics[-1]["step"] if run.metrics else 0
  held_out = sum(r[0] == 0 for r in data["rollouts"])
  revision, plus, changes = str(run.info.get("git") or "").partition("+")
  facts = [
    ("run", run.path.resolve().name),
    ("updates", f"{last} of {run.config.get('steps', last)}"),
    ("seed", str(run.info.get("seed", "–"))),
    ("device", str(run.info.get("device", "–"))),
    ("revision", f"{revision[:10]}{'+' * bool(plus)}{changes}" or "–"),
    ("transcripts", f"{held_out:,} held-out, {len(data['rollouts']) - held_out:,} training"),
  ]
  shared = sorted(data["shared"].items())
  if shared:
    facts.append(("all users", " · ".join(f"{k.replace('_', ' ')}: {v}" for k, v in shared)))
  return facts


def _window(run) -> int:
  """The study's 50 steps, or a sixth of a run too short for that."""
  return min(curves.WINDOW, max(3, len(run.metrics) // 6))


def _panels(run) -> list[str]:
  """Six figures: the groups' scores, and their gap, for reward, HEX and ACC."""
  panels = []
  top = max([m["step"] for m in run.metrics] + [e["step"] for e in run.evaluations] + [1])
  for name, (label, meaning) in LABELS.items():
    groups = [_series(run, f"{name}_{g}", GROUP_WORDS[g], g) for g in read.GROUPS]
    panels.append(figure(label, meaning, groups, top, floor=(1, 10)))
    gap = [_series(run, f"{name}_gap", "gap", "gap")]
    panels.append(figure(f"{label} gap", GAP_WORDS[name], gap, top, floor=(-1, 1), zero=True))
  return panels


def _series(run, key, label, css) -> dict:
  """Held-out points with 95% bands and the training rollouts' rolling mean with its own."""
  window = _window(run)
  raw = np.array([read.number(m.get(key)) for m in run.metrics])
  mean = curves.rolling_mean(raw, window) if len(raw) else raw
  if len(raw):
    count = np.maximum(curves.rolling_mean(np.isfinite(raw) * 1.0, window) * window, 1)
    square = curves.rolling_mean(raw**2, window)
    error = Z95 * np.sqrt(np.maximum(square - mean**2, 0) / np.maximum(count - 1, 1))
  else:
    error = raw
  return {
    "label": label,
    "css": css,
    "train": ([m["step"] for m in run.metrics], mean, error),
    "eval": (
      [e["step"] for e in run.evaluations],
      np.array([read.number(e.get(key)) for e in run.evaluations]),
      Z95 * np.array([read.number(e.get(f"{key}_se")) for e in run.evaluations]),
    ),
  }


def _health(run) -> list[str]:
  """Small figures of the learner's own numbers, those that the run logged."""
  figures = []
  steps = [m["step"] for m in run.metrics]
  for key, label in HEALTH.items():
    values = np.array([read.number(m.get(key)) for m in run.metrics])
    if np.isfinite(values).any():
      line = {"label": key, "css": "gap", "train": (steps, values, np.nan * values)}
      figures.append(figure(key.replace("_", " "), label, [line], max(steps + [1]), digits=3))
  return figures


def figure(title, subtitle, series, x_max, floor=None, zero=False, digits=2) -> str:
  """One chart as inline SVG. Colours come from the page's style, so it follows its theme.

  series: dicts with label, css, and train and/or eval = (steps, values, half-widths of
  the band); NaN breaks a line. floor: a range that the y axis always covers.
  """
  width, height, left, right, top, bottom = 420, 250, 44, 12, 14, 30
  lows, highs = [], []
  for s in series:
    for part in ("train", "eval"):
      _, values, half = s.get(part, ((), np.array([]), np.array([])))
      half = np.where(np.isfinite(half), half, 0)
      lows += list((values - half)[np.isfinite(values)])
      highs += list((values + half)[np.isfinite(values)])
  if not lows:
    lows, highs = [0.0], [1.0]
  low, high = min(lows), max(highs)
  if floor:
    low, high = min(low, floor[0]), max(high, floor[1])
  if high - low < 1e-12:
    low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
  y_ticks, x_ticks = ticks(low, high, 5), ticks(0, max(x_max, 1), min(6, max(x_max, 1)), whole=True)
  low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

  def x(step):
    return left + (width - left - right) * step / max(x_max, 1)

  def y(value):
    return height - bottom - (height - top - bottom) * (value - low) / (high - low)

  out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
  for tick in y_ticks:
    css = "axis0" if zero and tick == 0 else "grid"
    out.append(f'<line class="{css}" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
               f'y2="{y(tick):.1f}"/><text class="tick" x="{left - 7}" y="{y(tick) + 4:.1f}" '
               f'text-anchor="end">{_tick(tick)}</text>')  # fmt: skip
  for tick in x_ticks:
    out.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 10}" '
               f'text-anchor="middle">{_tick(tick)}</text>')  # fmt: skip
  for s in series:
    for part in ("train", "eval"):
      steps, values, half = s.get(part, ((), np.array([]), np.array([])))
      for run_of in _finite_runs(values):
        xs = [x(steps[i]) for i in run_of]
        line = " ".join(f"{a:.1f},{y(values[i]):.1f}" for a, i in zip(xs, run_of, strict=True))
        if np.isfinite(half[run_of]).any():
          width_at = np.where(np.isfinite(half), half, 0)
          upper = [f"{a:.1f},{y(values[i] + width_at[i]):.1f}" for a, i in zip(xs, run_of)]  # noqa: B905
          lower = [f"{a:.1f},{y(values[i] - width_at[i]):.1f}" for a, i in zip(xs, run_of)]  # noqa: B905
          points = " ".join(upper + lower[::-1])
          out.append(f'<polygon class="band {part} {s["css"]}" points="{points}"/>')
        out.append(f'<polyline class="line {part} {s["css"]}" points="{line}"/>')
        for a, i in zip(xs, run_of, strict=True) if part == "eval" else ():
          says = f"step {steps[i]}, {s['label']}: {_num(values[i], digits)}"
          if math.isfinite(half[i]):
            says += f" ± {_num(half[i] / Z95, digits)} (SE)"
          out.append(f'<circle class="dot {s["css"]}" cx="{a:.1f}" cy="{y(values[i]):.1f}" '
                     f'r="3.6"><title>{html.escape(says)}</title></circle>')  # fmt: skip
  out.append("</svg>")
  caption = f"<b>{html.escape(title)}</b> <span>{html.escape(subtitle)}</span>"
  return f"<figure><figcaption>{caption}</figcaption>{''.join(out)}</figure>"


def _finite_runs(values) -> list[list[int]]:
  """Indices of consecutive finite values: a hole in a curve stays a hole."""
  found, last = [], -2
  for i in np.flatnonzero(np.isfinite(values)).tolist():
    if i != last + 1:
      found.append([])
    found[-1].append(i)
    last = i
  return found


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
  """About `count` round numbers that cover [low, high] from inside; steps are whole."""
  raw = (high - low) / count
  base = 10.0 ** math.floor(math.log10(raw))
  sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
  step = next(m * base for m in sizes if m * base >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def _tick(value: float) -> str:
  return f"{value:g}".replace("-", "−")


def main(paths) -> None:
  if not paths or paths[0].startswith("-"):
    raise UserError("usage: python -m rlsafety.report.render RUN_DIR [RUN_DIR ...]")
  for path in paths:
    print(write_report(path))


if __name__ == "__main__":
  run_main(main, sys.argv[1:])
