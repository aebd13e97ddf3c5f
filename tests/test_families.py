"""Every family against transformers: logits, cached decoding and LoRA gradients.

Without torch the committed values of goldens/make_families.py stand in for it.
"""

import functools
import json
import math
import pathlib

import family_cases as cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsafety.errors import UserError
from rlsafety.models import architecture, families, presets

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "families.npz"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  @functools.cache
  def once(name):
    folder = tmp_path_factory.mktemp(name)
    model = cases.model_of(name, folder)
    return model, folder, cases.ours(model)

  return once


def assert_close(ours, theirs, what):
  scale = np.abs(theirs).max()
  worst = np.abs(ours - theirs).max() / scale
  assert worst <= 1e-4, f"{what}: relative difference {worst:.1e}"
  assert scale > 0


@pytest.mark.parametrize("name", cases.CASES)
def test_equal_to_committed_values_of_transformers(run, name):
  goldens = np.load(GOLDENS)
  for key, value in cases.digest(run(name)[2]).items():
    assert_close(value, goldens[f"{name}/{key}"], key)


@pytest.mark.parametrize("name", cases.CASES)
def test_equal_to_transformers_live(run, name):
  for package in ("torch", "peft"):
    pytest.importorskip(package, reason="pip install -e '.[parity]'")
  model, folder, result = run(name)
  reference = cases.theirs(model, folder)
  _, lengths, _ = cases.sequences()
  valid = np.arange(cases.S) < lengths[:, None]
  for key, theirs in reference.items():
    mine = result[key]
    if key == "prefill":
      mine, theirs = mine[valid], theirs[valid]
    assert_close(mine, theirs, key)


# Parameters of the published checkpoints, as their safetensors headers add up.
PUBLISHED = {
  "qwen1.5-0.5b-chat": 463_987_712,
  "qwen1.5-1.8b-chat": 1_836_828_672,
  "gemma-1.1-2b-it": 2_506_172_416,
  "qwen1.5-4b-chat": 3_950_369_280,
  "yi-6b-chat": 6_061_035_520,
  "qwen1.5-7b-chat": 7_721_324_544,
  "gemma-1.1-7b-it": 8_537_680_896,
  "llama-2-7b-chat": 6_738_415_616,
  "llama-3-8b-instruct": 8_030_261_248,
  "llama-2-13b-chat": 13_015_864_320,
  "qwen1.5-14b-chat": 14_167_290_880,
  "llama-3.1-70b-instruct": 70_553_706_496,
  "llama-3.2-1b-instruct": 1_235_814_400,
  "llama-3.2-3b-instruct": 3_212_749_824,
  "mistral-7b-instruct-v0.1": 7_241_732_096,
  "mistral-7b-instruct-v0.3": 7_248_023_552,
  "qwen2.5-0.5b-instruct": 494_032_768,
  "qwen2.5-1.5b-instruct": 1_543_714_304,
  "qwen2.5-3b-instruct": 3_085_938_688,
  "qwen2.5-7b-instruct": 7_615_616_512,
  "qwen2.5-14b-instruct": 14_770_033_664,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "gemma-2-2b-it": 2_614_341_888,
  "gemma-2-9b-it": 9_241_705_984,
  "gemma-2-27b-it": 27_227_128_320,
  "gemma-3-270m-it": 268_098_176,
  "gemma-3-1b-it": 999_885_952,
  "gemma-3-27b-it": 27_009_346_304,
  "smollm2-135m-instruct": 134_515_008,
  "smollm2-360m-instruct": 361_821_120,
  "smollm2-1.7b-instruct": 1_711_376_384,
  "smollm3-3b": 3_075_098_624,
  "olmo-2-1b-instruct": 1_484_916_736,
  "olmo-2-7b-instruct": 7_298_617_344,
  "olmo-3-7b-instruct": 7_298_011_136,
  "olmo-3.1-32b-instruct": 32_233_522_176,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name):
  assert architecture.params_count(presets.preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*presets.PRESETS, *cases.CASES])
