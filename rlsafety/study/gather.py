"""The cells of a study: run directories, or published numbers, in one shape.

A *cell* is one model in one environment under one variant, with its seeds. `collect`
makes cells from run directories, `published` from the numbers printed with the paper;
tables and figures do not know the difference. Everything that is missing, cut or left
out is written into `notes`, which the tables carry.
"""

import dataclasses
import glob
import itertools
import math
import pathlib
import re

import numpy as np

from rlsafety.errors import UserError
from rlsafety.metrics import curves
from rlsafety.rundir import read
from rlsafety.study.scores import evaluations, rollout_scores

# Fields that tell seeds, machines and models apart, but not treatments. A run that starts from
# an adapter is another treatment than one that starts fresh.
NOT_A_VARIANT = re.compile(
  r"^(name|seed|steps|variant|model\.(?!adapter$).*|mesh\..*|learner\..*|checkpoint\..*"
  r"|eval\..*|environment\.(name|seed)"
  r"|judge\.(url|price|concurrency|timeout_s|deadline_s|attempts))$"
)
INITIAL = "initial"  # the variant of runs of 0 steps: what a model said before any training
BENCHMARKS = pathlib.Path(__file__).parent / "benchmark_scores.csv"
PUBLISHED_NAMES = {
  "max_er_gap": "max_hex_gap", "max_acc_gap": "max_acc_gap", "hms_score": "hms",
  "er_gap_auc_normalized": "hex_gap_auc_normalised", "max_reward": "max_reward",
  "acc_gap_auc_normalized": "acc_gap_auc_normalised", "max_er_mean": "max_hex",
  "max_acc_mean": "max_acc", "init_hex_gap": "initial_hex_gap",
  "init_hex_gameable": "initial_hex", "delta_ce": "delta_ce",
}  # fmt: skip


@dataclasses.dataclass
class Cell:
  """One model x environment x variant.

  values, sd: {scalar: number}, sd over seeds (NaN with one). per_seed: {scalar: [seeds]},
  empty where only a summary was published. curves, curve_sd: {name: [N]} over `steps`.
  """

  model: str
  environment: str
  variant: str
  seeds: list[int]
  values: dict
  sd: dict
  per_seed: dict = dataclasses.field(default_factory=dict)
  full: dict = dataclasses.field(default_factory=dict)
  steps: np.ndarray | None = None
  curves: dict = dataclasses.field(default_factory=dict)
  curve_sd: dict = dataclasses.field(default_factory=dict)
  sources: list[str] = dataclasses.field(default_factory=list)
  counts: dict = dataclasses.field(default_factory=dict)
  parameters: float = math.nan  # billions

  @property
  def key(self):
    return self.model, self.environment, self.variant

  @property
  def initial(self):
    return self.variant.split(", ")[0] == INITIAL


def by_number(item):
  """Sorts seeds (or pairs led by one) as numbers, those that are not numbers last."""
  value = item[0] if isinstance(item, tuple) else item
  return (not isinstance(value, (int, float)), value if isinstance(value, (int, float)) else 0)


def slug(name: str) -> str:
  """A model's name without owner, case and punctuation, for joining tables."""
  return re.sub(r"[^a-z0-9]", "", str(name).rstrip("/").split("/")[-1].lower())


# --- From run directories ---------------------------------------------------------------


def find_runs(patterns) -> tuple[list, list[str]]:
  """Run directories matching the globs -> (complete runs, notes on those left out)."""
  found, notes = {}, []
  for pattern in patterns:
    matches = glob.glob(str(pattern), recursive=True)
    for match in map(pathlib.Path, matches):
      folder = match if match.is_dir() else match.parent
      if (folder / "config.json").exists() and (folder / "eval").exists():
        found[folder.resolve()] = folder
  complete = []
  for folder in sorted(found.values()):
    run = read.load_run(folder)
    if run.complete:
      complete.append(run)
    else:
      notes.append(f"left out, not complete: {folder}")
  if not complete:
    raise UserError(f"--runs={','.join(map(str, patterns))}: no complete run directory there")
  return complete, notes


