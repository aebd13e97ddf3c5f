"""From training to a paper's page without a manual step: 2 variants x 2 seeds, for real."""

import csv
import subprocess
import sys

from test_train import ROOT, environment

from rlsafety.rundir import read

STUDY = """
import sys
from rlsafety import train
from rlsafety.study import analyze
from rlsafety.tools import agreement, export, rescore, surprise
folder = sys.argv[1]
for cue in ("style", "none"):
  for seed in (5, 7):
    train.main(["train", "--config=configs/tiny_syco.py", f"--workdir={folder}/runs/{cue}-{seed}",
      f"--config.environment.cue={cue}", f"--config.seed={seed}", "--config.steps=2"])
train.main(["train", "--config=configs/tiny_syco.py", f"--workdir={folder}/runs/initial",
  "--config.steps=0"])
every = f"--runs={folder}/runs/**"
rescore.main(["rescore", every, "--judge=phrases", "--name=again", "--per_step=8",
  "--source=both"])
agreement.main(["agreement", every, "--name=again", f"--out={folder}/agreement.csv"])
export.main(["export", f"--run={folder}/runs/style-5", "--format=merged", f"--out={folder}/model"])
surprise.main(["surprise", every, f"--model={folder}/model", "--high=0", "--low=11",
  "--per_run=4", f"--out={folder}/surprise.csv"])
analyze.main(["analyze", every, f"--out={folder}/results", "--scores=again",
  f"--benchmarks={folder}/surprise.csv"])
"""


def test_two_variants_and_two_seeds_become_a_page(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", STUDY, str(tmp_path)],
    cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
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
  agreement = list(csv.DictReader((tmp_path / "agreement.csv").open()))
  assert all(float(r["within_1"]) == 1 for r in agreement)  # the same judge, twice
  page = (tmp_path / "results/index.html").read_text()
  assert "style-5" in page and "none-7" in page
