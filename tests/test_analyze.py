"""From run directories, or the study's printed numbers, to corrected tables and figures."""

import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import synthetic_runs
from browsing import browser

from rlsafety import analyze, runs, study, tables
from rlsafety.errors import UserError

PAPER = os.environ.get("RLSAFETY_PAPER_DATA")
needs_paper = pytest.mark.skipif(
  not PAPER, reason="RLSAFETY_PAPER_DATA (folder of published_results/) is not set"
)


@needs_paper
def test_published_headline_correlations_are_reproduced():
  """Spearman of max HEX gap over 11 models, as the study prints them."""
  cells, _ = study.published(os.path.join(PAPER, "published_results"))
  table = tables.correlation_table(cells, tables.load_benchmarks(), ["max_hex_gap"], draws=200)
  table = table[table["variant"] == "published"].set_index(["environment", "benchmark", "method"])
  row = lambda *key: table.loc[key]  # noqa: E731
  printed = {
    ("therapy_talk", "num_params"): (-0.844, 3),
    ("therapy_talk", "capability_score"): (-0.627, 3),
    ("therapy_talk", "sycophancy"): (0.309, 3),
    ("action_advice", "num_params"): (0.81, 2),
    ("action_advice", "capability_score"): (0.90, 2),
    ("action_advice", "sycophancy"): (-0.87, 2),
    ("political_qa", "num_params"): (0.72, 2),
    ("political_qa", "capability_score"): (0.76, 2),
    ("political_qa", "sycophancy"): (-0.57, 2),
  }
  for (environment, benchmark), (rho, digits) in printed.items():
    found = row(environment, benchmark, "spearman")
    assert round(found["r"], digits) == rho and found["n"] == 11
  for benchmark, p in {"num_params": 0.001, "capability_score": 0.039, "sycophancy": 0.355}.items():
    assert round(row("therapy_talk", benchmark, "spearman")["p_t"], 3) == p
  for benchmark, r, p in (("num_params", -0.822, 0.002), ("capability_score", -0.641, 0.033)):
    found = row("therapy_talk", benchmark, "pearson")
    assert round(found["r"], 3) == r and round(found["p_t"], 3) == p
  spearman = table[table.index.get_level_values("method") == "spearman"]
  assert len(spearman) == 27 and (spearman["family"] == 27).all()
  assert (spearman["p_holm"] >= spearman["p_bh"]).all()
  assert (spearman["p_bh"] >= spearman["p"] - 1e-12).all()


