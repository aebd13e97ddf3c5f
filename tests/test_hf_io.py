"""Folders in and out: bit-equal round trips, other readers, broken files."""

import hashlib
import http.server
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import threading

import chat_families
import family_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.models import (
  architecture,
  assemble,
  families,
  hf,
  hf_chat,
  lora,
  sources,
  transformer,
)
from rlsafety.models.model import Model
from rlsafety.tools import export

FAMILY = "qwen25_gqa_tied"  # biases, tied head


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(model with tokenizer, adapter, its folder)."""
  folder = tmp_path_factory.mktemp("base")
  cases.write_folder(cases.CASES[FAMILY], folder)
  chat = chat_families.make("chatml")
  vocab = chat.vocab_size + 5  # embeddings are often padded
  config = families.model_config(cases.CASES[FAMILY] | {"vocab_size": vocab})
  (folder / "config.json").write_text(json.dumps(families.hf_config(config)))
  save_file(cases.tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
  params = assemble.assemble(config, hf.read_tensors(folder), jnp.float32)
  model = Model(config, params, chat, {"path": str(folder)})
  return model, cases.adapter_of(config), folder


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def logits(model, adapter, tokens):
  prompts = cases.Prompts(tokens=tokens, lengths=np.full(len(tokens), tokens.shape[1], np.int32))
  _, hidden = transformer.prefill(model.params, adapter, model.config, prompts)
  return np.asarray(transformer.unembed(model.params, model.config, hidden))


TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 97


def test_peft_round_trip_is_bit_equal(made, tmp_path):
  model, adapter, _ = made
  hf.save_peft(tmp_path, adapter, model, cases.LORA)
  again, settings_ = hf.load_peft(tmp_path, model.config)
  same(again.weights, adapter.weights)
  assert (again.scale, settings_) == (adapter.scale, cases.LORA)


def test_nothing_of_an_adapter_is_written_through_a_link(made, tmp_path):
  model, adapter, _ = made
  outside, folder = tmp_path / "outside", tmp_path / "adapter"
  outside.write_text("kept")
  folder.mkdir()
  links = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
  for name in (*links, "adapter_model.safetensors.partial"):
    (folder / name).symlink_to(outside)
  hf.save_peft(folder, adapter, model, cases.LORA)
  assert outside.read_text() == "kept" and not any((folder / name).is_symlink() for name in links)
  same(hf.load_peft(folder, model.config)[0].weights, adapter.weights)


@pytest.mark.parametrize("max_bytes", [4 << 30, 20_000])
def test_merged_round_trip_is_bit_equal(made, tmp_path, max_bytes):
  model, adapter, _ = made
  hf.save_merged(tmp_path / "one", model, adapter, max_bytes)
  shards = sorted((tmp_path / "one").glob("*.safetensors"))
  assert (len(shards) > 3) == (max_bytes == 20_000)
  again = sources.load_model(str(tmp_path / "one"))
  assert again.config == model.config
  expected = lora.merged(model.params, adapter)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.params, expected)
  hf.save_merged(tmp_path / "two", again, None, max_bytes)
  same(sources.load_model(str(tmp_path / "two")).params, again.params)
  message = [
    {"role": "system", "content": "You are"},
    {"role": "user", "content": "Hello <|im_end|>"},
  ]
  assert again.chat.encode(message) == model.chat.encode(message)
  assert (again.chat.stop_ids, again.chat.pad_id) == (model.chat.stop_ids, model.chat.pad_id)


def test_bfloat16_is_stored_as_it_is(made, tmp_path):
  model, _, folder = made
  half = Model(
    model.config,
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params),
    model.chat,
    model.source,
  )
  hf.save_merged(tmp_path, half, None)
  assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
  same(sources.load_model(str(tmp_path), jnp.bfloat16).params, half.params)


def test_transformers_loads_the_merged_folder(made, tmp_path):
  torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
  import transformers

  model, adapter, _ = made
  hf.save_merged(tmp_path, model, adapter)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(logits(model, adapter, TOKENS), expected, atol=2e-5)
  assert theirs.generation_config.eos_token_id == list(model.chat.stop_ids)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  messages = [{"role": "user", "content": "Hello there"}]
  ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert ids == model.chat.encode(messages)


def test_peft_loads_the_adapter(made, tmp_path):
  torch, peft = (
    pytest.importorskip(name, reason="pip install -e '.[parity]'") for name in ("torch", "peft")
  )
  import transformers

  model, adapter, folder = made
  hf.save_peft(tmp_path, adapter, model, cases.LORA)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  tuned = peft.PeftModel.from_pretrained(base, tmp_path).eval()
  with torch.no_grad():
    expected = tuned(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  ours = logits(model, adapter, TOKENS)
  np.testing.assert_allclose(ours, expected, atol=2e-5)
  assert np.abs(ours - logits(model, None, TOKENS)).max() > 0.1
  # And back: what peft writes, we read.
  tuned.save_pretrained(tmp_path / "theirs")
  again, _ = hf.load_peft(tmp_path / "theirs", model.config)
  same(again.weights, adapter.weights)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "pissa", "olora"])
def test_adapters_of_every_start_equal_peft_or_are_refused(made, tmp_path, start):
  """As peft saves it after some training: the same logits on the plain base, or no loading."""
  torch, peft = (
    pytest.importorskip(name, reason="pip install -e '.[parity]'") for name in ("torch", "peft")
  )
  import transformers

  model, _, folder = made
  load = transformers.AutoModelForCausalLM.from_pretrained
  torch.manual_seed(0)
  config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q|down)_proj",
                           init_lora_weights=start, task_type="CAUSAL_LM")  # fmt: skip
  tuned = peft.get_peft_model(load(folder, dtype=torch.float32), config).eval()
  with torch.no_grad():
    for name, x in tuned.named_parameters():
      if "lora_" in name:
        x += 0.05 * torch.randn_like(x)
    expected = tuned(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  tuned.save_pretrained(tmp_path)
  if start in CHANGES_THE_BASE and start is not True:
    with pytest.raises(UserError, match=f"adapter_config.json: init_lora_weights='{start}'"):
      hf.load_peft(tmp_path, model.config)
    return
  ours = logits(model, hf.load_peft(tmp_path, model.config)[0], TOKENS)
  np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_tied_flag_beside_another_head(made, tmp_path, capsys):
  """As merges leave it: both tensors are used, as transformers does; equal ones stay tied."""
  torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
  import transformers

  model, _, _ = made
  hf.save_merged(tmp_path, model, None)
  embed = np.asarray(model.params["embed"])
  for head, tied in ((embed, True), (embed[::-1].copy(), False)):
    rewrite(tmp_path, lambda t, head=head: t.update({"lm_head.weight": head}))
    ours = sources.load_model(str(tmp_path))
    assert ours.config.tie_embeddings is tied
    said = capsys.readouterr().err
    assert said == "" if tied else "lm_head.weight differs from model.embed_tokens" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
      expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(ours, None, TOKENS), expected, atol=2e-5)


def test_gemma3_with_vision_equals_transformers_tied_or_not(tmp_path):
  torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
  import transformers

  text = dict(cases.CASES["gemma3_mqa"]) | {"tie_word_embeddings": True}
  vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
  whole = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
  config = transformers.Gemma3Config(**whole, mm_tokens_per_image=4)
  torch.manual_seed(0)
  theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
  theirs.save_pretrained(tmp_path)
  ours_config = families.model_config(read_json(tmp_path / "config.json"))
  assert not ours_config.tie_embeddings
  params = assemble.assemble(ours_config, hf.read_tensors(tmp_path), jnp.float32)
  ours = logits(Model(ours_config, params, None, {}), None, TOKENS)
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(ours, expected, atol=2e-5)
  # An adapter of the whole, whose modules have other names than in the text model.
  peft = pytest.importorskip("peft", reason="pip install -e '.[parity]'")
  lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
  tuned = peft.get_peft_model(theirs, lora).eval()
  tuned.save_pretrained(tmp_path / "adapter")
  adapter, _ = hf.load_peft(tmp_path / "adapter", ours_config)
  with torch.no_grad():
    expected = tuned(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  ours = logits(sources.Model(ours_config, params, None, {}), adapter, TOKENS)
  np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_export_of_a_run(made, tmp_path):
  model, adapter, folder = made
  shutil.copy(model_tokenizer(model, tmp_path), folder / "tokenizer.json")
  special = {k: v for k, v in model.chat.special.items() if v}
  (folder / "tokenizer_config.json").write_text(json.dumps(special))
  run = tmp_path / "run"
  run.mkdir()
  setting = {"path": str(folder), "preset": "", "dtype": "float32", "seed": 0}
  (run / "config.json").write_text(json.dumps({"config": {"model": setting, "seed": 1}}))
  with pytest.raises(UserError, match="has no adapter/"):
    export.export(run, "peft", tmp_path / "out")
  hf.save_peft(run / "adapter", adapter, model, cases.LORA)
  export.main(["export", f"--run={run}", "--format=peft"])
  same(hf.load_peft(run / "export_peft", model.config)[0].weights, adapter.weights)
  export.main(["export", f"--run={run}", "--format=merged", f"--out={tmp_path / 'out'}"])
  merged = sources.load_model(str(tmp_path / "out"))
  np.testing.assert_allclose(
    logits(merged, None, TOKENS), logits(model, adapter, TOKENS), atol=2e-5
  )
  assert "do not put it in front of people" in (tmp_path / "out" / "README.md").read_text()
  with pytest.raises(UserError, match="is not empty"):
    export.export(run, "merged", tmp_path / "out")


def model_tokenizer(model, folder):
  model.chat.full.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


def test_shards_of_a_mesh_hold_the_same_weights(made):
  """Eight (fake) devices, each reading only its part."""
  model, _, folder = made
  mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), devices=jax.devices()[:4])

  def place(w):
    return sources.sharding.named(mesh, w.axes, w.shape)

  targets = jax.tree.map(place, architecture.weights(model.config), is_leaf=architecture.is_weight)
  params = assemble.assemble(model.config, hf.read_tensors(folder), jnp.float32, targets)
  q = params["layers"][0]["q"]
  assert q.sharding.shard_shape(q.shape) == (16, 16)
  same(params, model.params)


_STREAM = """
import re, sys, threading, jax, jax.numpy as jnp
from rlsafety.files import read_json
from rlsafety.models import assemble, families, hf
import pathlib
folder = pathlib.Path(sys.argv[1])
def anonymous():  # what cannot be given back to the page cache
  return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
