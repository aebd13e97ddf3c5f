"""Re-scoring of finished runs, on records with real scenarios, through endpoints and resumed."""

import csv
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import replied_runs
from conftest import MAKE_MESH
from replied_runs import REPLIES
from test_judges_http import Endpoint

from rlsafety import addresses, files, judges, recipes, sharding
from rlsafety.errors import UserError
from rlsafety.models import presets, sources
from rlsafety.study import gather
from rlsafety.tools import agreement, rescore


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture
def run(tmp_path, model):
  return replied_runs.write(tmp_path / "run", model)


def score(run, model, records, **kwargs):
  config = rescore.judge_config(run, "phrases")
  opened = judges.open_judge(config.judge, config.environment, model)
  return rescore.score_run(run, "lex", config, opened, model.chat, records, batch=8, **kwargs)


def test_a_judge_without_wordings_rescores_a_run_that_had_one(run, model):
  run.config["environment"]["reward_wording"] = "plain"
  assert rescore.judge_config(run, "lm").environment.reward_wording == "plain"
  config = rescore.judge_config(run, "phrases")
  judges.open_judge(config.judge, config.environment, model)
  assert run.config["environment"]["reward_wording"] == "plain"


def test_selection_is_seeded_by_step_and_keeps_k_of_each(run):
  every = rescore.select(run)
  assert [rescore.place(r)[1:] for r in every] == sorted(rescore.place(r)[1:] for r in every)
  picked = rescore.select(run, per_step=1, seed=3)
  assert [r["step"] for r in picked] == [1, 2, 3]
  assert picked == rescore.select(run, per_step=1, seed=3)
  assert any(rescore.select(run, per_step=1, seed=s) != picked for s in range(4, 9))
  assert [r["step"] for r in rescore.select(run, every=2)] == [2] * 4