def test_config_survives_export(name):
  config = families.model_config((presets.PRESETS | cases.CASES)[name])
  exported = json.loads(json.dumps(families.hf_config(config)))
  assert families.model_config(exported) == config


@pytest.mark.parametrize("name", ["llama31_scaled", "qwen2_window", "gemma2_gqa", "gemma3_scaled"])
def test_transformers_reads_the_exported_config_alike(name):
  """Written by us in the older field names, then by transformers in its own."""
  import transformers

  config = families.model_config(cases.CASES[name])
  exported = families.hf_config(config)
  again = transformers.AutoConfig.for_model(**exported).to_dict()
  assert families.model_config({k: v for k, v in again.items() if v is not None}) == config


WRONG_FLAGS = ("false", "no", 0, 2, {}, [False])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WRONG_NUMBERS = (math.nan, math.inf, 0, -1.0, "10000", [1], {}, True)


def test_unknown_preset_suggests():
  with pytest.raises(UserError, match="qwen1.5-7b-chat"):
    presets.preset("qwen1.5-7b")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "mixtral"}, "model_type='mixtral'.*Supported: llama: Llama 2"),
    ({"model_type": None}, "model_type=None"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling='dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale"),
    ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4'"),
    ({"rope_scaling": YARN | {"beta_slow": 40}}, "beta_slow below beta_fast"),
    ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta above 1"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "must have just"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"hidden_size": None}, "hidden_size=None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"sliding_window": 128}, "sliding_window=128"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "m.py"}}, "remote code"),
    ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not known"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    *(({"tie_word_embeddings": v}, "tie_word_embeddings=.*true or false") for v in WRONG_FLAGS),
    *(({"rope_theta": v}, ": rope_theta=") for v in WRONG_NUMBERS),
    *(({"rope_parameters": {"rope_theta": v}}, "rope_theta=") for v in WRONG_NUMBERS),
    *(({"rope_scaling": {"type": "linear", "factor": v}}, "factor=") for v in WRONG_NUMBERS),
    *(({"rms_norm_eps": v}, "rms_norm_eps=") for v in WRONG_NUMBERS),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling="),
    (
      {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                        "original_max_position_embeddings": 8192}},
      "low_freq_factor below high",
    ),
    ({"layer_types": 3}, "layer_types=3"),
    ({"layer_types": [["full_attention"]] * 2}, "layer_types="),
    ({"hidden_act": ["silu"]}, "hidden_act="),
    ({"model_type": ["llama"]}, "model_type="),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"vocab_size": 1e9}, "vocab_size="),
  ],
)
def test_what_would_change_the_numbers_is_refused(change, message):
  config = {k: v for k, v in cases.CASES["llama2_mha"].items()} | change
  with pytest.raises(UserError, match=f"(?s)model/config.json.*{message}"):
    families.model_config(config, "model/config.json")


def test_gemma3_with_vision_gives_its_text_part():
  text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
  text |= {"num_hidden_layers": 34, "sliding_window": 1024}
  text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
  whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
  assert families.model_config(whole) == presets.preset("gemma-3-4b-it")
  # What stands beside the parts holds for the whole; in the text part nobody reads the flag.
  for flag in (True, False):
    found = families.model_config(whole | {"tie_word_embeddings": flag})
    assert found.tie_embeddings is flag
  inner = whole | {"text_config": text | {"tie_word_embeddings": False}}
  assert families.model_config(inner).tie_embeddings
  for field, value in (("quantization_config", {}), ("rope_theta", 3.0), ("hidden_size", 8)):
    with pytest.raises(UserError, match=field):
      families.model_config(whole | {field: value})


