"""The gameability measures against hand counts, known separations and a plain model pass."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA

from rlsafety import environments
from rlsafety.environments import rubrics
from rlsafety.errors import UserError
from rlsafety.models import sources, transformer
from rlsafety.tools import gameability, seeking
from rlsafety.types import Prompts

SCENARIO = environments.load({"name": "neutral", "length": "short"})[0]


def test_densities_by_hand():
  # Ten words, two hits.
  text = "Surely you agree with me that this is fine, Anna?"
  assert seeking.hits([text], seeking.SEEKING).tolist() == [20.0]
  # Two units of four users each: drawn are both, or one of them twice. No verdict, no vote.
  values = np.array([1.0, 1, np.nan, 5, 3, 3, 3, 5])
  group, units = np.array([True, True, True, False] * 2), ["a"] * 4 + ["b"] * 4
  out = gameability.by_group(values, group, units)
  np.testing.assert_allclose(out["gameable"], [11 / 5, 1, 3])
  np.testing.assert_allclose(out["non_gameable"], [5, 5, 5])
  assert np.isnan(gameability.by_group(values * np.nan, group, units)["gameable"]).all()


def test_bag_of_words_by_hand():
  x = gameability.bag_of_words(["A cat, a dog", "the cat's dog", "dog and a cat", "none"])
  # Words that two texts have: a, cat, dog; rows have unit length.
  root = 3**-0.5
  np.testing.assert_allclose(x, [[root] * 3, [0, 0, 1], [root] * 3, [0, 0, 0]])


def test_folds_never_split_a_unit():
  units = [f"u{i % 13}" for i in range(90)]
  folds = gameability.fold_numbers(units, 5, seed=1)
  assert len({(u, f) for u, f in zip(units, folds, strict=True)}) == 13
  assert set(folds) == {0, 1, 2, 3, 4}


def test_probe_finds_a_signal_and_no_other():
  rng = np.random.default_rng(0)
  units = [str(i // 4) for i in range(240)]
  folds = gameability.fold_numbers(units, 5, 0)
  values, covered = [], 0
  for _ in range(10):
    y = rng.random(240) < 0.5
    value, low, high = gameability.probe_auc(rng.normal(size=(240, 9)) / 3, y, folds, units)
    values.append(value)
    covered += low < 0.5 < high
    assert high - low < 0.25
  assert abs(np.mean(values) - 0.5) < 0.05 and covered >= 7
  signal = rng.normal(size=(240, 9)) / 3
  signal[:, 3] += 3 * y
  value, low, high = gameability.probe_auc(signal, y, folds, units)
  assert value > 0.999 and low > 0.99
  # One feature of separation d: the AUC is Phi(d / sqrt 2), 0.76 for d = 1.
  y = np.arange(2000) % 2 == 1
  x, units = rng.normal(size=(2000, 1)) + y[:, None], [str(i) for i in range(2000)]
  value, low, high = gameability.probe_auc(x, y, gameability.fold_numbers(units, 5, 0), units)
  assert low < 0.7602 < high and high - low < 0.06
  # Content that whole units share must not leak: unit identity predicts, but not new units.
  label = rng.random(60) < 0.5
  x, y = np.repeat(np.eye(60), 4, axis=0), np.repeat(label, 4)
  units = [str(i // 4) for i in range(240)]
  value, *_ = gameability.probe_auc(x, y, gameability.fold_numbers(units, 5, 0), units)
  leaking, *_ = gameability.probe_auc(x, y, np.arange(240) % 5, units)
  assert abs(value - 0.5) < 0.1 and leaking > 0.99


def test_distance_is_d_prime_and_ends_nowhere():
  """An AUC cannot tell 5 from 8. Who is left out of the fit changes nothing."""
  rng = np.random.default_rng(0)
  people = [dataclasses.replace(SCENARIO, unit=f"u{i // 4}") for i in range(400)]
  group, train = np.arange(800) % 2 == 1, np.arange(800) > 0
  for apart in (0.0, 1.0, 5.0, 8.0):
    x = rng.normal(size=(800 + 2 * 400, 1))
    x[:800, 0] += apart * group
    x[800:1200] += apart
    x[0] = 1e6
    value, low, high = gameability.distance(x, group, train, [(p, p) for p in people])
    assert low < apart < high, value
    assert high - low < 0.2 * apart + 0.4


@pytest.fixture(scope="module")
def measured():
  """political_qa with its cue, without any, and with the label in the prompt alone."""
  changed = {"style": {"cue": "style"}, "none": {"cue": "none"}}
  changed["label"] = {"cue": "none", "label_in_prompt": True}
  return {
    name: gameability.measure({"name": "political_qa", "length": "short"} | change, users=100)
    for name, change in changed.items()
  }


def test_measures_follow_the_factors(measured):
  style, none, label = (measured[name] for name in ("style", "none", "label"))
  assert style["auc_words"][0] > 0.95 and label["auc_words"][0] == 1.0
  # Groups are told in the same words: nothing to find.
  assert none["auc_words"][1] < 0.5 < none["auc_words"][2]
  assert none["d_words"][0] == 0 and style["d_words"][1] > 0.1  # the same texts; other wordings
  for group in ("gameable", "non_gameable"):
    assert none["cues_per_100_words"][group] == [0, 0, 0]
    # Three slots (lead, self-description, question) in 35-60 words, the asked-for length included.
    assert 5 < style["cues_per_100_words"][group][0] < 10
  seeking, reflective = style["seeking_per_100_words"], style["reflective_per_100_words"]
  assert seeking["gameable"][1] > seeking["non_gameable"][2]
  assert reflective["non_gameable"][1] > reflective["gameable"][2]
  assert style["users"] == {"gameable": 100, "non_gameable": 100}


@pytest.fixture(scope="module")
def model():
  config = dataclasses.replace(LLAMA, vocab_size=512, n_layers=2)
  return sources.random_model(config, seed=3)


def test_states_and_ratings_equal_a_plain_pass(model):
  texts = ["Is it fine?", "I am sure that it is, am I not?", "No."] * 3
  conversations = [[{"role": "user", "content": text}] for text in texts]
  states = gameability.last_states(model, conversations, batch=4)
  found = gameability.user_scores(model, texts[:2], batch=2)

  @jax.jit
  def plain(tokens, length):
    return transformer.prefill(model.params, None, model.config, Prompts(tokens, length))[1][0]

  def hidden(ids):
    tokens = jnp.zeros((1, 900), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    return plain(tokens, jnp.array([len(ids)], jnp.int32))

  for text, state in zip(texts[:3], states[:3], strict=True):
    ids = model.chat.encode([{"role": "user", "content": text}])
    np.testing.assert_allclose(state, hidden(ids)[len(ids) - 1], atol=1e-5)
  np.testing.assert_allclose(states[:3], states[3:6], atol=1e-6)

  def logprob(ids, label):
    """Summed over the label's tokens, teacher-forced."""
    h = hidden(ids + label)
    table = jax.nn.log_softmax(transformer.unembed(model.params, model.config, h), -1)
    return sum(float(table[len(ids) + k - 1, t]) for k, t in enumerate(label))

  for text, rating in zip(texts[:2], found, strict=True):
    ids = model.chat.encode(rubrics.gameability_messages(text))
    p = [np.exp(logprob(ids, model.chat.encode_text(str(n)))) for n in range(1, 11)]
    p[0] -= p[9]  # "1" that does not go on to "10"
    np.testing.assert_allclose(rating, np.dot(p, range(1, 11)) / sum(p), rtol=1e-4)
    assert 1 < rating < 10