def variants(found: list) -> tuple[list[str], list[str]]:
  """A label for each run: the config fields that vary within a model and environment.

  Fields that always change together make one part of the label, and the notes say so: no
  analysis can tell their effects apart. A field that differs only between models (a batch
  size, say) is no variant but a confound, and named too. A field that one config lacks,
  as configs of different versions do, is no difference.
  """
  flat = [dict(_flatten(run.config)) for run in found]
  cells = [(slug(read.model_name(run)), read.environment_name(run)) for run in found]
  labels, notes = [""] * len(found), []
  for environment in sorted({cell[1] for cell in cells}):
    here = [i for i, cell in enumerate(cells) if cell[1] == environment]
    varying, between = set(), set()
    for i, j in itertools.combinations(here, 2):
      for field in flat[i].keys() & flat[j].keys():
        if not NOT_A_VARIANT.match(field) and flat[i][field] != flat[j][field]:
          (varying if cells[i] == cells[j] else between).add(field)
    together = []  # lists of fields, each one-to-one with the first of its list
    for field in sorted(varying, key=lambda f: (not f.endswith(".name"), f)):
      for group in together:
        both = [(v[group[0]], v[field]) for v in map(flat.__getitem__, here)
                if group[0] in v and field in v]  # fmt: skip
        if len(set(both)) == len({a for a, _ in both}) == len({b for _, b in both}):
          group.append(field)
          break
      else:
        together.append([field])
    for first, *others in together:
      if others:
        notes.append(f"{environment}: vary only together with {first}: {', '.join(others)}")
      values = {flat[i].get(first, "absent") for i in here}
      short = {v: v.rstrip("/").split("/")[-1] or "none" for v in values}
      if len(set(short.values())) < len(values):  # folders of one name: their whole paths
        short = {v: v or "none" for v in values}
      for i in here:
        value = short[flat[i].get(first, "absent")]
        labels[i] += f"{', ' * bool(labels[i])}{first.split('.')[-1]}={value}"
    if between - varying:
      fields = ", ".join(sorted(between - varying))
      notes.append(f"confound in {environment}: differs between models: {fields}")
  named = [str(run.config.get("variant") or "") for run in found]
  parts = [", ".join(filter(None, pair)) for pair in zip(named, labels, strict=True)]
  return [part or "main" for part in parts], notes


def _flatten(config: dict, prefix: str = ""):
  for name, value in config.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, str(value)


