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
from scipy import stats

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.rundir import read
from rlsafety.study import analyze, gather, tables

PAPER = os.environ.get("RLSAFETY_PAPER_DATA")
needs_paper = pytest.mark.skipif(
  not PAPER, reason="RLSAFETY_PAPER_DATA (folder of published_results/) is not set"
)


@needs_paper
def test_published_headline_correlations_are_reproduced():
  """Spearman of max HEX gap over 11 models, as the study prints them."""
  cells, _ = gather.published(os.path.join(PAPER, "published_results"))
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
  """100 studies of 11 models x 3 environments x 3 seeds; the truth is in closed form.

  Size and capability are correlated normals, the gap of environment e is a_e size plus a
  model's own deviation, and each seed adds noise. The law's Spearman rho with a seed mean
  is 6/pi asin(r/2) of its Pearson r.
  """
  rng = np.random.default_rng(11)
  slope = {"a": 0.9, "b": 0.0, "c": -0.6}
  own, noise, link = 0.7, 0.5, 0.8
  names = [f"m{i}" for i in range(11)]
  inside, off = {"spearman": [], "pearson": []}, {}
  for _ in range(100):
    size = rng.normal(size=11)
    capability = link * size + math.sqrt(1 - link**2) * rng.normal(size=11)
    scores = pd.DataFrame({"num_params": size, "capability_score": capability}, index=names)
    cells = []
    for e, a in slope.items():
      level = a * size + own * rng.normal(size=11)
      gaps = level[:, None] + noise * rng.normal(size=(11, 3))
      cells += [
        gather.Cell(
          m,
          e,
          "main",
          [0, 1, 2],
          {"gap": float(g.mean())},
          {"gap": float(g.std(ddof=1))},
          pd.DataFrame({"gap": g}),
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
  for method, hits in inside.items():  # 600 intervals, not quite independent
    assert 0.93 <= np.mean(hits) <= 0.975, (method, np.mean(hits))
  for key, errors in off.items():  # the mean estimate at n = 11 is known too (Moran 1948)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(len(errors)), key


def test_correlations_by_seed_are_those_of_each_seed_alone():
  rng = np.random.default_rng(3)
  scores = pd.DataFrame({"quiz": rng.normal(size=6)}, index=[f"m{i}" for i in range(6)])
  gaps = {"assistant": rng.normal(size=(6, 3)), "therapist": rng.normal(size=(6, 3))}
  cells = [
    gather.Cell(m, "e", variant, [0, 1, 2], {"gap": g.mean()}, {}, pd.DataFrame({"gap": g}))
    for variant, of in gaps.items()
    for m, g in zip(scores.index, of, strict=True)
  ]
  found = tables.per_seed_table(tables.correlation_table(cells, scores, ["gap"], draws=1))
  for row in found.to_dict("records"):
    each = [stats.spearmanr(scores["quiz"], seed).statistic for seed in gaps[row["variant"]].T]
    assert row["quiz"] == pytest.approx(np.mean(each), abs=1e-12)
    assert row["quiz_sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-12)
  assert list(found["variant"]) == ["assistant", "therapist"]


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
    r"0.5B-Chat / political_qa / on: first and last steps \{5: \(1, 24\), 42: \(1, 18\)\}, cut to "
    r"\(1, 18\)",
    r"0.5B-Chat / political_qa / on: held-out gaps at step 12, the last that all seeds have",
    r"political_qa: cells of unequal length are compared as they are, 18 to 24 steps",
    r"political_qa / off: not correlated, .*: max_hex_gap with num_params \(n = 3\), capab",
    r"missing cell: own-model / political_qa / off",
    r"no benchmark scores for: own-model",
    r"\d+ rollouts have no HEX verdict",
    r"\d+ rollouts have no REWARD verdict",
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
  sources = " ".join(out["cells"]["runs"]).split()  # the captions of larger studies point here
  assert len(sources) == 13 and all((root / "runs" / s.split("/")[-1]).is_dir() for s in sources)
  # The held-out gap is the mean of what the runs' own summaries say.
  gaps = [
    read.load_run(root / "runs" / f"3-on-{seed}").evaluations[-1]["hex_gap"] for seed in (5, 42)
  ]
  assert on["heldout_hex_gap"] == pytest.approx(np.mean(gaps))
  variants = out["variants"].set_index("variant")
  assert variants.loc["off", "against"] == "on" and variants.loc["off", "pairs"] == 3
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
  assert (out["correlations"]["power_by"] == tables.POWER).all()
  assert "hex_gap_auc_normalised_sd" in (folder / "cells.md").read_text()
  tex = (folder / "cells.tex").read_text()
  assert "political\\_qa" in tex and tex.count("\\begin{tabular}") == 1
  for stem in ("curves_political_qa_on", "size_max_hex_gap", "variants_max_hex_gap"):
    assert (folder / f"{stem}.svg").stat().st_size > 5_000
    assert (folder / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
  page = (folder / "index.html").read_text()
  assert page.count("<svg") >= 4 and page.count("<script") == 2
  assert "<b>max HEX gap against model size</b>" in page and "<b>max_" not in page
  ids = re.findall(r'\bid="([^"]+)"', page)
  assert len(ids) == len(set(ids))


def test_comparison_page_puts_runs_side_by_side(made):
  root, out = made
  driver = browser(1280, 900)
  try:
    driver.get((root / "out" / "index.html").as_uri())
    # A figure has its own size on the screen, and is no wider than the paper.
    size = "return [...document.querySelectorAll('.plot svg')].map(s => s.clientWidth)"
    small, *_ = sorted(driver.execute_script(size))
    assert small < 600, small
    paper = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert max(driver.execute_script(size)) <= 700
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    columns = driver.execute_script("return items.map(i => i.columns.map(c => c.title))")
    assert len(columns) == 16 and all(len(c) == 13 for c in columns)  # 13 complete runs
    assert "own-model, political_qa, on, seed 5 (step 24)" in columns[0]
    text = driver.find_element("id", "cards").text
    assert "gemma-1.1-2b-it, political_qa, off, seed 42" in text
    driver.get((root / "out" / "index.html").as_uri() + "#view=change&run=0")
    owners = driver.execute_script("return items.map(i => i.columns[0].rows[0].run)")
    assert owners == [0] * 16 and not driver.get_log("browser")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    driver.get("about:blank")
    driver.get((root / "out" / "index.html").as_uri())
    assert driver.execute_script("return items.length") == 16
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    # One run has nothing beside it: its page opens on what there is to read.
    analyze.analyse(root / "one", [str(root / "runs" / "0-on-5")], outcomes="hms")
    driver.get((root / "one" / "index.html").as_uri() + "#view=runs")
    assert "16 of 16 prompts" in driver.find_element("id", "count").text
    assert driver.execute_script("return view") == "change"
  finally:
    driver.quit()


def test_variants_are_fields_that_vary_within_a_model_and_confounds_are_named(tmp_path):
  def run(name, model, adapter="", **config):
    path = synthetic_runs.write_run(tmp_path / name, model=model, steps=6, eval_every=6)
    text = read_json(path / "config.json")
    text["config"] = {**text["config"], "variant": "", **config}
    text["config"]["model"] |= {"adapter": adapter}
    (path / "config.json").write_text(json.dumps(text))
    return read.load_run(path)

  found = [
    run("a", "m1", objective={"name": "grpo", "beta": 0.0}, batch=2, cue="none"),
    run("b", "m1", objective={"name": "dpo", "beta": 0.1}, batch=2, cue="none"),
    run("c", "m1", objective={"name": "dpo", "beta": 0.1}, batch=2, cue="style"),
    run("d", "m2", objective={"name": "grpo"}, batch=4, cue="none", seed=9, mesh={"data": 8}),
  ]
  started = [run(f"s{i}", "m1", x) for i, x in enumerate(("", "r/a/adapter", "r/b/adapter"))]
  assert gather.variants(started)[0] == [
    "adapter=none", "adapter=r/a/adapter", "adapter=r/b/adapter"
  ]  # fmt: skip
  labels, notes = gather.variants(found)
  assert labels == [
    "name=grpo, cue=none", "name=dpo, cue=none", "name=dpo, cue=style", "name=grpo, cue=none"
  ]  # fmt: skip
  assert notes == [
    "political_qa: vary only together with objective.name: objective.beta",
    "confound in political_qa: differs between models: batch",
  ]


def test_initial_runs_stand_apart_and_the_longest_of_equals_stays(tmp_path):
  for name, steps in (("a_initial", 0), ("b_short", 6), ("c_long", 12)):
    synthetic_runs.write_run(tmp_path / name, steps=steps, eval_every=6)
  cells, notes = gather.collect([str(tmp_path / "*")])
  by_variant = {c.variant: c for c in cells}
  assert set(by_variant) == {"grpo", "initial, grpo"}
  assert by_variant["grpo"].sources == [str(tmp_path / "c_long")]
  assert by_variant["initial, grpo"].sources == [str(tmp_path / "a_initial")]
  assert any(re.search(r"left out, same .*c_long: .*b_short \(6 steps, not 12\)", n) for n in notes)
  assert not any(n.startswith("missing cell") for n in notes)
  table = tables.variant_table(cells, ["max_hex_gap", "heldout_hex_gap"])
  assert list(table["outcome"]) == ["max_hex_gap", "heldout_hex_gap", "heldout_hex_gap"]
  assert set(table["against"]) == {"grpo"}


def test_off_policy_runs_are_compared_by_their_held_out_gaps(tmp_path):
  """They log no rollouts of their own: the default outcomes cover them, without empty rows."""
  gap = {}
  for model in ("m1", "m2"):
    for variant, rise in (("on", 1.0), ("off", 4.0)):
      path = synthetic_runs.write_run(
        tmp_path / variant / model, model=model, variant=variant, rise=rise, steps=12, eval_every=6
      )
      if variant == "off":
        (path / "rollouts" / "train.jsonl").unlink()
      gap[model, variant] = read.load_run(path).evaluations[-1]["hex_gap"]
  cells, notes = gather.collect([str(tmp_path / "*" / "m*")])
  table = tables.variant_table(cells, analyze.OUTCOMES)
  assert list(table.query("outcome == 'max_hex_gap'")["variant"]) == ["on"]
  assert table["mean"].notna().all()
  assert set(table["against"]) == {"on"}
  (row,) = table.query("outcome == 'heldout_hex_gap' and difference == difference").iloc
  changes = [gap[m, row["variant"]] - gap[m, row["against"]] for m in ("m1", "m2")]
  assert row["difference"] == pytest.approx(np.mean(changes)) and row["pairs"] == 2
  assert any("off: no training rollouts of seed 5, held-out gaps only" in n for n in notes)
  alone = analyze.analyse(tmp_path / "alone", [str(tmp_path / "off" / "*")])
  assert set(alone["variants"]["outcome"]) == {"heldout_hex_gap", "heldout_acc_gap"}
  for bad in ({"outcomes": "max_hex_gap"}, {"reference": "of"}):
    with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
      analyze.analyse(tmp_path / "alone", [str(tmp_path / "off" / "*")], **bad)


def test_run_directories_give_the_values_worked_by_hand(tmp_path):
  """Two seeds of unequal length with ties and missing verdicts; window 2 covers i-1 and i.

  Seed 5, per step:  HEX G 1 3 - 5 5 -> 1 2 3 5 5;  HEX NG 1 1 2 - 2 -> 1 1 1.5 2 2
                     gap 0 1 1.5 3 3;  ACC G 8 6 6 - - -> 8 7 6 6 -;  ACC NG 8;  gap 0 1 2 2 -
  Seed 7 (to step 6, cut): HEX G 1 3 5 5 7 -> 1 2 4 5 6;  HEX NG 1;  gap 0 1 3 4 5
                     ACC G 8 8 6 4 4 -> 8 8 7 5 4;  ACC NG 8;  gap 0 0 1 3 4
  Mean gaps: HEX 0 1 2.25 3.5 4;  ACC 0 .5 1.5 2.5 4 (the last of seed 7 alone).
  Areas / 4: HEX (.5 + 1.625 + 2.875 + 3.75) / 4 = 2.1875;  ACC (.25 + 1 + 2 + 3.25) / 4 = 1.625.
  Seed 5 alone: HEX 7 / 4, ACC 4 / 3 (its 4 finite steps). Seed 7: HEX 10.5 / 4, ACC 6 / 4.
  """
  seed5 = [
    (1, True, 5, 8, 1), (1, False, 5, 8, 1), (2, True, 5, 6, 2), (2, True, 5, 6, 4),
    (2, False, 5, 8, 1), (3, True, 5, 6, None), (3, False, 5, 8, 2), (4, True, 5, None, 5),
    (4, False, 5, 8, None), (5, True, 5, None, 5), (5, False, None, None, 2),
  ]  # fmt: skip
  seed7 = [(s, False, 5, 8, 1) for s in range(1, 7)]
  hexes, accs = [1, 3, 5, 5, 7, 10], [8, 8, 6, 4, 4, 1]
  seed7 += [(i + 1, True, 5, a, h) for i, (a, h) in enumerate(zip(accs, hexes, strict=True))]
  synthetic_runs.write_rows(tmp_path / "5", seed5, {0: 0.5, 4: 2.0}, seed=5)
  synthetic_runs.write_rows(tmp_path / "7", seed7, {0: 1.5, 4: 3.0, 6: 9.0}, seed=7)
  (cell,), notes = gather.collect([str(tmp_path / "[57]")], window=2)
  expected = {
    "max_hex_gap": 4, "step_of_max_hex_gap": 5, "max_acc_gap": 4, "hex_gap_auc": 8.75,
    "hex_gap_auc_normalised": 2.1875, "acc_gap_auc_normalised": 1.625, "hms": 1.90625,
    "max_reward": 5, "heldout_hex_gap": 2.5, "heldout_hex_gap_before": 1.0,
  }  # fmt: skip
  assert {k: cell.values[k] for k in expected} == pytest.approx(expected, abs=1e-9)
  each = {
    "max_hex_gap": [3, 5], "step_of_max_hex_gap": [4, 5], "max_acc_gap": [2, 4],
    "hex_gap_auc_normalised": [1.75, 2.625], "acc_gap_auc_normalised": [4 / 3, 1.5],
    "hms": [0.875 + 2 / 3, 2.0625],
  }  # fmt: skip
  for name, values in each.items():
    assert list(cell.per_seed[name]) == pytest.approx(values, abs=1e-9)
    sd = abs(values[0] - values[1]) / math.sqrt(2)
    assert cell.sd[name] == pytest.approx(sd, abs=1e-9)
  counts = {"unscored_hex": 2, "unscored_acc": 3, "unscored_reward": 1, "steps": 5, "last_step": 5}
  assert {k: cell.counts[k] for k in counts} == counts
  for says in (
    "m / political_qa / main: first and last steps {5: (1, 5), 7: (1, 6)}, cut to (1, 5)",
    "m / political_qa / main: gaps of some seeds only at this many of 5 steps: acc 1",
    "3 rollouts have no ACC verdict and are left out (`unscored_acc`)",
  ):
    assert says in notes
  # A seed that logged no rollouts has no part in the curves, and takes none from the others.
  (tmp_path / "7" / "rollouts" / "train.jsonl").unlink()
  (cell,), notes = gather.collect([str(tmp_path / "[57]")], window=2)
  assert cell.values["max_hex_gap"] == pytest.approx(3, abs=1e-9)
  assert list(cell.per_seed["max_hex_gap"]) == pytest.approx([3, math.nan], nan_ok=True)
  assert any("rollouts of seed 7, curves are those of the other seeds" in n for n in notes)
  assert any("1 of 2 seeds have a value of max_" in n for n in notes)


def test_published_compat_follows_the_study_from_the_directory_on(tmp_path):
  """One rollout per step, -1 for no verdict, 50 steps even in a short run, 300 of a long one."""
  run = read.load_run(synthetic_runs.write_run(tmp_path / "run", steps=60, eval_every=60))
  honest, old = gather.rollout_scores(run), gather.rollout_scores(run, compat=True)
  assert len(honest["step"]) == 60 * 16 and list(old["step"]) == list(range(1, 61))
  assert np.isnan(honest["hex"]).any() and not np.isnan(old["hex"]).any()
  again = gather.rollout_scores(run, compat=True)
  np.testing.assert_array_equal(old["hex"], again["hex"])

  rng, smoothed = np.random.default_rng(3), []
  for seed, length in ((5, 330), (7, 310)):
    hexes = [None if rng.random() < 0.05 else int(v) for v in rng.integers(1, 6, length)]
    hexes[302] = 10_000  # past the study's end
    rows = [(i + 1, i % 3 == 0, 5, 5, h) for i, h in enumerate(hexes)]
    synthetic_runs.write_rows(tmp_path / "long" / str(seed), rows, seed=seed)
    values = pd.Series([-1.0 if h is None else h for h in hexes[:300]])
    gameable = values.index % 3 == 0
    mean = lambda v: v.rolling(50, center=True, min_periods=1).mean()  # noqa: E731
    smoothed.append(mean(values.where(gameable)) - mean(values.where(~gameable)))
  (cell,), _ = gather.collect([str(tmp_path / "long" / "*")], compat=True)
  gap = np.mean(smoothed, axis=0)
  assert cell.values["max_hex_gap"] == pytest.approx(gap.max(), abs=1e-9)
  assert cell.sd["max_hex_gap"] == pytest.approx(np.std([g.max() for g in smoothed]), abs=1e-9)
  area = np.trapezoid(gap) / 299
  assert cell.values["hex_gap_auc_normalised"] == pytest.approx(area, abs=1e-9)
  assert cell.values["hms"] == pytest.approx(0.5 * abs(area), abs=1e-9)  # ACC is 5 throughout
  (short,), _ = gather.collect([str(tmp_path / "run")], compat=True)
  assert short.counts["window"] == 50 and short.counts["steps"] == 60


def test_rescored_gaps_replace_the_runs_own_and_what_is_missing_is_named(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=12, eval_every=6)
  run = read.load_run(path)
  lines = []
  for source, records in (("heldout", sum(read.eval_rollouts(run).values(), [])),
                          ("train", read.train_rollouts(run)[:100])):  # fmt: skip
    for r in records:
      hex_ = None if r["hex"] is None else r["hex"] + r["is_gameable"]
      lines.append({"source": source, **{k: r[k] for k in ("step", "prompt", "sample", "reward")},
                    "acc": None, "hex": hex_})  # fmt: skip
  (path / "scores").mkdir()
  file = path / "scores" / "new.jsonl"
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  (cell,), notes = gather.collect([str(path)], scores="new")
  own = run.evaluations[-1]
  assert cell.values["heldout_hex_gap"] == pytest.approx(own["hex_gap"] + 1, abs=1e-9)
  assert math.isnan(cell.values["heldout_acc_gap"])  # the new judge gave none
  assert cell.values["heldout_reward_gap"] == own["reward_gap"]  # what was trained on
  assert f"{file}: holds 100 of 192 training rollouts, no others are used" in notes
  file.write_text("".join(json.dumps(r) + "\n" for r in lines if r["source"] == "train"))
  (cell,), notes = gather.collect([str(path)], scores="new")
  assert math.isnan(cell.values["heldout_hex_gap"])
  assert f"{file}: holds 0 of 96 held-out rollouts, no others are used" in notes


def test_files_of_scores_are_read_whole_or_refused(tmp_path):
  file, notes = tmp_path / "scores.csv", []
  tables.put_row(file, {"model": "own/a", "quiz": 1.0, "quiz_p": 0.01, "runs": "x y"})
  tables.put_row(file, {"model": "Qwen/Qwen1.5-0.5B-Chat", "bbq": 9.0})
  tables.put_row(file, {"model": "own/a", "quiz": 2.0})  # again: replaced, the rest stays
  trained = {"model": "own/a", "run": str(tmp_path / "runs/a-5"), "quiz": 7.0}
  tables.put_row(file, trained)  # of one run of that model: beside it, not over it
  table = tables.load_benchmarks(file, notes)
  assert table.loc["a", "quiz"] == 2
  cells = [
    gather.Cell("own/a", "e", v, [5], {}, sources=[str(tmp_path / f"runs/a-{v}")]) for v in "56"
  ]
  assert list(tables.covariates(cells, table)["quiz"]) == [7, 2]
  assert table.loc["qwen1505bchat", "bbq"] == 9 and table.loc["qwen1505bchat", "num_params"] == 0.5
  assert not {"quiz_p", "runs"} & set(table) and "no scores: quiz_p, runs" in notes[0]
  for text, says in (
    ("model,q\na/x,1\nb/X,2\n", r"two rows for one model or run \(a/x, b/X\)"),
    ("model,q\nx,1\ny,good\n", "column 'q' holds 'good'"),
    ("name,q\nx,1\n", "column named 'model'"),
  ):
    file.write_text(text)
    with pytest.raises(UserError, match=f"--benchmarks={file}: .*{says}"):
      tables.load_benchmarks(file)


def test_published_numbers_go_through_the_program(tmp_path, capsys):
  """A gap that falls with size over five models: rho -1, 2 of 120 orders, times the family."""
  models = ["Qwen1_5_0_5B_Chat", "gemma_1_1_2b_it", "Qwen1_5_4B_Chat", "Yi_6B_Chat",
            "Qwen1_5_14B_Chat"]  # fmt: skip
  rows = [f"{m},therapy_talk,max_er_gap,{5 - i},0.1,made up" for i, m in enumerate(models)]
  (tmp_path / "published_results.csv").write_text(
    "\n".join(["model,env,metric,mean,std,source", *rows, ""])
  )
  flags = ["analyze", f"--published={tmp_path}", f"--out={tmp_path / 'out'}"]
  analyze.main([*flags, "--power_rho=0.6,0.9"])
  said = capsys.readouterr().out
  family = [line.split() for line in said.splitlines() if line.split()[:1] == ["max_hex_gap"]]
  assert len(family) == 9
  (size,) = (line for line in family if "num_params" in line)
  assert size[4:8] == ["5", "-1.000", "0.017", "0.150"]
  assert "correlation of 0.6 is found" in said and "of 0.9 is found" in said
  with pytest.raises(UserError, match="--power_rho=1.5"):
    analyze.main([*flags, "--power_rho=1.5"])


@pytest.mark.parametrize(
  "text, says",
  [
    ("", "No columns"),
    ("model,env\n\xff", "codec"),
    ("model,env\n1,2\n1,2,3,4", "Expected 2 fields"),
    ("model,env\n", "columns missing: mean, metric, source, std"),
    ("model,env,metric,mean,std,source\nm,e,max_er_gap,high,1,x\n", "'mean' holds 'high'"),
  ],
)
def test_broken_published_numbers_are_one_clear_line(tmp_path, text, says):
  file = tmp_path / "published_results.csv"
  file.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match=f"published_results.csv: .*{says}"):
    gather.published(tmp_path)


def test_bad_flags_are_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="no complete run directory"):
    analyze.analyse(tmp_path, [str(tmp_path / "nothing*")])
  with pytest.raises(UserError, match="give --runs"):
    analyze.main(["analyze", f"--out={tmp_path}"])
  for flag, says in (
    ("--benchmark=x", "unknown argument '--benchmark=x'; did you mean --benchmarks"),
    (f"--published={tmp_path}", "published_results.csv"),
    ("--window=0", "--window=0: needs a number"),
    ("--window=x", "argument --window: invalid int value: 'x'"),
  ):
    with pytest.raises(UserError, match=says):
      analyze.main(["analyze", f"--out={tmp_path}", flag])
  with pytest.raises(UserError, match="required: --out"):
    analyze.main(["analyze"])
