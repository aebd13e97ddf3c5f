"""Tables of a study: cells, correlations with benchmarks, partial correlations, variants.

All return pandas frames whose columns name n, seeds and the correction; `write` puts one
on disk as CSV, Markdown and LaTeX with a caption that names the run directories too.
"""

import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame
from scipy import stats

from rlsafety.errors import UserError
from rlsafety.metrics.gaps import mean_and_error
from rlsafety.study import statistics
from rlsafety.study.gather import BENCHMARKS, Cell, Cells, numbers, read_csv, slug

# Columns of a file of scores that say where a score comes from: never tested as scores.
ABOUT = re.compile(r"(n|p|seeds|runs|correction|source|in_paper|hub_name|.*_(n|p|se|sd|std))$")
POWER = "simulated, of Spearman's exact test, no ties"


def cell_table(cells: Cells) -> DataFrame:
  """One row per cell: every scalar with its SD over seeds, and where it came from.

  `<scalar>_full` are the same with half-filled edge windows dropped.
  """
  rows = []
  for c in cells:
    row = {"model": c.model, "environment": c.environment, "variant": c.variant,
           "n_seeds": len(c.seeds), "seeds": " ".join(map(str, c.seeds)), **c.counts}  # fmt: skip
    for name, value in c.values.items():
      row[name], row[f"{name}_sd"] = value, c.sd.get(name, math.nan)
      if name.startswith(("max_", "step_of_max_")) and name in c.full:
        row[f"{name}_full"] = c.full[name]
    rows.append(row | {"runs": " ".join(c.sources)})
  return DataFrame(rows)


def seed_table(cells: Cells) -> DataFrame:
  """One row per run: its own scalars, from its own smoothed curves."""
  rows = []
  for c in cells:
    about = {"model": c.model, "environment": c.environment, "variant": c.variant}
    for own, source in zip(c.per_seed.itertuples(), c.sources, strict=False):
      own = own._asdict()
      rows.append(about | {"seed": own.pop("Index"), **own, "run": source})
  return DataFrame(rows)


def load_benchmarks(path: str | Path = "", notes: list[str] | None = None) -> DataFrame:
  """Our per-model scores, with the user's file (a `model` column) laid over them, by `slug`.

  A row that names a `run` too holds for that run directory alone and has the run's path as its
  index: a trained policy's scores are not its base's. Columns that say something about a score
  (n, runs, delta_ce_se and so on) are left out and named in `notes`; any other column must hold
  numbers.
  """
  table = _scores_table(BENCHMARKS, str(BENCHMARKS), [])
  if path:
    left_out: list[str] = []
    table = _scores_table(path, f"--benchmarks={path}", left_out).combine_first(table)
    if left_out and notes is not None:
      notes.append(f"--benchmarks={path}: columns taken as no scores: {', '.join(left_out)}")
  return table


def _scores_table(path: str | Path, says: str, left_out: list[str]) -> DataFrame:
  table = read_csv(path, says)
  if "model" not in table:
    raise UserError(f"{says}: needs a column named 'model'")
  of = table["run"] if "run" in table else [""] * len(table)
  table.index = [_key(m, r) for m, r in zip(table["model"], of, strict=True)]
  for name in table.index[table.index.duplicated()]:
    rows = ", ".join(map(str, table.loc[name, "model"]))
    raise UserError(f"{says}: two rows for one model or run ({rows}); keep one")
  left_out += [c for c in table if ABOUT.match(c)]
  table = table.drop(columns=["model", "run", *left_out], errors="ignore")
  return table.apply(numbers, says=says)


def _key(model: str, run: object) -> str:
  """Index of a row of scores: the run directory that it holds for, or else the model."""
  return slug(model) if pd.isna(run) or not str(run) else str(Path(str(run)).absolute())


def put_row(path: str | Path, row: dict) -> None:
  """Writes the row of a model, or of a `run` of it, into a CSV that `load_benchmarks` reads.

  What the file has for other models and runs, and under other columns for this one, stays.
  """
  path, rows = Path(path), {}
  if path.exists():
    table = read_csv(path, str(path), str)
    if "model" not in table:
      raise UserError(f"{path}: is no table of scores (no column 'model'); give another --out")
    rows = {_key(old["model"], old.get("run", "")): old for old in table.to_dict("records")}
  key = _key(row["model"], row.get("run", ""))
  rows[key] = {**rows.get(key, {}), **row}
  path.parent.mkdir(parents=True, exist_ok=True)
  DataFrame(list(rows.values())).to_csv(path, index=False)


