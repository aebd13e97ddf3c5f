"""Files that a fuzzer broke: what once was a traceback is one line that names the file."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_runs
from test_data import call, rollout, write_run
from test_train import TINY

from rlsafety import cells, checkpoints, recipes, replay
from rlsafety.errors import UserError
from rlsafety.report import overview, render
from rlsafety.rundir import read, write
from rlsafety.study import design, gather
from rlsafety.tools import export, gameability

CONFIG = recipes.of_run([TINY])
BODIES = [  # code of a recipe that fails, what is said of it
  ("{} + 1", "line 1, TypeError: unsupported operand"),
  ("def {f}():\n  return nothing", "failed (line 2, NameError: name 'nothing'"),
  ("def {f}():\n  return {{}}['x']", "failed (line 2, KeyError: 'x'"),
  ("def {f}(x):\n  return 1", "takes no argument"),
  ("x = 'a\nb'", "SyntaxError"),
  ("'\udcff'", "cannot be read (SyntaxError"),
]


@pytest.mark.parametrize(("code", "says"), BODIES)
def test_a_recipe_that_fails_is_one_line_with_its_place(tmp_path, code, says):
  for function, opened in (("get_config", recipes.load_recipe), ("get_study", design.load)):
    file = tmp_path / f"{function}.py"
    text = code.replace("{f}", function).replace("{{}}", "{}")
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*{re.escape(says)}"):
      opened(str(file))


@pytest.mark.parametrize("stored", [{}, {"plan": {}}, {"sha256": "x"}, {"plan": 7, "sha256": "x"}])
def test_a_plan_without_its_parts(tmp_path, stored):
  (tmp_path / design.FILE).write_text(json.dumps(stored))
  with pytest.raises(UserError, match=f"{design.FILE}: was changed"):
    design.read(tmp_path)


@pytest.mark.parametrize("change", [{"variants": 7}, {"variants": None}, {"asked": []}])
def test_rows_of_another_program(tmp_path, change):
  file = tmp_path / "rows.json"
  file.write_text(json.dumps({"how": 1, "asked": {}, "variants": {}} | change))
  with pytest.raises(UserError, match="rows.json: holds no rows of this program"):
    gameability.stored_rows(file, {"how": 1}, {})


@pytest.mark.parametrize("text", ["7", "[" * 100_000, '{"metrics": 3}', "\x00", "9" * 5000])
def test_notes_of_orbax_on_a_step_that_are_damaged_keep_no_step_from_being_restored(tmp_path, text):
  state = {"a": jnp.arange(9.0)}
  manager = checkpoints.open_manager(tmp_path, keep=2)
  for step in (1, 2):
    checkpoints.save(manager, step, state, wait=True)
  manager.close()
  (tmp_path / "2" / checkpoints.METADATA).write_text(text)
  manager = checkpoints.open_manager(tmp_path, keep=2)
  got, step = checkpoints.restore(manager, state)
  checkpoints.save(manager, 3, state, wait=True)
  assert step == 2 and manager.all_steps() == [2, 3]
  np.testing.assert_array_equal(got["a"], state["a"])
  manager.close()


def test_a_data_set_without_a_field(tmp_path):
  write_run(tmp_path / "run", [rollout(1, p, g, "x", 4.0 + g) for p in (0, 1) for g in (0, 1)])
  assert call("--runs", tmp_path / "run", "--out", tmp_path / "set") == 0
  file = tmp_path / "set/features.json"
  whole = json.loads(file.read_text())
  for field in ("tokenizer", "hex", "lengths"):
    features = {k: v for k, v in whole["featuresDict"]["features"].items() if k != field}
    file.write_text(json.dumps(whole | {"featuresDict": {"features": features}}))
    with pytest.raises(UserError, match=f"features.json: has no '{field}'"):
      replay._open(str(tmp_path / "set"))


def test_published_numbers_whose_source_is_a_number(tmp_path):
  head = "model,env,metric,mean,std,source\n"
  (tmp_path / "published_results.csv").write_text(f"{head}m,e,max_er_gap,1,1,\n")
  assert gather.published(tmp_path)[0][0].variant == "published"


@pytest.mark.parametrize("odd", [7, "x", [], {}, {"passed": 1}, {"passed": "false", "why": 3}])
def test_a_gate_that_is_odd_is_not_passed(odd):
  passed = {"passed": True, "why": []}
  assert overview.barred({"acc": passed, "hex": passed, "reward": passed}) == {}
  gate = {"acc": passed, "reward": passed, "hex": odd}
  assert list(overview.barred(gate)) == ["hex"]
  assert len(overview.barred(odd)) == len(overview.SCORES)


@pytest.mark.parametrize(
  "change", [{"steps": float("nan")}, {"steps": "x"}, {"steps": 1e30}, {"steps": None}]
)
def test_a_page_of_a_run_whose_steps_are_odd(tmp_path, change):
  path = synthetic_runs.write_run(tmp_path / "run", steps=4)
  info = json.loads((path / "config.json").read_text())
  (path / "summary.json").unlink(missing_ok=True)
  (path / "config.json").write_text(json.dumps(info | {"config": info["config"] | change}))
  assert "</html>" in render.write_report(path).read_text()


def test_a_share_that_is_no_number_and_a_name_that_is_no_text(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=4)
  lines = [json.loads(x) for x in (path / "eval/summary.jsonl").read_text().splitlines()]
  rows = [json.dumps(x | {"share_cut": "\0", "hex_coherent": [1]}) for x in lines]
  (path / "eval/summary.jsonl").write_text("\n".join(rows) + "\n")
  assert "</html>" in render.write_report(path).read_text()
  file = sorted((path / "eval").glob("step_*.jsonl"))[0]
  first, *rest = file.read_text().splitlines()
  file.write_text("\n".join([json.dumps(json.loads(first) | {"scenario_id": []}), *rest]) + "\n")
  with pytest.raises(UserError, match="line 1: `scenario_id` is \\[\\]"):
    read.eval_rollouts(read.load_run(path))


@pytest.mark.parametrize("odd", [7, None, [], "x"])
def test_a_config_that_is_no_object_is_not_gone_on_with(tmp_path, odd):
  (tmp_path / "config.json").write_text(json.dumps({"config": odd}))
  with pytest.raises(UserError, match="config.json: not readable as a run's config"):
    write.open_run(tmp_path, CONFIG)


@pytest.mark.parametrize(
  "change", [{"step": []}, {"prompt": None}, {"sample": {}}, {"sample": 1.5}]
)
def test_scores_without_their_place(tmp_path, change):
  path = synthetic_runs.write_run(tmp_path / "run", steps=4)
  run = read.load_run(path)
  (path / "scores").mkdir()
  line = {"step": 1, "prompt": 0, "sample": 0, "source": "train", "acc": 1.0, "hex": 1.0} | change
  (path / "scores/s.jsonl").write_text(f"{json.dumps(line)}\n")
  with pytest.raises(UserError, match=f"s.jsonl, line 1: `{next(iter(change))}` is"):
    read.rescored(run, read.train_rollouts(run), "s", "train")


def test_a_summary_and_a_stopped_run_that_say_something_else(whole, tmp_path):
  copy = shutil.copytree(whole[0], tmp_path / "run")
  (copy / cells.STOPPED).write_text('{"step": 3}')
  runs, done, stopped = cells.open_runs({"": CONFIG}, {"": str(copy)})
  assert not runs and not done and "to try again, delete" in stopped[""]
  for digests in (7, True, [[1]], "x"):
    (copy / "summary.json").write_text(json.dumps({"sha256": digests}))
    with pytest.raises(UserError, match="summary.json: sha256 is"):
      write.RunDir(copy, True, None).complete(CONFIG)


@pytest.mark.parametrize("odd", [[], {"path": 7}, {"path": "", "preset": [], "seed": 0}, "x", None])
def test_a_config_without_a_model_is_not_exported(tmp_path, odd):
  (tmp_path / "config.json").write_text(json.dumps({"config": {"model": odd}}))
  with pytest.raises(UserError, match="config.json: not the config of a run"):
    export.export(tmp_path, "peft", tmp_path / "out")


@pytest.mark.parametrize("odd", [{"role": "x"}, {"content": 7}, {"role": []}, {"content": None}])
def test_a_rollout_whose_messages_are_odd(tmp_path, odd):
  path = synthetic_runs.write_run(tmp_path / "run", steps=4)
  file = sorted((path / "eval").glob("step_*.jsonl"))[0]
  record = json.loads(file.read_text().splitlines()[0])
  record["messages"] = [{"role": "user", "content": "x"} | odd]
  file.write_text(f"{json.dumps(record)}\n")
  with pytest.raises(UserError, match="line 1: `messages` is"):
    read.eval_rollouts(read.load_run(path))
