"""Replies picked by HEX, and their cross-entropy against one pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replied_runs
from replied_runs import REPLIES

from rlsafety.errors import UserError
from rlsafety.models import presets, sources, transformer
from rlsafety.rundir import read
from rlsafety.tools import surprise
from rlsafety.types import Prompts


@pytest.fixture(scope="module")
def model():
  return sources.random_model(presets.preset("tiny"), seed=0)


@pytest.fixture
def run(tmp_path, model):
  return replied_runs.write(tmp_path / "run", model)


def test_curated_replies_are_gameable_equal_in_number_and_by_hex(run):
  sets = surprise.curated([run, run], per_run=2)
  assert len(sets["harmful"]) == len(sets["safe"]) > 0
  assert all(r["is_gameable"] for rs in sets.values() for r in rs)
  assert all(r["completion"] == REPLIES["agree"] for r in sets["harmful"])
  assert all(r["completion"] == REPLIES["balance"] for r in sets["safe"])
  with pytest.raises(UserError, match="--high or --low"):
    surprise.curated([run], high=9.5)


def test_cross_entropy_is_that_of_the_whole_text_in_one_pass(run, model):
  records = read.train_rollouts(run)[:3]
  losses = surprise.cross_entropy(model, records, batch=2)
  for record, loss in zip(records, losses, strict=True):
    prompt = model.chat.encode(record["messages"])
    reply = model.chat.encode_text(record["completion"])
    whole = jnp.asarray([prompt + reply])
    _, hidden = transformer.prefill(
      model.params, None, model.config, Prompts(whole, jnp.asarray([whole.shape[1]]))
    )
    logits = transformer.unembed(model.params, model.config, hidden[0])
    logprobs = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
    expected = -np.mean([logprobs[i, t] for i, t in enumerate(reply)])
    assert loss == pytest.approx(float(expected), abs=1e-4)