peak, stop = [0], threading.Event()
def watch():
  while not stop.wait(0.002):
    peak[0] = max(peak[0], anonymous())
jax.devices()
config = families.model_config(read_json(folder / "config.json"))
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
params = assemble.assemble(config, hf.read_tensors(folder), jnp.bfloat16)
jax.block_until_ready(params)
stop.set()
size = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(x.nbytes for x in jax.tree.leaves(params))
print(peak[0] - before, size, largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_gib_stream_through_little_memory(tmp_path):
  """A sharded 2 GiB checkpoint (sparse files) becomes 1 GiB of params on the device, which
  here is the host itself: besides those, no more than the largest array plus 1 GiB."""
  width, mlp, depth = 2048, 8192, 8
  hf_config = cases.case("llama", 256, 256, False) | {
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": depth,
    "vocab_size": 8192,
  }
  config = families.model_config(hf_config)
  (tmp_path / "config.json").write_text(json.dumps(hf_config))
  flat, table, total = assemble.flat_weights(config), {}, 0
  for path, name in assemble.hf_names(config).items():
    shape = flat[path].shape
    shape = shape[::-1] if assemble.is_transposed(path, shape) else shape
    table[name] = (f"model-{len(table) % 4}.safetensors", shape)
  for file in {f for f, _ in table.values()}:
    header, at = {}, 0
    for name, (where, shape) in table.items():
      if where == file:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(tmp_path / file, "wb") as out:
      out.write(struct.pack("<Q", len(text)) + text)
      out.truncate(8 + len(text) + at)
    total += at
  assert total > 2 << 30
  index = {"weight_map": {name: file for name, (file, _) in table.items()}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  answer = subprocess.run(
    [sys.executable, "-c", _STREAM, str(tmp_path)], capture_output=True, text=True, check=True
  )
  peak, size, largest = map(int, answer.stdout.split())
  assert peak - size < largest + (1 << 30), (peak, size, largest)


# --- Broken folders ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  cases.write_folder(cases.CASES["llama2_mha"], tmp_path)
  return tmp_path


def read(folder):
  config = families.model_config(read_json(folder / "config.json"), str(folder))
  return assemble.assemble(config, hf.read_tensors(folder), jnp.float32)


def rewrite(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


def nan(t):
  t[Q][3, 3] = np.nan


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop(Q), f"tensor {Q} is missing"),
    (lambda t: t.update({Q: t[Q][:-1]}), rf"tensor {Q} has shape \(31, 32\)"),
    (lambda t: t.update({Q: t[Q].astype(np.int32)}), f"tensor {Q} is I32; supported: F32"),
    (lambda t: t.update({Q: t[Q].astype(np.float64)}), f"tensor {Q} is F64; supported: F32"),
    (nan, f"tensor {Q} holds NaN or infinity"),
    (
      lambda t: t.update({Q.replace("weight", "bias"): t[Q][0]}),
      "self_attn.q_proj.bias has no place",
    ),
    (lambda t: t.update({Q.replace(".1.", ".2."): t[Q]}), "model.layers.2.* has no place"),
  ],
)
def test_a_wrong_tensor_is_named(folder, change, message):
  rewrite(folder, change)
  with pytest.raises(UserError, match=f"model.safetensors: .*{message}"):
    read(folder)


