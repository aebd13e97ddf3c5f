"""Tables of a study: cells, correlations with benchmarks, partial correlations, variants.

All return pandas frames whose columns name n, seeds and the correction; `write` puts one
on disk as CSV, Markdown and LaTeX with a caption that names the run directories too.
"""

import csv
import itertools
import math
import operator
import pathlib
import re

import numpy as np
from scipy import stats

from rlsafety.errors import UserError
from rlsafety.metrics import curves
from rlsafety.study import statistics
from rlsafety.study.gather import BENCHMARKS, by_number, slug

# Columns of a file of scores that say where a score comes from: never tested as scores.
ABOUT = re.compile(r"(n|p|seeds|runs|correction|source|in_paper|hub_name|.*_(n|p|se|sd|std))$")
POWER = "Fisher's z for Pearson, no ties"


def cell_table(cells):
  """One row per cell: every scalar with its SD over seeds, and where it came from.

  `<scalar>_full` are the same with half-filled edge windows dropped.
  """
  import pandas as pd

  rows = []
  for c in cells:
    row = {"model": c.model, "environment": c.environment, "variant": c.variant,
           "n_seeds": len(c.seeds), "seeds": " ".join(map(str, c.seeds)), **c.counts}  # fmt: skip
    for name, value in c.values.items():
      row[name], row[f"{name}_sd"] = value, c.sd.get(name, math.nan)
      if name.startswith(("max_", "step_of_max_")) and name in c.full:
        row[f"{name}_full"] = c.full[name]
    rows.append(row | {"runs": " ".join(c.sources)})
  return pd.DataFrame(rows)


def seed_table(cells):
  """One row per run: its own scalars, from its own smoothed curves."""
  import pandas as pd

  rows = []
  for c in cells:
    for i, seed in enumerate(c.seeds if c.per_seed else ()):
      row = {"model": c.model, "environment": c.environment, "variant": c.variant, "seed": seed}
      rows.append(row | {k: v[i] for k, v in c.per_seed.items()} | {"run": c.sources[i]})
  return pd.DataFrame(rows)


def load_benchmarks(path=None, notes=None):
  """Our per-model scores, with the user's file (a `model` column) laid over them.

  Columns that say something about a score (n, runs, delta_ce_se and so on) are left out and
  named in `notes`; any other column must hold numbers.
  """
  table = _scores_table(BENCHMARKS, BENCHMARKS, [])
  if path:
    left_out = []
    table = _scores_table(path, f"--benchmarks={path}", left_out).combine_first(table)
    if left_out and notes is not None:
      notes.append(f"--benchmarks={path}: columns taken as no scores: {', '.join(left_out)}")
  return table


def _scores_table(path, says, left_out):
  import pandas as pd

  try:
    table = pd.read_csv(path, comment="#")
  except (OSError, ValueError) as error:
    raise UserError(f"{says}: {error}") from None
  if "model" not in table:
    raise UserError(f"{says}: needs a column named 'model'")
  table.index = [slug(m) for m in table["model"]]
  for name in table.index[table.index.duplicated()]:
    rows = ", ".join(map(str, table.loc[name, "model"]))
    raise UserError(f"{says}: two rows for one model ({rows}); keep one")
  left_out += [c for c in table if ABOUT.match(c)]
  table = table.drop(columns=["model", *left_out])
  for column in table:
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = table[column][values.isna() & table[column].notna()]
    if len(wrong):
      raise UserError(f"{says}: column {column!r} holds {wrong.iloc[0]!r}, which is no number")
    table[column] = values.astype(float)
  return table


def put_row(path, row: dict) -> None:
  """Writes a model's row into a CSV of scores that `load_benchmarks` reads.

  What the file has for other models, and under other columns for this one, stays.
  """
  path, rows = pathlib.Path(path), {}
  if path.exists():
    with path.open(encoding="utf-8", newline="") as file:
      rows = {old.get("model"): old for old in csv.DictReader(file)}
    if None in rows:
      raise UserError(f"{path}: is no table of scores (no column 'model'); give another --out")
  rows[row["model"]] = {**rows.get(row["model"], {}), **row}
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8", newline="") as file:
    columns = dict.fromkeys(name for each in rows.values() for name in each)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())


