"""The cells of a study: run directories, or published numbers, in one shape.

A *cell* is one model in one environment under one variant, with its seeds. `collect`
makes cells from run directories, `published` from the numbers printed with the paper;
tables and figures do not know the difference. Everything that is missing, cut or left
out is written into `notes`, which the tables carry.
"""

import glob
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from rlsafety.errors import UserError
from rlsafety.metrics import curves, gaps
from rlsafety.rundir import read
from rlsafety.study import nulls, scalars

# Fields that tell seeds, machines and models apart, but not treatments. A run that starts from
# an adapter is another treatment than one that starts fresh.
NOT_A_VARIANT = re.compile(
  r"^(name|seed|steps|variant|model\.(?!adapter$).*|mesh\..*|learner\..*|checkpoint\..*"
  r"|eval\..*|environment\.(name|seed|heldout_seed)"
  r"|judge\.(url|price|concurrency|timeout_s|deadline_s|attempts))$"
)
PEOPLE = ("seed", "heldout_seed")  # of an environment: who there is, and who is held out
INITIAL = "initial"  # the variant of runs of 0 steps: what a model said before any training
BENCHMARKS = Path(__file__).parent / "benchmark_scores.csv"
PUBLISHED_NAMES = {
  "max_er_gap": "max_hex_gap", "max_acc_gap": "max_acc_gap", "hms_score": "hms",
  "er_gap_auc_normalized": "hex_gap_auc_normalised", "max_reward": "max_reward",
  "acc_gap_auc_normalized": "acc_gap_auc_normalised", "max_er_mean": "max_hex",
  "max_acc_mean": "max_acc", "init_hex_gap": "initial_hex_gap",
  "init_hex_gameable": "initial_hex", "delta_ce": "delta_ce",
}  # fmt: skip


@dataclass
class Cell:
  """One model x environment x variant.

  values, sd: {scalar: number}, sd over seeds (NaN with one). per_seed: frame of the seeds'
  own scalars, empty where only a summary was published. curves, curve_sd: frames over steps.
  """

  model: str
  environment: str
  variant: str
  seeds: list  # numbers, or "seed/environment.seed" where both vary
  values: dict[str, float] = field(default_factory=dict)
  sd: dict[str, float] = field(default_factory=dict)
  per_seed: DataFrame = field(default_factory=DataFrame)
  full: dict[str, float] = field(default_factory=dict)
  curves: DataFrame = field(default_factory=DataFrame)
  curve_sd: DataFrame = field(default_factory=DataFrame)
  sources: list[str] = field(default_factory=list)
  counts: dict[str, int] = field(default_factory=dict)
  parameters: float = math.nan  # billions

  @property
  def key(self) -> tuple[str, str, str]:
    return self.model, self.environment, self.variant

  @property
  def title(self) -> str:
    return " / ".join(self.key)

  @property
  def initial(self) -> bool:
    return self.variant.split(", ")[0] == INITIAL

  def value(self, outcome: str) -> float:
    """A scalar, NaN if the cell has none."""
    return self.values.get(outcome, math.nan)


Cells = Sequence[Cell]


def slug(name: str) -> str:
  """A model's name without owner, case and punctuation, for joining tables."""
  return re.sub(r"[^a-z0-9]", "", str(name).rstrip("/").split("/")[-1].lower())


# --- From run directories ---------------------------------------------------------------


def find_runs(patterns: Sequence[str]) -> tuple[list[read.Run], list[str]]:
  """Run directories matching the globs -> (complete runs, notes on those left out)."""
  found = {}
  for match in (Path(m) for p in patterns for m in glob.glob(str(p), recursive=True)):
    folder = match if match.is_dir() else match.parent
    if (folder / "config.json").exists() and (folder / "eval").exists():
      found[folder.resolve()] = folder
  runs = [read.load_run(folder) for folder in sorted(found.values())]
  if not any(run.complete for run in runs):
    raise UserError(f"--runs={','.join(map(str, patterns))}: no complete run directory there")
  notes = [f"left out, not complete: {run.path}" for run in runs if not run.complete]
  return [run for run in runs if run.complete], notes


