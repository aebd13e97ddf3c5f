"""A judge of one's own by its dotted name, several rewards, and an evaluator apart."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest
from judge_helpers import replies
from test_judges_lm import scenario
from test_train import ROOT

from rlsafety import errors, judges, train
from rlsafety.config import Judge
from rlsafety.environments import Environment
from rlsafety.environments.scenario import environment_module, people_of
from rlsafety.errors import UserError
from rlsafety.judges import own
from rlsafety.models import presets, sources

MODULE = """
import jax, jax.numpy as jnp
def length(users, texts):
  return {"reward": [[float(len(t)) for t in group] for group in texts]}
@jax.jit
def _count(lengths):
  return lengths.astype(jnp.float32)
def tokens(users, replies):
  return {"reward": _count(replies.lengths), "hex": -_count(replies.lengths)}
tokens.on_tokens = True
def silent(users, texts):
  return {"reward": [[None for t in group] for group in texts]}
def flat(users, texts):
  return {"reward": [1.0]}
def endless(users, texts):
  return {"reward": [[float("inf")] * len(group) for group in texts]}
def wrong(users, texts):
  return {"rewards": []}
WORD = "word"
def helper(text):
  return 1 / len([])
def crash(users, texts):
  return {"reward": [[helper(t) for t in group] for group in texts]}
def traced(users, replies):
  return {"reward": jax.jit(helper)(replies.lengths)}
traced.on_tokens = True
"""
LINE = {text: number for number, text in enumerate(MODULE.splitlines(), 1)}
LATE = """calls = 0
def length(users, texts):
  global calls
  calls += 1
  if calls > 3: raise OSError("no answer")  # two batches of held-out users, and step 1
  return {"reward": [[float(len(t)) for t in group] for group in texts]}
"""


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  for name in ("mine", "study"):  # of the test before, from its own folder
    monkeypatch.delitem(sys.modules, name, raising=False)


def judged(model, texts, **settings):
  opened = judges.open_judge(Judge(**settings), Environment(), model)
  users = [scenario() for _ in texts]
  return opened, *opened.score(users, replies(model.chat, texts))


def test_texts_or_tokens_are_scored_and_broken_replies_are_not(model):
  broken = [*model.chat.encode_text("Yes"), max(model.chat.control), 99]
  _, scores, metrics = judged(model, [["Yes, I see.", "", broken]], name="mine.length")
  np.testing.assert_array_equal(scores["reward"], [[11.0, 1.0, 1.0]])  # the floor
  assert np.isnan(scores["hex"]).all() and metrics["judge_degenerate"] == pytest.approx(2 / 3)
  _, scores, _ = judged(model, [["Yes", "Indeed"]], name="mine.tokens", degenerate="nan")
  counts = [[float(len(model.chat.encode_text(t))) for t in ("Yes", "Indeed")]]
  np.testing.assert_array_equal(scores["reward"], counts)
  np.testing.assert_array_equal(scores["hex"], np.negative(counts))
  assert np.isnan(judged(model, [["Yes"]], name="mine.silent")[1]["reward"]).all()


def test_rewards_add_up_and_the_evaluator_is_another(model):
  texts = [["I agree, you are right.", "Others argue against it."]]
  plain = judged(model, texts, name="phrases")[1]
  opened, scores, metrics = judged(
    model, texts, name="mine.length", also=("phrases=0.5", "mine.tokens=-1"), evaluator="phrases"
  )
  lengths = np.array([[float(len(t)) for t in texts[0]]])
  counts = np.array([[len(model.chat.encode_text(t)) for t in texts[0]]])
  wanted = lengths + 0.5 * np.asarray(plain["reward"]) - counts
  np.testing.assert_allclose(scores["reward"], wanted, rtol=1e-5)
  np.testing.assert_array_equal(scores["hex"], plain["hex"])
  assert float(metrics["judge_reward_mine.length"]) == lengths.mean()
  assert "0.5 x phrases" in opened.about["name"] and "ACC and HEX by" in opened.about["name"]


def test_an_evaluator_may_have_a_model_of_its_own(model, monkeypatch):
  """lm rewards with the policy's base and evaluates with another; alone it says that they share."""
  texts, other = [["I agree, you are right.", "Others argue against it."]], "other"
  second = sources.random_model(presets.preset("tiny"), seed=1)
  second = dataclasses.replace(second, source=second.source | {"sha256": "0" * 64, "reading": "0"})
  monkeypatch.setattr(judges, "other_model", lambda *_: second)
  shared, one, _ = judged(model, texts, name="lm")
  apart, two, _ = judged(model, texts, name="lm", evaluator_model=other)
  alone = judges.open_judge(Judge(name="lm", model=other), Environment(), model)
  three, _ = alone.score([scenario()], replies(model.chat, texts))
  assert "one model rewards and scores" in shared.about["limits"]
  assert "one model" not in apart.about["limits"] and "ACC and HEX by" in apart.about["name"]
  np.testing.assert_array_equal(two["reward"], one["reward"])
  for score in ("acc", "hex"):
    np.testing.assert_array_equal(two[score], three[score])
  with pytest.raises(UserError, match="judge phrases reads no model"):
    Judge(name="phrases", evaluator_model=other)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("mine.nothing", "mine has no nothing"),
    ("no_such_module.f", "cannot be imported"),
    ("mine.WORD", "not a function"),
    ("mine.flat", "shape"),
    ("mine.endless", "finite"),
    ("mine.wrong", "a dict of reward, acc, hex"),
  ],
)
def test_what_is_no_judge_is_refused_by_name(model, name, words):
  with pytest.raises(UserError, match=f"judge.name={name}.*{words}"):
    own.make(name, model.chat)([scenario()], replies(model.chat, [["Yes"]]))


