"""Tests of a difference between treatments: the published numbers, and data without one."""

import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import synthetic_runs

from rlsafety.study import gather, interactions, tables
from rlsafety.study.gather import Cell


@pytest.mark.skipif("RLSAFETY_PAPER_DATA" not in os.environ, reason="no RLSAFETY_PAPER_DATA")
def test_the_published_reversal_is_an_interaction_and_base_models_are_pairs():
  cells, _ = gather.published(os.path.join(os.environ["RLSAFETY_PAPER_DATA"], "published_results"))
  of_size = interactions.table(cells, tables.load_benchmarks(), ["max_hex_gap"])
  of_size = of_size[(of_size["benchmark"] == "num_params") & (of_size["n"] == 11)]
  found = {(r.first[:6], r.second[:6]): (r.difference, r.p) for r in of_size.itertuples()}
  assert len(found) == 3
  difference, p = found["action", "therap"]
  assert difference == pytest.approx(1.65, abs=0.005) and p <= 0.0002
  difference, p = found["politi", "therap"]
  assert difference == pytest.approx(1.57, abs=0.005) and p <= 0.0005
  difference, p = found["action", "politi"]
  assert difference == pytest.approx(0.08, abs=0.005) and p == pytest.approx(0.69, abs=0.01)
  row = tables.variant_table(cells, ["max_hex_gap"]).set_index("variant").loc["base models"]
  assert (row["pairs"], row["paired_by"]) == (6, "models")
  assert row["p_sign"] == pytest.approx(1 / 32) and row["low95"] > 0


def test_what_two_treatments_have_in_common_is_no_difference():
  rng, small = np.random.default_rng(0), 0
  for _ in range(60):
    x = rng.normal(size=11)
    a, b = 2 * x + rng.normal(size=(2, 11))
    small += interactions.difference(x, a, b)[1] <= 0.05
  assert small <= 8  # 0.05 * 60 = 3 expected
  found, p = interactions.difference(x, x, -x)
  assert found == pytest.approx(2.0) and p < 0.001
  assert math.isnan(interactions.difference(x[:3], x[:3], x[:3])[1])


def test_one_model_with_several_seeds_has_an_interval():
  def cell(variant, values):
    frame = pd.DataFrame({"hms": values}, index=["5/0", "5/1", "6/0"][: len(values)])
    return Cell("m", "e", variant, list(frame.index), {"hms": float(np.mean(values))}, {}, frame)

  cells = [cell("off", [1.0, 1.5, 2.0]), cell("on", [2.0, 2.75, 3.0])]
  row = tables.variant_table(cells, ["hms"], "off").set_index("variant").loc["on"]
  assert (row["paired_by"], row["pairs"]) == ("seeds", 3)
  half = 4.3026527 * np.std([1.0, 1.25, 1.0], ddof=1) / math.sqrt(3)
  assert row["low95"] == pytest.approx(row["difference"] - half)


def test_other_people_are_a_replicate_no_duplicate(tmp_path):
  for people in (0, 1):
    path = synthetic_runs.write_run(tmp_path / str(people), steps=12, eval_every=6)
    info = json.loads((path / "config.json").read_text())
    info["config"]["environment"]["seed"] = people
    (path / "config.json").write_text(json.dumps(info))
  (cell,), notes = gather.collect([str(tmp_path / "*")])
  assert cell.seeds == ["5/0", "5/1"] and len(cell.per_seed) == 2
  assert not any(note.startswith("left out") for note in notes)
