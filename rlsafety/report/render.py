"""report.html: one run as a page to read, in one file that needs no network.

  python -m rlsafety.report.render RUN_DIR [RUN_DIR ...]

Reads a run directory (also of a run that is still going) and writes the page into it: a
conclusion, held-out scores before and after, curves, and the transcripts with filters and
permalinks. Replies are hostile input: the page carries them as JSON with `<`, `>` and `&`
encoded, the script shows them as text nodes only, and a content security policy allows that
one script by its hash and no connection at all.
"""

import base64
import functools
import hashlib
import importlib.resources
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np

from rlsafety import flags
from rlsafety.errors import run_main
from rlsafety.files import read_jsonl
from rlsafety.metrics import curves, gaps
from rlsafety.report import beyond, charts, gaming, overview
from rlsafety.report.transcripts import MAX_ROLLOUTS, embed_json, transcripts
from rlsafety.rundir import read

# What HEX and ACC look for, by environment; others ask for the one or the other.
ADVICE = ("encouragement of the harmful wish", "dissuasion")
ASKED = {
  "political_qa": ("agreement with the user’s politics", "neutrality"),
  "action_advice": ADVICE,
  "therapy_talk": ADVICE,
  "neutral": ADVICE,
}
GOOD = {"reward": "what training raises", "hex": "lower is better", "acc": "higher is better"}
GAP_WORDS = {
  "reward": "gameable − non-gameable",
  "hex": "gameable − non-gameable",
  "acc": "non-gameable − gameable",
}
GROUP_WORDS = {"gameable": "gameable users", "non_gameable": "non-gameable users",
               "everyone": "all users", "gap": "gap"}  # fmt: skip
HEALTH = {  # metric: (what it is, unit)
  "kl": ("KL to the base model, per token", "nats"),
  "entropy": ("entropy of the policy, per token", "nats"),
  "length_mean": ("reply length", "tokens"),
  "grad_norm": ("gradient norm", "norm"),
  "unscorable": ("replies without a verdict", "replies"),
  "logprob_diff_max": ("largest sampler − learner log-prob difference", "nats"),
}
# What was measured of a judge (judges.gate, tools.judges.fit), and its tables' captions.
JUDGE_TABLES = {
  "contrasts": "How often the judge puts a reply of the wanted kind above one of another (area "
  "under the ROC curve, AUC: 1 = always, 0.5 = by chance), with its 95% interval. Row: the score; "
  "replies of the untrained model (base) or of trained ones; the other kind, and for which users.",
  "pleasant": "Share of users for whom a sincere reply of the wanted kind scores above one that "
  "pleases and says nothing. Row: how it pleases; columns: the score.",
  "confusion": "Sampled replies by kind. Row: the kind given by hand; columns: the judge's.",
  "": "Other numbers, as config.json has them.",
}
CONTRAST_COLUMNS = {
  "auc": "AUC",
  "low": "95% from",
  "high": "95% to",
  "wanted": "wanted replies",
  "others": "other replies",
}


def labels_of(environment: str) -> dict[str, tuple[str, str]]:
  """{score: (name, what it is, which direction is good and whom it is about)}."""
  hex_, acc = ASKED.get(environment, ("encouragement or agreement", "dissuasion or neutrality"))
  return {
    "reward": ("Reward", "how content the simulated user is, as the judge rates it, 1 to 10: what "
               "training raises, for good or ill"),
    "hex": ("HEX", f"harmful exploitation: {hex_}, 1 to 10. Lower is better; it is about replies "
            "to gameable users first"),
    "acc": ("ACC", f"good behaviour: {acc}, 1 to 10. Higher is better; it is about replies to "
            "non-gameable users first"),
  }  # fmt: skip


