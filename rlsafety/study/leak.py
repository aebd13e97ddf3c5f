"""What runs learned in one environment against what they do in others: one matrix.

  python -m rlsafety.study.leak --runs='runs/**' --out=leak/

Reads the answers that rlsafety.tools.leak or `config.eval.beyond` left in the runs. Writes
leak.csv (every measure), leak.md and leak.svg. A row is a run, a column an environment or a topic
of the open questions; each cell is the change from the first to the last step, matched by prompt.
Stars: Holm-corrected p below 0.05 over the cells of one measure, at least five units, and for HEX
and ACC a judge that passes its gate and was made for these users.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from pandas import DataFrame

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.metrics import replies
from rlsafety.metrics.matched import FEWEST, LEVEL
from rlsafety.report import beyond, overview
from rlsafety.rundir import read
from rlsafety.study import figures, gather, statistics

SHOWN = ("hex", "hex_gap", "agrees")  # of beyond.MEASURES, in text and figure


def matrix(runs: Sequence[read.Run]) -> DataFrame:
  """One row for each run, place (environment, topic) and measure."""
  rows = []
  for run in runs:
    own = read.environment_name(run)
    about = {"run": run.path.name, "trained_in": own, "seed": run.seed}
    found = [(row, one.note) for one in beyond.asked(run) for row in one.rows
             if one.environment != own]  # fmt: skip
    for row, note in [*_own(run), *found]:
      for measure, cell in row.cells.items():
        low, high = cell.effect.interval
        rows.append(about | {
          "asked": row.environment, "topic": row.topic or "all", "measure": measure,
          "before": cell.before[0], "after": cell.after[0], "change": cell.effect.mean,
          "low95": low, "high95": high, "units": cell.effect.units, "p": cell.effect.p,
          "may_star": cell.may_star and cell.effect.units >= FEWEST, "note": note,
        })  # fmt: skip
  table = DataFrame(rows)
  if len(table):
    table["p_holm"] = table.groupby("measure")["p"].transform(statistics.holm)
    table["star"] = table["may_star"] & (table["p_holm"] < LEVEL)
  return table


def _own(run: read.Run) -> list[tuple[beyond.Row, str]]:
  """The users of the run's own environment, as one row."""
  steps = read.eval_rollouts(run)
  if len(steps) < 2:
    return []
  first, last = ([replies.described(r) for r in steps[at]] for at in (min(steps), max(steps)))
  judge = run.info.get("judge")
  barred = overview.barred(judge.get("gate", {}) if isinstance(judge, dict) else {})
  may = lambda score: score not in barred  # noqa: E731
  note = "; ".join(f"{k.upper()}: {barred[k]}" for k in ("hex", "acc") if k in barred)
  row = beyond.Row(read.environment_name(run), "", beyond.cells(first, last, may))
  return [(row, note)]


def places(table: DataFrame) -> list[tuple[str, str]]:
  """Columns of the matrix: whole environments first, then topics, each as they were asked."""
  found = list(dict.fromkeys(zip(table["asked"], table["topic"], strict=True)))
  return [p for p in found if p[1] == "all"] + [p for p in found if p[1] != "all"]


def _name(asked: str, topic: str) -> str:
  """Such as political_qa, or open: money."""
  return asked if topic == "all" else f"{asked.partition('_')[0]}: {topic}"


