"""Inspect's tasks at the evaluations of a run: numbers, faults, and the same after a kill."""

import gc
import json
import sys

import jax
import numpy as np
import pytest
from test_cells import ROOT, SMALL, rows
from test_serve import LORAS, random_adapter

from rlsafety import cells, config, evaluation, recipes, sharding, train
from rlsafety.errors import UserError
from rlsafety.models import sources

pytest.importorskip("inspect_ai", reason="pip install 'rlsafety[inspect]'")

TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, mean, model_graded_qa, scorer, stderr

@scorer(metrics=[mean(), stderr()])
def ord_of_first():
  async def score(state, target):
    text = state.output.completion
    return Score(value=sum(map(ord, text)) / 1000, answer=text)
  return score

def task_of(scorer):
  samples = [Sample(w, target="e", id=w) for w in ("Hm?", "Sell", "Buy")]
  return Task(samples, scorer=scorer, config=GenerateConfig(max_tokens=6))

@task
def sums():
  return task_of(ord_of_first())

@task
def graded():
  return task_of(model_graded_qa())

@task
def broken():
  raise ValueError("the data are not on this machine")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("tasks") / "mine.py"
  path.write_text(TASKS)
  return path


@pytest.fixture(scope="module")
def asked(file, tmp_path_factory):
  """ask(names, adapter) of a tiny base; the adapter that it is asked of."""
  from rlsafety.serve import tasks  # needs the extra

  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    model = sources.open_model(config.Model(preset="tiny", dtype="float32"))
    adapter = jax.device_get(random_adapter(model, LORAS["a"], 20).adapter)
  folder = tmp_path_factory.mktemp("runs") / "x"

  def ask(*names, adapter=adapter, limit=0):
    called = tuple(n if "/" in n else f"{file}@{n}" for n in names)
    settings = config.Eval(tasks=called, task_samples=limit)
    with jax.set_mesh(mesh):
      return tasks.ask(settings, model, mesh, LORAS["a"], adapter, folder, 3)

  return ask, adapter, folder


def test_numbers_are_the_scorers_and_come_again(asked, file):
  ask, adapter, folder = asked
  found = ask("sums")
  assert set(found) == {"sums/mean"} and found["sums/mean"]["n"] == 3
  entry = found["sums/mean"]
  values = list(entry["samples"].values())
  assert set(entry["samples"]) == {"Hm?", "Sell", "Buy"} and len(set(values)) > 1
  assert entry["value"] == pytest.approx(np.mean(values))
  assert entry["stderr"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
  assert ask("sums") == found  # at temperature 1: the seeds follow the messages
  logs = list((folder / "eval/inspect/step_000003").glob("*.eval"))
  assert len(logs) == 1  # of the last asking alone
  other = adapter.replace(scale=-adapter.scale)
  assert ask("sums", adapter=other) != found  # the adapter that is given, not an earlier one
  assert ask("sums", limit=2)["sums/mean"]["n"] == 2


def test_a_task_of_an_installed_package_is_found_by_its_name(asked, tmp_path, monkeypatch):
  from inspect_ai._util import entrypoints

  from rlsafety.serve import tasks  # needs the extra

  place = tmp_path / "site-packages"  # what Inspect takes for installed
  info, package = place / "others_evals-1.0.dist-info", place / "others_evals"
  for folder in (info, package):
    folder.mkdir(parents=True)
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others-evals\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text("[inspect_ai]\nothers_evals = others_evals\n")
  (package / "__init__.py").write_text(TASKS)
  monkeypatch.syspath_prepend(place)
  entrypoints.clear_entry_points_state()  # Inspect may have looked before
  tasks.check(["others_evals/sums"])
  found = asked[0]("others_evals/sums", "sums")
  assert set(found) == {"others_evals/sums/mean", "sums/mean"}
  assert found["others_evals/sums/mean"] == found["sums/mean"]


def test_a_task_that_fails_is_named_and_the_others_are_asked(asked):
  ask, *_ = asked
  found = ask("broken", "sums", "nowhere")
  assert np.isnan(found["broken"]["value"]) and found["broken"]["n"] == 0
  assert found["broken"]["error"] == "ValueError: the data are not on this machine"
  assert np.isfinite(found["sums/mean"]["value"])
  assert np.isnan(found["nowhere"]["value"]) and found["nowhere"]["error"]
  json.dumps(found)


def test_the_grader_of_a_task_that_names_none_is_the_base(asked, monkeypatch):
  from inspect_ai.model import get_model

  kind = type(get_model("rlsafety/base", path="none", memoize=False).api)
  seen, real = [], kind.generate

  async def generate(self, *a, **k):
    seen.append(self.model_name)
    return await real(self, *a, **k)

  monkeypatch.setattr(kind, "generate", generate)
  asked[0]("graded")
  assert seen.count("base") == 3 and seen.count("x@step3") == 3


def test_what_is_not_there_is_said_before_any_weight_is_read(file, monkeypatch):
  from rlsafety.serve import tasks  # needs the extra

  tasks.check([f"{file}@sums"])
  with pytest.raises(UserError, match="gone.py@x: no such file"):
    tasks.check(["gone.py@x"])
  with pytest.raises(UserError, match="no_such_package/x: neither FILE.py@TASK nor PACKAGE/TASK"):
    tasks.check(["no_such_package/x"])
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="Inspect talks to one process, and this run has 2"):
    tasks.check([f"{file}@sums"])
  with pytest.raises(UserError, match="eval.tasks.*twice"):
    config.Eval(tasks=("a.py@x", "a.py@x"))