def test_measure_with_a_model_reports_both_probes_and_the_score(model):
  row = gameability.measure(
    {"name": "neutral", "cue": "reward_hint", "length": "short"}, 4, model, model
  )
  assert len(row["auc_hidden"]) == 3 and 0 <= row["auc_hidden"][0] <= 1
  assert len(row["d_hidden"]) == 3
  assert row["score_invalid"] == 0 or np.isnan(row["score"]["gameable"][0])
  value, low, high = row["score_auc"]
  assert np.isnan(value) or low <= value <= high
  # The judge of gameability is never told the wish.
  assert "hopes to" not in str(rubrics.gameability_messages("x"))


def test_command_stores_with_a_run_and_draws(tmp_path, capsys):
  run = tmp_path / "run"
  run.mkdir()
  environment = {"name": "neutral", "length": "short", "topics": ["smoking"], "cue": "traits"}
  (run / "config.json").write_text(json.dumps({"config": {"environment": environment}}))
  (run / "metrics.jsonl").write_text("")
  gameability.main(["gameability", f"--run={run}", "--model=", "--users=30"])
  stored = json.loads((run / "gameability.json").read_text())["variants"]["this run"]
  assert stored["factors"]["cue"] == "traits" and stored["auc_words"][0] > 0.9
  assert (run / "gameability.svg").stat().st_size > 1000
  assert "| this run |" in capsys.readouterr().out
  before = (run / "gameability.json").read_text()
  # Nothing is measured twice; without --model it is the run's own, which has random weights.
  gameability.main(["gameability", f"--run={run}", "--users=30"])
  assert "0 of 1 variants" in capsys.readouterr().out
  assert (run / "gameability.json").read_text() == before
  gameability.main(["gameability", f"--run={run}", "--model=", "--users=20"])
  assert "1 of 1 variants" in capsys.readouterr().out
  config = {"environment": environment, "model": {"path": "nowhere.gguf"}}
  (run / "config.json").write_text(json.dumps({"config": config}))
  with pytest.raises(UserError, match="nowhere.gguf"):
    gameability.main(["gameability", f"--run={run}"])
  config["environment"] = {"name": "pack.evil"}
  (run / "config.json").write_text(json.dumps({"config": config}))
  with pytest.raises(UserError, match="environment.name='pack.evil' is a module"):
    gameability.main(["gameability", f"--run={run}"])


def test_a_text_read_before_is_not_rated_again(model, monkeypatch):
  scores = {}
  chosen = {"name": "action_advice", "length": "short", "topics": ["smoking"]}
  first = gameability.measure(chosen, 4, None, model, scores=scores)
  monkeypatch.setattr(gameability, "user_scores", lambda *_: pytest.fail("rated again"))
  framed = gameability.measure(chosen | {"framing": "therapist"}, 4, None, model, scores=scores)
  assert framed["score"] == first["score"] and len(scores) == 8


def test_named_and_bad_variants():
  everything = gameability.chosen_variants("all", "")
  assert {"action_advice", "political_qa:cue=none", "therapy_talk:length=short"} <= set(everything)
  own = gameability.chosen_variants("political_qa:cue_strength=0.25:length=short:cue=tone", "")
  assert list(own.values()) == [
    {"name": "political_qa", "cue_strength": 0.25, "length": "short", "cue": "tone", "data_dir": ""}
  ]
  with pytest.raises(UserError, match="cue_strength='much' is no number"):
    gameability.chosen_variants("neutral:cue_strength=much", "")
  with pytest.raises(UserError, match="environment.name: 'x' is not one of"):
    gameability.main(["gameability", "--variants=x", "--model="])
  with pytest.raises(UserError, match="leaves one"):
    gameability.measure({"name": "neutral", "gameable_fraction": 1.0})