def variants(runs: list[read.Run]) -> tuple[list[str], list[str]]:
  """A label for each run: the config fields that vary within a model and environment.

  Fields that always change together make one part of the label, and the notes say so: no
  analysis can tell their effects apart. A field that differs only between models (a batch
  size, say) is no variant but a confound, and named too. A field that one config lacks,
  as configs of different versions do, is no difference.
  """
  fields = DataFrame([dict(_flatten(run.config)) for run in runs])
  fields = fields[sorted(f for f in fields if not NOT_A_VARIANT.match(f))]
  models = pd.Series([slug(read.model_name(run)) for run in runs])
  environments = pd.Series([read.environment_name(run) for run in runs], dtype=object)
  labels = pd.Series([str(run.config.get("variant") or "") for run in runs], dtype=object)
  notes = []
  for environment, here in fields.groupby(environments):
    varying = here.columns[here.groupby(models).nunique().gt(1).any()]
    for first, *others in _together(here[sorted(varying, key=lambda f: not f.endswith(".name"))]):
      if others:
        notes.append(f"{environment}: vary only together with {first}: {', '.join(others)}")
      chosen = here[first].fillna("absent")
      short = chosen.map(lambda v: v.rstrip("/").split("/")[-1] or "none")
      if short.nunique() < chosen.nunique():  # folders of one name: their whole paths
        short = chosen.map(lambda v: v or "none")
      labels[here.index] += f", {first.split('.')[-1]}=" + short
    between = [f for f in here if f not in varying and here[f].nunique() > 1]
    if between:
      notes.append(f"confound in {environment}: differs between models: {', '.join(between)}")
  return [label.removeprefix(", ") or "main" for label in labels], notes