def test_without_inspect_the_extra_is_named(monkeypatch):
  tiny = recipes.frozen(recipes.load_recipe(str(ROOT / "configs/tiny_syco.py")))
  monkeypatch.setitem(sys.modules, "inspect_ai", None)
  monkeypatch.delitem(sys.modules, "rlsafety.serve.tasks", raising=False)
  monkeypatch.delattr("rlsafety.serve.tasks", raising=False)
  with pytest.raises(UserError, match="eval.tasks: .*pip install 'rlsafety.inspect.'"):
    evaluation.tasks_of(recipes.replaced(tiny, {"eval.tasks": ["a.py@x"]}).eval)
  assert evaluation.tasks_of(tiny.eval) is None


def test_a_run_that_was_killed_ends_in_the_same_numbers(file, tmp_path, monkeypatch):
  tiny = recipes.frozen(recipes.load_recipe(str(ROOT / "configs/tiny_syco.py")))
  names = {"eval.tasks": (f"{file}@sums", f"{file}@broken"), "eval.beyond": ("open_questions",)}
  settings = recipes.replaced(tiny, SMALL | names | {"steps": 2, "eval.every": 1})

  real, calls = cells.save, []

  def save(*a, **k):  # the process dies after the evaluation of step 1, before its checkpoint
    calls.append(a)
    if len(calls) == 2:
      for cell in a[0]:
        cell.run.close()  # as the death of a process lets go of the lock
      raise KeyboardInterrupt
    return real(*a, **k)

  monkeypatch.setattr(cells, "save", save)
  with pytest.raises(KeyboardInterrupt):
    train.run(settings, str(tmp_path / "killed"))
  assert len(rows(tmp_path / "killed", "eval/summary.jsonl")) == 2
  monkeypatch.setattr(cells, "save", real)
  gc.collect()  # the dead run's lock goes with its frames
  train.run(settings, str(tmp_path / "whole"))
  summary = train.run(settings, str(tmp_path / "killed"))
  logs = ["eval/summary.jsonl", *(f"eval/open_questions/step_{s:06d}.jsonl" for s in range(3))]
  for log in logs:
    killed, whole = ((tmp_path / name / log).read_bytes() for name in ("killed", "whole"))
    assert killed == whole, log
  lines = rows(tmp_path / "whole", "eval/summary.jsonl")
  assert [set(line["tasks"]) for line in lines] == [{"sums/mean", "broken"}] * 3
  assert summary["tasks"]["sums/mean"]["n"] == 3 and "not on this" in summary["table"]
  assert "open_questions/money" in summary["beyond"] or "open_questions" in summary["beyond"]
  page = (tmp_path / "whole/report.html").read_text()
  assert "Outside the training environment" in page and "sums/mean" in page
