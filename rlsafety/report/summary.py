"""The last lines of a run: what changed on held-out users, as a table, and the report."""

import pathlib

from rlsafety.report import render
from rlsafety.rundir import read

NAMES = {"reward": "reward", "acc": "ACC", "hex": "HEX"}
COLUMNS = {"gameable": "gameable", "non_gameable": "non-gameable", "gap": "gap"}


def finish(workdir: pathlib.Path) -> dict:
  """Writes report.html; returns what summary.json holds, the printed table included."""
  run = read.load_run(workdir)
  overview = render.overview(run, read.eval_rollouts(run))
  text = table(overview)
  page = render.write_report(workdir)
  print(text, flush=True)
  print(f"report: {page}", flush=True)
  return {"step": overview["last"]["step"], "table": text, **as_dict(overview)}


def as_dict(overview: dict) -> dict:
  """{"reward_gameable": {"before": [mean, se], "after": [...], "change": [...]}, ...}."""
  return {
    f"{row['name']}_{cell['what']}": {k: list(cell[k]) for k in ("before", "after", "change")}
    for row in overview["rows"]
    for cell in row["cells"]
  }


def table(overview: dict) -> str:
  """Before, after and change with standard errors; * where change > 2 standard errors."""
  first, last = overview["first"], overview["last"]
  lines = [
    f"{first['prompts']} held-out prompts x {first['samples']} replies, "
    f"step {first['step']} -> {last['step']}; mean +- standard error over prompts, "
    "the change paired by prompt, * beyond two standard errors",
    f"{'':8}{'users':14}{'before':>16}{'after':>16}{'change':>16}",
  ]
  for row in overview["rows"]:
    for cell in row["cells"]:
      cells = "".join(f"{mean:9.2f} +-{se:5.2f}" for mean, se in (cell["before"], cell["after"]))
      mean, se = cell["change"]
      star = " *" if cell["notable"] else ""
      change = f"{mean:+9.2f} +-{se:5.2f}{star}"
      lines.append(f"{NAMES[row['name']]:8}{COLUMNS[cell['what']]:14}{cells}{change}")
  return "\n".join(lines)