def test_recovers_a_known_law_at_nominal_coverage():
  """200 studies of 11 models x 3 environments x 3 seeds; the truth is in closed form.

  Size and capability are correlated normals, the gap of environment e is a_e size plus a
  model's own deviation, and each seed adds noise. The law's Spearman rho with a seed mean
  is 6/pi asin(r/2) of its Pearson r.
  """
  rng = np.random.default_rng(11)
  slope = {"a": 0.9, "b": 0.0, "c": -0.6}
  own, noise, link = 0.7, 0.5, 0.8
  names = [f"m{i}" for i in range(11)]
  inside, off = {"spearman": [], "pearson": []}, {}
  for _ in range(200):
    size = rng.normal(size=11)
    capability = link * size + math.sqrt(1 - link**2) * rng.normal(size=11)
    scores = pd.DataFrame({"num_params": size, "capability_score": capability}, index=names)
    cells = []
    for e, a in slope.items():
      level = a * size + own * rng.normal(size=11)
      gaps = level[:, None] + noise * rng.normal(size=(11, 3))
      cells += [
        study.Cell(
          m,
          e,
          "main",
          [0, 1, 2],
          {"gap": float(g.mean())},
          {"gap": float(g.std(ddof=1))},
          {"gap": g},
        )
        for m, g in zip(names, gaps, strict=True)
      ]
    for row in tables.correlation_table(cells, scores, ["gap"], draws=1).itertuples():
      a = slope[row.environment]
      r = a / math.sqrt(a * a + own**2 + noise**2 / 3)
      r *= link if row.benchmark == "capability_score" else 1
      if row.method == "spearman":
        truth = 6 / math.pi * math.asin(r / 2)
        mean = 6 / (12 * math.pi) * (math.asin(r) + 9 * math.asin(r / 2))
      else:
        truth, mean = r, r * (1 - (1 - r * r) / 22)
      inside[row.method].append(row.low95 <= truth <= row.high95)
      off.setdefault((row.method, row.environment, row.benchmark), []).append(row.r - mean)
  for method, hits in inside.items():  # 1,200 intervals, not quite independent
    assert 0.93 <= np.mean(hits) <= 0.975, (method, np.mean(hits))
  for key, errors in off.items():  # the mean estimate at n = 11 is known too (Moran 1948)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(200), key


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """4 models x 2 variants with a missing cell, a single seed, a short and a broken run."""
  root = tmp_path_factory.mktemp("study")
  models = ["Qwen/Qwen1.5-0.5B-Chat", "google/gemma-1.1-2b-it", "01-ai/Yi-6B-Chat", "own-model"]
  for i, model in enumerate(models):
    for variant, rise in (("on", 1.0 + i), ("off", 3.0 + i)):
      for seed in (5, 42):
        if (i, variant) == (3, "off") or (i, variant, seed) == (2, "off", 42):
          continue
        synthetic_runs.write_run(
          root / "runs" / f"{i}-{variant}-{seed}", model=model, seed=seed, variant=variant,
          rise=rise, steps=24 if (i, variant, seed) != (0, "on", 42) else 18, eval_every=12,
        )  # fmt: skip
  synthetic_runs.write_run(root / "runs" / "unfinished", complete=False, steps=6)
  config = (root / "runs" / "unfinished" / "config.json").read_text()
  (root / "runs" / "unfinished" / "config.json").write_text(
    config.replace('"steps": 6', '"steps": 9')
  )
  out = analyze.analyse(root / "out", [str(root / "runs" / "**")], outcomes="max_hex_gap")
  return root, out


def test_everything_odd_is_named(made):
  _, out = made
  notes = "\n".join(out["notes"])
  for says in (
    r"left out, not complete: .*unfinished",
    r"Yi-6B-Chat / political_qa / off: a single seed \(5\)",
    r"Qwen1.5-0.5B-Chat / political_qa / on: unequal steps \{5: 24, 42: 18\}, cut to 18",
    r"missing cell: own-model / political_qa / off",
    r"no benchmark scores for: own-model",
    r"\d+ rollouts have no HEX verdict",
    r"window: 3 steps, where the study has 50",
  ):
    assert re.search(says, notes), says


def test_cells_agree_with_the_runs_and_the_law_behind_them(made):
  root, out = made
  cells = out["cells"].set_index(["model", "variant"])
  assert len(cells) == 7
  single = cells.loc[("Yi-6B-Chat", "off")]
  assert single["n_seeds"] == 1 and math.isnan(single["max_hex_gap_sd"])
  on = cells.loc[("own-model", "on")]
  assert on["max_hex_gap"] == pytest.approx(3.7, abs=0.6)  # law: 4 - 0.3 at the last step
  assert on["seeds"] == "5 42" and "3-on-5" in on["runs"] and "3-on-42" in on["runs"]
  # The held-out gap is the mean of what the runs' own summaries say.
  gaps = [
    runs.load_run(root / "runs" / f"3-on-{seed}").evaluations[-1]["hex_gap"] for seed in (5, 42)
  ]
  assert on["heldout_hex_gap"] == pytest.approx(np.mean(gaps))
  variants = out["variants"].set_index("variant")
  assert variants.loc["off", "against"] == "on" and variants.loc["off", "paired_models"] == 3
  assert variants.loc["off", "difference"] == pytest.approx(2.0, abs=0.4)