@pytest.mark.parametrize("name", ["mine.crash", "mine.traced"])
def test_a_fault_in_it_ends_in_one_line_with_its_place(model, tmp_path, capsys, name):
  score = own.make(name, model.chat)
  with pytest.raises(SystemExit) as end:
    errors.run_main(score, [scenario()], replies(model.chat, [["Yes"]]))
  *trace, last = capsys.readouterr().err.splitlines()
  where = f"{tmp_path / 'mine.py'}:{LINE['  return 1 / len([])']}"
  assert end.value.code == 2
  assert last == f"rlsafety: judge.name={name}: {where}: ZeroDivisionError: division by zero"
  # Above it the user's own frames, from the first of them on: none of ours.
  assert trace[0].startswith("Traceback") and str(tmp_path / "mine.py") in trace[1]
  assert "  return 1 / len([])" in "\n".join(trace) and str(ROOT / "rlsafety") not in str(trace)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("import jax\nlr = jax.no_such_name", r"broken.py:2: AttributeError: .*no_such_name"),
    ("import no_such_package", r"broken.py:1: ModuleNotFoundError: No module named 'no_such_p"),
    ("def f(:", r"SyntaxError: .*broken.py, line 1"),
  ],
)
def test_a_fault_of_its_module_is_named_with_its_line(tmp_path, text, words):
  (tmp_path / "study").mkdir()
  (tmp_path / "study" / "broken.py").write_text(text)
  for find, name in ((own.find, "study.broken.f"), (environment_module, "study.broken")):
    with pytest.raises(UserError, match=f"name={name}: .*{words}") as found:
      find(name)
    assert str(tmp_path / "study" / "broken.py") in found.value.details


def test_a_fault_in_an_environments_people_is_named_with_its_line(tmp_path):
  text = "DEFAULTS, TOPICS, RUBRICS = {}, ('a',), {}\ndef people(seed):\n  return [seed['x']]"
  (tmp_path / "places.py").write_text(text)
  with pytest.raises(UserError, match=r"environment.name=places: .*places.py:3: TypeError"):
    people_of(importlib.import_module("places"), 0)


def test_a_fault_in_a_run_costs_none_of_its_updates(tmp_path, capsys):
  (tmp_path / "late.py").write_text(LATE)
  flags = [f"--config={ROOT / 'configs/tiny_syco.py'}", f"--workdir={tmp_path / 'r'}"]
  flags += ["--config.judge.name=late.length", "--config.checkpoint.every=0", "--config.steps=2"]
  argv = ["train", *flags, "--config.learner.microbatches=1", "--config.mesh.tensor=2"]
  with pytest.raises(SystemExit) as end:
    errors.run_main(train.main, argv)
  said = capsys.readouterr()
  assert end.value.code == 2 and "late.py:5: OSError: no answer" in said.err.splitlines()[-1]
  row = (tmp_path / "r/metrics.jsonl").read_text()
  assert row.startswith('{"step": 1,') and row.count("\n") == 1  # the second never got rewards
  late = importlib.import_module("late")
  late.calls = -100
  train.main(argv)
  assert "resuming after step 1" in capsys.readouterr().out
  assert (tmp_path / "r/metrics.jsonl").read_text().startswith(row)
  assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("also", ["phrases", "phrases=much", "frases=1"])
def test_further_rewards_need_a_name_and_a_weight(also):
  with pytest.raises(UserError, match="judge.also"):
    Judge(name="phrases", also=(also,))
