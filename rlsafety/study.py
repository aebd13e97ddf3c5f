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
import random
import re

import numpy as np

from rlsafety import runs
from rlsafety.errors import UserError
from rlsafety.metrics import misalignment

# Fields that tell seeds, machines and models apart, but not treatments.
NOT_A_VARIANT = re.compile(
  r"^(name|seed|steps|variant|model\..*|mesh\..*|learner\..*|checkpoint\..*|eval\..*"
  r"|environment\.(name|seed|data_dir)|judge\.url)$"
)
BENCHMARKS = pathlib.Path(__file__).parent / "metrics" / "benchmark_scores.csv"
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
    run = runs.load_run(folder)
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
  cells = [(slug(runs.model_name(run)), runs.environment_name(run)) for run in found]
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
      for i in here:
        value = str(flat[i].get(first, "absent")).rstrip("/").split("/")[-1]
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


def rollout_scores(run, scores: str = "", compat: bool = False, seed: int = 42) -> dict:
  """Arrays over a run's training rollouts: step, is_gameable, reward, acc, hex.

  scores: name of a re-scoring by `rlsafety.evaluate` whose ACC and HEX replace the run's
  own (rollouts that it left out are left out here). compat: one rollout per step, drawn
  with `seed`, missing verdicts filled in as the study did.
  """
  records = runs.train_rollouts(run)
  if scores:
    records = _rescored(run, records, scores)
  if compat:
    rng, by_step = random.Random(seed), {}
    for record in records:
      by_step.setdefault(record["step"], []).append(record)
    records = [rng.choice(group) for _, group in sorted(by_step.items())]
  out = {
    "step": np.array([r["step"] for r in records], int),
    "is_gameable": np.array([bool(r["is_gameable"]) for r in records], bool),
  }
  values = {k: np.array([runs.score(r, k) for r in records], float) for k in runs.SCORES}
  return out | (misalignment.published_compat(values) if compat else values)


def _rescored(run, records, name):
  path = run.path / "scores" / f"{name}.jsonl"
  if not path.exists():
    raise UserError(f"{path}: no such scores; make them with python -m rlsafety.evaluate")
  keys = ("step", "prompt", "sample")
  new = {tuple(r[k] for k in keys): r for r in runs.read_jsonl(path) if r.get("source") == "train"}
  kept = []
  for record in records:
    found = new.get(tuple(record[k] for k in keys))
    if found:
      kept.append({**record, "acc": found.get("acc"), "hex": found.get("hex")})
  return kept


