"""The last lines of a run: what changed on held-out users, as a table, and the report."""

import pathlib

from rlsafety.errors import UserError
from rlsafety.report import beyond, gaming, render
from rlsafety.report.charts import number
from rlsafety.report.overview import Overview, overview, shares, span
from rlsafety.rundir import read

NAMES = {"reward": "reward", "acc": "ACC", "hex": "HEX"}


def finish(workdir: pathlib.Path) -> dict:
  """Writes report.html; returns what summary.json holds, the table to print included."""
  run = read.load_run(workdir)
  evaluations = read.eval_rollouts(run)
  found, moved = overview(run, evaluations), gaming.features(evaluations, read.train_rollouts(run))
  if found is None:
    raise UserError(f"{run.path / 'eval/summary.jsonl'}: has no evaluation, so there is no summary")
  others, tasks = beyond.asked(run), beyond.tasks(found.first, found.last)
  render.write_report(workdir, moved=moved)
  return {
    "step": found.last["step"],
    "table": "\n".join([table(found), *gaming.table(moved), *beyond.table(others, tasks)]),
    **as_dict(found),
    **gaming.as_dict(moved),
    **beyond.as_dict(others, tasks),
  }


def as_dict(found: Overview) -> dict:
  """{"reward_gameable": {"before": [mean, error], "after", "change", "interval": [low, high],
  "detectable", "within", "units"}, ...}: see `matched.Effect`."""
  out = {}
  for name, cells in found.rows.items():
    for what, cell in cells.items():
      effect = cell.effect
      own = {k: list(getattr(cell, k)) for k in ("before", "after", "change")}
      own |= {"interval": list(effect.interval), "units": effect.units}
      own |= {"detectable": effect.detectable, "within": effect.within}
      out[f"{name}_{what}"] = own
  return out


def table(found: Overview) -> str:
  """Before, after and the matched change with its interval; * where `Change.notable`."""
  first, last = found.first, found.last
  units = max(cell.effect.units for cells in found.rows.values() for cell in cells.values())
  lines = [
    f"{first.get('prompts', '?')} held-out prompts of {units} units x {first.get('samples', '?')} "
    f"replies, step {first['step']} -> {last['step']}; the change matched by prompt, with its 95% "
    "interval over units (* p < 0.05 by Holm over all rows that may have one) and the change that "
    "one row alone would find in 80% of such runs",
    f"{'':8}{'users':14}{'before':>8}{'after':>8}{'change':>8}{'interval':>18}{'detectable':>12}",
  ]
  silent = [n for n, cells in found.rows.items() if all(c.unscored for c in cells.values())]
  for name, cells in found.rows.items():
    if name in silent:
      lines.append(f"{NAMES[name]:8}no reply has a score: the judge gives none")
      continue
    for what, cell in cells.items():
      values = [number(cell.before[0]), number(cell.after[0]), number(cell.change[0], sign=True)]
      tail = f"{span(cell.effect.interval):>18}{number(cell.effect.detectable):>12}"
      row = f"{NAMES[name]:8}{what.replace('_', '-'):14}" + "".join(f"{v:>8}" for v in values)
      lines.append((row + tail).replace("−", "-") + " *" * cell.notable)
  barred = {name: why for name, why in found.barred.items() if name not in silent}
  lines += [f"no stars for {NAMES[name]}: {why}" for name, why in barred.items()]
  return "\n".join(lines + shares(first, last))
