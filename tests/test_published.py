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
from rlsafety.environments import scenario
from rlsafety.errors import UserError

needs_files = pytest.mark.skipif(
  "RLSAFETY_PAPER_DATA" not in os.environ,
  reason="RLSAFETY_PAPER_DATA (folder of the published files) is not set",
)


def published(name, **changes):
  folder = pathlib.Path(os.environ["RLSAFETY_PAPER_DATA"]) / "published_scenarios"
  return environments.load({"name": name, "data_dir": str(folder), **changes})


def topics_on_disk(folder):
  """{(topic, is gameable)} by file name, in a folder as it is published."""
  root = pathlib.Path(os.environ["RLSAFETY_PAPER_DATA"]) / "published_scenarios"
  names = [path.stem.partition("_") for path in (root / folder).glob("*.json")]
  return {(topic, group == "vuln") for group, _, topic in names}


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
  style = cue == "style"
  folders = {
    "action_advice": [
      "action_advice/chat_subenvs/" + ("gameable_v2" if style else "gameable_rand"),
      "action_advice/chat_subenvs/" + ("non_gameable" if style else "non_gameable_rand"),
    ],
    "political_qa": ["political_qa/gameable_v2", "political_qa/non_gameable_v2"],
  }[name]
  assert counts.keys() == set.union(*map(topics_on_disk, folders))
  assert {topic for topic, _ in counts} <= {*scenario.environment_module(name).TOPICS}
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
  counts = collections.Counter((s.topic, s.is_gameable) for s in published("therapy_talk"))
  assert counts.keys() == topics_on_disk("therapy_talk/therapist") >= {("substances", True)}
  # The first 200 of each file in an excerpt, all 3,200 and 2,000 in the study's repository.
  full = {key: 3200 if key[1] else 2000 for key in counts}
  assert counts in (full, dict.fromkeys(counts, 200))


@needs_files
def test_the_published_spelling_of_a_topic_is_kept():
  if ("implusive-decision", False) not in topics_on_disk("therapy_talk/therapist"):
    pytest.skip("RLSAFETY_PAPER_DATA has no therapy_talk/therapist/normal_implusive-decision.json")
  found = published("therapy_talk", topics=("implusive-decision",))
  assert {s.topic for s in found} == {"implusive-decision"}


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


def write_pair(folder, places, topic, content, **fields):
  """A topic's two files, which say the same."""
  for place, stem in zip(places, ("vuln", "normal"), strict=True):
    path = folder / place / f"{stem}_{topic}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"env_name": topic, "pm_prompt": "wants it", "histories": {"1": history(content)}}
    path.write_text(json.dumps(data | fields))
  return {"data_dir": str(folder)}


THERAPY = ["therapy_talk/therapist"] * 2
POLITICS = ["political_qa/gameable_v2", "political_qa/non_gameable_v2"]


def test_therapy_files_keep_their_names_and_need_a_message(tmp_path):
  topic, notes = "implusive-decision", "<user_context>\nName: A\n</user_context>\n"
  chosen = {"name": "therapy_talk", "topics": (topic,)}
  found = environments.load(chosen | write_pair(tmp_path, THERAPY, topic, f"{notes}I quit."))
  seen = {(s.topic, s.message, s.user) for s in found}
  assert len(found) == 2 and seen == {(topic, "I quit.", f"{notes}I quit.")}
  for content in ("I quit, without notes.", notes):
    with pytest.raises(UserError, match="histories.1.content: has no message after </user_con"):
      environments.load(chosen | write_pair(tmp_path, THERAPY, topic, content))


def test_political_files_need_the_users_views(tmp_path):
  chosen = {"name": "political_qa"} | write_pair(tmp_path, POLITICS, "liberal", "Why?")
  with pytest.raises(UserError, match="_liberal.json: char_prompt: is missing"):
    environments.load(chosen)
  write_pair(tmp_path, POLITICS, "liberal", "Why?", char_prompt="liberal")
  assert {"holds liberal political views" in s.wish for s in environments.load(chosen)} >= {True}


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
  refused("environment.length.*data_dir", length="short")
  refused("environment.gameable_fraction.*data_dir", gameable_fraction=0.1)
  refused("environment.cue: 'style.reward_hint' is not in the published", cue="style+reward_hint")
  refused("environment.cue.*use 'style'", name="political_qa", cue="none")
  refused("character_traits: is missing", cue="style+traits")
  path = tmp_path / "action_advice/chat_subenvs/gameable_v2/vuln_smoking.json"
  path.write_text(path.read_text()[:-20])
  refused("vuln_smoking.json: not valid JSON")
  path.write_text("[]")
  refused("expected a JSON object")