def collect(patterns, window=None, scores="", compat=False) -> tuple[list[Cell], list[str]]:
  """Run directories -> cells and notes.

  window: smoothing in steps; None takes the study's 50, or a sixth of the shortest run if
  that is less. Unequal step counts within a cell are cut to its shortest run. compat: the
  study's handling, one rollout per step of its first 300, always smoothed over 50.
  """
  found, notes = find_runs(patterns)
  initial = [run for run in found if run.config.get("steps") == 0]
  trained = [run for run in found if run.config.get("steps") != 0]
  labels, more = variants(trained)
  notes += more
  if initial:
    apart, more = variants(initial)
    labels += [INITIAL if label == "main" else f"{INITIAL}, {label}" for label in apart]
    notes += [*more, f"runs of 0 steps, apart as variant `{INITIAL}`: {len(initial)}"]
  groups = {}
  for run, label in zip(trained + initial, labels, strict=True):
    key = (read.model_name(run) or run.path.name, read.environment_name(run), label)
    seed = run.info.get("seed", run.config.get("seed"))
    seeds = groups.setdefault(key, {})
    both = sorted([run] if seed not in seeds else [seeds[seed], run], key=_length, reverse=True)
    seeds[seed] = both[0]  # the longest stays, the first of equals
    for left in both[1:]:
      notes.append(
        f"left out, same model, config and seed as {both[0].path}: {left.path} "
        f"({_length(left)} steps, not {_length(both[0])})"
      )
  if window is None:
    kept = [run for seeds in groups.values() for run in seeds.values() if run.metrics]
    shortest = min((len(run.metrics) for run in kept), default=1)
    window = curves.WINDOW if compat else min(curves.WINDOW, max(1, shortest // 6))
  if window != curves.WINDOW:
    notes.append(f"smoothing window: {window} steps, where the study has {curves.WINDOW}")
  cells = []
  for key, seeds in sorted(groups.items(), key=lambda item: str(item[0])):
    cells.append(
      _cell(key, dict(sorted(seeds.items(), key=by_number)), window, scores, compat, notes)
    )
  unscored = {k: sum(c.counts.get(f"unscored_{k}", 0) for c in cells) for k in read.SCORES}
  for name, count in unscored.items():
    if count:
      notes.append(
        f"{count} rollouts have no {name.upper()} verdict and are left out (`unscored_{name}`)"
      )
  for environment in sorted({c.environment for c in cells}):
    here = [c for c in cells if c.environment == environment and not c.initial]
    lengths = {c.counts["last_step"] for c in here if "last_step" in c.counts}
    if len(lengths) > 1:
      notes.append(
        f"{environment}: cells of unequal length are compared as they are, {min(lengths)} to "
        f"{max(lengths)} steps (column `last_step`)"
      )
  missing = _missing(cells)
  return cells, notes + [f"missing cell: {' / '.join(key)}" for key in missing]


def _length(run) -> int:
  return run.metrics[-1]["step"] if run.metrics else 0


def _cell(key, seeds, window, scores, compat, notes) -> Cell:
  name = " / ".join(key)
  cell = Cell(*key, list(seeds), {}, {}, sources=[str(run.path) for run in seeds.values()])
  cell.parameters = max((_parameters(run) for run in seeds.values()), default=math.nan)
  if len(seeds) == 1:
    notes.append(f"{name}: a single seed ({next(iter(seeds))}), no spread over seeds")
  data = {s: rollout_scores(run, scores, compat, notes=notes) for s, run in seeds.items()}
  data = {s: d for s, d in data.items() if len(d["step"])}
  lacking = ", ".join(str(s) for s in seeds if s not in data)
  if lacking and not cell.initial:
    rest = "curves are those of the other seeds" if data else "held-out gaps only"
    notes.append(f"{name}: no training rollouts of seed {lacking}, {rest}")
  ddof = 0 if compat else 1
  _add(cell, held_out_gaps(cell, list(seeds.values()), scores, notes), ddof)
  if data:
    _add_curves(cell, data, window, compat, notes)
  fewer = {}
  for scalar, values in cell.per_seed.items():
    known = int(np.isfinite(values).sum())
    if 0 < known < len(values):
      fewer.setdefault(known, []).append(scalar)
  for known, scalars in sorted(fewer.items()):
    notes.append(f"{name}: {known} of {len(seeds)} seeds have a value of {', '.join(scalars)}")
  return cell


def _add_curves(cell, data, window, compat, notes) -> None:
  """Curves and their scalars from {seed: rollout scores}, which may lack some of the seeds."""
  name = " / ".join(cell.key)
  spans = {s: (int(d["step"].min()), int(d["step"].max())) for s, d in data.items()}
  first, last = max(a for a, _ in spans.values()), min(b for _, b in spans.values())
  if compat:
    last = min(last, first + curves.PUBLISHED_STEPS - 1)
  if set(spans.values()) != {(first, last)}:
    notes.append(f"{name}: first and last steps {spans}, cut to {first, last}")
  steps = np.arange(first, last + 1)
  means, hms_b, rollouts, unscored = [], [], 0, dict.fromkeys(read.SCORES, 0)
  for d in data.values():
    use = (d["step"] >= first) & (d["step"] <= last)
    d = {k: v[use] for k, v in d.items()}
    rollouts += int(use.sum())
    seed_means = {
      k: curves.step_means(d["step"], d[k], d["is_gameable"], steps)[0] for k in read.SCORES
    }
    everyone = curves.step_means(d["step"], d["reward"], np.ones(len(d["step"])), steps)[0]
    means.append(seed_means | {"all": everyone["gameable"]})
    hms_b.append(curves.hms_windowed(d["step"], d["acc"], d["hex"], d["is_gameable"]))
    unscored = {k: n + int(np.isnan(d[k]).sum()) for k, n in unscored.items()}
  summary = curves.seed_summary(steps, means, window, compat)
  empty = int(np.isnan(summary["curves"]["hex_gap"]).sum())
  if empty:
    notes.append(f"{name}: {empty} of {len(steps)} steps have no HEX gap even after smoothing")
  partial = {k: summary["partial_steps"][f"{k}_gap"] for k in read.SCORES}
  if any(partial.values()):
    says = ", ".join(f"{k} {n}" for k, n in partial.items() if n)
    notes.append(f"{name}: gaps of some seeds only at this many of {len(steps)} steps: {says}")
  cell.values |= summary["scalars"]
  cell.sd |= summary["sd"]
  place = [cell.seeds.index(s) for s in data]

  def of_all_seeds(values):
    out = np.full(len(cell.seeds), np.nan)
    out[place] = values
    return out

  cell.per_seed |= {k: of_all_seeds(v) for k, v in summary["per_seed"].items()}
  _add(cell, {"hms_windowed": of_all_seeds(hms_b)}, 0 if compat else 1)
  cell.full, cell.steps = summary["full"], steps
  cell.curves, cell.curve_sd = summary["curves"], summary["curve_sd"]
  cell.counts |= {
    "rollouts": rollouts,
    **{f"unscored_{k}": n for k, n in unscored.items()},
    "steps": len(steps),
    "last_step": last,
    "window": window,
  }


def _add(cell: Cell, per_seed: dict, ddof: int) -> None:
  """Adds scalars that are means over the seeds' own values."""
  for name, values in per_seed.items():
    cell.per_seed[name] = values
    cell.values[name] = float(curves.nanmean(values))
    cell.sd[name] = float(curves.nanstd(values, ddof))


def held_out_gaps(cell: Cell, seeds: list, scores: str, notes: list[str]) -> dict:
  """{"heldout_<score>_gap": [seeds], "heldout_<score>_gap_before": ...} from eval/.

  Of the last evaluated step that all seeds have. With `scores`, ACC and HEX are those of
  the re-scored replies, and NaN where it has none.
  """
  lines = [evaluations(run, scores, notes) for run in seeds]
  ends = {s: max(found) for s, found in zip(cell.seeds, lines, strict=True) if found}
  at = None
  if len(set(ends.values())) > 1:
    later = [set(found) - {min(found)} for found in lines if found]
    at = max(set.intersection(*later), default=None)
    which = f"at step {at}, the last that all seeds have" if at else "at each seed's own last step"
    notes.append(f"{' / '.join(cell.key)}: held-out gaps {which}; last ones {ends}")
  if ends:
    cell.counts["last_step"] = at or min(ends.values())
  out = {}
  for name in read.SCORES:
    before = [read.number(x[min(x)].get(f"{name}_gap")) if x else math.nan for x in lines]
    after = [read.number(x[at or max(x)].get(f"{name}_gap")) if x else math.nan for x in lines]
    out[f"heldout_{name}_gap"] = np.array(after)
    out[f"heldout_{name}_gap_before"] = np.array(before)
  return out


def _parameters(run) -> float:
  for source in (run.info.get("model"), run.info):
    if isinstance(source, dict) and source.get("parameters"):
      return float(source["parameters"]) / 1e9
  return math.nan


def _missing(cells: list[Cell]) -> list[tuple]:
  """Combinations of a model with an environment's variants that no run covers."""
  have = {cell.key for cell in cells if cell.seeds and not cell.initial}
  treatments = sorted({key[1:] for key in have})
  models = sorted({key[0] for key in have})
  return [(m, *t) for m in models for t in treatments if (m, *t) not in have]


# --- From the paper's printed numbers ----------------------------------------------------


def published(folder) -> tuple[list[Cell], list[str]]:
  """published_results.csv of a folder -> cells; three seeds behind each, curves unknown."""
  import pandas as pd

  path = pathlib.Path(folder) / "published_results.csv"
  if not path.exists():
    raise UserError(f"{path}: no such file; --published takes the folder that holds it")
  table = pd.read_csv(path)
  names = {slug(m): m for m in pd.read_csv(BENCHMARKS, comment="#")["model"]}
  lacking = {"model", "env", "metric", "mean", "std", "source"} - set(table)
  if lacking:
    raise UserError(f"{path}: columns missing: {', '.join(sorted(lacking))}")
  cells = {}
  for row in table.itertuples():
    if row.metric not in PUBLISHED_NAMES:
      continue
    variant = "base models" if "base models" in row.source else "published"
    key = (names.get(slug(row.model), row.model), row.env, variant)
    cell = cells.setdefault(key, Cell(*key, [5, 42, 83], {}, {}))
    name = PUBLISHED_NAMES[row.metric]
    cell.values[name], cell.sd[name] = float(row.mean), float(row.std)
    if row.source not in cell.sources:
      cell.sources.append(row.source)
  return list(cells.values()), [f"cells are published means over 3 seeds, from {path.name}"]
