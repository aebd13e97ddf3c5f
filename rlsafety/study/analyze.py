"""Run directories to a paper's tables and figures.

  python -m rlsafety.study.analyze --runs='runs/**' --out=results/
  python -m rlsafety.study.analyze --published=DIR --out=results/   (the study's printed numbers)

Writes CSV, Markdown and LaTeX tables (cells, seeds, correlations, partial, variants), SVG
and PNG figures, notes.md, and index.html, a page that holds all of it. Flags:
  --runs=GLOB[,GLOB]   run directories; incomplete ones are left out and named
  --published=DIR      folder with published_results.csv, in place of or beside --runs
  --out=DIR            where to write (created)
  --outcomes=a,b       scalars to analyse; default max_hex_gap,max_acc_gap,hms and the held-out
                       gaps, as far as there are any
  --benchmarks=FILE    CSV with a `model` column, laid over the shipped scores; tools.lm_eval
                       and rlsafety.tools.rescore --what=cross_entropy write such files
  --scores=NAME        ACC and HEX of a re-scoring by rlsafety.tools.rescore
  --reference=VARIANT  variant that the others are compared with
  --window=N           smoothing in steps; default 50, or a sixth of a shorter run
  --power_rho=0.6,0.8  true correlations whose chance to be found is given; default 0.6
  --published_compat   the study's handling: one rollout per step of the first 300, smoothed over
                       50, unscored = -1 or 0, SD / n
"""

import math
import os
import pathlib
import re
import sys

from rlsafety.errors import UserError, run_main
from rlsafety.report import render
from rlsafety.rundir import read
from rlsafety.study import figures, gather, tables

FLAGS = {"runs": "", "published": "", "out": "", "outcomes": "", "benchmarks": "", "scores": "",
         "reference": "", "window": "", "power_rho": "0.6", "published_compat": ""}  # fmt: skip
OUTCOMES = ("max_hex_gap", "max_acc_gap", "hms", "heldout_hex_gap", "heldout_acc_gap")
SHOWN = {
  "cells": ("model", "environment", "variant", "n_seeds", "seeds", "steps", "max_hex_gap",
            "max_hex_gap_sd", "max_hex_gap_full", "step_of_max_hex_gap", "max_acc_gap",
            "max_acc_gap_sd", "step_of_max_acc_gap", "hex_gap_auc_normalised",
            "hex_gap_auc_normalised_sd", "acc_gap_auc_normalised", "acc_gap_auc_normalised_sd",
            "hms", "hms_sd", "hms_windowed", "hms_windowed_sd", "heldout_hex_gap",
            "heldout_hex_gap_sd", "heldout_acc_gap", "heldout_acc_gap_sd", "max_reward", "runs"),
  "correlations": ("outcome", "environment", "variant", "benchmark", "method", "n", "seeds", "r",
                   "low95", "high95", "p", "p_holm", "p_bh", "p_t", "loo_min", "loo_max",
                   "models_low", "models_high", "seeds_low", "seeds_high", "per_seed"),
}  # fmt: skip