def collect(patterns, window=None, scores="", compat=False) -> tuple[list[Cell], list[str]]:
  """Run directories -> cells and notes.

  window: smoothing in steps; None takes the study's 50, or a sixth of the shortest run if
  that is less. Unequal step counts within a cell are cut to its shortest run.
  """
  found, notes = find_runs(patterns)
  labels, more = variants(found)
  notes += more
  groups = {}
  for run, label in zip(found, labels, strict=True):
    key = (runs.model_name(run) or run.path.name, runs.environment_name(run), label)
    seed = run.info.get("seed", run.config.get("seed"))
    seeds = groups.setdefault(key, {})
    if seed in seeds:
      notes.append(f"left out, same model, config and seed as {seeds[seed].path}: {run.path}")
    else:
      seeds[seed] = run
  if window is None:
    shortest = min((len(run.metrics) for run in found if run.metrics), default=1)
    window = min(misalignment.WINDOW, max(1, shortest // 6))
  if window != misalignment.WINDOW:
    notes.append(f"smoothing window: {window} steps, where the study has {misalignment.WINDOW}")
  cells = []
  for key, seeds in sorted(groups.items(), key=lambda item: str(item[0])):
    cells.append(
      _cell(key, dict(sorted(seeds.items(), key=by_number)), window, scores, compat, notes)
    )
  if unscored := sum(c.counts.get("unscored", 0) for c in cells):
    notes.append(f"{unscored} rollouts have no HEX verdict and are left out (column `unscored`)")
  missing = _missing(cells)
  return cells, notes + [f"missing cell: {' / '.join(key)}" for key in missing]


def _cell(key, seeds, window, scores, compat, notes) -> Cell:
  name = " / ".join(key)
  data = {s: rollout_scores(run, scores, compat) for s, run in seeds.items()}
  for seed in [s for s, d in data.items() if not len(d["step"])]:
    notes.append(f"{name}: seed {seed} has no training rollouts, held-out gaps only")
    del data[seed]
  held_out = held_out_gaps(list(seeds.values()))
  cell = Cell(*key, list(seeds), {}, {}, sources=[str(run.path) for run in seeds.values()])
  cell.parameters = max((_parameters(run) for run in seeds.values()), default=math.nan)
  _add(cell, held_out, 0 if compat else 1)
  if len(seeds) == 1:
    notes.append(f"{name}: a single seed ({next(iter(seeds))}), no spread over seeds")
  if len(data) < len(seeds):  # curves need rollouts of every seed
    return cell
  first = max(int(d["step"].min()) for d in data.values())
  ends = {s: int(d["step"].max()) for s, d in data.items()}
  last = min(ends.values())
  if len(set(ends.values())) > 1:
    notes.append(f"{name}: unequal steps {ends}, cut to {last}")
  steps = np.arange(first, last + 1)
  means, hms_b, unscored = [], [], 0
  for d in data.values():
    use = (d["step"] >= first) & (d["step"] <= last)
    d = {k: v[use] for k, v in d.items()}
    unscored += int(np.isnan(d["hex"]).sum())
    seed_means = {
      k: misalignment.step_means(d["step"], d[k], d["is_gameable"], steps)[0] for k in runs.SCORES
    }
    everyone = misalignment.step_means(d["step"], d["reward"], np.ones(len(d["step"])), steps)[0]
    means.append(seed_means | {"all": everyone["gameable"]})
    hms_b.append(misalignment.hms_windowed(d["step"], d["acc"], d["hex"], d["is_gameable"]))
  summary = misalignment.seed_summary(steps, means, window, compat)
  empty = int(np.isnan(summary["curves"]["hex_gap"]).sum())
  if empty:
    notes.append(f"{name}: {empty} of {len(steps)} steps have no HEX gap even after smoothing")
  cell.values |= summary["scalars"]
  cell.sd |= summary["sd"]
  cell.per_seed |= summary["per_seed"]
  _add(cell, {"hms_windowed": np.array(hms_b)}, 0 if compat else 1)
  cell.full, cell.steps = summary["full"], steps
  cell.curves, cell.curve_sd = summary["curves"], summary["curve_sd"]
  cell.counts = {
    "rollouts": sum(len(d["step"]) for d in data.values()),
    "unscored": unscored,
    "steps": len(steps),
    "window": window,
  }
  return cell


def _add(cell: Cell, per_seed: dict, ddof: int) -> None:
  """Adds scalars that are means over the seeds' own values."""
  for name, values in per_seed.items():
    cell.per_seed[name] = values
    cell.values[name] = float(misalignment.nanmean(values))
    cell.sd[name] = float(misalignment.nanstd(values, ddof))


def held_out_gaps(seeds: list) -> dict:
  """{"heldout_<score>_gap": [seeds], "heldout_<score>_gap_before": ...} from eval/."""
  out = {}
  for name in runs.SCORES:
    for suffix, index in (("", -1), ("_before", 0)):
      values = [
        runs.number(run.evaluations[index].get(f"{name}_gap")) if run.evaluations else math.nan
        for run in seeds
      ]
      out[f"heldout_{name}_gap{suffix}"] = np.array(values)
  return out


def _parameters(run) -> float:
  for source in (run.info.get("model"), run.info):
    if isinstance(source, dict) and source.get("parameters"):
      return float(source["parameters"]) / 1e9
  return math.nan


def _missing(cells: list[Cell]) -> list[tuple]:
  """Combinations of a model with an environment's variants that no run covers."""
  have = {cell.key for cell in cells if cell.seeds}
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