def test_scores_are_the_judges_and_resuming_changes_nothing(run, model):
  records, said = rescore.select(run), []
  assert score(run, model, records, say=said.append)["scored"] == 12
  assert "12/12" in said[-1] and "left" in said[-1]
  path = run.path / "scores" / "lex.jsonl"
  whole = path.read_text()
  rows = [json.loads(line) for line in whole.splitlines()]
  for agree, balance in zip(rows[::2], rows[1::2], strict=True):
    assert agree["hex"] > balance["hex"] and agree["acc"] < balance["acc"]
  # Killed in the middle of a line: the same command makes the same file.
  path.write_text(whole[: len(whole) // 2])
  done = score(run, model, records, say=said.append)
  assert 0 < done["old"] < 12 and done["scored"] == 12 - done["old"]
  assert path.read_text() == whole
  header = run.path / "scores" / "lex.json"
  header.write_text(header.read_text().replace("phrases", "other phrases"))
  with pytest.raises(UserError, match="another judge"):
    score(run, model, records)
  found = gather.rollout_scores(run, "lex")
  np.testing.assert_allclose(found["hex"], [r["hex"] for r in rows])
  np.testing.assert_array_equal(found["reward"], 5.0)  # the reward stays what was trained on


def test_a_torn_header_heals_where_nothing_is_scored_yet(run, model):
  header = run.path / "scores" / "lex.json"
  header.parent.mkdir()
  header.write_text('{"judge": {"na')  # of a kill, before the first row
  assert score(run, model, rescore.select(run))["scored"] == 12
  assert files.read_json(header)["config"]["name"] == "phrases"
  header.write_text('{"judge": {"na')  # damaged later: whose rows are these?
  with pytest.raises(UserError, match="lex.json: not valid JSON"):
    score(run, model, rescore.select(run))


@pytest.fixture
def address():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/v1"
  server.shutdown()


def test_an_endpoints_cost_is_shown_and_its_failures_are_asked_again(run, model, address):
  """12 replies, 3 questions each, 50 + 1 tokens a question; half of them fail the first time."""
  config = rescore.judge_config(run, "http", "m", address, "2,10")
  # The endpoint's count is no locked one.
  config = recipes.replaced(config, {"judge.attempts": 1, "judge.concurrency": 1})
  opened = judges.open_judge(config.judge, config.environment, model)
  records, said = rescore.select(run), []
  Endpoint.failures[REPLIES["agree"]] = 6 * 3

  def once():
    return rescore.score_run(run, "api", config, opened, model.chat, records, 8, said.append)

  done = once()
  assert (done["scored"], done["unscorable"], done["old"]) == (12, 6, 0)
  assert done["judge_cost"] == pytest.approx(18 * (50 * 2 + 10) / 1e6)
  assert "12/12, 6 unscorable" in said[-1] and "cost 0.00198" in said[-1]
  config = recipes.replaced(config, {"judge.price": (3, 10)})  # another price is the same judge
  done = once()
  assert (done["scored"], done["unscorable"], done["old"]) == (6, 0, 6)
  rows = files.read_jsonl(run.path / "scores" / "api.jsonl")
  assert len(rows) == 12 and {r["hex"] for r in rows} == {8.0}
  assert once()["scored"] == 0
  with pytest.raises(UserError, match="judge.price=.*two numbers"):
    rescore.judge_config(run, "http", "m", address, "3")


def test_a_run_chooses_no_address_no_module_and_no_file(run, address, tmp_path, monkeypatch):
  """The directory may be a stranger's: what is sent, imported and written is the command's."""
  monkeypatch.setenv(addresses.KEYS[1], "canary")
  info = files.read_json(run.path / "config.json")
  info["config"]["judge"] |= {"name": "http", "model": "m", "url": f"{address}/sk-123456789012"}
  (run.path / "config.json").write_text(json.dumps(info))
  Endpoint.seen.clear()
  command = ["rescore", f"--runs={run.path}", "--batch=8"]
  with pytest.raises(UserError, match="its judge is the endpoint http.*--judge_url") as e:
    rescore.main([*command, "--name=own"])
  assert not Endpoint.seen and "sk-1234" not in str(e.value) and not (run.path / "scores").exists()
  for other, says in (
    ({"evaluator": "http"}, "its judge is the endpoint http"),
    ({"also": ["http=0.5"]}, "its judge is the endpoint http"),
    ({"name": "evil.judge"}, "its judge is the function evil.judge"),
    ({"evaluator": "evil.judge"}, "its judge is the function evil.judge"),
    ({"also": ["evil.judge=1"]}, "its judge is the function evil.judge"),
  ):
    judge = info["config"]["judge"] | {"name": "phrases"} | other
    changed = info | {"config": info["config"] | {"judge": judge}}
    (run.path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=says):
      rescore.main([*command, "--name=own"])
  assert not Endpoint.seen

  (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "pack").mkdir()
  (tmp_path / "pack/evil.py").write_text("raise SystemExit('ran')")
  info["config"]["environment"]["name"] = "pack.evil"
  (run.path / "config.json").write_text(json.dumps(info))
  with pytest.raises(UserError, match="environment.name='pack.evil' is a module"):
    rescore.main([*command, "--name=own", "--judge=phrases"])
  with pytest.raises(SystemExit, match="ran"):  # the user's own, by name
    rescore.main([*command, "--name=own", "--judge=phrases", "--environment=pack.evil"])

  info["config"]["environment"]["name"] = "political_qa"
  (run.path / "config.json").write_text(json.dumps(info))
  for name in ("../rollouts/train", str(tmp_path / "x"), "a/b", ".x", "x..y", ""):
    with pytest.raises(UserError, match="letters, digits"):
      rescore.main([*command, f"--name={name}", "--judge=phrases"])
  for place in ("scores", "scores/x.jsonl"):
    outside = tmp_path / f"outside_{len(place)}"
    outside.mkdir() if place == "scores" else outside.write_text("kept")
    (run.path / place).parent.mkdir(exist_ok=True)
    (run.path / place).symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the run"):
      rescore.main([*command, "--name=x", "--judge=phrases"])
    (run.path / place).unlink()
    assert not outside.is_dir() or not list(outside.iterdir())


def test_command_lines(run, address, tmp_path, capsys, monkeypatch):
  """score, then agreement with the run's own scores, through the programs' own flags, on all
  devices."""
  monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
  other = shutil.copytree(run.path, tmp_path / "other")
  info = files.read_json(other / "config.json")
  info["config"]["judge"] |= {"name": "lm"}
  (other / "config.json").write_text(json.dumps(info))
  rescore.main(["rescore", f"--runs={tmp_path}/*", "--name=own", "--batch=8"])
  hexes = [{r["hex"] for r in files.read_jsonl(p / "scores/own.jsonl")} for p in (other, run.path)]
  assert hexes[0] != hexes[1]  # each run's own judge, not the first one's
  asked = [f"--runs={other}", "--name=api", "--judge=http", "--judge_model=m", "--price=0.5,1"]
  rescore.main(["rescore", *asked, f"--judge_url={address}", "--batch=8"])
  assert {r["hex"] for r in files.read_jsonl(other / "scores/api.jsonl")} == {8.0}
  rescore.main(["rescore", f"--runs={run.path}", "--judge=phrases", "--name=again", "--batch=8"])
  out = tmp_path / "out" / "agreement.csv"
  agreement.main(["agreement", f"--runs={tmp_path}/*", "--name=again", f"--out={out}"])
  rows = list(csv.DictReader(out.open()))
  assert float(next(r for r in rows if r["score"] == "hex")["spearman"]) > 0.8
  assert rows[0]["runs"] == str(run.path) and rows[0]["correction"] == "none"  # not the other's
  for bad, says in (
    (["--runs=x", "--name=a", "--source=test"], "invalid choice: 'test'"),
    (["--runs=x", "--name=a", "--judge=head_"], "--judge=head_: unknown"),
    (["--runs=x", "--batch=many"], "--batch: invalid int value: 'many'"),
    (["--runs=x", "--name=a", "--run=x"], "unknown argument '--run=x'; did you mean --runs"),
    ([], "--runs"),
  ):
    with pytest.raises(UserError, match=says):
      rescore.main(["rescore", *bad])
  capsys.readouterr()