def _known(
  cells: Cells, benchmarks: DataFrame, outcomes: Sequence[str]
) -> Iterator[tuple[dict, list[Cell], np.ndarray, dict[str, np.ndarray]]]:
  """For each outcome and treatment: both by name, the cells that have the outcome, its values
  [cells], and {benchmark: [cells]}."""
  for outcome, ((environment, variant), group) in itertools.product(outcomes, treatments(cells)):
    known = [c for c in group if math.isfinite(c.value(outcome))]
    about = {"outcome": outcome, "environment": environment, "variant": variant}
    yield about, known, np.array([c.value(outcome) for c in known]), covariates(known, benchmarks)


def correlation_table(
  cells: Cells,
  benchmarks: DataFrame,
  outcomes: Sequence[str],
  draws: int = 1_000,
  rhos: Sequence[float] = (0.6,),
  notes: list[str] | None = None,
) -> DataFrame:
  """One row per outcome x environment x variant x benchmark x method.

  The family of a correction is all rows of one method in this table. `detectable` is the
  |rho| that this n finds with probability 0.8 at 0.05; `power_0.6` is the chance of
  finding 0.6, and so for all `rhos`. notes get the pairs for which n or spread is too small.
  """
  rows, skipped = [], {}
  for about, known, y, scores in _known(cells, benchmarks, outcomes):
    for benchmark, x in scores.items():
      use = np.isfinite(x)
      if use.sum() < 4 or np.ptp(x[use]) == 0:
        if known:
          key = about["environment"], about["variant"], f"{benchmark} (n = {use.sum()})"
          skipped.setdefault(key, []).append(about["outcome"])
        continue
      used = list(itertools.compress(known, use))
      for method in statistics.METHODS:
        found = statistics.correlate(x, y, method)
        loo = statistics.leave_one_out(x, y, [c.model for c in known], method).values()
        families = statistics.without_families(x, y, [c.model for c in known], method).values()
        models = statistics.bootstrap_models(x, y, method, draws)
        row = about | {
          "benchmark": benchmark, "method": method, "n": found.n, "r": found.r,
          "low95": found.low, "high95": found.high, "p": found.p,
          "p_kind": "exact" if found.exact else f"{statistics.PERMUTATIONS} permutations",
          "p_t": found.p_t, "p_none": statistics.equivalence(found.r, found.n, method=method),
          "loo_min": min(loo), "loo_max": max(loo), "families_min": min(families),
          "families_max": max(families),
          "models_low": models[0], "models_high": models[1],
        }  # fmt: skip
        if all(about["outcome"] in c.per_seed for c in used):
          seeds = DataFrame([c.per_seed[about["outcome"]] for c in used])
          seeds = seeds[sorted(seeds, key=str)].to_numpy()
          low, high = statistics.bootstrap_seeds(x[use], seeds, method, draws)
          each = statistics.per_seed(x[use], seeds, method)
          row |= {"seeds_low": low, "seeds_high": high}
          row |= {"per_seed": " ".join(f"{r:.2f}" for r in each)}
          row |= {"per_seed_mean": each.mean(), "per_seed_sd": pd.Series(each).std()}
        row |= {
          **{f"power_{rho:g}": statistics.power(rho, found.n) for rho in rhos},
          "detectable": statistics.detectable(found.n),
          "power_by": POWER,
          "seeds": seeds_text(used),
          "models": " ".join(c.model for c in used),
        }
        rows.append(row)
  if notes is not None:
    notes += _not_correlated(skipped)
  table = DataFrame(rows)
  if len(table):
    p = table.groupby("method")["p"]
    after = table.columns.get_loc("p") + 1
    table.insert(after, "p_holm", p.transform(statistics.holm))
    table.insert(after + 1, "p_bh", p.transform(statistics.benjamini_hochberg))
    table["family"] = p.transform("count")
  return table