def analyse(
  out, globs=(), published="", outcomes="", benchmarks="", scores="", reference="",
  window=None, compat=False, rhos=(0.6,),
) -> dict:  # fmt: skip
  """Writes everything to the folder `out`; returns {table name: frame, "notes": [...]}.

  globs: of run directories. published: folder of published_results.csv. outcomes: "a,b";
  empty takes those of OUTCOMES that a cell has. Raises UserError when neither source gives
  a cell, or when an outcome or reference that was asked for is unknown.
  """
  cells, notes = [], []
  if published:
    cells, notes = gather.published(published)
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
  known = {name for c in cells for name, value in c.values.items() if math.isfinite(value)}
  names = [name.strip() for name in outcomes.split(",") if name.strip()]
  for name in names:
    if name not in known:
      raise UserError(f"--outcomes: {name!r} is not one of {', '.join(sorted(known))}")
  names = names or [name for name in OUTCOMES if name in known]
  if reference and reference not in {c.variant for c in cells}:
    there = "; ".join(sorted({c.variant for c in cells}))
    raise UserError(f"--reference={reference}: is not one of the variants: {there}")
  scores_of = tables.load_benchmarks(benchmarks or None, notes)
  unmatched = sorted(
    {c.model for c in cells} - {c.model for c in cells if gather.slug(c.model) in scores_of.index}
  )
  if unmatched:
    notes.append(f"no benchmark scores for: {', '.join(unmatched)} (add them with --benchmarks)")
  made = {
    "cells": tables.cell_table(cells),
    "seeds": tables.seed_table(cells),
    "correlations": tables.correlation_table(cells, scores_of, names, rhos=rhos, notes=notes),
    "partial": tables.partial_table(cells, scores_of, names),
    "variants": tables.variant_table(cells, names, reference or None),
  }
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  captions = _captions(made, cells)
  for name, table in made.items():
    if len(table):
      tables.write(table, out / name, captions[name], SHOWN.get(name))
  drawn = draw(out, cells, made, scores_of, names)
  (out / "notes.md").write_text("".join(f"- {note}\n" for note in notes), encoding="utf-8")
  _index(out, made, captions, drawn, notes, cells)
  return made | {"notes": notes}


def _captions(made: dict, cells) -> dict[str, str]:
  """What each table is, with its n, seeds, correction and the runs behind it."""
  seeds = sorted({s for c in cells for s in c.seeds}, key=gather.by_number)
  sources = [s for c in cells for s in c.sources]
  listed = "; ".join(dict.fromkeys(sources)) if len(sources) <= 12 else "column `runs` of cells.csv"
  models = len({c.model for c in cells})
  common = (
    f"{models} models, {len(cells)} cells, seeds {', '.join(map(str, seeds))}. From: {listed}."
  )
  family = {k: len(made[k][made[k]["method"] == "spearman"]) if k == "correlations" and len(made[k])
            else len(made[k]) for k in ("correlations", "partial")}  # fmt: skip
  return {
    "cells": "Per cell: scalars of the seed-mean smoothed curves; _sd over the seeds' own scalars; "
    f"_full without half-filled edge windows. No test, so no correction. {common}",
    "seeds": f"Per run: scalars of its own smoothed curves. No test, so no correction. {common}",
    "correlations": "Across models. p: two-sided, exact or from permutations; p_t: t "
    f"approximation; p_holm, p_bh: corrected over the {family['correlations']} tests of one method "
    "in this table; low95, high95: Fisher's z (Spearman: Bonett-Wright); loo: leave one model out; "
    f"models, seeds: bootstrap 95% intervals. {_power_text(made['correlations'])} {common}",
    "partial": f"Spearman partial correlations, t test; p_holm over {family['partial']} tests. "
    f"{common}",
    "variants": "Per variant: mean over models; difference to the reference paired by model, 95% t "
    f"interval, not corrected for the number of variants. {common}",
  }


def _power_text(table) -> str:
  if not len(table):
    return ""
  row = table.loc[table["n"].idxmax()]
  chances = [f"{name.removeprefix('power_')} is found with probability {row[name]:.2f}"
             for name in table if re.fullmatch(r"power_[\d.]+", name)]  # fmt: skip
  return (
    f"At n = {row['n']}, a true correlation of {', of '.join(chances)} (alpha 0.05, uncorrected), "
    f"and {row['detectable']:.2f} with 0.80 (approximation: {tables.POWER})."
  )


def draw(out, cells, made, benchmarks, outcomes) -> list[tuple[str, pathlib.Path]]:
  """All figures that the cells allow -> [(caption, SVG path)]."""
  drawn = []

  def add(caption, paths):
    if paths:
      drawn.append((caption, paths[0]))

  for (environment, variant), group in tables.treatments(cells):
    if any(c.curves for c in group):
      stem = re.sub(r"[^\w.=-]+", "_", f"curves_{environment}_{variant}")
      add(f"Curves, {environment}, {variant}", figures.curve_panels(group, benchmarks, out / stem))
  for outcome in outcomes:
    add(
      f"{outcome} against model size",
      figures.trend(cells, benchmarks, outcome, out / f"size_{outcome}"),
    )
    if len(made["correlations"]):
      add(
        f"Correlations of {outcome}",
        figures.forest(made["correlations"], outcome, out / f"correlations_{outcome}"),
      )
    if len({c.variant for c in cells}) > 1:
      add(
        f"{outcome} by variant",
        figures.variant_bars(cells, outcome, out / f"variants_{outcome}"),
      )
  return drawn