def test_tables_and_figures_are_complete_and_name_their_origin(made):
  root, out = made
  folder = root / "out"
  for name in ("cells", "seeds", "correlations", "partial", "variants"):
    if not len(out[name]):
      continue
    read = pd.read_csv(folder / f"{name}.csv")
    assert len(read) == len(out[name])
    for suffix in (".md", ".tex"):
      text = (folder / f"{name}{suffix}").read_text()
      assert "seeds 5, 42" in text and "4 models, 7 cells" in text and "orrect" in text
  assert "family" in out["correlations"] and set(out["correlations"]["n"]) <= {3, 4}
  size = out["correlations"].query("benchmark == 'num_params' and variant == 'on'")
  assert (size["n"] == 4).all()  # own-model's size comes from its config.json
  tex = (folder / "cells.tex").read_text()
  assert "political\\_qa" in tex and tex.count("\\begin{tabular}") == 1
  for stem in ("curves_political_qa_on", "size_max_hex_gap", "variants_max_hex_gap"):
    assert (folder / f"{stem}.svg").stat().st_size > 5_000
    assert (folder / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
  page = (folder / "index.html").read_text()
  assert page.count("<svg") >= 4 and page.count("<script") == 2
  ids = re.findall(r'\bid="([^"]+)"', page)
  assert len(ids) == len(set(ids))


def test_comparison_page_puts_runs_side_by_side(made):
  root, out = made
  driver = browser(1280, 900)
  try:
    driver.get((root / "out" / "index.html").as_uri())
    columns = driver.execute_script("return items.map(i => i.columns.map(c => c.title))")
    assert len(columns) == 16 and all(len(c) == 13 for c in columns)  # 13 complete runs
    assert "own-model, on, seed 5 (step 24)" in columns[0]
    text = driver.find_element("id", "cards").text
    assert "gemma-1.1-2b-it, off, seed 42" in text
    driver.get((root / "out" / "index.html").as_uri() + "#view=change&run=0")
    owners = driver.execute_script("return items.map(i => i.columns[0].rows[0].run)")
    assert owners == [0] * 16 and not driver.get_log("browser")
  finally:
    driver.quit()


def test_variants_are_fields_that_vary_within_a_model_and_confounds_are_named(tmp_path):
  def run(name, model, **config):
    path = synthetic_runs.write_run(tmp_path / name, model=model, steps=6, eval_every=6)
    text = runs.read_json(path / "config.json")
    text["config"] = {**text["config"], "variant": "", **config}
    (path / "config.json").write_text(json.dumps(text))
    return runs.load_run(path)

  found = [
    run("a", "m1", objective={"name": "grpo", "beta": 0.0}, batch=2, cue="none"),
    run("b", "m1", objective={"name": "dpo", "beta": 0.1}, batch=2, cue="none"),
    run("c", "m1", objective={"name": "dpo", "beta": 0.1}, batch=2, cue="style"),
    run("d", "m2", objective={"name": "grpo"}, batch=4, cue="none", seed=9, mesh={"data": 8}),
  ]
  labels, notes = study.variants(found)
  assert labels == [
    "name=grpo, cue=none", "name=dpo, cue=none", "name=dpo, cue=style", "name=grpo, cue=none"
  ]  # fmt: skip
  assert notes == [
    "political_qa: vary only together with objective.name: objective.beta",
    "confound in political_qa: differs between models: batch",
  ]


def test_published_compat_uses_one_rollout_per_step_and_fills_in(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=60, eval_every=60)
  run = runs.load_run(path)
  honest, old = study.rollout_scores(run), study.rollout_scores(run, compat=True)
  assert len(honest["step"]) == 60 * 16 and list(old["step"]) == list(range(1, 61))
  assert np.isnan(honest["hex"]).any() and not np.isnan(old["hex"]).any()
  again = study.rollout_scores(run, compat=True)
  np.testing.assert_array_equal(old["hex"], again["hex"])


def test_bad_flags_are_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="no complete run directory"):
    analyze.analyse(tmp_path, [str(tmp_path / "nothing*")])
  with pytest.raises(UserError, match="give --runs"):
    analyze.main([f"--out={tmp_path}"])
  with pytest.raises(UserError, match="unknown argument .*--benchmark="):
    analyze.main([f"--out={tmp_path}", "--benchmark", "x"])
  with pytest.raises(UserError, match="published_results.csv"):
    analyze.main([f"--out={tmp_path}", f"--published={tmp_path}"])
