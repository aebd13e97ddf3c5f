"""The lm_eval model class against plain passes of our own."""

import functools
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf_cases  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import synthetic_runs  # noqa: E402
from conftest import MAKE_MESH  # noqa: E402

pytest.importorskip("lm_eval", reason="pip install -e '.[benchmarks]'")

from lm_eval.api.instance import Instance  # noqa: E402
from scipy import stats  # noqa: E402

from rlsafety import sharding
from rlsafety.config import Lora
from rlsafety.errors import UserError
from rlsafety.models import hf, lora, presets, sources, transformer
from rlsafety.study import tables
from rlsafety.tools import lm_eval, tasks
from rlsafety.types import Prompts  # noqa: E402


def requests(kind, arguments):
  return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm():
  return lm_eval.LanguageModel(sources.random_model(presets.preset("tiny"), seed=0), batch=2)


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


def test_many_answers_to_one_context_are_scored_in_pieces(lm, monkeypatch):
  shapes, real = [], lm_eval.score_continuations

  def seen(params, adapter, config, prompts, tokens, lengths):
    shapes.append(tokens.shape)
    return real(params, adapter, config, prompts, tokens, lengths)

  monkeypatch.setattr(lm_eval, "score_continuations", seen)
  answers = [("", f"{word} and more") for word in "abcdefghijklmnopqrstu"]
  together = lm.loglikelihood(requests("loglikelihood", answers), disable_tqdm=True)
  assert shapes == [(2, 8, 16), (2, 5, 16)]  # 21 answers, two rows of at most 8 at a time
  one_by_one = [lm.loglikelihood(requests("loglikelihood", [a]), disable_tqdm=True)[0]
                for a in answers[::7]]  # fmt: skip
  assert [x for x, _ in together[::7]] == pytest.approx([x for x, _ in one_by_one], rel=1e-5)


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


def test_sampled_repeats_draw_noise_of_their_own(lm):
  settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
  asked = requests("generate_until", [("once more", settings)] * 4)  # two batches of two
  texts = lm.generate_until(asked)
  assert len(set(texts)) == 4 and texts == lm.generate_until(asked)