def per_seed_table(correlations: DataFrame) -> DataFrame:
  """Spearman's correlation at each seed alone, mean and SD (n - 1) over the seeds: one row per
  outcome and treatment, two columns per benchmark. This is how the study prints its chain of
  environments; treatments of one seed have no row."""
  if "per_seed_sd" not in correlations:
    return DataFrame()
  use = (correlations["method"] == "spearman") & correlations["per_seed_sd"].notna()
  rows: dict[tuple, dict] = {}
  for row in correlations[use].to_dict("records"):
    about = {k: row[k] for k in ("outcome", "environment", "variant", "seeds")}
    own = rows.setdefault(tuple(about.values()), about)
    own[row["benchmark"]] = row["per_seed_mean"]
    own[f"{row['benchmark']}_sd"] = row["per_seed_sd"]
  return DataFrame(list(rows.values()))


def _not_correlated(skipped: dict[tuple[str, str, str], list[str]]) -> list[str]:
  """{(environment, variant, benchmark): outcomes} -> one note for all places that lack the same."""
  lacking: dict[tuple, list[str]] = {}
  for (*where, benchmark), outcomes in skipped.items():
    lacking.setdefault((*where, ", ".join(outcomes)), []).append(benchmark)
  places: dict[str, list[str]] = {}
  for (*where, outcomes), benchmarks in lacking.items():
    places.setdefault(f"{outcomes} with {', '.join(benchmarks)}", []).append(" / ".join(where))
  return [f"{', '.join(where)}: not correlated, below 4 models or all equal: {what}"
          for what, where in places.items()]  # fmt: skip


def partial_table(cells: Cells, benchmarks: DataFrame, outcomes: Sequence[str]) -> DataFrame:
  """Spearman partial correlations: size given capability, capability given size, and
  every other benchmark given each of the two."""
  rows = []
  for about, known, y, scores in _known(cells, benchmarks, outcomes):
    for given, benchmark in itertools.product(("num_params", "capability_score"), scores):
      if benchmark == given or given not in scores:
        continue
      found = statistics.partial(scores[benchmark], y, [scores[given]])
      if math.isfinite(found.r):
        use = np.isfinite(scores[benchmark]) & np.isfinite(scores[given])
        rows.append(
          about
          | {"benchmark": benchmark, "given": given, "n": found.n, "r": found.r,
             "low95": found.low, "high95": found.high, "p": found.p,
             "seeds": seeds_text(list(itertools.compress(known, use)))}
        )  # fmt: skip
  table = DataFrame(rows)
  if len(table):
    table.insert(10, "p_holm", statistics.holm(table["p"]))
    table["family"] = len(table)
  return table


def variant_table(cells: Cells, outcomes: Sequence[str], reference: str = "") -> DataFrame:
  """Each variant against the reference within an environment, paired by model, or by seed where
  there is one model alone (`paired_by`); base and chat models of one name are pairs too.

  reference: a variant's label; "" takes the trained one with the most models, of equals one
  that logs its own rollouts. The interval is a paired t interval, p_sign an exact sign test. A
  variant without the outcome has no row.
  """
  rows = []
  for environment, outcome in itertools.product(sorted({c.environment for c in cells}), outcomes):
    every = [c for c in cells if c.environment == environment]
    here = [c for c in every if math.isfinite(c.value(outcome))]
    groups = {v: [c for c in here if c.variant == v] for v in sorted({c.variant for c in here})}
    rank = {
      c.variant: (not c.initial, sum(o.variant == c.variant for o in every), len(c.curves) > 0)
      for c in every
    }
    base = reference if reference in groups else max(groups, key=rank.get, default="")
    for variant, own in groups.items():
      change, by = _changes(own, groups[base], outcome) if variant != base else (np.array([]), "")
      mean, error = mean_and_error(change)
      half = stats.t.isf(0.025, len(change) - 1) * error if len(change) > 1 else math.nan
      moved = change[change != 0]
      sign = stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue if len(moved) else math.nan
      values = pd.Series([c.value(outcome) for c in own])
      rows.append({
        "environment": environment, "outcome": outcome, "variant": variant, "models": len(own),
        "seeds": seeds_text(own), "mean": values.mean(), "sd_models": values.std(),
        "against": base, "paired_by": by, "pairs": len(change), "difference": mean,
        "low95": mean - half, "high95": mean + half, "p_sign": sign,
      })  # fmt: skip
  return DataFrame(rows)