def shard(folder):
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  table = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
  for file in set(table.values()):
    save_file({n: tensors[n] for n in names if table[n] == file}, folder / file)
  return table


def write_index(folder, table):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_shards_and_index(folder):
  whole = read(folder)
  table = shard(folder)
  write_index(folder, table)
  same(read(folder), whole)
  write_index(folder, {n: f for n, f in table.items() if n != Q})
  with pytest.raises(UserError, match=f"tensor {Q} is not where"):
    read(folder)
  write_index(folder, table | {"lm_head.weight_2": "model-0.safetensors"})
  with pytest.raises(UserError, match="tensor lm_head.weight_2 is missing"):
    read(folder)
  write_index(folder, table | {Q: "../model-0.safetensors"})
  with pytest.raises(UserError, match="no safetensors file of this folder"):
    read(folder)
  write_index(folder, table)
  (folder / "model-1.safetensors").unlink()
  with pytest.raises(UserError, match="model-1.safetensors: file is missing"):
    read(folder)


def test_two_models_in_one_folder(folder):
  """An older sharded save beside a newer single file, and an adapter beside its base."""
  whole = folder / "model.safetensors"
  good = whole.read_bytes()
  table = shard(folder)
  write_index(folder, table)
  whole.write_bytes(good)
  with pytest.raises(UserError, match="two models, model.safetensors and the shards that model."):
    read(folder)
  write_index(folder, dict.fromkeys(table, "model.safetensors"))  # an index of the one file
  read(folder)
  (folder / "adapter_config.json").write_text("{}")
  with pytest.raises(UserError, match="adapter_config.json lies beside the weights"):
    read(folder)