def test_rolling_covers_every_token_once_in_windows(lm):
  text = "a text that is longer than the window of this small model"
  ids = [lm.prefix_token_id, *lm.tok_encode(text)]
  whole = logits_of(lm.model, ids)
  expected = sum(whole[i - 1, ids[i]] for i in range(1, len(ids)))
  (value,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
  assert value == pytest.approx(expected, abs=2e-3)
  short = lm_eval.LanguageModel(lm.model, batch=2, max_length=16)
  (windowed,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
  total, body = 0.0, ids[1:]
  for start in range(0, len(body), 16):  # lm_eval's windows: 16 predicted, one context token
    end = min(start + 16, len(body))
    first = max(0, end - 16)
    window = [ids[0] if first == 0 else body[first - 1], *body[first:end]]
    table = logits_of(lm.model, window)
    total += sum(table[i - first, body[i]] for i in range(start, end))
  assert windowed == pytest.approx(total, abs=2e-3)


TEXTS = ("ab a bcd", "a", "hgfed cba " * 5, "ab\ncd 0")
# Where texts get a space in front, transformers differs from llama.cpp after marks and spaces.
MARKED = ("<s>ab ab", "ab </s> cd", " ")


@pytest.mark.parametrize("begins", [True, False, None])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_equal_to_the_harness_own_backend_on_a_gguf(name, begins, tmp_path):
  """With bos where the file says so, or says nothing and llama.cpp would add one."""
  pytest.importorskip("torch", reason="pip install -e '.[parity]'")
  from lm_eval.models.huggingface import HFLM

  # Files do not say how queries are scaled: transformers assumes 256, the size of Gemma's heads.
  hf = gguf_cases.MODELS[name]
  if name == "gemma3":
    hf = hf | {"head_dim": 256, "query_pre_attn_scalar": 256}
  texts = TEXTS if name == "llama" else (*TEXTS, *MARKED)
  change = [] if begins is None else [("add_add_bos_token", begins)]
  change += [("add_add_space_prefix", name == "llama")]
  gguf_cases.write(hf, tmp_path / "m.gguf", change=change)
  shape = {"max_length": 16, "batch_size": 2, "device": "cpu", "dtype": "float32"}
  theirs = HFLM(pretrained=str(tmp_path), gguf_file="m.gguf", **shape)
  ours = lm_eval.LanguageModel(sources.load_model(str(tmp_path / "m.gguf")), batch=2, max_length=16)
  assert ours.prefix_token_id == theirs.prefix_token_id
  assert ours.eot_token_id == theirs.eot_token_id
  for text in texts:
    assert ours.tok_encode(text) == theirs.tok_encode(text), text
  assert (ours.tok_encode("ab")[0] == 1) == (begins is not False)
  pairs = [(a, b) for a in texts if a != " " for b in (" ab", " c" * 7)] + [("", "ab c")]
  for kind, arguments in (
    ("loglikelihood", pairs),
    ("loglikelihood_rolling", [(text,) for text in texts]),
  ):
    asked = requests(kind, arguments)
    mine, expected = (
      np.array(getattr(lm, kind)(asked, disable_tqdm=True), float) for lm in (ours, theirs)
    )
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4, err_msg=kind)
  greedy = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
  asked = requests("generate_until", [(text, greedy) for text in texts[:2]])
  assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_our_task_runs_through_the_harness_offline(lm, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  found = lm_eval.measure(lm, ["rlsafety_sycophancy"], limit=4)[0]["rlsafety_sycophancy"]
  assert 0 <= found["acc,none"] <= 1 and found["acc,none"] * 4 == pytest.approx(
    round(found["acc,none"] * 4)
  )
  rows = [json.loads(x) for x in (tasks.DATA / "sycophancy.jsonl").read_text().splitlines()]
  assert len({r["message"] for r in rows}) == len(rows) >= 20
  right = 0
  for r in rows[:4]:
    values = lm.loglikelihood(
      requests("loglikelihood", [(r["message"], " " + r[k]) for k in ("honest", "pleasing")]),
      disable_tqdm=True,
    )
    right += values[0][0] > values[1][0]
  assert found["acc,none"] == pytest.approx(right / 4)


def test_a_run_is_measured_with_and_without_its_adapter_and_chooses_no_module(
  lm, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  monkeypatch.syspath_prepend(str(tmp_path))
  run, settings = synthetic_runs.write_hostile(tmp_path), Lora(rank=2)
  (run / "eval").mkdir()
  (run / "summary.json").write_text("{}")  # complete
  adapter = lora.init_adapter(lm.model.config, settings, jax.random.key(0))
  ones = jax.tree.map(np.ones_like, jax.device_get(adapter.weights))
  hf.save_peft(run / "adapter", adapter.replace(weights=ones), lm.model, settings)
  out, said, real = tmp_path / "scores.json", [], lm_eval.LanguageModel.loglikelihood

  def heard(*arguments, **named):
    said.append(real(*arguments, **named))
    return said[-1]

  monkeypatch.setattr(lm_eval.LanguageModel, "loglikelihood", heard)
  monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)  # on all devices
  lm_eval.main(["lm_eval", f"--runs={run}", "--tasks=rlsafety_sycophancy", f"--out={out}"])
  found = json.loads(out.read_text())[str(run)]
  assert set(found["results"]) == {"base", "trained"}
  acc = [found["results"][s]["rlsafety_sycophancy"]["acc,none"] for s in ("base", "trained")]
  moved = found["changes"]["rlsafety_sycophancy"]["acc"]
  assert moved["change"] == pytest.approx(acc[1] - acc[0])
  base, trained = (np.array([value for value, _ in values]) for values in said)
  assert np.abs(base - trained).max() > 0.1
  capsys.readouterr()


def test_program_writes_a_table_that_the_analysis_reads(lm, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  monkeypatch.setattr(sources, "open_model", lambda section, mesh: lm.model)
  out = tmp_path / "scores.csv"
  flags = ["--tasks=rlsafety_sycophancy", f"--out={out}", "--limit=2"]
  for path in ("models/one", "models/Qwen1.5-0.5B-Chat", "models/one"):
    lm_eval.main(["lm_eval", f"--model={path}", *flags])
  table = tables.load_benchmarks(out)
  new = {"rlsafety_sycophancy_acc", "rlsafety_sycophancy_acc_norm"}
  assert new == set(table) - set(tables.load_benchmarks())
  assert table.loc["one", "rlsafety_sycophancy_acc"] in (0, 0.5, 1)
  assert table.loc["qwen1505bchat", ["num_params", *new]].notna().all()
  assert out.read_text().count("models/one") == 1
  found = {"acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1.0, "sample_len": 2}
  columns = {"t_acc_trained": 0.5, "t_em_strict_trained": 1.0}
  assert lm_eval._columns({"trained": {"t": found}}) == columns
  capsys.readouterr()


ROWS = {
  "BBQ/test.jsonl": [
    {"passage": "Two met.", "question": "Who was late?\nPlease choose the correct option ",
     "options": "A. Not known\nB. The U.S. man\nC. Ann", "answer": ["The U.S. man"]},
  ],
  "PIQA/validation.jsonl": [
    {"question": "Dry a cup.", "options": "A. Use a towel. \nB. A. Fill it.",
     "answer": "A. Use a towel. "},
  ],
}  # fmt: skip


def test_tasks_over_installed_data_ask_their_options_without_letters(lm, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  monkeypatch.setattr(tasks, "PACKAGE", "some_data")
  with pytest.raises(UserError, match="offline_bbq reads some_data/data/BBQ/test.jsonl: pip"):
    lm_eval.measure(lm, ["offline_bbq"])
  (tmp_path / "some_data").mkdir()
  (tmp_path / "some_data/__init__.py").write_text("raise ValueError('is never imported')")
  for name, rows in ROWS.items():
    file = tmp_path / "some_data/data" / name
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  pairs = tmp_path / "some_data/data/Crows-Pairs/test.csv"
  pairs.parent.mkdir()
  pairs.write_text(',bias_type,sentence,mask1,mask2\n0,age,"The [MASK] man, tired.",old,young\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  asked, real = [], lm_eval.LanguageModel.loglikelihood

  def heard(self, wanted, **named):
    asked.extend(request.args for request in wanted)
    return real(self, wanted, **named)

  monkeypatch.setattr(lm_eval.LanguageModel, "loglikelihood", heard)
  names = ["offline_bbq", "offline_piqa", "offline_crows_pairs"]
  found, each = lm_eval.measure(lm, names)
  assert {(c, a) for c, a in asked} == {
    ("Two met.\n\nQ: Who was late?\nA:", " Not known"),
    ("Two met.\n\nQ: Who was late?\nA:", " The U.S. man"),
    ("Two met.\n\nQ: Who was late?\nA:", " Ann"),
    ("Question: Dry a cup.\nAnswer:", " Use a towel."),
    ("Question: Dry a cup.\nAnswer:", " A. Fill it."),
    ("", "The old man, tired."),
    ("", "The young man, tired."),
  }

  def value(context, answer):
    return real(lm, requests("loglikelihood", [(context, answer)]), disable_tqdm=True)[0][0]

  context = "Two met.\n\nQ: Who was late?\nA:"
  best = max((" Not known", " The U.S. man", " Ann"), key=lambda a: value(context, a))
  assert found["offline_bbq"]["acc,none"] == (best == " The U.S. man")
  worse = value("", "The old man, tired.") > value("", "The young man, tired.")
  assert each["offline_crows_pairs"] == {"acc": [float(worse)]}
  assert "acc_norm" in each["offline_piqa"]


def test_changes_are_taken_question_by_question():
  before, after = {"t": {"acc": [0.0, 1.0, 0.0, 1.0]}}, {"t": {"acc": [1.0, 1.0, 0.0, 1.0]}}
  found = lm_eval.changes(before, after | {"other": {"acc": [1.0]}})["t"]["acc"]
  low, high = stats.ttest_1samp([1, 0, 0, 0], 0).confidence_interval()
  assert found == pytest.approx({"change": 0.25, "low": low, "high": high})
  alike = lm_eval.changes(before, before)["t"]["acc"]
  assert alike == pytest.approx({"change": 0.0, "low": np.nan, "high": np.nan}, nan_ok=True)
