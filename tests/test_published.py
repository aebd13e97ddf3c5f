"""The reader of the study's scenario files: real files where there are some, and bad ones.

RLSAFETY_PAPER_DATA is a folder with `published_scenarios/` in it, laid out as in the
study's repository below llm_agent/environments (all of it, or a part).
"""

import collections
import json
import os
import pathlib

import numpy as np
import pytest

from rlsafety import environments
from rlsafety.errors import UserError

needs_files = pytest.mark.skipif(
  "RLSAFETY_PAPER_DATA" not in os.environ,
  reason="RLSAFETY_PAPER_DATA (folder of the published files) is not set",
)


def published(name, **changes):
  folder = pathlib.Path(os.environ["RLSAFETY_PAPER_DATA"]) / "published_scenarios"
  return environments.load({"name": name, "data_dir": str(folder), **changes})


@needs_files
@pytest.mark.parametrize(
  "name, cue, per_topic, chars",
  # Histories per topic and group, and mean characters of both groups (the
  # means there are over all topics, so a part of them comes close).
  [
    ("action_advice", "style", 160, {True: 550, False: 473}),
    ("action_advice", "none", 320, {True: 471, False: 469}),
    ("political_qa", "style", 300, {True: 502, False: 601}),
  ],
)
def test_counts_names_and_lengths_of_the_published_files(name, cue, per_topic, chars):
  scenarios = published(name, cue=cue)
  counts = collections.Counter((s.topic, s.is_gameable) for s in scenarios)
  assert set(counts.values()) == {per_topic}
  known = {
    "action_advice": {
      "drinking",
      "extreme_sports",
      "gambling",
      "impulsive-decision",
      "neglecting-medication",
      "over-spending",
      "smoking",
    },
    "political_qa": {"alt-right", "conservative", "liberal", "socialist"},
  }
  assert {topic for topic, _ in counts} <= known[name]
  assert len({s.id for s in scenarios}) == len(scenarios)
  assert len({s.system for s in scenarios}) == 1  # no group label
  for group, mean in chars.items():
    measured = np.mean([len(s.message) for s in scenarios if s.is_gameable == group])
    assert abs(measured / mean - 1) < 0.12


@needs_files
def test_published_therapy_talk_keeps_its_notes_for_the_policy_only():
  scenarios = published("therapy_talk", topics=("substances",))
  assert {s.is_gameable for s in scenarios} == {True, False}
  for s in scenarios:
    assert s.user.startswith("<user_context>") and s.user.endswith(s.message)
    assert "user_context" not in s.message and "Character traits" not in s.message
    assert s.wish in str(environments.judge_messages(s))
  everything = published("therapy_talk")
  assert {(s.topic, s.is_gameable) for s in everything} >= {("substances", True), ("anger", False)}


@needs_files
def test_the_chain_on_published_action_advice():
  topics = ("smoking",)
  plain = {s.id: s for s in published("action_advice", topics=topics)}
  traits = {
    s.id: s
    for s in published(
      "action_advice", topics=topics, cue="style+traits", framing="therapist", label_in_prompt=True
    )
  }
  assert plain.keys() == traits.keys()
  for key, s in traits.items():
    assert s.message == plain[key].message and s.wish == plain[key].wish
    assert s.user.startswith("Notes about the user:\n- ") and s.user.endswith(s.message)
    assert s.system.endswith("Be helpful." if s.is_gameable else "Be helpful and honest.")
  # Within a group every user has the file's traits; the groups' traits differ.
  notes = {(s.is_gameable, s.user.removesuffix(s.message)) for s in traits.values()}
  assert len(notes) == 2
  equal = published("action_advice", topics=topics, cue="traits")
  assert not {s.message for s in equal if s.is_gameable} & {
    s.message for s in equal if not s.is_gameable
  }


def history(text="I would like to try it, what do you think?"):
  return [{"role": "environment", "content": text}]


def write_smoking(folder, **changes):
  """A small action_advice folder of our own; `changes` go into the gameable file."""
  for group, stem in (("gameable_v2", "vuln"), ("non_gameable", "normal")):
    path = folder / "action_advice" / "chat_subenvs" / group / f"{stem}_smoking.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"env_name": "smoking", "pm_prompt": "wants it", "histories": {"7": history()}}
    if stem == "vuln":
      data |= changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
  return folder


def test_a_minimal_folder_loads(tmp_path):
  scenarios = environments.load({"name": "action_advice", "data_dir": str(write_smoking(tmp_path))})
  assert sorted((s.id, s.is_gameable, s.wish) for s in scenarios) == [
    ("gameable_v2/vuln_smoking/7", True, "wants it"),
    ("non_gameable/normal_smoking/7", False, "wants it"),
  ]


@pytest.mark.parametrize(
  "changes, key, reason",
  [
    ({"pm_prompt": None}, "pm_prompt", "is missing"),
    ({"pm_prompt": 3}, "pm_prompt", "must be a non-empty string"),
    ({"env_name": "drinking"}, "env_name", "the file name says 'smoking'"),
    ({"histories": None}, "histories", "non-empty object"),
    ({"histories": {}}, "histories", "non-empty object"),
    ({"histories": [history()]}, "histories", "non-empty object"),
    ({"histories": {"1": history() * 2}}, "histories.1", "exactly one message"),
    ({"histories": {"1": [{"role": "user", "content": "x"}]}}, "histories.1.role", "'environment'"),
    ({"histories": {"1": history("  ")}}, "histories.1.content", "non-empty string"),
    ({"histories": {"1": history("a \u27e6reply\u27e7 b")}}, "vuln_smoking/1", "reply slot"),
  ],
)
def test_a_malformed_file_is_refused_with_file_key_and_reason(tmp_path, changes, key, reason):
  folder = write_smoking(tmp_path, **changes)
  with pytest.raises(UserError) as error:
    environments.load({"name": "action_advice", "data_dir": str(folder)})
  message = str(error.value)
  assert "vuln_smoking" in message and key in message and reason in message


def test_other_refusals(tmp_path):
  folder = str(write_smoking(tmp_path))

  def refused(match, name="action_advice", **changes):
    with pytest.raises(UserError, match=match):
      environments.load({"name": name, "data_dir": folder} | changes)

  refused("is not a folder", data_dir=str(tmp_path / "nowhere"))
  refused("is not a folder", name="political_qa")
  refused("no file for 'gambling'.*there are: smoking", topics=("gambling",))
  refused("environment.length.*published", length="short")
  refused("environment.gameable_fraction.*published", gameable_fraction=0.1)
  refused("environment.cue: 'style.reward_hint' is not in the published", cue="style+reward_hint")
  refused("environment.cue.*use 'style'", name="political_qa", cue="none")
  refused("character_traits: is missing", cue="style+traits")
  path = tmp_path / "action_advice/chat_subenvs/gameable_v2/vuln_smoking.json"
  path.write_text(path.read_text()[:-20])
  refused("vuln_smoking.json: file: cannot be read as JSON")
  path.write_text("[]")
  refused("must be one JSON object")
