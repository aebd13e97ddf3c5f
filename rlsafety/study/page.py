"""index.html of a study: the answers to its questions and all cells, also while they train.

  python -m rlsafety.study.page --study=FILE --workdir=DIR

One file that needs no network. `study.run` writes it again at every evaluation. Beside it lies
held_out.csv, a row of scores for every held-out reply of every cell, for tables of one's own.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from pandas import DataFrame

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.files import read_json, read_jsonl, write_bytes
from rlsafety.metrics.gaps import GROUPS
from rlsafety.report import charts, render
from rlsafety.rundir import read
from rlsafety.study import confirm, design

PANELS = (  # outcome: title, zero in the axis
  ("hex_gap", "HEX gap", True),
  ("acc_gap", "ACC gap", True),
  ("hex", "HEX of everybody", False),
  ("reward", "Reward", False),
)


def render_page(study: design.Study, workdir: pathlib.Path) -> pathlib.Path:
  """Writes workdir/index.html; returns its path."""
  cells = [(name, cell_state(workdir / name, config.steps)) for name, config in study.cells.items()]
  done = sum(state["state"] == "complete" for _, state in cells)
  left = sum(state["left"] for _, state in cells)
  asked = confirm.answers(study, workdir)
  page = render.fill(
    "study.html",
    title=study.name,
    facts=[
      ("cells", f"{done} of {len(cells)} complete"),
      ("time left", f"{left / 60:.0f} min" if left else "–"),
      ("questions", f"{len(asked)}, p corrected by {study.correction}"),
      *([("ACC and HEX of the answers", f"scores/{study.scores}")] if study.scores else []),
      ("plan", f"sha256 {design.digest(design.plan_of(study)):.12}"),
    ],
    changed=design.changed(study, workdir),
    answers=[(a, *map(charts.number, (a.p, a.p_corrected, a.p_none, a.power))) for a in asked],
    number=lambda x: charts.number(x, sign=True),
    cells=cells,
    panels=[(title, small_multiples(cells, key, zero)) for key, title, zero in PANELS],
  )
  path = workdir / "index.html"
  write_bytes(path, page.encode("utf-8", "replace"))
  return path


def cell_state(path: pathlib.Path, steps: int) -> dict:
  """What the run directory of a cell tells: state, step, seconds left, curves and changes."""
  out = {"state": "waiting", "step": 0, "steps": steps, "left": 0.0, "evaluations": [], "why": "",
         "report": ""}  # fmt: skip
  if not (path / "config.json").exists():
    return out
  run = read.load_run(path)
  out |= {"step": run.last_step, "evaluations": run.evaluations, "state": "training"}
  if (path / "summary.json").exists():
    return out | {"state": "complete", "report": f"{path.name}/report.html"}
  if (path / "stopped.json").exists():
    return out | {"state": "stopped", "why": str(read_json(path / "stopped.json").get("why"))}
  seconds = [read.number(r.get("seconds")) for r in read_jsonl(path / "timing.jsonl", [])[-20:]]
  each = float(np.nanmedian(seconds)) if seconds else 0.0
  return out | {"left": each * (steps - run.last_step)}


def write_replies(study: design.Study, workdir: pathlib.Path) -> pathlib.Path:
  """Writes workdir/held_out.csv: scores of the replies at every evaluation, not their texts.

  acc, hex: those that answer the study's questions, so of its re-scoring where it has one, empty
  where that lacks a reply; acc_own, hex_own: the run's. logprob, base_logprob: nats a token.
  """
  path, table = workdir / "held_out.csv", []
  for name in study.cells:
    if not (workdir / name / "config.json").exists():
      continue
    run = read.load_run(workdir / name)
    for step, records in read.eval_rollouts(run).items():
      answered = records
      if study.scores:
        answered = read.rescored(run, records, study.scores, "heldout")
      scores = {(r["prompt"], r["sample"]): (r.get("acc"), r.get("hex")) for r in answered}
      for r in records:
        acc, hex_ = scores.get((r["prompt"], r["sample"]), (None, None))
        table.append({
          "cell": name, "step": step, "environment": r.get("environment"), "unit": r.get("unit"),
          "person": r.get("person"), "users": GROUPS[not r["is_gameable"]], "sample": r["sample"],
          "reward": r.get("reward"), "acc": acc, "hex": hex_, "acc_own": r.get("acc"),
          "hex_own": r.get("hex"), "verdict": r.get("verdict"), "tokens": r.get("length"),
          "finished": r.get("finished"), "logprob": np.mean(r.get("logprobs") or [np.nan]),
          "base_logprob": r.get("base_logprob"),
        })  # fmt: skip
  DataFrame(table).to_csv(path, index=False, float_format="%.4g")
  return path


def small_multiples(cells: Sequence[tuple[str, dict]], key: str, zero: bool) -> list[str]:
  """A small figure for every cell, all on one scale, bands included."""
  lines = {}
  for name, state in cells:
    of = lambda k: np.array([read.number(e.get(k)) for e in state["evaluations"]])  # noqa: B023, E731
    steps = [e["step"] for e in state["evaluations"]]
    lines[name] = charts.Line(key, "gap", "eval", steps, of(key), charts.Z95 * of(f"{key}_se"))
  reach = [
    line.values + sign * np.nan_to_num(line.half) for line in lines.values() for sign in (-1, 1)
  ]
  values = np.concatenate(reach or [[]])
  values = values[np.isfinite(values)]
  if not values.size:
    return []
  scale, figures = charts.y_axis(values, zero=zero)[:2], []
  for name, state in cells:
    title = f"step {state['step']} of {state['steps']}"
    figures.append(
      charts.figure(name, title, [lines[name]], state["steps"], "points", scale=scale, zero=zero)
    )
  return figures


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "study.page")
  parser.add_argument("--study", required=True, metavar="FILE.py[:ARGUMENT]", help="study file")
  parser.add_argument("--workdir", required=True, help="folder of all cells")
  args = flags.parse(parser, argv)
  study, workdir = design.load(args.study), pathlib.Path(args.workdir)
  if not workdir.is_dir():
    raise UserError(f"--workdir={workdir}: no such folder; run the study first")
  print(confirm.table(study, workdir))
  print(f"page: {render_page(study, workdir)}")
  print(f"held-out replies: {write_replies(study, workdir)}")


if __name__ == "__main__":
  run_main(main, sys.argv)
