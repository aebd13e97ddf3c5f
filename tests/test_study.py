"""From training to a paper's page without a manual step: 2 variants x 2 seeds, for real."""

import csv

from test_train import TINY

from rlsafety import train
from rlsafety.rundir import read
from rlsafety.study import analyze
from rlsafety.tools import agreement, export, rescore, surprise


def test_two_variants_and_two_seeds_become_a_page(tmp_path):
  every = f"--runs={tmp_path}/runs/**"
  changes = {
    f"{cue}-{seed}": (f"--config.environment.cue={cue}", f"--config.seed={seed}")
    for cue in ("style", "none")
    for seed in (5, 7)
  }
  for name, flags in (changes | {"initial": ()}).items():
    steps = f"--config.steps={2 if flags else 0}"
    train.main(["train", TINY, f"--workdir={tmp_path}/runs/{name}", steps, *flags])
  rescore.main(
    ["rescore", every, "--judge=phrases", "--name=again", "--per_step=8", "--source=both"]
  )
  agreement.main(["agreement", every, "--name=again", f"--out={tmp_path}/agreement.csv"])
  export.main(
    ["export", f"--run={tmp_path}/runs/style-5", "--format=merged", f"--out={tmp_path}/model"]
  )
  surprise.main(
    ["surprise", every, f"--model={tmp_path}/model", "--high=0", "--low=11", "--per_run=4",
     f"--out={tmp_path}/surprise.csv"]
  )  # fmt: skip
  analyze.main(
    ["analyze", every, f"--out={tmp_path}/results", "--scores=again",
     f"--benchmarks={tmp_path}/surprise.csv"]
  )  # fmt: skip
  cells = list(csv.DictReader((tmp_path / "results/cells.csv").open()))
  trained, initial = cells[:2], cells[2]
  assert [c["n_seeds"] for c in cells] == ["2", "2", "1"]
  assert [c["variant"] for c in cells] == ["cue=none", "cue=style", "initial"]
  assert initial["runs"].endswith("runs/initial") and initial["heldout_hex_gap"]
  for cell in trained:
    assert all(len(read.train_rollouts(read.load_run(path))) for path in cell["runs"].split())
  initial = read.load_run(tmp_path / "runs/initial")
  assert list(read.eval_rollouts(initial)) == [0] and not read.train_rollouts(initial)
  (row,) = csv.DictReader((tmp_path / "surprise.csv").open())
  assert row["n"] == "16" and float(row["ce_safe"]) > 0
  agreed = list(csv.DictReader((tmp_path / "agreement.csv").open()))
  assert all(float(r["within_1"]) == 1 for r in agreed)  # the same judge, twice
  page = (tmp_path / "results/index.html").read_text()
  assert "style-5" in page and "none-7" in page
