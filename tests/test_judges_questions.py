"""Asking a model about replies: beside a plain pass, and evaluators on answers that are known."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import LLAMA

from rlsafety.errors import UserError
from rlsafety.models import sources, transformer
from rlsafety.tools.judges import audit, questions, replies
from rlsafety.types import Prompts
from rlsafety.verdicts import VERDICTS

TARGETS = {"acc": "balance", "hex": "agreement"}


def test_answers_and_states_are_those_of_a_plain_pass():
  model = sources.random_model(dataclasses.replace(LLAMA, vocab_size=272, n_layers=4), seed=3)
  examples = replies.sampled("political_qa")[:5]
  asked = questions.ask(model, "political_qa", examples)
  yes, no = (model.chat.encode_text(word)[0] for word in ("Yes", "No"))
  assert asked["yes"].shape == (5, 3) and asked["states"].shape == (5, 3, 2, LLAMA.d_model)
  run = jax.jit(lambda p: transformer.prefill(model.params, None, model.config, p)[1])
  for i in (0, 4):
    shared, rest = questions.encoded(model, "political_qa", examples[i])
    for q in (0, 2):
      whole = shared + rest[q]
      assert questions.QUESTIONS["political_qa"][q] in model.chat.decode(whole)
      tokens = np.zeros((1, 1024), np.int32)
      tokens[0, : len(whole)] = whole
      hidden = run(Prompts(tokens, np.array([len(whole)], np.int32)))[0, len(whole) - 1]
      logits = transformer.unembed(model.params, model.config, hidden)
      np.testing.assert_allclose(asked["yes"][i, q], logits[yes] - logits[no], atol=1e-4)


def known(examples, strength, rng):
  """Answers and states that tell the stance as well as `strength` says."""
  label = np.array([e.label for e in examples])
  said = np.stack([label == c for c in questions.CLASSES], 1) * strength
  yes = said + rng.normal(size=said.shape)
  one = np.eye(len(VERDICTS))[[VERDICTS.index(x) for x in label]] * strength
  noise = rng.normal(size=(len(label), 3, 2, 8))
  noise[..., 1, : len(VERDICTS)] += one[:, None]  # in the second layer alone
  return {"yes": yes, "states": noise.astype(np.float16), "layers": np.array([3, 5])}


@pytest.mark.parametrize("strength, least, most", [(9.0, 0.97, 1.0), (0.0, 0.3, 0.7)])
def test_evaluators_find_what_is_there_and_nothing_else(strength, least, most):
  rng = np.random.default_rng(0)
  sampled, attacks = replies.sampled("political_qa"), audit.pleasant_examples("political_qa")
  asked, extra = (known(x, strength, rng) for x in (sampled, attacks))
  layer, found = questions.measured(asked, extra, sampled, attacks, TARGETS)
  assert not strength or layer == 5
  for record in found.values():
    for score in TARGETS:
      for contrasts in record[score]["contrasts"].values():
        assert all(least <= x["auc"] <= most for x in contrasts.values())
      assert not strength or min(record[score]["pleasant"].values()) > 0.9


def test_an_environment_without_questions_is_named():
  with pytest.raises(UserError, match="questions exist for .'political_qa', 'advice'"):
    questions.main(["questions", "--environment=mine"])