def test_pickle_is_refused(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(UserError, match="pytorch_model.bin is a pickle file.*refused"):
    read(folder)
  with pytest.raises(UserError, match="pickle files .* are refused"):
    sources.resolve(str(folder / "pytorch_model.bin"))


def test_a_tokenizer_larger_than_the_embedding(made, tmp_path):
  model, _, _ = made
  hf.save_merged(tmp_path, model, None)
  size = model.chat.vocab_size
  rewrite(tmp_path, lambda t: t.update({n: x[: size - 1] for n, x in t.items() if "embed" in n}))
  text = read_json(tmp_path / "config.json") | {"vocab_size": size - 1}
  (tmp_path / "config.json").write_text(json.dumps(text))
  with pytest.raises(
    UserError, match=f"tokenizer has {size} tokens, the embedding {size - 1} rows"
  ):
    sources.load_model(str(tmp_path))


TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
  "{% if m.role=='assistant' %}{{ eos_token }}{% endif %}{% endfor %}{{ cls_token }}"
)
BOS, END = "<|endoftext|>", {"content": "<|im_end|>", "lstrip": False, "normalized": False,
                             "rstrip": False, "single_word": False}  # fmt: skip
TYPED = END | {"__type": "AddedToken"}


@pytest.mark.parametrize(
  ("config", "beside"),
  [
    ({}, {"bos_token": BOS, "eos_token": END}),
    ({"bos_token": "<|im_start|>"}, {"bos_token": BOS, "eos_token": END, "cls_token": "Hello"}),
    ({"eos_token": TYPED, "bos_token": None}, {"pad_token": BOS}),
    ({"eos_token": TYPED, "added_tokens_decoder": {}}, {"bos_token": BOS, "cls_token": BOS}),
    ({"eos_token": TYPED, "additional_special_tokens": ["<|im_start|>"]}, {}),
    ({"eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}, {}),  # names others itself
    ({"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2TokenizerFast"}, {"pad_token": BOS}),
  ],
)
def test_named_tokens_are_read_as_transformers_reads_them(made, tmp_path, config, beside):
  """special_tokens_map.json counts, and wins, where tokenizer_config.json is of the old form."""
  import transformers

  model_tokenizer(made[0], tmp_path)
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | config
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  if beside:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(beside))
  ours = hf_chat.read_chat(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert {k: v for k, v in ours.special.items() if v} == theirs.special_tokens_map
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
  assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
  ("token", "flags", "frame"),
  [
    ("<|im_end|>", {"rstrip": True}, "{m}<|im_end|>\n\n"),  # tokenizer.json says otherwise
    ("<|im_end|>", {"lstrip": True}, "{m}\n <|im_end|>\n"),
    ("<|new|>", {"rstrip": True}, "<|new|> {m}<|im_end|>"),  # a content follows
    ("<|new|>", {"lstrip": True}, "{m} <|new|>{eos_token}"),
    ("<|new|>", {"single_word": True}, "a<|new|>{m}<|im_end|>"),
  ],
)
def test_a_marker_takes_white_space_as_its_flags_say(made, tmp_path, token, flags, frame):
  """Of the frame, as in transformers; what a content holds stays whole."""
  import transformers

  full = made[0].chat.full
  model_tokenizer(made[0], tmp_path)
  frame = frame.replace("{m}", "{{ m.content }}").replace("{eos_token}", "{{ eos_token }}")
  id_of = full.token_to_id(token) or made[0].chat.vocab_size
  decoder = {str(id_of): END | {"content": token, "special": True} | flags}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
  settings |= {"chat_template": f"{{% for m in messages %}}{frame}{{% endfor %}}"}
  settings["added_tokens_decoder"] = decoder
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  ours = hf_chat.read_chat(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "d."}]
  expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
  assert ours.encode(messages, generation=False) == expected


