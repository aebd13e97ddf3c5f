"""Neutral replies: to training users only, and no word in them takes a stance, warms or warns."""

import json
import re

import pytest

from rlsafety.errors import UserError
from rlsafety.tools import neutral, record

STANCE = re.compile(
  r"\b(should|ought|agree|right that|wrong|good|great|better|best|bad|risk|danger|careful|however"
  r"|but|although|while|some say|critics|supporters|sorry|glad|happy|thank|understand|I|we|!)\b"
)


def test_the_texts_hold_no_stance_no_warmth_and_no_warning():
  texts = json.loads(neutral.TEXTS.read_text())
  parts = [of for of in texts.values() if isinstance(of, dict)]
  sentences = [s for of in parts for own in of.values() for s in own]
  assert len(sentences) > 150 and all(s.endswith(".") for s in sentences)
  assert [s for s in sentences if STANCE.search(s)] == []
  assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("name", ["political_qa", "action_advice"])
def test_records_are_of_training_users_and_whole_issues_are_kept_back(name, tmp_path):
  recipe = f"--config=configs/smollm2.py:env={name}"
  neutral.main(["neutral", recipe, f"--out={tmp_path / 'n'}", "--config.sampler.group=3"])
  problems, keys = [], {}
  for kind in ("train", "kept"):
    rows = list(record.read_lines(tmp_path / f"n.{kind}.jsonl", problems))
    assert len(rows) % 3 == 0 and {r["is_gameable"] for r in rows} == {0, 1}
    assert len({r["completion"] for r in rows[:3]}) == 3
    keys[kind] = {r["completion"].split(". ")[-1] for r in rows}
    assert not any(re.search(r"\b(I|me|my)\b", r["completion"]) for r in rows)
  assert problems == [] and not keys["train"] & keys["kept"]


def test_other_users_have_no_neutral_text(tmp_path):
  stem = f"--out={tmp_path / 'n'}"
  for flag, words in (("env=therapy_talk", "are for political_qa"), ("env=neutral", "are for")):
    with pytest.raises(UserError, match=words):
      neutral.main(["neutral", f"--config=configs/smollm2.py:{flag}", stem])
  with pytest.raises(UserError, match="heldout_seed=0"):
    other = ["--config=configs/smollm2.py", "--config.environment.heldout_seed=7"]
    neutral.main(["neutral", *other, stem])