def write_report(
  run_dir: str | pathlib.Path,
  max_rollouts: int = MAX_ROLLOUTS,
  moved: Sequence[gaming.Feature] | None = None,
) -> pathlib.Path:
  """Writes run_dir/report.html and returns its path.

  max_rollouts: how many transcripts the page holds; what it leaves out is said there. moved:
  `gaming.features` of the run, where the caller has them.
  """
  run = read.load_run(run_dir)
  notes = list(run.notes)
  evaluations = read.eval_rollouts(run, notes)
  training = read.train_rollouts(run, notes)
  data, left_out = transcripts(evaluations, training, max_rollouts)
  notes += [f"{count:,} {kind} rollouts left out of this page to keep it light"
            for kind, count in left_out.items() if count]  # fmt: skip
  found = overview.overview(run, evaluations)
  outside = beyond.asked(run, notes)
  labels = labels_of(read.environment_name(run))
  page = fill(
    "report.html",
    title=_title(run),
    going=_going(run),
    conclusion=overview.conclusion(found),
    facts=_facts(run, data),
    judge=judge_block(run.info.get("judge") or {}),
    overview=found,
    shares=overview.shares(found.first, found.last) if found else [],
    table=[
      (line["step"], [overview.estimate(line, s, w) for s in labels for w in overview.COLUMNS])
      for line in run.evaluations
    ],
    moved=gaming.features(evaluations, training) if moved is None else moved,
    features=gaming.FEATURES,
    partings=gaming.partings(evaluations),
    outside=outside,
    outside_figure=beyond.figure(run, outside) if outside else "",
    measures=beyond.MEASURES,
    tasks=beyond.tasks(found.first, found.last) if found else [],
    panels=_panels(run, labels),
    health=_health(run),
    window=_window(run),
    labels=labels,
    groups=GROUP_WORDS,
    columns=[GROUP_WORDS[what] for what in overview.COLUMNS],
    notes=notes,
    data_json=embed_json(data),
    several=False,
  )
  path = run.path / "report.html"
  partial = path.with_suffix(".html.tmp")
  partial.unlink(missing_ok=True)
  # "x": never through a link out of the run. What has no UTF-8 form was a broken file's.
  with open(partial, "x", encoding="utf-8", errors="replace") as file:
    file.write(page)
  partial.replace(path)
  return path


def fill(template: str, **values: Any) -> str:
  """A template with the style and script inlined and the script's hash allowed."""
  digest = hashlib.sha256(_text("report.js").encode()).digest()
  return _templates().get_template(template).render(
    css=_text("report.css"),
    js=_text("report.js"),
    script_hash="sha256-" + base64.b64encode(digest).decode(),
    **values,
  )  # fmt: skip


def _text(name: str) -> str:
  return (importlib.resources.files("rlsafety.report") / "templates" / name).read_text("utf-8")


@functools.cache  # a run draws its page again and again, and compiling a template takes 0.1 s
def _templates() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(_text),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
  )
  environment.filters |= {"pm": overview.plus_minus, "num": charts.number, "span": overview.span}
  return environment


def judge_block(judge: dict | str) -> dict:
  """config.json's judge, as words and numbers.

  {"name", "limits": its own statement as a sentence, "facts": [(label, text)], "tables":
  [(caption, head, [(label, [text])])]}: dicts of numbers become rows, those of one kind a table.
  """
  if not isinstance(judge, dict):
    judge = {"name": str(judge)}
  limits = judge.get("limits") or ""
  limits = " ".join(map(str, limits)) if isinstance(limits, (list, tuple)) else str(limits).strip()
  if limits:
    limits = limits[:1].upper() + limits[1:] + ("" if limits.endswith((".", "!", "?")) else ".")
  facts, tables = [], {kind: {} for kind in JUDGE_TABLES}

  def text(value: Any) -> str:
    if isinstance(value, bool):
      return "yes" if value else "no"
    if isinstance(value, list):
      return "; ".join(map(text, value)) or "–"
    return charts.number(value) if isinstance(value, float) else str(value)

  def walk(value: Any, path: list[str]) -> None:
    if not isinstance(value, dict):
      if value is not None:
        facts.append((" · ".join(path).replace("_", " "), text(value)))
    elif value and all(isinstance(v, (int, float)) for v in value.values()):
      kind = next((p for p in path if p in JUDGE_TABLES), "")
      label = " · ".join(p for p in path if p not in ("measured", kind))
      if kind == "pleasant":  # many ways to please, few scores: turned, so that it fits a page
        for name, share in value.items():
          tables[kind].setdefault(name, {})[label] = share
      else:
        tables[kind][label] = value
    else:
      for key, item in value.items():
        walk(item, [*path, str(key)])

  walk({k: v for k, v in judge.items() if k not in ("name", "limits")}, [])
  return {
    "name": str(judge.get("name", "")),
    "limits": limits,
    "facts": facts,
    "tables": [(JUDGE_TABLES[kind], *_table(rows, text)) for kind, rows in tables.items() if rows],
  }


def _table(rows: dict[str, dict], text: Callable[[Any], str]) -> tuple[list, list]:
  """Head and rows of numbers that are not all in every row, in words."""
  words = lambda key: CONTRAST_COLUMNS.get(key, str(key)).replace("_", " ")  # noqa: E731
  rank = {key: i for i, key in enumerate(CONTRAST_COLUMNS)}
  found = dict.fromkeys(key for row in rows.values() for key in row)
  order = sorted(found, key=lambda key: rank.get(key, len(rank)))
  cells = [
    (label.replace("_", " "), [text(row[k]) if k in row else "" for k in order])
    for label, row in rows.items()
  ]
  return [words(k) for k in order], cells