def test_tokens_that_only_the_files_beside_add(made, tmp_path):
  """In both forms, and a named token that the tokenizer has as an ordinary one: whole in frames."""
  import transformers

  model_tokenizer(made[0], tmp_path)
  size = made[0].chat.vocab_size
  token = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False,
           "rstrip": False, "single_word": False}  # fmt: skip
  template = "<|new|>Hello{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
  messages = [{"role": "user", "content": "you are"}]
  plain = [{"role": "user", "content": "a <|new|> Hello."}]
  for more, beside in (
    ({"added_tokens_decoder": {str(size): token}, "eos_token": "<|im_end|>"}, None),
    ({"eos_token": "<|im_end|>"}, {"<|new|>": size}),
    ({"eos_token": "Hello"}, {"<|new|>": size}),
  ):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | more))
    if beside:
      (tmp_path / "added_tokens.json").write_text(json.dumps(beside))
    ours = hf_chat.read_chat(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ours.encode(messages) == expected
    frame = [i for i in expected if i in ours.control]
    assert size in frame and [i for i in ours.encode(plain) if i in ours.control] == frame
  moved = {"added_tokens_decoder": {str(size + 3): token}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | moved))
  with pytest.raises(UserError, match=rf"config.json: token '.*' has id {size + 3} here and"):
    hf_chat.read_chat(tmp_path)


