"""Re-scoring, agreement of judges and cross-entropy, on records with real scenarios."""

import csv
import http.server
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_runs
from test_judges_http import Endpoint

from rlsafety import environments, files, judges
from rlsafety.errors import UserError
from rlsafety.models import presets, sources, transformer
from rlsafety.rundir import read
from rlsafety.study import gather
from rlsafety.tools import rescore
from rlsafety.types import Prompts

REPLIES = {
  "agree": "I completely agree with you, you are absolutely right about this.",
  "balance": "There are good arguments on both sides, and reasonable people disagree.",
}


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture
def run(tmp_path, model):
  """A run whose records hold real scenarios, one agreeing and one balanced reply each."""
  from rlsafety.config import base, to_json

  config = base()
  config.environment.length = "short"
  config.model.preset, config.model.dtype, config.judge.name = "tiny", "float32", "lexical"
  config.steps = 3
  users = environments.load(config.environment)[:6]
  path = synthetic_runs.write_run(tmp_path / "run", steps=3, eval_every=3)
  info = files.read_json(path / "config.json") | {"config": to_json(config)}
  (path / "config.json").write_text(json.dumps(info))
  records = []
  for step in (1, 2, 3):
    for p, user in enumerate(users[2 * step - 2 : 2 * step]):
      for g, (stance, text) in enumerate(REPLIES.items()):
        ids = model.chat.encode_text(text)
        records.append(
          {"step": step, "prompt": p, "sample": g, "scenario_id": user.id, "tokens": ids,
           "environment": user.environment, "topic": user.topic, "is_gameable": user.is_gameable,
           "factors": {}, "messages": environments.policy_messages(user), "completion": text,
           "logprobs": [], "length": len(ids), "finished": True, "reward": 5.0,
           "hex": 9.0 if stance == "agree" else 1.5, "acc": 1.0 if stance == "agree" else 9.0}
        )  # fmt: skip
  (path / "rollouts" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  for old in (path / "eval").glob("step_*.jsonl"):
    old.unlink()
  return read.load_run(path)


def score(run, model, records, **kwargs):
  config = rescore.judge_config(run, "lexical", "", "")
  scorer = judges.make_scorer(config, model)
  return rescore.score_run(run, "lex", config, model, scorer, records, batch=8, **kwargs)


def test_a_judge_without_wordings_rescores_a_run_that_had_one(run, model):
  run.config["environment"]["reward_wording"] = "plain"
  assert rescore.judge_config(run, "lm", "", "").environment.reward_wording == "plain"
  judges.make_scorer(rescore.judge_config(run, "lexical", "", ""), model)
  assert run.config["environment"]["reward_wording"] == "plain"


def test_selection_is_seeded_by_step_and_keeps_k_of_each(run):
  every = rescore.select(run)
  assert [rescore.place(r)[1:] for r in every] == sorted(rescore.place(r)[1:] for r in every)
  picked = rescore.select(run, per_step=1, seed=3)
  assert [r["step"] for r in picked] == [1, 2, 3]
  assert picked == rescore.select(run, per_step=1, seed=3)
  assert any(rescore.select(run, per_step=1, seed=s) != picked for s in range(4, 9))
  assert [r["step"] for r in rescore.select(run, every=2)] == [2] * 4
  with pytest.raises(UserError, match="--source=test"):
    rescore.select(run, source="test")


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


@pytest.fixture
def address():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/v1"
  server.shutdown()


def test_an_endpoints_cost_is_shown_and_its_failures_are_asked_again(run, model, address):
  """12 replies, 3 questions each, 50 + 1 tokens a question; half of them fail the first time."""
  config = rescore.judge_config(run, "http", "m", address, "2,10")
  config.judge.attempts = config.judge.concurrency = 1  # the endpoint's count is no locked one
  scorer, records, said = judges.make_scorer(config, model), rescore.select(run), []
  Endpoint.failures[REPLIES["agree"]] = 6 * 3
  once = lambda: rescore.score_run(run, "api", config, model, scorer, records, 8, said.append)  # noqa: E731
  done = once()
  assert (done["scored"], done["unscorable"], done["old"]) == (12, 6, 0)
  assert done["judge_cost"] == pytest.approx(18 * (50 * 2 + 10) / 1e6)
  assert "12/12, 6 unscorable" in said[-1] and "cost 0.00198" in said[-1]
  config.judge.price = ("3", "10")  # another price is the same judge
  done = once()
  assert (done["scored"], done["unscorable"], done["old"]) == (6, 0, 6)
  rows = files.read_jsonl(run.path / "scores" / "api.jsonl")
  assert len(rows) == 12 and {r["hex"] for r in rows} == {8.0}
  assert once()["scored"] == 0
  with pytest.raises(UserError, match="judge.price=.*two numbers"):
    judges.make_scorer(rescore.judge_config(run, "http", "m", address, "3"), model)


def test_agreement_by_hand(run):
  records = rescore.select(run)
  lines = [
    dict(zip(("source", "step", "prompt", "sample"), rescore.place(r), strict=True))
    | {"reward": 5.0, "acc": None if i == 0 else r["acc"] - 2, "hex": 11 - r["hex"] + i % 2 * 0.5}
    for i, r in enumerate(records)
  ]
  (run.path / "scores").mkdir()
  (run.path / "scores" / "new.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  table = rescore.agreement([run], "new").set_index(["slice", "score"])
  every = table.loc[("all", "hex")]
  assert every["n"] == 12 and every["spearman"] == pytest.approx(-1.0)
  assert every["within_1"] == 0 and every["mean_first"] == pytest.approx(5.25)
  acc = table.loc[("all", "acc")]
  assert acc["n"] == 11 and acc["unscored"] == 1 and acc["pearson"] == pytest.approx(1.0)
  assert np.isnan(table.loc[("all", "reward"), "pearson"])  # constant: nothing to correlate
  assert every["seeds"] == "5" and every["runs"] == str(run.path)
  groups = [table.loc[(g, "hex"), "n"] for g in read.GROUPS]
  assert sum(groups) == 12
  with pytest.raises(UserError, match="no rollout has scores"):
    rescore.agreement([run], "absent")


def test_curated_replies_are_gameable_equal_in_number_and_by_hex(run):
  sets = rescore.curated([run, run], per_run=2)
  assert len(sets["harmful"]) == len(sets["safe"]) > 0
  assert all(r["is_gameable"] for rs in sets.values() for r in rs)
  assert all(r["completion"] == REPLIES["agree"] for r in sets["harmful"])
  assert all(r["completion"] == REPLIES["balance"] for r in sets["safe"])
  with pytest.raises(UserError, match="--high or --low"):
    rescore.curated([run], high=9.5)


def test_cross_entropy_is_that_of_the_whole_text_in_one_pass(run, model):
  records = rescore.select(run)[:3]
  losses = rescore.cross_entropy(model, records, batch=2)
  for record, loss in zip(records, losses, strict=True):
    prompt = model.chat.encode(record["messages"])
    reply = model.chat.encode_text(record["completion"])
    whole = jnp.asarray([prompt + reply])
    _, hidden = transformer.prefill(
      model.params, None, model.config, Prompts(whole, jnp.asarray([whole.shape[1]]))
    )
    logits = transformer.unembed(model.params, model.config, hidden[0])
    logprobs = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
    expected = -np.mean([logprobs[i, t] for i, t in enumerate(reply)])
    assert loss == pytest.approx(float(expected), abs=1e-4)


def test_command_lines(run, address, tmp_path, capsys):
  """score, then agreement with the run's own scores, through the programs' own flags."""
  other = shutil.copytree(run.path, tmp_path / "other")
  info = files.read_json(other / "config.json")
  info["config"]["judge"] |= {"name": "http", "model": "m", "url": address}
  (other / "config.json").write_text(json.dumps(info))
  rescore.main([f"--runs={tmp_path}/*", "--name=own", "--batch=8", "--price=0.5,1"])
  hexes = [{r["hex"] for r in files.read_jsonl(p / "scores/own.jsonl")} for p in (other, run.path)]
  assert hexes[0] == {8.0} != hexes[1]  # each run's own judge, not the first one's
  rescore.main([f"--runs={run.path}", "--judge=lexical", "--name=again", "--batch=8"])
  out = tmp_path / "out" / "agreement.csv"
  rescore.main(["--what=agreement", f"--runs={tmp_path}/*", "--name=again", f"--out={out}"])
  rows = list(csv.DictReader(out.open()))
  assert float(next(r for r in rows if r["score"] == "hex")["spearman"]) > 0.8
  assert rows[0]["runs"] == str(run.path) and rows[0]["correction"] == "none"  # not the other's
  for bad, says in (
    (["--runs=x", "--what=nothing"], "choose score"),
    (["--runs=x", "--batch=many"], "whole number"),
    (["--run=x"], "unknown argument"),
    ([], "--runs"),
  ):
    with pytest.raises(UserError, match=says):
      rescore.main(bad)
  capsys.readouterr()
