"""Agreement of two judges, by hand."""

import json

import numpy as np
import pytest
import replied_runs

from rlsafety.errors import UserError
from rlsafety.metrics import gaps
from rlsafety.models import presets, sources
from rlsafety.tools import agreement, rescore


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture
def run(tmp_path, model):
  return replied_runs.write(tmp_path / "run", model)


def test_agreement_by_hand(run):
  records = rescore.select(run)
  lines = [
    dict(zip(("source", "step", "prompt", "sample"), rescore.place(r), strict=True))
    | {"reward": 5.0, "acc": None if i == 0 else r["acc"] - 2, "hex": 11 - r["hex"] + i % 2 * 0.5}
    for i, r in enumerate(records)
  ]
  (run.path / "scores").mkdir()
  (run.path / "scores" / "new.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  table = agreement.agreement([run], "new").set_index(["slice", "score"])
  every = table.loc[("all", "hex")]
  assert every["n"] == 12 and every["spearman"] == pytest.approx(-1.0)
  assert every["within_1"] == 0 and every["mean_first"] == pytest.approx(5.25)
  acc = table.loc[("all", "acc")]
  assert acc["n"] == 11 and acc["unscored"] == 1 and acc["pearson"] == pytest.approx(1.0)
  assert np.isnan(table.loc[("all", "reward"), "pearson"])  # constant: nothing to correlate
  assert every["seeds"] == "5" and every["runs"] == str(run.path)
  groups = [table.loc[(g, "hex"), "n"] for g in gaps.GROUPS]
  assert sum(groups) == 12
  with pytest.raises(UserError, match="no rollout has scores"):
    agreement.agreement([run], "absent")