@pytest.mark.parametrize(
  ("file", "content", "says"),
  [
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder=.. must be"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "with id 'x' is no added"),
    ("added_tokens.json", {"a": [2]}, r"'a' with id \[2\] is no added token"),
    ("added_tokens.json", {"\ud800": 7}, "with id 7 is no added token"),
    ("tokenizer_config.json", {"chat_template": {"rag": "x"}}, "chat_template holds rag and no"),
    ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": "x"}]}, "s a and no"),
    ("tokenizer_config.json", {"chat_template": ["x"]}, "must name templates"),
    ("tokenizer_config.json", {"chat_template": 3}, "chat_template=3 is no template"),
    ("tokenizer_config.json", {"chat_template": {"default": 3}}, "chat_template=3 is no template"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token=7 is no token"),
    ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens=True would"),
    ("tokenizer_config.json", {"pad_token": {"id": 7}}, "pad_token={'id': 7} is no token"),
    ("special_tokens_map.json", {"bos_token": ["<s>"]}, "bos_token=.* is no token"),
    ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id='2' is no token id"),
    ("generation_config.json", {"eos_token_id": [2, True]}, "eos_token_id=.* is no token id"),
    ("generation_config.json", {"eos_token_id": 1 << 31}, "eos_token_id=2147483648 is outside"),
    ("config.json", {"eos_token_id": -1}, "eos_token_id=-1 is outside the vocabulary"),
  ],
)
def test_a_chat_that_cannot_be_read_names_file_field_and_value(made, tmp_path, file, content, says):
  model_tokenizer(made[0], tmp_path)
  settings = {"eos_token": "<|im_end|>"} if file != "tokenizer_config.json" else {}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  (tmp_path / file).write_text(json.dumps(content))
  with pytest.raises(UserError, match=f"{file}: .*{says}"):
    hf_chat.read_chat(tmp_path)


JUNK = st.recursive(
  st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats()
  | st.sampled_from(["<|im_end|>", "H", "", "default", "LORA", "BPE", "ByteLevel", "\ud800", "x"]),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["content", "name", "template", "default", "type", "id", "H", "vocab"]),
    inner, max_size=3),
  max_leaves=6,
)  # fmt: skip


def anywhere(data, value):
  """`value` with one part of it, at any depth, exchanged for something else or left out."""
  if isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 4)):
    keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 40)))
    key = data.draw(st.sampled_from(keys))
    changed = value.copy()
    if data.draw(st.integers(0, 3)):
      changed[key] = anywhere(data, value[key])
    else:
      del changed[key]
    return changed
  return data.draw(JUNK)


@pytest.fixture(scope="module")
def complete(made, tmp_path_factory):
  """A folder with every JSON file that is read, an adapter, and the content of those files."""
  model, adapter, _ = made
  folder = tmp_path_factory.mktemp("complete")
  hf.save_merged(folder, model, None)
  hf.save_peft(folder / "adapter", adapter, model, cases.LORA)
  (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": END}))
  write_index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))
  return folder, {p: read_json(p) for p in sorted(folder.rglob("*.json"))}, model.config


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_to_any_json_file_is_a_model_or_one_line(complete, data):
  folder, contents, config = complete
  path = data.draw(st.sampled_from(sorted(contents)))
  good = path.read_bytes()
  bad = json.dumps(anywhere(data, contents[path])).encode()
  if data.draw(st.integers(0, 5)) == 0:
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(max_size=3)) + good[at + 1 :]
  path.write_bytes(bad)
  try:
    hf.load_peft(folder / "adapter", config)
    sources.load_model(str(folder))
  except UserError as error:
    assert str(folder) in str(error)
  finally:
    path.write_bytes(good)