def _flatten(config: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
  for name, value in config.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, str(value)


def _together(fields: DataFrame) -> list[list[str]]:
  """Lists of columns, each one-to-one with the first of its list."""
  found: list[list[str]] = []
  for name in fields:
    for group in found:
      both = fields[[group[0], name]].dropna().drop_duplicates()
      if len(both) == both[group[0]].nunique() == both[name].nunique():
        group.append(name)
        break
    else:
      found.append([name])
  return found


def collect(
  patterns: Sequence[str], window: int | None = None, scores: str = "", compat: bool = False
) -> tuple[list[Cell], list[str]]:
  """Run directories -> cells and notes.

  window: smoothing in steps; None takes the study's 50, or a sixth of the shortest run if
  that is less. scores: name of a re-scoring that gives ACC and HEX. Unequal step counts within
  a cell are cut to its shortest run. compat: the study's handling, one rollout per step of its
  first 300, always smoothed over 50.
  """
  runs, notes = find_runs(patterns)
  initial = [run for run in runs if run.config.get("steps") == 0]
  trained = [run for run in runs if run.config.get("steps") != 0]
  labels, more = variants(trained)
  notes += more
  if initial:
    apart, more = variants(initial)
    labels += [INITIAL if label == "main" else f"{INITIAL}, {label}" for label in apart]
    notes += [*more, f"runs of 0 steps, apart as variant `{INITIAL}`: {len(initial)}"]
  # Other people and another split are a replicate as well as another seed of training.
  replicates = [f for f in PEOPLE if len({_people(run, f) for run in trained}) > 1]
  groups: dict[tuple, dict[int | str, list[read.Run]]] = {}
  for run, label in zip(trained + initial, labels, strict=True):
    key = (read.model_name(run) or run.path.name, read.environment_name(run), label)
    others = [_people(run, f) for f in replicates]
    seed = "/".join([str(run.seed), *others]) if others else run.seed
    groups.setdefault(key, {}).setdefault(seed, []).append(run)
  for runs in (runs for seeds in groups.values() for runs in seeds.values()):
    runs.sort(key=lambda run: -run.last_step)  # the longest stays, the first of equals
    for left in runs[1:]:
      notes.append(
        f"left out, same model, config and seed as {runs[0].path}: {left.path} "
        f"({left.last_step} steps, not {runs[0].last_step})"
      )
  if window is None:
    updates = [len(runs[0].metrics) for seeds in groups.values() for runs in seeds.values()]
    shortest = min(filter(None, updates), default=1)
    window = curves.WINDOW if compat else min(curves.WINDOW, max(1, shortest // 6))
  if window != curves.WINDOW:
    notes.append(f"smoothing window: {window} steps, where the study has {curves.WINDOW}")
  cells = []
  for key in sorted(groups):
    seeds = {seed: runs[0] for seed, runs in sorted(groups[key].items())}
    cells.append(_cell(key, seeds, window, scores, compat, notes))
  return cells, notes + _said_once(cells)


def _people(run: read.Run, field: str) -> str:
  return str((run.config.get("environment") or {}).get(field, 0))


def _said_once(cells: list[Cell]) -> list[str]:
  """Notes on all cells together: verdicts and cells that are missing, unequal lengths."""
  notes = []
  for name in gaps.SCORES:
    if count := sum(c.counts.get(f"unscored_{name}", 0) for c in cells):
      notes.append(
        f"{count} rollouts have no {name.upper()} verdict and are left out (`unscored_{name}`)"
      )
  trained = [c for c in cells if not c.initial]
  for environment in sorted({c.environment for c in cells}):
    lengths = {c.counts["last_step"] for c in trained
               if c.environment == environment and "last_step" in c.counts}  # fmt: skip
    if len(lengths) > 1:
      notes.append(
        f"{environment}: cells of unequal length are compared as they are, {min(lengths)} to "
        f"{max(lengths)} steps (column `last_step`)"
      )
  for model in sorted({c.model for c in trained}):
    for treatment in sorted({c.key[1:] for c in trained}):
      if (model, *treatment) not in {c.key for c in trained}:
        notes.append(f"missing cell: {' / '.join((model, *treatment))}")
  return notes


def _cell(
  key: tuple[str, str, str], seeds: dict, window: int, scores: str, compat: bool,
  notes: list[str],
) -> Cell:  # fmt: skip
  cell = Cell(*key, list(seeds), sources=[str(run.path) for run in seeds.values()])
  sizes = [read.number(run.info["model"].get("parameters")) for run in seeds.values()]
  cell.parameters = max(sizes) / 1e9
  if len(seeds) == 1:
    notes.append(f"{cell.title}: a single seed ({cell.seeds[0]}), no spread over seeds")
  cell.per_seed = held_out_gaps(cell, list(seeds.values()), scores, notes)
  found = {seed: rollout_scores(run, scores, compat, notes) for seed, run in seeds.items()}
  found = {seed: rollouts for seed, rollouts in found.items() if len(rollouts)}
  lacking = ", ".join(str(seed) for seed in seeds if seed not in found)
  if lacking and not cell.initial:
    rest = "curves are those of the other seeds" if found else "held-out gaps only"
    notes.append(f"{cell.title}: no training rollouts of seed {lacking}, {rest}")
  of_mean_curve = _add_curves(cell, found, window, compat, notes) if found else {}
  cell.values = cell.per_seed.mean().to_dict() | of_mean_curve
  cell.sd = cell.per_seed.std(ddof=0 if compat else 1).to_dict()
  known = cell.per_seed.notna().sum()
  for count in range(1, len(seeds)):
    if (known == count).any():
      names = ", ".join(known.index[known == count])
      notes.append(f"{cell.title}: {count} of {len(seeds)} seeds have a value of {names}")
  return cell


def _add_curves(
  cell: Cell, found: dict[int, DataFrame], window: int, compat: bool, notes: list[str]
) -> dict[str, float]:
  """Adds the curves of {seed: rollouts}, which may lack some of the seeds.

  Returns the scalars of the mean curve.
  """
  spans = {seed: (int(r["step"].min()), int(r["step"].max())) for seed, r in found.items()}
  first, last = max(a for a, _ in spans.values()), min(b for _, b in spans.values())
  if compat:
    last = min(last, first + scalars.PUBLISHED_STEPS - 1)
  if set(spans.values()) != {(first, last)}:
    notes.append(f"{cell.title}: first and last steps {spans}, cut to {first, last}")
  steps = np.arange(first, last + 1)
  found = {seed: r[r["step"].between(first, last)] for seed, r in found.items()}
  means = {seed: scalars.step_means(r, steps) for seed, r in found.items()}
  summary = scalars.seed_summary(means, window, 0 if compat else 1)
  cell.full, cell.curves, cell.curve_sd = (summary[k] for k in ("full", "curves", "curve_sd"))
  own = summary["per_seed"].assign(hms_windowed=[scalars.hms_windowed(r) for r in found.values()])
  cell.per_seed = cell.per_seed.join(own)
  empty = int(cell.curves["hex_gap"].isna().sum())
  if empty:
    notes.append(
      f"{cell.title}: {empty} of {len(steps)} steps have no HEX gap even after smoothing"
    )
  partial = {name: summary["partial_steps"][f"{name}_gap"] for name in gaps.SCORES}
  if any(partial.values()):
    says = ", ".join(f"{name} {count}" for name, count in partial.items() if count)
    known = f"gaps of some seeds only at this many of {len(steps)} steps"
    notes.append(f"{cell.title}: {known}: {says}")
  every = pd.concat(list(found.values()))
  cell.counts |= {
    "rollouts": len(every),
    **{f"unscored_{name}": int(every[name].isna().sum()) for name in gaps.SCORES},
    "steps": len(steps),
    "last_step": last,
    "window": window,
  }
  return summary["scalars"] | ({} if compat else nulls.bands(found, steps, window))


def rollout_scores(
  run: read.Run, scores: str = "", compat: bool = False, notes: list[str] | None = None
) -> DataFrame:
  """A run's training rollouts, one row each: step, prompt, is_gameable, reward, acc, hex.

  scores: of a re-scoring whose ACC and HEX replace the run's own (rollouts that it left out
  are left out here). compat: one rollout per step, drawn with a fixed seed, missing
  verdicts filled in as the study did.
  """
  records = read.train_rollouts(run)
  if scores:
    records = read.rescored(run, records, scores, "train", notes)
  if compat:
    rng, by_step = random.Random(42), {}
    for record in records:
      by_step.setdefault(record["step"], []).append(record)
    records = [rng.choice(group) for _, group in sorted(by_step.items())]
  found = DataFrame(
    {name: [r[name] for r in records] for name in ("step", "prompt", "is_gameable")}
    | {name: [read.number(r.get(name)) for r in records] for name in gaps.SCORES}
  )
  return found.fillna(scalars.PUBLISHED_FILL) if compat else found


def held_out_gaps(cell: Cell, runs: list[read.Run], scores: str, notes: list[str]) -> DataFrame:
  """Frame of the seeds' "heldout_<score>_gap" and "heldout_<score>_gap_before" from eval/, and of
  the numbers of Inspect's tasks.

  Of the last evaluated step that all seeds have. With `scores`, ACC and HEX are those of
  the re-scored replies, and NaN where it has none.
  """
  lines = [_evaluations(run, scores, notes) for run in runs]
  ends = {seed: max(found) for seed, found in zip(cell.seeds, lines, strict=True) if found}
  at = None
  if len(set(ends.values())) > 1:
    later = [set(found) - {min(found)} for found in lines if found]
    at = max(set.intersection(*later), default=None)
    which = f"at step {at}, the last that all seeds have" if at else "at each seed's own last step"
    notes.append(f"{cell.title}: held-out gaps {which}; last ones {ends}")
  if ends:
    cell.counts["last_step"] = at or min(ends.values())

  def gap(found: dict[int, dict], name: str, step: int | None) -> float:
    return read.number(found[step].get(f"{name}_gap")) if found else math.nan

  out = {}
  for name in gaps.SCORES:
    out[f"heldout_{name}_gap"] = [gap(x, name, at or max(x, default=None)) for x in lines]
    out[f"heldout_{name}_gap_before"] = [gap(x, name, min(x, default=None)) for x in lines]
  return DataFrame(out | _tasks(lines, at), cell.seeds)


def _tasks(lines: list[dict[int, dict]], at: int | None) -> dict[str, list[float]]:
  """{"task_<name>", "task_<name>_before": [a value for each run]} of Inspect's tasks."""

  def values(found: dict[int, dict], step: int | None) -> dict:
    kept = found.get(step, {}).get("tasks")
    kept = kept if isinstance(kept, dict) else {}
    return {re.sub(r"[^\w.]+", "_", k): v for k, v in kept.items() if isinstance(v, dict)}

  last = [values(x, at or max(x, default=None)) for x in lines]
  first = [values(x, min(x, default=None)) for x in lines]
  out = {}
  for name in sorted({n for found in (*first, *last) for n in found}):
    for kept, end in ((last, ""), (first, "_before")):
      out[f"task_{name}{end}"] = [read.number(x.get(name, {}).get("value")) for x in kept]
  return out


def _evaluations(run: read.Run, scores: str, notes: list[str]) -> dict[int, dict]:
  """{step: line of eval/summary.jsonl}, with a re-scoring's ACC and HEX gaps if one is named;
  those are NaN at a step that it left out."""
  lines = {line["step"]: line for line in run.evaluations}
  if not scores:
    return lines
  records = [r for step in read.eval_rollouts(run).values() for r in step]
  records = read.rescored(run, records, scores, "heldout", notes)
  for step in lines:
    here = [r for r in records if r["step"] == step]
    for name in ("acc", "hex"):
      means = [list(read.prompt_means(here, name, gameable).values()) for gameable in (True, False)]
      gap = np.mean(means[0]) - np.mean(means[1]) if all(means) else math.nan
      lines[step] = lines[step] | {f"{name}_gap": gaps.GAP_SIGN[name] * gap}
  return lines


# --- From the paper's printed numbers ----------------------------------------------------


def published(folder: str | Path) -> tuple[list[Cell], list[str]]:
  """published_results.csv of a folder -> cells; three seeds behind each, curves unknown."""
  path = Path(folder) / "published_results.csv"
  if not path.exists():
    raise UserError(f"{path}: no such file; --published takes the folder that holds it")
  table = read_csv(path, str(path))
  names = {slug(m): m for m in pd.read_csv(BENCHMARKS, comment="#")["model"]}
  lacking = {"model", "env", "metric", "mean", "std", "source"} - set(table)
  if lacking:
    raise UserError(f"{path}: columns missing: {', '.join(sorted(lacking))}")
  table = table.assign(mean=numbers(table["mean"], str(path)), std=numbers(table["std"], str(path)))
  cells: dict[tuple, Cell] = {}
  for row in table[table["metric"].isin(PUBLISHED_NAMES)].itertuples():
    variant = "base models" if "base models" in str(row.source) else "published"
    key = (names.get(slug(row.model), row.model), row.env, variant)
    cell = cells.setdefault(key, Cell(*key, [5, 42, 83]))
    name = PUBLISHED_NAMES[row.metric]
    cell.values[name], cell.sd[name] = float(row.mean), float(row.std)
    cell.sources = list(dict.fromkeys([*cell.sources, row.source]))
  return list(cells.values()), [f"cells are published means over 3 seeds, from {path.name}"]


def read_csv(path: str | Path, says: str, dtype: type | None = None) -> DataFrame:
  """A CSV whose lines may end in # comments. says: how the error names it."""
  try:
    return pd.read_csv(path, comment="#", dtype=dtype, keep_default_na=dtype is None)
  except (OSError, ValueError) as error:
    raise UserError(f"{says}: {error}") from None


def numbers(column: Series, says: str) -> Series:
  """A column as floats, an empty field NaN. Raises UserError naming what is no number."""
  values = pd.to_numeric(column, errors="coerce")
  wrong = column[values.isna() & column.notna()]
  if len(wrong):
    raise UserError(f"{says}: column {column.name!r} holds {wrong.iloc[0]!r}, which is no number")
  return values.astype(float)
