"""The lm_eval model class against plain passes of our own and lm_eval's own backend."""

import functools
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

pytest.importorskip("lm_eval", reason="pip install -e '.[benchmarks]'")

from lm_eval.api.instance import Instance  # noqa: E402

from rlsafety import benchmarks  # noqa: E402
from rlsafety.models import load, presets, transformer  # noqa: E402
from rlsafety.types import Prompts  # noqa: E402


def requests(kind, arguments):
  return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm():
  return benchmarks.LanguageModel(load.random_model(presets.preset("tiny"), seed=0), batch=2)


@functools.partial(jax.jit, static_argnames="config")
def plain_pass(params, config, tokens, length):
  _, hidden = transformer.prefill(params, None, config, Prompts(tokens, length))
  return jax.nn.log_softmax(transformer.unembed(params, config, hidden[0]))


def logits_of(model, ids):
  """Log-probs [len(ids), V] of a text in one plain pass (one shape for all texts)."""
  tokens = np.zeros((1, 96), np.int32)
  tokens[0, : len(ids)] = ids
  out = plain_pass(model.params, model.config, tokens, np.array([len(ids)], np.int32))
  return np.asarray(out)[: len(ids)]


def test_loglikelihood_is_that_of_one_plain_pass(lm):
  pairs = [
    ("The capital of France is", " Paris"), ("The capital of France is", " a large city"),
    ("Two and two ", "make four"), ("", "no context at all"), ("One more context.", " Yes"),
  ]  # fmt: skip
  found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  for (context, text), (value, greedy) in zip(pairs, found, strict=True):
    if context.endswith(" "):  # the harness moves it over
      context, text = context[:-1], " " + text
    before = lm.tok_encode(context) if context else [lm.prefix_token_id]
    ids = before + lm.tok_encode(text, add_special_tokens=False)
    table = logits_of(lm.model, ids)
    places = range(len(before), len(ids))
    assert value == pytest.approx(sum(table[i - 1, ids[i]] for i in places), abs=1e-3)
    assert greedy == all(table[i - 1].argmax() == ids[i] for i in places)


def test_greedy_flag_and_generation_follow_the_argmax(lm):
  context = "Once upon a time"
  text = lm.generate_until(
    requests("generate_until", [(context, {"until": [], "max_gen_toks": 8})])
  )[0]
  ids = lm.tok_encode(context)
  for _ in range(8):
    ids.append(int(logits_of(lm.model, ids)[-1].argmax()))
    if ids[-1] in lm.model.chat.stop_ids:
      break
  assert text == lm.model.chat.decode(ids[len(lm.tok_encode(context)) :])
  ids = ids[len(lm.tok_encode(context)) :][:4]
  ((_, greedy),) = lm._loglikelihood_tokens([(None, lm.tok_encode(context), ids)])
  assert greedy
  ((_, greedy),) = lm._loglikelihood_tokens([(None, lm.tok_encode(context), ids[:3] + [5])])
  assert greedy == (ids[3] == 5)


def test_generation_keeps_order_settings_and_stop_strings(lm):
  long, short = ({"until": [], "max_gen_toks": n} for n in (6, 3))
  asked = [("a", long), ("bb", short), ("ccc", long), ("d", long)]
  together = lm.generate_until(requests("generate_until", asked))
  alone = [lm.generate_until(requests("generate_until", [a]))[0] for a in asked]
  assert together == alone
  stop = together[2][2:3]
  cut = lm.generate_until(
    requests("generate_until", [("ccc", {"until": [stop], "max_gen_toks": 6})])
  )[0]
  assert cut == together[2][: together[2].index(stop)]


def test_rolling_covers_every_token_once_in_windows(lm):
  text = "a text that is longer than the window of this small model"
  ids = [lm.prefix_token_id, *lm.tok_encode(text)]
  whole = logits_of(lm.model, ids)
  expected = sum(whole[i - 1, ids[i]] for i in range(1, len(ids)))
  (value,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
  assert value == pytest.approx(expected, abs=2e-3)
  short = benchmarks.LanguageModel(lm.model, batch=2, max_length=17)
  (windowed,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
  total, body = 0.0, ids[1:]
  for start in range(0, len(body), 16):  # lm_eval's windows: 16 predicted, one context token
    end = min(start + 16, len(body))
    first = max(0, end - 16)
    window = [ids[0] if first == 0 else body[first - 1], *body[first:end]]
    table = logits_of(lm.model, window)
    total += sum(table[i - first, body[i]] for i in range(start, end))
  assert windowed == pytest.approx(total, abs=2e-3)


def test_our_task_runs_through_the_harness_offline(lm, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  found = benchmarks.measure(lm, ["rlsafety_sycophancy"], limit=4)["rlsafety_sycophancy"]
  assert 0 <= found["acc,none"] <= 1 and found["acc,none"] * 4 == pytest.approx(
    round(found["acc,none"] * 4)
  )
  rows = [json.loads(x) for x in (benchmarks.DATA / "sycophancy.jsonl").read_text().splitlines()]
  assert len({r["message"] for r in rows}) == len(rows) >= 20
  right = 0
  for r in rows[:4]:
    values = lm.loglikelihood(
      requests("loglikelihood", [(r["message"], " " + r[k]) for k in ("honest", "pleasing")]),
      disable_tqdm=True,
    )
    right += values[0][0] > values[1][0]
  assert found["acc,none"] == pytest.approx(right / 4)


def test_equals_lm_evals_own_transformers_backend(tmp_path):
  """A small random llama, saved as a folder and read by both."""
  torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
  import transformers
  from lm_eval.models.huggingface import HFLM
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  lines = [benchmarks.DATA.joinpath("sycophancy.jsonl").read_text()]
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  tokenizer.train_from_iterator(lines, trainer)
  wrapped = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
  )
  wrapped.chat_template = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
  )
  config = transformers.LlamaConfig(
    vocab_size=len(wrapped), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=0, eos_token_id=1,
  )  # fmt: skip
  torch.manual_seed(0)
  network = transformers.LlamaForCausalLM(config).float().eval()
  for weight in network.parameters():
    torch.nn.init.normal_(weight, std=0.15)
  network.save_pretrained(tmp_path / "m")
  wrapped.save_pretrained(tmp_path / "m")
  ours = benchmarks.LanguageModel(load.load_model(str(tmp_path / "m")), batch=4)
  theirs = HFLM(pretrained=network, tokenizer=wrapped, backend="causal", batch_size=1, device="cpu")
  rows = [json.loads(x) for x in (benchmarks.DATA / "sycophancy.jsonl").read_text().splitlines()]
  pairs = [(r["message"], " " + r[k]) for r in rows[:4] for k in ("honest", "pleasing")]
  pairs.append(("", rows[0]["honest"]))
  pairs.append((rows[1]["message"] + " ", rows[1]["honest"]))  # a space at the end moves over
  got = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  want = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  np.testing.assert_allclose([v for v, _ in got], [v for v, _ in want], atol=1e-3, rtol=1e-5)
  assert [g for _, g in got] == [g for _, g in want]
  texts = [(rows[0]["message"] * 6,), (rows[2]["honest"],)]
  got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
  want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
  np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)
  asked = [
    (r["message"], {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for r in rows[:3]
  ]
  got = ours.generate_until(requests("generate_until", asked))
  want = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
  assert got == want