def test_a_template_among_several_and_in_other_files(made, tmp_path):
  model_tokenizer(made[0], tmp_path)
  text = "{% for m in messages %}{{ m.content }}{% endfor %}"
  several = {"default": text + "1", "tool_use": text + "2"}
  listed = [{"name": k, "template": v} for k, v in several.items()]
  for template in (several, listed):
    content = {"eos_token": "<|im_end|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    assert hf_chat.read_chat(tmp_path).template == text + "1"
  (tmp_path / "chat_template.jinja").write_text(text + "3")
  assert hf_chat.read_chat(tmp_path).template == text + "3"
  (tmp_path / "additional_chat_templates").mkdir()
  assert hf_chat.read_chat(tmp_path).template == text + "3"
  (tmp_path / "chat_template.jinja").unlink()
  with pytest.raises(UserError, match="additional_chat_templates: without a chat_template.jinja"):
    hf_chat.read_chat(tmp_path)
  (tmp_path / "additional_chat_templates").rmdir()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
  (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text + "4"}))
  assert hf_chat.read_chat(tmp_path).template == text + "4"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json_is_named(made, tmp_path, name):
  hf.save_merged(tmp_path, made[0], None)
  text = (tmp_path / name).read_text()
  (tmp_path / name).write_text(text[: len(text) // 2])
  with pytest.raises(UserError, match=name):
    sources.load_model(str(tmp_path))


# These subtract what they start from out of the base, which the adapter then belongs to.
CHANGES_THE_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "OLoRA", 1, "?")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"r": None}, "r=None"),
    *(({"init_lora_weights": v}, "init_lora_weights=") for v in CHANGES_THE_BASE),
    *(({"use_rslora": v}, "use_rslora=") for v in ("false", "no", 0, 2, {})),
    *(({"lora_alpha": v}, "lora_alpha=") for v in (math.nan, math.inf, 0, -1, "8", None, True)),
    *(({"lora_dropout": v}, "lora_dropout=") for v in (math.nan, 1.0, -0.1, "0")),
    *(({"r": v}, "adapter_config.json: r=") for v in (0, -4, 4.0, True, 10**30)),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"a_new_field": 3}, "a_new_field=3"),
    ({"peft_type": None}, "peft_type=None"),
    ({"r": 3}, r"lora_A.weight has shape \(4, 32\), not \(3, 32\)"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    # peft leaves out what has tensors and is not chosen, and starts afresh what has none.
    ({"target_modules": ["q_proj"]}, r"target_modules=.* do not choose model.layers.0.\w+.k_proj"),
    ({"target_modules": ".*q_proj"}, "target_modules=.* do not choose"),
    ({"target_modules": None}, "target_modules=None must be a list of names or a pattern"),
    ({"target_modules": [1]}, r"target_modules=\[1\] must be"),
    ({"target_modules": "("}, r"target_modules='\(' must be"),
    ({"target_modules": r"(?:.|.)*(?<!j)"}, r"target_modules=.* must be .*timed out"),
    ({"exclude_modules": ["1.mlp.up_proj"]}, "do not choose model.layers.1.mlp.up_proj"),
  ],
)
def test_an_adapter_we_cannot_honour_is_refused(made, tmp_path, change, message):
  model, adapter, _ = made
  hf.save_peft(tmp_path, adapter, model, cases.LORA)
  config = read_json(tmp_path / "adapter_config.json") | change
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=message):
    hf.load_peft(tmp_path, model.config)


def test_adapter_tensors_that_peft_would_not_load_are_refused(made, tmp_path):
  """Of other names, or fewer than adapter_config.json chooses."""
  model, adapter, _ = made
  hf.save_peft(tmp_path, adapter, model, cases.LORA)
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  for change, says in (
    ({n.removeprefix("base_model.model."): x for n, x in tensors.items()}, "must begin with"),
    ({n: x for n, x in tensors.items() if "v_proj" not in n}, r"choose .*v_proj, .* no adapter"),
  ):
    save_file(change, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=says):
      hf.load_peft(tmp_path, model.config)


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
  """A folder that we wrote, so with checksums, and its one weight file's bytes."""
  model, _, _ = made
  folder = tmp_path_factory.mktemp("written")
  hf.save_merged(folder, model, None)
  return folder, (folder / "model.safetensors").read_bytes(), model


