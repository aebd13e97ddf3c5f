"""Prompt order, recorded datasets and what malformed records do."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from conftest import LLAMA, objective_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsafety import replay
from rlsafety import rollout as rollout_lib
from rlsafety.errors import UserError
from rlsafety.models import scoring, sources
from rlsafety.models.chat import byte_chat
from rlsafety.tools import record
from rlsafety.types import Prompts

NAN = float("nan")


def users(gameable, others):
  return [i < gameable for i in range(gameable + others)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_prompt_order(gameable, others, n, seed):
  scenarios = users(gameable, others)
  steps = [rollout_lib.order(scenarios, seed, step, n) for step in range(12)]
  np.testing.assert_array_equal(steps[7], rollout_lib.order(scenarios, seed, 7, n))  # no memory
  drawn = np.concatenate(steps)
  counts = np.bincount(drawn, minlength=gameable + others)
  for part in (counts[:gameable], counts[gameable:]):
    assert part.max() - part.min() <= 1  # nobody again before everybody once
  share = gameable / (gameable + others)
  assert abs((drawn < gameable).sum() - share * 12 * n) < 1
  for chosen in steps:
    assert abs((chosen < gameable).sum() - share * n) < 1


def test_prompt_order_changes_with_epoch_and_seed():
  scenarios = users(20, 20)
  first, second = (rollout_lib.order(scenarios, 1, step, 40).tolist() for step in (0, 1))
  assert sorted(first) == sorted(second) and first != second
  assert first != rollout_lib.order(scenarios, 2, 0, 40).tolist()
  assert (rollout_lib.order(users(5, 15), 1, 0, 8) < 5).sum() == 2


# --- Datasets ---------------------------------------------------------------------------

CHAT = byte_chat()
MESSAGES = [{"role": "system", "content": "Advise."}, {"role": "user", "content": "Tax more?"}]


def rollout(step, prompt, sample, text, reward, **more):
  tokens = CHAT.encode_text(text) + [CHAT.stop_ids[-1]]
  messages = [MESSAGES[0], {"role": "user", "content": f"Question {step}.{prompt}?"}]
  return {
    "step": step,
    "prompt": prompt,
    "sample": sample,
    "scenario_id": f"s{prompt}",
    "environment": "political_qa",
    "is_gameable": prompt % 2 == 0,
    "messages": messages,
    "completion": text,
    "tokens": tokens,
    "logprobs": [-0.5 - 0.1 * sample] * len(tokens),
    "length": len(tokens),
    "finished": True,
    "reward": reward,
    "acc": 2.0,
    "hex": None,
  } | more


def write_run(folder, rows, tail=""):
  (folder / "rollouts").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({"model": {"path": "random"}}))
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "rollouts/train.jsonl").write_text(lines + tail)


def call(*argv):
  """Runs the program; returns its exit code."""
  try:
    record.main(["record", *map(str, argv)])
  except SystemExit as stop:
    return stop.code
  return 0


def model(path="random"):
  return types.SimpleNamespace(chat=CHAT, source={"path": path})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rows = [
    rollout(step, prompt, sample, f"reply {step} {prompt} {sample}", reward)
    for step in (1, 2, 3)
    for prompt in (0, 1)
    for sample, reward in enumerate((4.0, 9.0, None))
  ]
  rows[2]["finished"] = False
  write_run(folder / "run", rows)
  assert call("--runs", folder / "run", "--out", folder / "set", "--first_step", 2) == 0
  return folder / "set"


def test_batches_hold_what_the_run_wrote(dataset):
  records = replay.load(str(dataset), model(), objective_of("grpo"), 4, 200, 40)
  assert len(records.is_gameable) == 4  # steps 2 and 3, two prompts each
  batch, scores = replay.batch_at(records, seed=3, step=5, n=2)
  assert scores["is_gameable"].tolist() in ([True, False], [False, True])
  for p in range(2):
    ids = batch.prompts.tokens[p, : batch.prompts.lengths[p]]
    question = CHAT.decode(ids)
    step, prompt = int(question.split("Question ")[1][0]), int(scores["is_gameable"][p] == 0)
    assert ids.tolist() == CHAT.encode(rollout(step, prompt, 0, "", 0)["messages"])
    for g, reward in enumerate((4.0, 9.0, NAN)):
      row = rollout(step, prompt, g, f"reply {step} {prompt} {g}", reward)
      n = batch.lengths[p, g]
      assert batch.tokens[p, g, :n].tolist() == row["tokens"]
      np.testing.assert_allclose(batch.behaviour_logprobs[p, g, :n], row["logprobs"], rtol=1e-6)
    np.testing.assert_array_equal(batch.rewards[p], np.float32([4, 9, NAN, NAN]))
    assert batch.lengths[p, 3] == 0
    assert (batch.staleness[p] == step + 5).all()
  assert np.isnan(scores["hex"]).all() and (scores["acc"][:, :3] == 2).all()
  again, _ = replay.batch_at(records, seed=3, step=5, n=2)
  np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_slots_of_preferences(dataset):
  dpo = replay.load(str(dataset), model(), objective_of("dpo"), 4, 200, 40)
  batch, _ = replay.batch_at(dpo, 0, 0, 4)
  assert batch.tokens.shape[1] == 2
  assert (batch.rewards == [9.0, 4.0]).all()  # the unrated third is no candidate

  kto = objective_of("kto", kto_anchor=True)
  batch, _ = replay.batch_at(replay.load(str(dataset), model(), kto, 2, 200, 40), 0, 0, 4)
  assert batch.tokens.shape[1] == 3
  np.testing.assert_array_equal(batch.tokens[:, 2], np.roll(batch.tokens[:, 0], -1, axis=0))


def test_another_tokenizer_reads_the_text_again(dataset):
  with pytest.raises(UserError, match="12 of 12 replies have none"):
    replay.load(str(dataset), model("other"), objective_of("grpo"), 4, 200, 40)
  with pytest.raises(UserError, match="have none"):  # one epoch would do without
    replay.load(str(dataset), model("other"), objective_of("rloo"), 4, 200, 40, epochs=2)
  replay.load(str(dataset), model("other"), objective_of("rloo"), 4, 200, 40)
  records = replay.load(str(dataset), model("other"), objective_of("sft"), 4, 200, 40, epochs=2)
  batch, _ = replay.batch_at(records, 0, 0, 4)
  own = replay.load(str(dataset), model(), objective_of("sft"), 4, 200, 40)
  np.testing.assert_array_equal(batch.tokens, replay.batch_at(own, 0, 0, 4)[0].tokens)
  assert np.isnan(batch.behaviour_logprobs).all()
  assert CHAT.encode([*MESSAGES, {"role": "assistant", "content": "Yes."}], False)[-2:] == [
    replay.encode_reply(CHAT, "Yes.", True)[-1],
    *CHAT.encode_text("\n"),
  ]


def test_limits_and_missing_datasets(dataset, tmp_path):
  with pytest.raises(UserError, match="the limit is 20"):
    replay.load(str(dataset), model(), objective_of("sft"), 4, 20, 40)
  with pytest.raises(UserError, match="no dataset"):
    replay.load(str(tmp_path), model(), objective_of("sft"), 4, 20, 40)
  batch, _ = replay.batch_at(
    replay.load(str(dataset), model(), objective_of("sft"), 4, 200, 5), 0, 0, 4
  )
  assert batch.tokens.shape == (4, 4, 5) and batch.lengths.max() == 5


GOOD = {"messages": MESSAGES, "completion": "Yes.", "reward": 3, "is_gameable": True}
BAD = {
  "not valid JSON": "{",
  "expected an object": "[1]",
  "`messages` must be a non-empty list": {"completion": "a"},
  "must end with the user": {"messages": MESSAGES[:1], "completion": "a"},
  "role 'tool'": {"messages": [{"role": "tool", "content": "a"}], "completion": "a"},
  "`content` string": {"messages": [{"role": "user", "content": 1}], "completion": "a"},
  "`completion` must be a string": {"messages": MESSAGES, "completion": None},
  "`completion` is empty": {"messages": MESSAGES, "completion": ""},
  "`rejected` is empty": {"messages": MESSAGES, "chosen": "a", "rejected": ""},
  "without its other half": {"messages": MESSAGES, "chosen": "a"},
  "are the same text": {"messages": MESSAGES, "chosen": "a", "rejected": "a"},
  "either `tokens` or": {"messages": MESSAGES, "chosen": "a", "rejected": "b", "tokens": [1]},
  "`finished` must be true or false, not 'false'": GOOD | {"finished": "false"},
  "`finished` must be true or false, not 1": GOOD | {"finished": 1},
  "`score` is no field": {"messages": MESSAGES, "completion": "a", "score": 3},
  "`rewrd` is no field of a record; did you mean reward?": GOOD | {"rewrd": 3},
  "`label` must be": {"messages": MESSAGES, "completion": "a", "label": 1},
  "either `label` or": GOOD | {"label": True},
  "not True": GOOD | {"reward": True},
  "not '7'": GOOD | {"reward": "7"},
  "`is_gameable` must be true, false or null, not 1": GOOD | {"is_gameable": 1},
  "list of one assistant": {"messages": MESSAGES, "completion": [{"role": "user", "content": "a"}]},
  "`prompt`: role 'x'": {"prompt": [{"role": "x", "content": "a"}], "completion": "a"},
  "`messages`: a message has `name`": GOOD | {"messages": [MESSAGES[1] | {"name": "x"}]},
  "`completion`: a message has `tool_calls`": GOOD
  | {"completion": [{"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}]},
  "either `messages` or `prompt`": GOOD | {"prompt": "Tax more?"},
  "`scenario_id` must be": GOOD | {"scenario_id": 3},
  "from -1 on": GOOD | {"step": 2**31},
  "`reward` must be a number": GOOD | {"reward": "high"},
  "`is_gameable` must be": GOOD | {"is_gameable": "yes"},
  "one number per id": GOOD | {"tokens": [1, 2], "logprobs": [-1.0]},
  "numbers <= 0": GOOD | {"tokens": [1], "logprobs": [2.0]},
  "list of token ids": GOOD | {"tokens": [1.5]},
  "of token ids": GOOD | {"tokens": [2**31]},
  "a list of token ids": GOOD | {"tokens": [-1]},
  "`tokens` must be a list": GOOD | {"tokens": [True]},
  "`logprobs` must be numbers": GOOD | {"tokens": [1], "logprobs": ["x"]},
  "not inf": GOOD | {"reward": float("inf")},
  "give either": GOOD | {"chosen": "a", "rejected": "b"},
  "`step` must be": GOOD | {"step": "1"},
}


def test_malformed_lines_are_named_and_good_ones_kept(tmp_path, capsys):
  lines = [json.dumps(GOOD | {"scenario_id": "a\ud800"}), json.dumps(GOOD | {"completion": "No."})]
  lines += [bad if isinstance(bad, str) else json.dumps(bad) for bad in BAD.values()]
  lines += [json.dumps({"messages": MESSAGES[1:], "chosen": "A", "rejected": "B"}), '{"mess']
  path = tmp_path / "mixed.jsonl"
  path.write_text("\n".join(lines))
  assert call("--jsonl", path, "--out", tmp_path / "set") == 1
  captured = capsys.readouterr()
  for number, words in enumerate(BAD, 3):
    line = next(x for x in captured.err.splitlines() if f"mixed.jsonl:{number}:" in x)
    assert words in line
  assert f"mixed.jsonl:{len(lines)}: not valid JSON" in captured.err and "torn" in captured.err
  assert "2 prompts, 4 replies" in captured.out

  records = replay.load(str(tmp_path / "set"), model(), objective_of("sft"), 2, 100, 20)
  first = replay.example_at(records, 0)
  assert json.loads(first["completions"]) == ["Yes.", "No."]  # one prompt, one group
  assert first["scenario_id"] == "a?"
  assert first["reward"].tolist() == [3, 3] and first["is_gameable"] == 1
  pair = replay.example_at(records, 1)
  assert json.loads(pair["completions"]) == ["A", "B"] and pair["reward"].tolist() == [10, 1]


def test_public_preference_and_label_files(tmp_path):
  """The conversational and the plain form of the formats that TRL documents, and pairs apart."""
  question, reply = (
    [{"role": "user", "content": "2+2?"}],
    lambda t: [{"role": "assistant", "content": t, "tool_calls": None, "train": True}],
  )
  rows = [
    {"prompt": question, "chosen": reply("4"), "rejected": reply("5")},
    {"prompt": question, "chosen": "four", "rejected": "five", "id": 7},  # of the same prompt
    {"prompt": question, "completion": reply("4"), "label": True},
    {"prompt": "2+2?", "completion": "6", "label": False},
    {"messages": question, "completion": "9", "reward": None, "finished": False},
  ]
  path = tmp_path / "trl.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert call("--jsonl", path, "--out", tmp_path / "set", "--ignore", "id", "train") == 0
  records = replay.load(str(tmp_path / "set"), model(), objective_of("dpo"), 2, 100, 20)
  found = [replay.example_at(records, i) for i in range(len(records.is_gameable))]
  assert [json.loads(e["completions"]) for e in found][:2] == [["4", "5"], ["four", "five"]]
  assert [e["reward"].tolist() for e in found][:2] == [[10, 1], [10, 1]]
  rest = [(e["reward"].tolist(), e["finished"].tolist()) for e in found[2:]]
  assert str(rest) == str([([10.0], [1]), ([1.0], [1]), ([NAN], [0])])
  pairs, _ = replay.batch_at(records, 0, 0, 5)
  lines = [[CHAT.decode(t[: n - 1]) for t, n in zip(*x)] for x in zip(pairs.tokens, pairs.lengths)]  # noqa: B905
  assert sorted(lines)[-2:] == [["4", "5"], ["four", "five"]]  # no reply of another line


def test_a_data_set_chooses_no_module_to_import(dataset, tmp_path, monkeypatch):
  copy = shutil.copytree(dataset, tmp_path / "copy")
  (tmp_path / "evil_features.py").write_text("raise SystemExit('ran')")
  monkeypatch.syspath_prepend(str(tmp_path))
  features, info = copy / "features.json", copy / "dataset_info.json"
  kept = features.read_text()
  for key in ("pythonClassName", "python_class_name", "type", "proto_cls"):
    told = json.loads(kept)
    node = told["featuresDict"]["features"]["tokens"]
    node.pop("pythonClassName")
    node[key] = "evil_features.Tensor"
    features.write_text(json.dumps(told))
    with pytest.raises(UserError, match="features.json: names 'evil_features.Tensor'"):
      replay.load(str(copy), model(), objective_of("sft"), 4, 200, 40)
  features.write_text(kept)
  info.write_text(json.dumps(json.loads(info.read_text()) | {"moduleName": "evil_features"}))
  with pytest.raises(UserError, match="moduleName 'evil_features'"):
    replay.load(str(copy), model(), objective_of("sft"), 4, 200, 40)


SHARDS = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"shardLengths": ["2"]}, "shardLengths tell of 2 records, the files hold 4"),
    ({"filepathTemplate": f"../set/{SHARDS}"}, "a file of another folder"),
    ({"filepathTemplate": f"{{SET}}/{SHARDS}"}, "a file of another folder"),
  ],
)
def test_records_are_all_of_those_in_the_folder_and_no_others(dataset, tmp_path, change, says):
  """No record is left out in silence, and none is read that the digest does not cover."""
  shutil.copytree(dataset, tmp_path / "set")
  copy = shutil.copytree(dataset, tmp_path / "copy")
  info = json.loads((copy / "dataset_info.json").read_text())
  change = {k: v.replace("{SET}", str(dataset)) if isinstance(v, str) else v
            for k, v in change.items()}  # fmt: skip
  info["splits"][0] |= change
  (copy / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(UserError, match=f"copy/dataset_info.json: .*{says}"):
    replay.load(str(copy), model(), objective_of("sft"), 4, 200, 40)


def test_the_digest_of_a_data_set(dataset, tmp_path):
  copy = shutil.copytree(dataset, tmp_path / "copy")
  own = replay.digest(str(dataset))
  assert replay.digest(str(copy)) == own and len(own) == 64  # its place does not enter
  for file in sorted(p for p in copy.rglob("*") if p.is_file()):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert replay.digest(str(copy)) != own, file
    file.write_bytes(data)
    file.rename(file.with_name("other"))
    assert replay.digest(str(copy)) != own, file
    file.with_name("other").rename(file)
  assert replay.digest(str(copy)) == own
  (copy / "link").symlink_to(copy / "features.json")
  with pytest.raises(UserError, match="link is not a regular file"):
    replay.digest(str(copy))
  with pytest.raises(UserError, match="no such folder"):
    replay.digest(str(tmp_path / "absent"))


def test_nothing_usable_writes_nothing(tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text("{}\n")
  for argv, words in (
    (["--jsonl", path], "no usable record"),
    (["--jsonl", tmp_path / "absent"], "no such file"),
    (["--runs", tmp_path], "is no run directory"),
    ([], "nothing to read"),
  ):
    with pytest.raises(UserError, match=words):
      record.main(["record", *map(str, argv), "--out", str(tmp_path / "set")])
  assert not (tmp_path / "set").exists()


def test_logprobs_of_a_named_model(tmp_path):
  """From text alone to the log-probs that the model itself gives, unpadded."""
  from rlsafety.models import hf

  tiny = sources.random_model(dataclasses.replace(LLAMA, vocab_size=512, n_layers=1), seed=0)
  hf.save_merged(tmp_path / "tiny", tiny, None)
  path = tmp_path / "demos.jsonl"
  rows = [GOOD, GOOD | {"completion": "No, never."}, GOOD | {"messages": MESSAGES[1:]}]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  model_path = str(tmp_path / "tiny")
  assert call("--jsonl", path, "--out", tmp_path / "set", "--logprobs_model", model_path) == 0

  loaded = sources.load_model(model_path)
  records = replay.load(str(tmp_path / "set"), loaded, objective_of("grpo"), 2, 100, 40)
  score = jax.jit(functools.partial(scoring.token_scores, config=loaded.config))
  for i, completions in enumerate((["Yes.", "No, never."], ["Yes."])):
    example = replay.example_at(records, i)
    prompt = np.array([loaded.chat.encode(json.loads(example["messages"]))], np.int32)
    replies = replay.replies_of(records, example)
    assert [loaded.chat.decode(r.tokens) for r in replies] == completions
    reply = replies[-1]
    expected = score(
      loaded.params,
      None,
      prompts=Prompts(prompt, np.array([prompt.shape[1]], np.int32)),
      tokens=reply.tokens[None, None],
      lengths=np.array([[len(reply.tokens)]], np.int32),
    ).logprobs
    np.testing.assert_allclose(reply.logprobs, expected[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("messages", "[" * 100_000),
    ("messages", '{"role": "user"}'),
    ("messages", '[{"role": "user", "content": 3}]'),
    ("completions", '["one"]'),
    ("completions", "[1, 2, 3]"),
  ],
)
def test_a_record_that_no_program_of_ours_wrote_is_named(dataset, field, value):
  records = replay.load(str(dataset), model(), objective_of("sft"), 4, 200, 40)
  example = replay.example_at(records, 0) | {field: value}
  read = replay._messages if field == "messages" else replay._completions
  with pytest.raises(UserError, match=f"record of .*{field}"):
    read(example)