def correlation_table(
  cells, benchmarks, outcomes, methods=("spearman", "pearson"), draws=1_000, rhos=(0.6,), notes=None
):
  """One row per outcome x environment x variant x benchmark x method.

  The family of a correction is all rows of one method in this table. `detectable` is the
  |rho| that this n finds with probability 0.8 at 0.05; `power_0.6` is the chance of
  finding 0.6, and so for all `rhos`. notes get the pairs for which n or spread is too small.
  """
  import pandas as pd

  rows, skipped = [], {}
  for outcome, (where, group) in itertools.product(outcomes, treatments(cells)):
    known = [c for c in group if math.isfinite(c.values.get(outcome, math.nan))]
    scores = covariates(known, benchmarks)
    y = np.array([c.values[outcome] for c in known])
    for benchmark, x in scores.items():
      use = np.isfinite(x)
      if use.sum() < 4 or np.ptp(x[use]) == 0:
        if len(known):
          skipped.setdefault((where, f"{benchmark} (n = {use.sum()})"), []).append(outcome)
        continue
      used = [c for c, u in zip(known, use, strict=True) if u]
      seeds = _seed_matrix(used, outcome)
      for method in methods:
        found = statistics.correlate(x, y, method)
        loo = list(statistics.leave_one_out(x, y, [c.model for c in known], method).values())
        models = statistics.bootstrap_models(x, y, method, draws)
        row = {
          "outcome": outcome, "environment": where[0], "variant": where[1],
          "benchmark": benchmark, "method": method, "n": found.n, "r": found.r,
          "low95": found.low, "high95": found.high, "p": found.p,
          "p_kind": "exact" if found.exact else f"{statistics.PERMUTATIONS} permutations",
          "p_t": found.p_t, "loo_min": min(loo), "loo_max": max(loo),
          "models_low": models[0], "models_high": models[1],
        }  # fmt: skip
        if seeds is not None:
          low, high = statistics.bootstrap_seeds(x[use], seeds, method, draws)
          each = statistics.per_seed(x[use], seeds, method)
          row |= {"seeds_low": low, "seeds_high": high}
          row |= {"per_seed": " ".join(f"{r:.2f}" for r in each)}
        row |= {
          **{f"power_{rho:g}": statistics.power(rho, found.n) for rho in rhos},
          "detectable": statistics.detectable(found.n),
          "power_by": POWER,
          "seeds": seeds_text(used),
          "models": " ".join(c.model for c in used),
        }
        rows.append(row)
  grouped = {}
  for (where, benchmark), names in skipped.items():
    grouped.setdefault((where, ", ".join(names)), []).append(benchmark)
  if notes is not None:
    alike = {}  # one note for all cells that lack the same
    for (where, names), found in grouped.items():
      alike.setdefault(f"{names} with {', '.join(found)}", []).append(" / ".join(where))
    notes += [f"{', '.join(places)}: not correlated, below 4 models or all equal: {what}"
              for what, places in alike.items()]  # fmt: skip
  table = pd.DataFrame(rows)
  if len(table):
    by_method = table.groupby("method")["p"]
    table.insert(table.columns.get_loc("p") + 1, "p_holm", by_method.transform(statistics.holm))
    table.insert(
      table.columns.get_loc("p_holm") + 1,
      "p_bh",
      by_method.transform(statistics.benjamini_hochberg),
    )
    table["family"] = by_method.transform("count")
  return table


def partial_table(cells, benchmarks, outcomes):
  """Spearman partial correlations: size given capability, capability given size, and
  every other benchmark given each of the two."""
  import pandas as pd

  rows = []
  for outcome, (where, group) in itertools.product(outcomes, treatments(cells)):
    known = [c for c in group if math.isfinite(c.values.get(outcome, math.nan))]
    scores = covariates(known, benchmarks)
    y = np.array([c.values[outcome] for c in known])
    for given in ("num_params", "capability_score"):
      for benchmark, x in scores.items():
        if benchmark == given or given not in scores:
          continue
        found = statistics.partial(x, y, [scores[given]])
        if math.isfinite(found.r):
          use = np.isfinite(x) & np.isfinite(scores[given])
          rows.append(
            {"outcome": outcome, "environment": where[0], "variant": where[1],
             "benchmark": benchmark, "given": given, "n": found.n, "r": found.r,
             "low95": found.low, "high95": found.high, "p": found.p,
             "seeds": seeds_text([c for c, u in zip(known, use, strict=True) if u])}
          )  # fmt: skip
  table = pd.DataFrame(rows)
  if len(table):
    table.insert(10, "p_holm", statistics.holm(table["p"]))
    table["family"] = len(table)
  return table


