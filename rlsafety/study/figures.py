"""Figures of a study, each as SVG (for the page) and PNG (for everything else).

Colours are ordered by model size and safe for colour-blind readers; bands and bars say in
the caption what they are. What has nothing to show draws nothing and returns None.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pandas import DataFrame

from rlsafety.study import statistics, tables
from rlsafety.study.gather import Cells

NAMES = {
  "max_hex_gap": "max HEX gap", "max_acc_gap": "max ACC gap", "hms": "HMS",
  "hex_gap_auc_normalised": "mean HEX gap (AUC / range)", "reward": "reward",
  "acc_gap_auc_normalised": "mean ACC gap (AUC / range)", "heldout_hex_gap": "held-out HEX gap",
  "heldout_acc_gap": "held-out ACC gap",
  "hex_gameable": "HEX, gameable users", "acc_non_gameable": "ACC, non-gameable users",
  "hex_gap": "HEX gap", "acc_gap": "ACC gap", "reward_gap": "reward gap",
}  # fmt: skip


STYLE = {
  "svg.fonttype": "none", "svg.hashsalt": "rlsafety", "font.size": 9, "axes.spines.top": False,
  "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 110,
  "legend.frameon": False,
}  # fmt: skip
styled = matplotlib.rc_context(STYLE)  # decorates whatever draws: nobody else's plots change


def panels(
  rows: int, columns: int, size: tuple[float, float], **shared: bool
) -> tuple[Figure, np.ndarray]:
  """A figure of `size` inches and its axes [rows, columns]."""
  figure = Figure(figsize=size)
  return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def save(figure: Figure, stem: Path) -> Path:
  """Writes STEM.svg (no date, so equal runs give equal bytes) and STEM.png; returns the first."""
  svg = stem.with_name(stem.name + ".svg")
  figure.savefig(svg, metadata={"Date": None}, bbox_inches="tight")
  figure.savefig(stem.with_name(stem.name + ".png"), dpi=160, bbox_inches="tight")
  return svg


def frame(column: int, row: int) -> Rectangle:
  """The outline of one cell of a matrix."""
  return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="0.1", lw=1.6)


def _where(environment: str, variant: str) -> str:
  return environment if variant in ("main", "published") else f"{environment}, {variant}"


@styled
def curve_panels(cells: Cells, benchmarks: DataFrame, stem: Path) -> Path:
  """Reward, HEX, ACC and the three gaps over steps, one line per model, band +-1 SD of seeds."""
  cells = [c for c in cells if len(c.curves)]
  size = tables.covariates(cells, benchmarks)["num_params"]
  order = sorted(range(len(cells)), key=lambda i: (np.nan_to_num(size[i], nan=np.inf), i))
  cells = [cells[i] for i in order]
  colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(cells)))
  figure, axes = panels(2, 3, (10.5, 5.6), sharex=True)
  names = ("reward", "hex_gameable", "acc_non_gameable", "reward_gap", "hex_gap", "acc_gap")
  for name, axis in zip(names, axes.flat, strict=True):
    for cell, colour in zip(cells, colours, strict=True):
      mean, sd = cell.curves[name], cell.curve_sd[name]
      axis.plot(mean.index, mean, color=colour, lw=1.6, label=f"{cell.model} ({len(cell.seeds)})")
      axis.fill_between(mean.index, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)
    if name.endswith("_gap"):
      axis.axhline(0, color="0.4", lw=0.8)
      axis.set_xlabel("step")
      axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(NAMES[name], fontsize=10, loc="left")
  handles, labels = axes.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(cells)),
    title="model (number of seeds)",
  )  # fmt: skip
  where = f"{cells[0].environment}, {cells[0].variant}"
  figure.suptitle(f"{where}: smoothed over {cells[0].counts['window']} steps, band ±1 SD of seeds")
  figure.tight_layout()
  return save(figure, stem)


@styled
def trend(cells: Cells, benchmarks: DataFrame, outcome: str, stem: Path) -> Path | None:
  """Outcome against model size, one panel per environment and variant.

  Bars are one SD over seeds; the title gives Spearman's rho, its 95% interval, exact p and n.
  """
  shown = []
  for where, group in tables.treatments(cells):
    group = [c for c in group if math.isfinite(c.value(outcome))]
    x = tables.covariates(group, benchmarks)["num_params"]
    if np.isfinite(x).sum() >= 2:
      shown.append((where, group, x))
  if not shown:
    return None
  columns = min(3, len(shown))
  rows = math.ceil(len(shown) / columns)
  figure, axes = panels(rows, columns, (3.7 * columns, 3.3 * rows))
  for axis in axes.flat[len(shown) :]:
    axis.set_visible(False)
  for axis, (where, group, x) in zip(axes.flat, shown, strict=False):
    y = np.array([c.values[outcome] for c in group])
    sd = np.array([c.sd.get(outcome, math.nan) for c in group])
    axis.errorbar(x, y, np.nan_to_num(sd), fmt="o", ms=5, color="#3b528b", ecolor="0.65", lw=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    middle = np.sqrt(np.nanmin(x) * np.nanmax(x))
    for c, a, b in zip(group, x, y, strict=True):
      if math.isfinite(a):  # labels grow towards the middle, so that none leaves its panel
        axis.annotate(c.model, (a, b), (-4 if a > middle else 4, 3), textcoords="offset points",
                      ha="right" if a > middle else "left", fontsize=6, color="0.35")  # fmt: skip
    found = statistics.correlate(x, y)
    says = f"ρ = {found.r:+.2f} [{found.low:+.2f}, {found.high:+.2f}], p = {found.p:.3f}, "
    says = says if math.isfinite(found.r) else ""
    axis.set_title(f"{_where(*where)}\n{says}n = {found.n}", fontsize=8.5, loc="left")
    axis.set_xlabel("parameters, billions")
    axis.set_ylabel(NAMES.get(outcome, outcome))
  figure.tight_layout()
  return save(figure, stem)


@styled
def variant_bars(cells: Cells, outcome: str, stem: Path) -> Path | None:
  """Mean over models of each variant, with every model as a line through its variants."""
  rows = [(*c.key, c.value(outcome)) for c in cells if math.isfinite(c.value(outcome))]
  if not rows:
    return None
  table = DataFrame(rows, columns=["model", "environment", "variant", "value"])
  # One frame [models, variants] for each environment.
  found = {e: t.pivot(index="model", columns="variant", values="value")
           for e, t in table.groupby("environment")}  # fmt: skip
  widest = max(values.shape[1] for values in found.values())
  size = max(3.2, 1.2 * widest + 1) * len(found), 3.4
  figure, axes = panels(1, len(found), size, sharey=True)
  for axis, (environment, values) in zip(axes.flat, found.items(), strict=True):
    place = np.arange(values.shape[1])
    axis.bar(place, values.mean(), color="#c9d3e6", width=0.6)
    axis.set_xlim(-0.7, widest - 0.3)  # bars of one width in all panels
    axis.plot(place, values.T, "o-", color="#3b528b", ms=4, lw=0.8, alpha=0.75)
    labels = [f"{v.replace(', ', chr(10))}\n(models: {n})" for v, n in values.count().items()]
    axis.set_xticks(place, labels, fontsize=7)
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set_title(environment, fontsize=10, loc="left")
  axes.flat[0].set_ylabel(NAMES.get(outcome, outcome))
  figure.tight_layout()
  return save(figure, stem)


@styled
def forest(table: DataFrame, outcome: str, stem: Path) -> Path | None:
  """Spearman's rho with 95% intervals for every benchmark; filled where Holm's p < 0.05."""
  table = table[(table["outcome"] == outcome) & (table["method"] == "spearman")]
  if not len(table):
    return None
  groups = list(table.groupby(["environment", "variant"], sort=False))
  size = 3.1 * len(groups) + 1, 0.28 * table["benchmark"].nunique() + 1.3
  figure, axes = panels(1, len(groups), size, sharex=True)
  for axis, ((environment, variant), rows) in zip(axes.flat, groups, strict=True):
    place = -np.arange(len(rows))
    axis.hlines(place, rows["low95"], rows["high95"], color="0.6", lw=1.2)
    survives = (rows["p_holm"] < 0.05).to_numpy()
    axis.scatter(rows["r"], place, c=["#3b528b" if s else "white" for s in survives],
                 edgecolors="#3b528b", zorder=3, s=28)  # fmt: skip
    axis.set_yticks(place, rows["benchmark"])
    axis.axvline(0, color="0.4", lw=0.8)
    axis.set_xlim(-1.05, 1.05)
    axis.set_title(f"{_where(environment, variant)}, n = {rows['n'].max()}", fontsize=9, loc="left")
  figure.supxlabel(
    f"Spearman's ρ with {NAMES.get(outcome, outcome)}, 95% interval; filled: Holm p < 0.05 over "
    f"{int(table['family'].iloc[0])} tests",
    fontsize=8.5,
  )
  figure.tight_layout()
  return save(figure, stem)
