"""Blind sheets of held-out replies, and what their labels show: by hand and in closed form."""

import json

import numpy as np
import pandas as pd
import pytest
import replied_runs

from rlsafety import environments, recipes
from rlsafety.errors import UserError
from rlsafety.models import presets, sources
from rlsafety.tools import reading

TEXT = {  # by (trained, is_gameable); the reader's label of each
  (False, True): "Budgets are made every year, number {}.",
  (False, False): "Budgets are made every year, number {}.",
  (True, True): "You are quite right about case {}.",
  (True, False): "Some like case {}, others do not.",
}
LABEL = {"Budgets": "no_stance", "You": "agreement", "Some": "balance"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Six people of six issues in both versions, before and after; the judge is half right."""
  model = sources.random_model(presets.preset("tiny"), seed=0)
  run = replied_runs.write(tmp_path_factory.mktemp("runs") / "run", model)
  section = recipes.frozen(run.config).environment
  pairs = {a.unit: (a, b) for a, b in environments.heldout_pairs(section)}
  people = list(pairs.values())[:6]
  for step in (0, 2, 3):
    records = []
    for p, user in enumerate([a for a, _ in people] + [b for _, b in people]):
      reply = TEXT[step > 0, user.is_gameable].format(p)
      scores = {"acc": 9.0 if "Some" in reply else 2.0, "hex": 2.0 if "You" in reply else 8.0}
      records.append(
        {"step": step, "prompt": p, "sample": 0, "scenario_id": user.id, "unit": user.unit,
         "person": user.person, "is_gameable": user.is_gameable, "completion": reply,
         "messages": environments.policy_messages(user), "finished": True, "length": 9,
         "reward": 5.0, "verdict": "incoherent" if step else None, **scores}
      )  # fmt: skip
    path = run.path / f"eval/step_{step:06d}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return run


def called(run, out, *flags):
  reading.main(["reading", f"--runs={run.path}", f"--out={out}", *flags])


def filled(out, name, change=None):
  """A reader's copy of the sheet, labelled by its texts. change: {n: another label}."""
  sheet = pd.read_csv(out / "sheet.csv", keep_default_na=False)
  sheet["label"] = [LABEL[text.split()[0]] for text in sheet["reply"]]
  for n, label in (change or {}).items():
    sheet.loc[sheet["n"] == n, "label"] = label
  path = out / f"{name}.csv"
  sheet.to_csv(path, index=False)
  return str(path)


def test_a_sheet_shows_the_text_once_and_nothing_else(run, tmp_path):
  called(run, tmp_path)
  sheet = pd.read_csv(tmp_path / "sheet.csv", keep_default_na=False)
  assert list(sheet.columns) == ["n", "message", "reply", "finished", "label", "note"]
  # First and last evaluation of 12 prompts: all texts differ, but for none is it told when or whom.
  assert list(sheet["n"]) == list(range(24)) and not sheet["label"].any()
  starts = [text.split()[0] for text in sheet["reply"]]
  assert starts != sorted(starts)  # in random order
  section = recipes.frozen(run.config).environment
  people = {s.plain: s for s in environments.load(section)}
  for message in sheet["message"]:
    assert message in people and message != people[message].message  # without its cues
  once = reading.numbered(reading.replies([run]).assign(reply="the same", message="as well"), 0)
  assert set(once) == {0}
  other = reading.numbered(reading.replies([run]), 1)
  assert sorted(other) == list(range(24)) and list(other) != list(
    reading.numbered(reading.replies([run]), 0)
  )
  words = (tmp_path / "classes.txt").read_text()
  assert all(f"{name}: " in words for name in reading.CLASSES)


def test_kappa_by_hand():
  """20 yes, 15 no of both; 5 and 10 of one each: (0.7 - 0.5) / (1 - 0.5), Cohen's example."""
  a = pd.Series(["y"] * 25 + ["n"] * 25)
  b = pd.Series(["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15)
  assert reading.kappa(a, b) == pytest.approx(0.4)
  assert np.isnan(reading.kappa(a[:5], a[:5]))  # all alike: chance agrees as well


def test_what_labels_show_in_closed_form(run, tmp_path, capsys):
  called(run, tmp_path)
  one, two = filled(tmp_path, "ann"), filled(tmp_path, "bob", {0: "incoherent"})
  called(run, tmp_path, f"--labels={one},{two}")
  said = capsys.readouterr().out
  found = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in
           ("agreement", "shares", "changes", "against_judge", "labels")}  # fmt: skip
  assert found["agreement"]["equal"].item() == pytest.approx(23 / 24)
  first, last = found["shares"].to_dict("records")
  assert (first["step"], last["step"], last["replies"]) == (0, 3, 12)
  assert last["incoherent by judge"] == 1 and np.isnan(first["incoherent by judge"])
  step = found["labels"].set_index("n").loc[0, "step"]  # of what bob alone called incoherent
  for row in (first, last):
    assert row["incoherent"] == pytest.approx(0.5 / 12 if row["step"] == step else 0)
  called(run, tmp_path, f"--labels={one}")
  changes = pd.read_csv(tmp_path / "changes.csv").set_index(["class", "users"])
  for key, change in {
    ("agreement", "gameable"): 1, ("agreement", "non_gameable"): 0, ("agreement", "gap"): 1,
    ("balance", "gap"): -1, ("no_stance", "everyone"): -1, ("off_topic", "everyone"): 0,
  }.items():  # fmt: skip
    row = changes.loc[key]
    assert (row["change"], row["low"], row["high"], row["units"]) == (change, change, change, 6)
  judged = pd.read_csv(tmp_path / "against_judge.csv")
  every = judged["policy"].str.startswith("all of ")
  assert every.sum() * 2 == len(judged)  # of one policy: the same once more
  assert judged["wanted"].max() == 6
  judged = judged[every].set_index(["replies", "score", "contrast"])["auc"]
  assert judged["trained", "acc", "balance against agreement"] == 1
  assert judged["trained", "hex", "agreement against balance"] == 0
  assert "base" not in judged.index.get_level_values(0)  # none of the wanted classes there
  assert "agreement against balance" in said


def test_the_judge_may_be_one_that_rescored(run, tmp_path):
  called(run, tmp_path)
  labels = filled(tmp_path, "ann")
  with pytest.raises(UserError, match="--scores=none: no run has such scores"):
    called(run, tmp_path, f"--labels={labels}", "--scores=none")
  (run.path / "scores").mkdir(exist_ok=True)
  lines = [
    {"source": "heldout", "step": 3, "prompt": p, "sample": 0, "acc": 1.0, "hex": 9.0 - p}
    for p in range(12)
  ]
  (run.path / "scores/new.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  called(run, tmp_path, f"--labels={labels}", "--scores=new")
  judged = pd.read_csv(tmp_path / "against_judge.csv").drop_duplicates(["score", "contrast"])
  judged = judged.set_index(["score", "contrast"])["auc"]
  assert judged["hex", "agreement against balance"] == 1
  assert judged["acc", "balance against agreement"] == 0.5


def test_bad_labels_are_named(run, tmp_path):
  called(run, tmp_path)
  for change, says in (
    ({3: ""}, "ann.csv: n=3 has no label; it takes one of agreement, lip_service"),
    ({3: "agree"}, "ann.csv: n=3 has label 'agree'"),
  ):
    with pytest.raises(UserError, match=says):
      called(run, tmp_path, f"--labels={filled(tmp_path, 'ann', change)}")
  with pytest.raises(UserError, match="n=.* is another reply than that of these runs and"):
    called(run, tmp_path, f"--labels={filled(tmp_path, 'ann')}", "--seed=1")
  with pytest.raises(UserError, match="give each reader's file a name of its own, not 'reply'"):
    called(run, tmp_path, f"--labels={filled(tmp_path, 'reply')}")
  (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
  with pytest.raises(UserError, match="odd.csv: has no column 'n'"):
    called(run, tmp_path, f"--labels={tmp_path / 'odd.csv'}")
  with pytest.raises(UserError, match="no.csv"):
    called(run, tmp_path, f"--labels={tmp_path / 'no.csv'}")
  lines = (tmp_path / "sheet.csv").read_text().splitlines(keepends=True)
  (tmp_path / "twice.csv").write_text("".join([*lines, lines[3]]))
  with pytest.raises(UserError, match="twice.csv: n=2 stands there twice"):
    called(run, tmp_path, f"--labels={tmp_path / 'twice.csv'}")
  assert called(run, tmp_path) is None  # an empty sheet may be written again
  filled(tmp_path, "sheet")
  with pytest.raises(UserError, match="its sheet.csv holds labels already"):
    called(run, tmp_path)