def variant_table(cells, outcomes, reference=None):
  """Each variant against the reference within an environment, paired by model.

  reference: a variant's label; None takes the trained one with the most models, of equals one
  that logs its own rollouts. The interval is a paired t interval over models. A variant
  without the outcome has no row.
  """
  import pandas as pd

  rows = []
  for environment, outcome in itertools.product(sorted({c.environment for c in cells}), outcomes):
    every = [c for c in cells if c.environment == environment]
    here = [c for c in every if math.isfinite(c.values.get(outcome, math.nan))]
    names = sorted({c.variant for c in here})
    rank = {
      c.variant: (not c.initial, sum(o.variant == c.variant for o in every), c.steps is not None)
      for c in every
    }
    base = reference if reference in names else max(names, key=rank.get, default="")
    for variant in names:
      value = {
        v: {c.model: c.values[outcome] for c in here if c.variant == v} for v in (base, variant)
      }
      own = np.array(list(value[variant].values()))
      row = {
        "environment": environment, "outcome": outcome, "variant": variant,
        "models": int(np.isfinite(own).sum()),
        "seeds": seeds_text([c for c in here if c.variant == variant]),
        "mean": float(curves.nanmean(own)), "sd_models": float(curves.nanstd(own)),
        "against": base, "paired_models": 0, "difference": math.nan,
        "low95": math.nan, "high95": math.nan,
      }  # fmt: skip
      if variant != base:
        mean, se, n = curves.paired_change(value[base], value[variant])
        half = stats.t.isf(0.025, n - 1) * se if n > 1 else math.nan
        row |= {"paired_models": n, "difference": mean}
        row |= {"low95": mean - half, "high95": mean + half}
      rows.append(row)
  return pd.DataFrame(rows)


def covariates(cells, benchmarks) -> dict[str, np.ndarray]:
  """{benchmark: [models]}; a model that the table lacks gets its size from its run."""
  names = [slug(c.model) for c in cells]
  out = {b: benchmarks[b].reindex(names).to_numpy(float) for b in benchmarks.columns}
  if "num_params" in out:
    own = np.array([c.parameters for c in cells])
    out["num_params"] = np.where(np.isfinite(out["num_params"]), out["num_params"], own)
  return out


def treatments(cells):
  """((environment, variant), its cells) in order."""
  key = operator.attrgetter("environment", "variant")
  return [(k, list(g)) for k, g in itertools.groupby(sorted(cells, key=key), key)]


def _seed_matrix(cells, outcome):
  """[models, seeds] of per-seed scalars, NaN where a seed was not run; None if unknown."""
  if not cells or not all(outcome in c.per_seed for c in cells):
    return None
  seeds = sorted({s for c in cells for s in c.seeds}, key=by_number)
  matrix = np.full((len(cells), len(seeds)), np.nan)
  for i, c in enumerate(cells):
    for s, value in zip(c.seeds, c.per_seed[outcome], strict=True):
      matrix[i, seeds.index(s)] = value
  return matrix


def seeds_text(cells) -> str:
  """The seeds behind a row: one list if all models share it, else the range of counts."""
  lists = {tuple(c.seeds) for c in cells}
  if len(lists) == 1:
    return " ".join(map(str, next(iter(lists))))
  counts = [len(c.seeds) for c in cells]
  return f"{min(counts)} to {max(counts)} per model"


def write(table, stem, caption: str, columns=None, digits: int = 3) -> list[pathlib.Path]:
  """Writes STEM.csv (all columns, full precision), STEM.md and STEM.tex (`columns`)."""
  stem = pathlib.Path(stem)
  table.to_csv(stem.with_suffix(".csv"), index=False)
  shown = table[[c for c in columns if c in table]] if columns else table
  head = [str(c) for c in shown.columns]
  body = text_rows(shown, digits)
  lines = [f"# {stem.name.replace('_', ' ')}", "", caption, ""]
  lines += ["| " + " | ".join(x.replace("|", "\\|") for x in r) + " |" for r in [head]]
  lines += ["|" + "---|" * len(head)]
  lines += ["| " + " | ".join(x.replace("|", "\\|") for x in r) + " |" for r in body]
  stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
  tex = [
    "\\begin{table}", "\\centering", f"\\caption{{{latex(caption)}}}",
    f"\\begin{{tabular}}{{{'l' * len(head)}}}", "\\toprule",
    " & ".join(map(latex, head)) + r" \\", "\\midrule",
    *(" & ".join(map(latex, r)) + r" \\" for r in body),
    "\\bottomrule", "\\end{tabular}", "\\end{table}",
  ]  # fmt: skip
  stem.with_suffix(".tex").write_text("\n".join(tex) + "\n", encoding="utf-8")
  return [stem.with_suffix(s) for s in (".csv", ".md", ".tex")]


def text_rows(table, digits: int = 3) -> list[list[str]]:
  """The table as strings; a column of whole numbers gets no decimals, NaN is a dash."""
  columns = []
  for name in table:
    values = list(table[name])
    numbers = [v for v in values if isinstance(v, (float, np.floating))]
    places = digits if any(v % 1 for v in numbers if math.isfinite(v)) else 0
    columns.append([_cell_text(v, places) for v in values])
  return [list(row) for row in zip(*columns, strict=True)]


def _cell_text(value, digits) -> str:
  if isinstance(value, (float, np.floating)):
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")
  return str(value)


def latex(text: str) -> str:
  """Escapes LaTeX's special characters."""
  special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
             "−": "$-$", "–": "--"}  # fmt: skip
  special |= {c: "\\" + c for c in "&%$#_{}"}
  return "".join(special.get(c, c) for c in text)