def _changes(own: Cells, base: Cells, outcome: str) -> tuple[np.ndarray, str]:
  """Differences of pairs, and what pairs them: models, or the seeds of the only model."""
  for name in (slug, _kin):
    values = [pd.Series({name(c.model): c.value(outcome) for c in group}) for group in (own, base)]
    change = (values[0] - values[1]).dropna().to_numpy()
    if len(change):
      break
  if len(change) == 1:
    (mine,) = (c for c in own if name(c.model) in set(map(name, [b.model for b in base])))
    (theirs,) = (c for c in base if name(c.model) == name(mine.model))
    if outcome in mine.per_seed and outcome in theirs.per_seed:
      seeds = (mine.per_seed[outcome] - theirs.per_seed[outcome]).dropna().to_numpy(float)
      if len(seeds) > 1:
        return seeds, "seeds"
  return change, "models" if len(change) else ""


def _kin(model: str) -> str:
  """What a chat model and its base have in common: Llama-2-7b-chat-hf and Llama-2-7b-hf."""
  return slug(
    re.sub(r"(?i)[-_](chat|instruct|it|hf|base)(?![a-z])|(?<=gemma)[-_]1[._]1", "", model)
  )


def covariates(cells: Cells, benchmarks: DataFrame) -> dict[str, np.ndarray]:
  """{benchmark: [cells]}: the mean over a cell's runs where they have rows of their own, else its
  model's; a model that the table lacks gets its size from its run."""
  out = benchmarks.reindex([slug(c.model) for c in cells]).reset_index(drop=True)
  own = [benchmarks.reindex([_key("", s) for s in c.sources]).mean() for c in cells]
  if cells:
    out = DataFrame(own).reset_index(drop=True).combine_first(out)
  if "num_params" in out:
    out["num_params"] = out["num_params"].fillna(pd.Series([c.parameters for c in cells]))
  return {name: out[name].to_numpy(float) for name in out}


def treatments(cells: Cells) -> list[tuple[tuple[str, str], list[Cell]]]:
  """((environment, variant), its cells) in order."""
  key = operator.attrgetter("environment", "variant")
  return [(k, list(g)) for k, g in itertools.groupby(sorted(cells, key=key), key)]


def seeds_text(cells: Cells) -> str:
  """The seeds behind a row: one list if all models share it, else the range of counts."""
  lists = {tuple(c.seeds) for c in cells}
  if len(lists) == 1:
    return " ".join(map(str, next(iter(lists))))
  counts = [len(c.seeds) for c in cells]
  return f"{min(counts)} to {max(counts)} per model"


def write(table: DataFrame, stem: Path, caption: str, columns: Sequence[str] | None = None) -> None:
  """Writes STEM.csv (all columns, full precision), STEM.md and STEM.tex (`columns`)."""
  table.to_csv(stem.with_suffix(".csv"), index=False)
  shown = table[[c for c in columns if c in table]] if columns else table
  head, *body = [list(shown), *text_rows(shown)]
  title = f"# {stem.name.replace('_', ' ')}"
  bar = "|" + "---|" * len(head)
  lines = ["| " + " | ".join(x.replace("|", r"\|") for x in row) + " |" for row in (head, *body)]
  markdown = "\n".join([title, "", caption, "", lines[0], bar, *lines[1:], ""])
  stem.with_suffix(".md").write_text(markdown, encoding="utf-8")
  lines = [" & ".join(map(latex, row)) + r" \\" for row in (head, *body)]
  tex = [
    r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}",
    rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", lines[0], r"\midrule",
    *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}",
  ]  # fmt: skip
  stem.with_suffix(".tex").write_text("\n".join(tex) + "\n", encoding="utf-8")


def text_rows(table: DataFrame) -> list[list[str]]:
  """The table as strings; a column of whole numbers gets no decimals, NaN is a dash."""

  def text(column: pd.Series) -> list[str]:
    if column.dtype.kind != "f":
      return ["–" if pd.isna(v) else str(v) for v in column]
    places = 3 if (column.dropna() % 1).any() else 0
    return ["–" if pd.isna(v) else f"{v:.{places}f}".replace("-", "−") for v in column]

  return [list(row) for row in zip(*(text(table[name]) for name in table), strict=True)]


def latex(text: str) -> str:
  """Escapes LaTeX's special characters."""
  special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
             "−": "$-$", "–": "--"}  # fmt: skip
  special |= {c: "\\" + c for c in "&%$#_{}"}
  return "".join(special.get(c, c) for c in text)