def _index(out, made, captions, drawn, notes, cells) -> None:
  """results/index.html: tables and figures on one page, in the style of a run's report."""
  parts = []
  for name, table in made.items():
    if len(table):
      shown = table[[c for c in SHOWN.get(name, table.columns) if c in table]]
      parts.append({"name": name, "caption": captions[name], "head": list(shown.columns),
                    "rows": tables.text_rows(shown)})  # fmt: skip
  pictures = []
  for i, (caption, path) in enumerate(drawn):
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # Two figures on one page may not share the ids of their clip paths.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{i}-", svg)
    pictures.append((caption, svg))
  pages = [
    (f"{c.model}, {c.environment}, {c.variant}, seed {seed}", os.path.relpath(page, out))
    for c in cells
    for seed, source in zip(c.seeds, c.sources, strict=False)
    if (page := pathlib.Path(source) / "report.html").exists()
  ]
  owners = [(c, seed, s) for c in cells for seed, s in zip(c.seeds, c.sources, strict=False)
            if pathlib.Path(s).is_dir()]  # fmt: skip
  labels = [f"{c.model}, {c.environment}, {c.variant}, seed {seed}" for c, seed, _ in owners]
  data, left_out = render.compared([read.load_run(s) for *_, s in owners], labels)
  if left_out:
    notes = [*notes, f"transcripts below leave out {len(left_out)} runs to keep the page light"]
  page = render.render(
    "comparison.html",
    title="Comparison of runs",
    notes=notes,
    tables=parts,
    figures=pictures,
    pages=pages,
    data_json=render.embed_json(data) if data else "",
    several=True,
  )
  (out / "index.html").write_text(page, encoding="utf-8")


def read_flags(argv) -> dict:
  values = dict(FLAGS)
  for argument in argv:
    name, equals, value = argument.lstrip("-").partition("=")
    if not argument.startswith("--") or name not in FLAGS:
      raise UserError(f"unknown argument {argument!r}; flags: {', '.join('--' + f for f in FLAGS)}")
    values[name] = value if equals else "true"
  return values


def main(argv) -> None:
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return
  # `--out results/` reads as `--out=results/`.
  joined, rest = [], list(argv)
  while rest:
    word = rest.pop(0)
    bare = word.startswith("--") and "=" not in word and word != "--published_compat"
    joined.append(f"{word}={rest.pop(0)}" if bare and rest else word)
  flags = read_flags(joined)
  if not flags["out"]:
    raise UserError("--out=DIR is missing: where should the tables go?")
  if flags["window"] and not flags["window"].isdigit():
    raise UserError(f"--window={flags['window']}: needs a number of steps")
  try:
    rhos = [float(rho) for rho in flags["power_rho"].split(",")]
  except ValueError:
    rhos = [math.nan]
  if not all(0 < rho < 1 for rho in rhos):
    raise UserError(f"--power_rho={flags['power_rho']}: needs numbers between 0 and 1, like 0.6")
  made = analyse(
    flags["out"],
    [g for g in flags["runs"].split(",") if g],
    flags["published"],
    flags["outcomes"],
    flags["benchmarks"],
    flags["scores"],
    flags["reference"],
    int(flags["window"]) if flags["window"] else None,
    flags["published_compat"].lower() not in ("", "false", "0"),
    rhos,
  )
  for note in made["notes"]:
    print(f"note: {note}")
  table = made["correlations"]
  if len(table):
    table = table[table["method"] == "spearman"]
    columns = ["outcome", "environment", "variant", "benchmark", "n", "r", "p", "p_holm", "p_bh"]
    print(table[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    print(_power_text(made["correlations"]))
  print(f"tables, figures and {pathlib.Path(flags['out']) / 'index.html'} written")


if __name__ == "__main__":
  run_main(main, sys.argv[1:])
