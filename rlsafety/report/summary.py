"""The last lines of a run: what changed on held-out users, as a table, and the report."""

import pathlib

from rlsafety.errors import UserError
from rlsafety.report import render
from rlsafety.report.overview import Overview, overview, plus_minus
from rlsafety.rundir import read

NAMES = {"reward": "reward", "acc": "ACC", "hex": "HEX"}


def finish(workdir: pathlib.Path) -> dict:
  """Writes report.html; returns what summary.json holds, the printed table included."""
  run = read.load_run(workdir)
  found = overview(run, read.eval_rollouts(run))
  if found is None:
    raise UserError(f"{run.path / 'eval/summary.jsonl'}: has no evaluation, so there is no summary")
  text = table(found)
  page = render.write_report(workdir)
  print(text, flush=True)
  print(f"report: {page}", flush=True)
  return {"step": found.last["step"], "table": text, **as_dict(found)}


def as_dict(found: Overview) -> dict:
  """{"reward_gameable": {"before": [mean, se], "after": [...], "change": [...]}, ...}."""
  return {
    f"{name}_{what}": {k: list(getattr(cell, k)) for k in ("before", "after", "change")}
    for name, cells in found.rows.items()
    for what, cell in cells.items()
  }


def table(found: Overview) -> str:
  """Before, after and change with standard errors; * where the change is notable."""
  first, last = found.first, found.last
  lines = [
    f"{first.get('prompts', '?')} held-out prompts x {first.get('samples', '?')} replies, "
    f"step {first['step']} -> {last['step']}; mean +- standard error over prompts, "
    "the change paired by prompt, * beyond two standard errors",
    f"{'':8}{'users':14}{'before':>16}{'after':>16}{'change':>16}",
  ]
  for name, cells in found.rows.items():
    for what, cell in cells.items():
      values = plus_minus(cell.before), plus_minus(cell.after), plus_minus(cell.change, sign=True)
      row = f"{NAMES[name]:8}{what.replace('_', '-'):14}" + "".join(f"{v:>17}" for v in values)
      lines.append(row.replace("±", "+-").replace("−", "-") + " *" * cell.notable)
  return "\n".join(lines)