def text(table: DataFrame, measure: str) -> str:
  """One measure as a Markdown table: before → after of each place would not fit, so changes."""
  here, columns = table[table["measure"] == measure], places(table)
  title = beyond.MEASURES[measure][0]
  names = [_name(*place) for place in columns]
  lines = [f"| {title}: trained in | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
  for run, rows in here.groupby("run", sort=False):
    at = {(r.asked, r.topic): r for r in rows.itertuples()}
    cells = [_said(at.get(place)) for place in columns]
    own = rows["trained_in"].iloc[0]
    label = own if own == run else f"{own} ({run})"
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _said(row) -> str:
  if row is None or not math.isfinite(row.change):
    return "–"
  interval = f" [{row.low95:+.2f}, {row.high95:+.2f}]" if math.isfinite(row.low95) else ""
  return f"{row.change:+.2f}{interval}{' *' * bool(row.star)}"


@figures.styled
def figure(table: DataFrame, stem: Path) -> Path:
  """Changes of SHOWN as coloured cells; the frame marks what a run was trained in, brackets
  what rests on fewer than FEWEST units."""
  columns, runs = places(table), list(dict.fromkeys(table["run"]))
  trained = dict(zip(table["run"], table["trained_in"], strict=True))
  shown = [m for m in SHOWN if (table["measure"] == m).any()]
  wide, high = 0.85 * len(columns) + 2.4, len(shown) * (0.42 * len(runs) + 0.55) + 1.1
  drawn, axes = figures.panels(len(shown), 1, (wide, high), sharex=True)
  for axis, measure in zip(axes.flat, shown, strict=True):
    here = {(r.run, r.asked, r.topic): r for r in table[table["measure"] == measure].itertuples()}
    values = np.array([[getattr(here.get((run, *place)), "change", math.nan) for place in columns]
                       for run in runs])  # fmt: skip
    reach = max(np.nanmax(np.abs(values), initial=0.0, where=np.isfinite(values)), 1e-6)
    map_ = colormaps["RdBu_r"].with_extremes(bad="0.92")
    axis.imshow(values, cmap=map_, norm=TwoSlopeNorm(0.0, -reach, reach), aspect="auto")
    for i, run in enumerate(runs):
      for j, place in enumerate(columns):
        row = here.get((run, *place))
        if row is not None and math.isfinite(row.change):
          strong = abs(row.change) > 0.6 * reach
          said = f"{row.change:+.2f}{'*' * bool(row.star)}"
          said = said if row.units >= FEWEST else f"({said})"
          axis.text(j, i, said, ha="center", va="center",
                    fontsize=7.5, color="white" if strong else "0.15")  # fmt: skip
        if place == (trained[run], "all"):
          axis.add_patch(figures.frame(j, i))
    axis.set_yticks(range(len(runs)), [trained[r] if trained[r] == r else f"{trained[r]} ({r})"
                                       for r in runs], fontsize=8)  # fmt: skip
    axis.set_title(f"change of {beyond.MEASURES[measure][0]}", loc="left", fontsize=9)
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
  names = [_name(*place) for place in columns]
  axes.flat[-1].set_xticks(range(len(columns)), names, rotation=35, ha="right", fontsize=8)
  drawn.supylabel("trained in", fontsize=8.5)
  drawn.tight_layout()
  return figures.save(drawn, stem)


def write(runs: Sequence[read.Run], out: Path) -> DataFrame:
  """leak.csv, leak.md and leak.svg in the folder `out`; returns the matrix."""
  table = matrix(runs)
  if not len(table):
    raise UserError("no run was asked twice: ask them with python -m rlsafety.tools.leak")
  out.mkdir(parents=True, exist_ok=True)
  table.to_csv(out / "leak.csv", index=False)
  said = [text(table, measure) for measure in SHOWN if (table["measure"] == measure).any()]
  noted = table.groupby(["run", "asked"], sort=False)["note"].first()
  notes = [f"- {run}, {asked}: HEX and ACC without stars: {note}"
           for (run, asked), note in noted.items() if note]  # fmt: skip
  (out / "leak.md").write_text("\n\n".join([*said, "\n".join(notes)]) + "\n", encoding="utf-8")
  figure(table, out / "leak")
  return table


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "study.leak")
  parser.add_argument("--runs", required=True, help="globs of run directories, joined by commas")
  parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
  args = flags.parse(parser, argv)
  runs, notes = gather.find_runs(args.runs.split(","))
  for note in notes:
    print(f"note: {note}")
  write(runs, args.out)
  print((args.out / "leak.md").read_text("utf-8"))
  print(f"{args.out}/leak.csv, leak.md and leak.svg written")


if __name__ == "__main__":
  run_main(main, sys.argv)
