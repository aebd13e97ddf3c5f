"""Run directories to a paper's tables and figures.

  python -m rlsafety.study.analyze --runs 'runs/**' --out results/
  python -m rlsafety.study.analyze --published DIR --out results/   (the study's printed numbers)

Writes CSV, Markdown and LaTeX tables (cells, seeds, correlations, per_seed, partial, variants,
interactions), SVG and PNG figures, notes.md, and index.html, a page that holds all of it.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pandas import DataFrame

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.report import render, transcripts
from rlsafety.rundir import read
from rlsafety.study import confirm, figures, gather, interactions, statistics, tables
from rlsafety.study.gather import Cells

OUTCOMES = ("max_hex_gap", "max_acc_gap", "hms", "heldout_hex_gap", "heldout_acc_gap")
FLAGS = {
  "--runs": ("GLOB[,GLOB]", "run directories; incomplete ones are left out and named"),
  "--published": ("DIR", "folder with published_results.csv, in place of or beside --runs"),
  "--outcomes": ("A,B", "scalars to analyse; default Inspect's tasks and those there are of "
                 + ", ".join(OUTCOMES)),
  "--benchmarks": ("FILE", "CSV with a `model` column, laid over the shipped scores; tools.lm_eval "
                   "and tools.surprise write such files"),
  "--scores": ("NAME", "ACC and HEX of a re-scoring by tools.rescore"),
  "--reference": ("VARIANT", "variant that the others are compared with"),
}  # fmt: skip
SHOWN = {
  "cells": ("model", "environment", "variant", "n_seeds", "seeds", "steps", "max_hex_gap",
            "max_hex_gap_sd", "max_hex_gap_null95", "max_hex_gap_full", "step_of_max_hex_gap",
            "max_acc_gap",
            "max_acc_gap_sd", "max_acc_gap_null95", "step_of_max_acc_gap", "hex_gap_auc_normalised",
            "hex_gap_auc_normalised_sd", "acc_gap_auc_normalised", "acc_gap_auc_normalised_sd",
            "hms", "hms_sd", "hms_null95", "hms_signed", "hms_signed_null95", "hms_windowed",
            "hms_windowed_sd", "heldout_hex_gap",
            "heldout_hex_gap_sd", "heldout_acc_gap", "heldout_acc_gap_sd", "max_reward", "runs"),
  "correlations": ("outcome", "environment", "variant", "benchmark", "method", "n", "seeds", "r",
                   "low95", "high95", "p", "p_holm", "p_bh", "p_t", "p_none", "loo_min", "loo_max",
                   "families_min", "families_max",
                   "models_low", "models_high", "seeds_low", "seeds_high", "per_seed"),
}  # fmt: skip


def analyse(
  out: str | Path,
  globs: Sequence[str] = (),
  published: str = "",
  outcomes: str = "",
  benchmarks: str = "",
  scores: str = "",
  reference: str = "",
  window: int | None = None,
  compat: bool = False,
  rhos: Sequence[float] = (0.6,),
) -> dict:
  """Writes everything to the folder `out`; returns {table name: frame, "notes": [...]}.

  globs: of run directories. published: folder of published_results.csv. outcomes: "a,b";
  empty takes those of OUTCOMES and of Inspect's tasks that a cell has. Raises UserError when
  neither source gives a cell, or when an outcome or reference that was asked for is unknown.
  """
  cells, notes = gather.published(published) if published else ([], [])
  if globs:
    more, said = gather.collect(globs, window, scores, compat)
    cells, notes = cells + more, notes + said
  if not cells:
    raise UserError("nothing to analyse: give --runs='runs/**' or --published=DIR")
  if compat:
    notes.append(
      "published handling: one rollout per step of the first 300, smoothed over 50 unless --window "
      "says otherwise, unscored = -1 (reward 0), SD over n"
    )
  known = {name for c in cells for name in c.values if math.isfinite(c.value(name))}
  names = list(filter(None, map(str.strip, outcomes.split(","))))
  for name in names:
    if name not in known:
      raise UserError(f"--outcomes: {name!r} is not one of {', '.join(sorted(known))}")
  tasks = sorted(n for n in known if n.startswith("task_") and not n.endswith("_before"))
  names = names or [name for name in (*OUTCOMES, *tasks) if name in known]
  there = sorted({c.variant for c in cells})
  if reference and reference not in there:
    raise UserError(f"--reference={reference}: is not one of the variants: {'; '.join(there)}")
  scores_of = tables.load_benchmarks(benchmarks, notes)
  unmatched = sorted({c.model for c in cells if gather.slug(c.model) not in scores_of.index})
  if unmatched:
    notes.append(f"no benchmark scores for: {', '.join(unmatched)} (add them with --benchmarks)")
  made = {
    "confirmatory": confirm.of_runs(Path(run) for c in cells if globs for run in c.sources),
    "cells": tables.cell_table(cells),
    "seeds": tables.seed_table(cells),
    "correlations": tables.correlation_table(cells, scores_of, names, rhos=rhos, notes=notes),
    "partial": tables.partial_table(cells, scores_of, names),
    "variants": tables.variant_table(cells, names, reference),
    "interactions": interactions.table(cells, scores_of, names),
  }
  made["per_seed"] = tables.per_seed_table(made["correlations"])
  if published:
    notes.append(
      "published_results.csv has means and SDs over seeds and no value of a single seed, so the "
      "study's correlations by seed, and their SDs, cannot be recomputed from it"
    )
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  captions = _captions(made, cells)
  filled = {name: table for name, table in made.items() if len(table)}
  for name, table in filled.items():
    tables.write(table, out / name, captions[name], SHOWN.get(name))
  drawn = {caption: svg for caption, svg in draw(out, cells, made, scores_of, names) if svg}
  (out / "notes.md").write_text("".join(f"- {note}\n" for note in notes), encoding="utf-8")
  _write_page(out, filled, captions, drawn, notes, cells)
  return made | {"notes": notes}


def _captions(made: dict[str, DataFrame], cells: Cells) -> dict[str, str]:
  """What each table is, with its n, seeds, correction and the runs behind it."""
  seeds = sorted({s for c in cells for s in c.seeds})
  sources = [s for c in cells for s in c.sources]
  listed = "; ".join(dict.fromkeys(sources)) if len(sources) <= 12 else "column `runs` of cells.csv"
  models = len({c.model for c in cells})
  common = (
    f"{models} models, {len(cells)} cells, seeds {', '.join(map(str, seeds))}. From: {listed}."
  )
  family = {k: len(made[k][made[k]["method"] == "spearman"]) if k == "correlations" and len(made[k])
            else len(made[k]) for k in ("correlations", "partial")}  # fmt: skip
  exploratory = "Exploratory. " if len(made["confirmatory"]) else ""
  return {
    "confirmatory": "Confirmatory: the questions that were fixed when training started, as the "
    "runs' study.json has them. Seeds and held-out units are crossed random effects; p corrected "
    "over the questions of a study; p_none: that the effect is below the smallest of interest.",
    "cells": f"{exploratory}Per cell: scalars of the seed-mean smoothed curves; "
    "_sd over the seeds' own scalars; "
    "_null95: what 95 of 100 shuffles of the group labels within steps stay below; "
    f"_full without half-filled edge windows. No test, so no correction. {common}",
    "seeds": f"Per run: scalars of its own smoothed curves. No test, so no correction. {common}",
    "correlations": "Across models. p: two-sided, exact or from permutations; p_t: t "
    f"approximation; p_holm, p_bh: corrected over the {family['correlations']} tests of one method "
    "in this table; low95, high95: Fisher's z (Spearman: Bonett-Wright); loo: leave one model out, "
    f"families: one family; p_none: that |rho| is below {statistics.BOUND}, two one-sided tests; "
    f"models, seeds: bootstrap 95% intervals. {_power_text(made['correlations'])} {common}",
    "partial": f"Spearman partial correlations, t test; p_holm over {family['partial']} tests. "
    f"{common}",
    "variants": "Per variant: mean over models; difference to the reference paired by model "
    "(with one model by seed), 95% t interval and sign test, not corrected for the number of "
    f"variants. {common}",
    "per_seed": "Spearman's correlation at each seed alone, mean and SD over the seeds, by "
    f"treatment. Seeds share their models, so the SD is no error of the correlation. {common}",
    "interactions": "Difference of two treatments' rank correlations with a benchmark over the "
    "models that both have; p: permutations of the benchmark, p_holm corrected over the rows of "
    f"one benchmark. {common}",
  }


def _power_text(table: DataFrame) -> str:
  if not len(table):
    return ""
  row = table.loc[table["n"].idxmax()]
  chances = [f"{name.removeprefix('power_')} is found with probability {row[name]:.2f}"
             for name in table if re.fullmatch(r"power_[\d.]+", name)]  # fmt: skip
  return (
    f"At n = {row['n']}, a true correlation of {', of '.join(chances)} (alpha 0.05, uncorrected), "
    f"and {row['detectable']:.2f} with 0.80 ({tables.POWER})."
  )


def draw(
  out: Path, cells: Cells, made: dict[str, DataFrame],
  benchmarks: DataFrame, outcomes: Sequence[str],
) -> Iterator[tuple[str, Path | None]]:  # fmt: skip
  """Draws all figures: (caption, SVG path, or None where the cells do not allow it)."""
  for (environment, variant), group in tables.treatments(cells):
    if any(len(c.curves) for c in group):
      stem = out / re.sub(r"[^\w.=-]+", "_", f"curves_{environment}_{variant}")
      yield f"Curves, {environment}, {variant}", figures.curve_panels(group, benchmarks, stem)
  table = made["correlations"]
  for name in outcomes:
    words = figures.NAMES.get(name, name)
    trend = figures.trend(cells, benchmarks, name, out / f"size_{name}")
    yield f"{words} against model size", trend
    if len(table):
      path = figures.forest(table, name, out / f"correlations_{name}")
      yield f"Correlations of {words}", path
    if len({c.variant for c in cells}) > 1:
      bars = figures.variant_bars(cells, name, out / f"variants_{name}")
      yield f"{words} by variant: bars are means, lines are models", bars


def _write_page(
  out: Path, made: dict[str, DataFrame], captions: dict[str, str],
  drawn: dict[str, Path], notes: list[str], cells: Cells,
) -> None:  # fmt: skip
  """index.html: tables and figures on one page, in the style of a run's report."""
  parts = []
  for name, table in made.items():
    shown = table[[c for c in SHOWN.get(name, table.columns) if c in table]]
    parts.append({"name": name, "caption": captions[name], "head": list(shown),
                  "rows": tables.text_rows(shown)})  # fmt: skip
  pictures = []
  for i, (caption, path) in enumerate(drawn.items()):
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # Two figures on one page may not share the ids of their clip paths.
    pictures.append((caption, re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{i}-", svg)))
  runs = {
    f"{c.model}, {c.environment}, {c.variant}, seed {seed}": Path(source)
    for c in cells
    for seed, source in zip(c.seeds, c.sources, strict=False)
    if Path(source).is_dir()
  }
  data, left_out = transcripts.compared(list(map(read.load_run, runs.values())), list(runs))
  if left_out:
    notes = [*notes, f"transcripts below leave out {len(left_out)} runs to keep the page light"]
  reports = [(label, os.path.relpath(folder / "report.html", out))
             for label, folder in runs.items() if (folder / "report.html").exists()]  # fmt: skip
  page = render.fill(
    "comparison.html",
    title="Comparison of runs",
    notes=notes,
    tables=parts,
    figures=pictures,
    pages=reports,
    data_json=transcripts.embed_json(data) if data else "",
    several=True,
  )
  (out / "index.html").write_text(page, encoding="utf-8")


def _probabilities(text: str) -> list[float]:
  """Numbers between 0 and 1 in a list like "0.6,0.8"."""
  try:
    found = [float(part) for part in text.split(",")]
  except ValueError:
    found = [math.nan]
  if not all(0 < rho < 1 for rho in found):
    raise UserError(f"--power_rho={text}: needs numbers between 0 and 1, like 0.6")
  return found


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "study.analyze")
  parser.add_argument("--out", required=True, metavar="DIR", help="where to write (created)")
  for name, (metavar, says) in FLAGS.items():
    parser.add_argument(name, default="", metavar=metavar, help=says)
  said = "smoothing in steps; default 50, or a sixth of a shorter run"
  parser.add_argument("--window", type=int, metavar="N", help=said)
  said = "true correlations whose chance to be found is given; default 0.6"
  parser.add_argument("--power_rho", default="0.6", metavar="RHO[,RHO]", help=said)
  said = (
    "the study's handling: one rollout per step of the first 300, smoothed over 50, unscored = -1 "
    "or 0, SD / n"
  )
  parser.add_argument("--published_compat", action="store_true", help=said)
  args = flags.parse(parser, argv)
  if args.window is not None and args.window < 1:
    raise UserError(f"--window={args.window}: needs a number of steps, at least 1")
  given = vars(args)
  globs, rhos = given.pop("runs").split(","), _probabilities(given.pop("power_rho"))
  compat = given.pop("published_compat")
  made = analyse(globs=list(filter(None, globs)), rhos=rhos, compat=compat, **given)
  for note in made["notes"]:
    print(f"note: {note}")
  if len(made["confirmatory"]):
    print(made["confirmatory"].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    print("exploratory from here on:")
  table = made["correlations"]
  if len(table):
    table = table[table["method"] == "spearman"]
    columns = ["outcome", "environment", "variant", "benchmark", "n", "r", "p", "p_holm", "p_bh"]
    print(table[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    print(_power_text(made["correlations"]))
  print(f"tables, figures and {Path(args.out) / 'index.html'} written")


if __name__ == "__main__":
  run_main(main, sys.argv)