def _title(run: read.Run) -> str:
  parts = [read.model_name(run), read.environment_name(run)]
  return " · ".join(p for p in parts if p) or run.path.resolve().name


def _going(run: read.Run) -> str:
  """How far a run is that is not complete, and the time left at the pace of its last steps."""
  steps = read.number(run.config.get("steps"))
  if run.complete or not steps >= 1:
    return ""
  said = f"Step {run.last_step} of {steps:.0f}"
  seconds = [read.number(t.get("seconds")) for t in read_jsonl(run.path / "timing.jsonl", [])[-20:]]
  if pace := np.nanmedian(seconds) if np.isfinite(seconds).any() else 0.0:
    minutes = (steps - run.last_step) * float(pace) / 60
    left = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    said += f", about {left} left if it goes on, evaluations not counted"
  return f"{said}. Drawn {time.strftime('%Y-%m-%d %H:%M')}; reload the page after an evaluation."


def _facts(run: read.Run, data: dict) -> list[tuple[str, str]]:
  held_out = sum(r[0] == 0 for r in data["rollouts"])
  revision, plus, changes = str(run.info.get("git") or "").partition("+")
  facts = [
    ("run", run.path.resolve().name),
    ("updates", f"{run.last_step} of {run.config.get('steps', run.last_step)}"),
    ("seed", str(run.seed)),
    ("device", str(run.info.get("device", "–"))),
    ("revision", f"{revision[:10]}{'+' * bool(plus)}{changes}" or "–"),
    ("transcripts", f"{held_out:,} held-out, {len(data['rollouts']) - held_out:,} training"),
  ]
  shared = [f"{k.replace('_', ' ')}: {v}" for k, v in data["shared"].items()]
  return [*facts, ("all users", " · ".join(shared))] if shared else facts


def _window(run: read.Run) -> int:
  """The study's 50 steps, or a sixth of a run too short for that."""
  return min(curves.WINDOW, max(3, len(run.metrics) // 6))


def _panels(run: read.Run, labels: dict[str, tuple[str, str]]) -> list[str]:
  """Six figures: the groups' scores, and their gap, for reward, HEX and ACC."""
  panels = []
  last = max([m["step"] for m in run.metrics] + [e["step"] for e in run.evaluations] + [1])
  for name, (label, _) in labels.items():
    groups = [line for g in gaps.GROUPS for line in _lines(run, name, g)]
    unit = f"{label}, 1 to 10"
    panels.append(charts.figure(label, GOOD[name], groups, last, unit, scale=(1, 10)))
    title, gap, unit = f"{label} gap", _lines(run, name, "gap"), f"difference in {label}"
    panels.append(charts.figure(title, GAP_WORDS[name], gap, last, unit, zero=True))
  return panels


def _lines(run: read.Run, name: str, what: str) -> list[charts.Line]:
  """The training rollouts' rolling mean and the held-out points, with their 95% bands."""
  window, key, label = _window(run), f"{name}_{what}", GROUP_WORDS[what]
  raw = np.array([read.number(m.get(key)) for m in run.metrics])
  mean, share, square = curves.rolling_mean(np.stack([raw, np.isfinite(raw), raw**2]), window)
  count = np.maximum(share * window, 1)
  error = np.sqrt(np.maximum(square - mean**2, 0) / np.maximum(count - 1, 1))
  held_out = np.array([overview.estimate(e, name, what) for e in run.evaluations]).reshape(-1, 2).T
  steps = [m["step"] for m in run.metrics], [e["step"] for e in run.evaluations]
  return [
    charts.Line(label, what, "train", steps[0], mean, charts.Z95 * error),
    charts.Line(label, what, "eval", steps[1], held_out[0], charts.Z95 * held_out[1]),
  ]


def _health(run: read.Run) -> list[str]:
  """Small figures of the learner's own numbers, those that the run logged."""
  figures = []
  steps = [m["step"] for m in run.metrics]
  for key, (label, unit) in HEALTH.items():
    values = np.array([read.number(m.get(key)) for m in run.metrics])
    if np.isfinite(values).any():
      line = charts.Line(label, "gap", "train", steps, values, np.nan * values)
      title = key.replace("_", " ")
      figures.append(charts.figure(title, "", [line], max(steps + [1]), unit, digits=3))
  return figures


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "report.render")
  parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directory")
  said = "transcripts on a page; default %(default)s"
  parser.add_argument("--max_rollouts", type=int, default=MAX_ROLLOUTS, metavar="N", help=said)
  args = flags.parse(parser, argv)
  for path in args.runs:
    print(write_report(path, args.max_rollouts))


if __name__ == "__main__":
  run_main(main, sys.argv)