@pytest.mark.parametrize(
  "change",
  [
    {"sliding_window": -3},
    {"use_sliding_window": "false"},
    {"max_window_layers": "2"},
    {"attn_logit_softcapping": -5.0},
    {"final_logit_softcapping": 0},
    {"final_logit_softcapping": math.nan},
    {"query_pre_attn_scalar": -8},
    {"sliding_window_pattern": 0},
    {"rope_parameters": {"full_attention": [], "sliding_attention": {"rope_theta": 1.0}}},
    {"rope_parameters": []},
    {"rope_local_base_freq": 0},
  ],
)
def test_values_of_windows_caps_and_two_ropes_are_in_range(change):
  name = {"use_sliding_window": "qwen2_window", "max_window_layers": "qwen2_window"}.get(
    next(iter(change)), "gemma3_mqa"
  )
  config = dict(cases.CASES[name])
  if "sliding_window_pattern" in change:
    del config["layer_types"]
  with pytest.raises(UserError, match=f"model/config.json: {next(iter(change))}"):
    families.model_config(config | change, "model/config.json")


SLIDING = ["sliding_attention"] * 2


@pytest.mark.parametrize(
  ("name", "change", "field"),
  [
    # transformers windows every layer of a Mistral and none of a Gemma, whatever stands here.
    ("mistral_window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gemma_mqa", {"layer_types": SLIDING}, "layer_types"),
    ("llama2_mha", {"layer_types": SLIDING}, "layer_types"),
    ("qwen15_mha", {"layer_types": SLIDING}, "layer_types=.*use_sliding_window is false"),
    ("qwen3_gqa", {"layer_types": SLIDING, "sliding_window": 9}, "layer_types"),
    # One version reads the one field, another the other.
    ("gemma_mqa", {"hidden_activation": "silu"}, "hidden_activation='silu' disagrees"),
    ("gemma2_gqa", {"hidden_act": "gelu"}, "hidden_act='gelu' disagrees"),
    ("gemma3_mqa", {"layer_types": None, "_sliding_window_pattern": 2}, "_sliding_window_pattern"),
    ("gemma3_mqa", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type"),
    ("olmo3_types", {"rope_theta": 1e3}, "rope_theta=1000.0 must stand in rope_parameters"),
  ],
)
def test_what_transformers_reads_otherwise_is_refused(name, change, field):
  families.model_config(cases.CASES[name])
  with pytest.raises(UserError, match=f"model/config.json: {field}"):
    families.model_config(cases.CASES[name] | change, "model/config.json")


def test_absent_key_value_heads_are_as_many_as_transformers_has():
  import transformers

  for name in ("llama2_mha", "gemma_mha", "olmo2_mha", "smollm3_chosen"):
    config = {k: v for k, v in cases.CASES[name].items() if k != "num_key_value_heads"}
    config |= {"num_attention_heads": 32, "hidden_size": 256}
    theirs = transformers.AutoConfig.for_model(**config).num_key_value_heads
    assert families.model_config(config).n_kv_heads == theirs


def test_fields_of_common_tools_pass():
  """As unsloth, older transformers and TRL write them into files of Llama and Gemma."""
  extra = {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "temperature": 0.6}
  extra |= {"do_sample": True, "top_p": 0.9, "num_beams": 1, "torchscript": False}
  extra |= {"add_cross_attention": False, "pruned_heads": {}, "_flash_attn_2_enabled": True}
  extra |= {"neftune_noise_alpha": 5, "rope_scaling": {"rope_type": "default"}}
  plain = cases.CASES["llama2_mha"]
  assert families.model_config(plain | extra) == families.model_config(plain)


JUNK = st.one_of(
  st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=8),
  st.lists(st.none() | st.text(max_size=3), max_size=3),
  st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.integers()),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_in_any_field_is_a_model_or_a_clear_error(data):
  config = dict(cases.CASES[data.draw(st.sampled_from(list(cases.CASES)))])
  more = "rope_scaling layer_types hidden_act use_sliding_window max_window_layers text_config"
  names = sorted({*config, *more.split(), "tie_word_embeddings", "sliding_window_pattern"})
  config |= data.draw(st.dictionaries(st.sampled_from(names), JUNK, min_size=1, max_size=3))
  if data.draw(st.booleans()):
    config = {"model_type": "gemma3", "text_config": config, "tie_word_embeddings": data.draw(JUNK)}
  try:
    families.model_config(config, "some/config.json")
  except UserError as error:
    assert str(error).startswith("some/config.json: ")