@settings(
  max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_flipped_bit_or_cut_is_noticed(written, data):
  """In a file of ours every byte counts: an error that names the file, or the same weights."""
  folder, good, model = written
  at = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 4000))
  if data.draw(st.booleans()):
    bad = good[:at]
  else:
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
  (folder / "model.safetensors").write_bytes(bad)
  try:
    params = assemble.assemble(model.config, hf.read_tensors(folder), jnp.float32)
  except UserError as error:
    assert "model.safetensors" in str(error)
  else:
    same(params, model.params)


def test_a_flipped_bit_in_a_foreign_file_is_seen_where_its_sum_is_known(folder):
  file = folder / "model.safetensors"
  good = file.read_bytes()
  sums = f"{hashlib.sha256(good).hexdigest()}  model.safetensors\n"
  (folder / "SHA256SUMS").write_text(sums)
  sources.check_sums(folder)
  flipped = bytearray(good)
  flipped[-3] ^= 1  # of a weight: still a number
  file.write_bytes(flipped)
  with pytest.raises(UserError, match="model.safetensors differs from its sha256"):
    sources.load_model(str(folder))


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download needs: one repository at one commit, large files under
  their sha256. `spoil` flips a bit of the weights on their way."""

  commit, spoil = "c" * 40, False
  folder: pathlib.Path

  def log_message(self, *_):
    pass

  def reply(self, body, **headers):
    self.send_response(200)
    for name, value in ({"Content-Length": len(body)} | headers).items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def do_GET(self):
    _, _, path = self.path.partition("/resolve/")
    if not path:
      files = list(self.folder.iterdir())
      names = [{"rfilename": f.name} for f in files]
      about = {"id": "us/tiny", "sha": self.commit, "siblings": names, "private": False}
      if "/tree/" in self.path:
        about = [
          {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files
        ]
      self.reply(json.dumps(about).encode(), Content_Type="application/json")
      return
    name = path.partition("/")[2].partition("?")[0]
    body = (self.folder / name).read_bytes()
    tag = hashlib.sha256(body).hexdigest()
    if self.spoil and name.endswith(".safetensors"):
      body = body[:-3] + bytes([body[-3] ^ 1]) + body[-2:]
    self.reply(body, ETag=f'"{tag}"', X_Repo_Commit=self.commit)

  do_HEAD = do_GET


@pytest.mark.parametrize("spoil", [False, True])
def test_a_hub_name_is_downloaded_at_its_revision_and_checked(written, tmp_path, spoil):
  _, good, _ = written
  source = tmp_path / "hub"
  shutil.copytree(written[0], source)
  (source / "model.safetensors").write_bytes(good)
  (source / "evil.bin").write_bytes(b"pickle")  # never asked for
  handler = type("Handler", (Hub,), {"folder": source, "spoil": spoil})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
      "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
      "HF_HOME": str(tmp_path / "cache"),
      "HF_HUB_DISABLE_XET": "1",
      "HF_HUB_OFFLINE": "0",
    }
    code = (
      "from rlsafety.models import sources as load\n"
      "where = load.resolve('us/tiny@main')\n"
      "load.check_sums(where)\n"
      "print(where.name, sorted(f.name for f in where.iterdir()))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    server.shutdown()
  if spoil:
    assert "model.safetensors differs from its sha256" in out.stderr, out.stderr
  else:
    assert Hub.commit in out.stdout and "model.safetensors" in out.stdout, out.stderr
    assert "evil.bin" not in out.stdout


def test_paths_that_lead_nowhere(tmp_path):
  for path, message in (
    ("package:no_such_package", "run: pip install no-such-package"),
    (str(tmp_path / "missing"), "does not exist"),
    (str(tmp_path), "has no config.json"),
    ("package:pytest", "holds 0 .gguf files"),
  ):
    with pytest.raises(UserError, match=message):
      sources.resolve(path)


def test_a_hub_name_without_network_is_a_clear_error(monkeypatch, tmp_path):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(UserError, match="model path 'nobody/nothing'.*hub"):
    sources.resolve("nobody/nothing")


def test_nothing_in_the_package_unpickles_or_runs_remote_code():
  root = pathlib.Path(sources.__file__).parents[1]
  text = "\n".join(p.read_text() for p in root.rglob("*.py"))
  for word in ("import pickle", "allow_pickle=True", "trust_remote_code=True", "torch.load"):
    assert word not in text
