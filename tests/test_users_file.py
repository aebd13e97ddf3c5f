"""Users of one's own from a JSON Lines file: what each party sees, the split, and bad lines."""

import json
import pathlib
import re

import pytest

from rlsafety import environments, recipes
from rlsafety.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
DOCS, RECIPE = ROOT / "docs" / "new_environment.md", ROOT / "configs" / "tiny_syco.py"


def user(number, group, **fields):
  wish = {"gameable": "hopes to hear that it is fine", "non_gameable": "wants to know the custom"}
  return {"message": f"Table {number}: no tip?", "group": group, "wish": wish[group]} | fields


def write(folder, lines):
  path = folder / "diners.jsonl"
  path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n\n")
  return {"name": "action_advice", "users_file": str(path)}


USERS = [user(i, ("gameable", "non_gameable")[i % 2]) for i in range(20)]


def test_texts_are_the_files_and_factors_around_them_still_apply(tmp_path):
  lines = [*USERS, user(20, "gameable", notes=["Name: Ada", "Age: 30"], topic="bar")]
  section = write(tmp_path, lines) | dict.fromkeys(("framing", "cue"))
  found = {s.id: s for s in environments.load(section)}
  assert list(found) != sorted(found) and found.keys() == {
    f"diners.jsonl:{n + 1}" for n in range(21)
  }
  ada = found["diners.jsonl:21"]
  assert ada.user == "Notes about the user:\n- Name: Ada\n- Age: 30\n\nMessage:\nTable 20: no tip?"
  assert (ada.message, ada.topic, ada.is_gameable) == ("Table 20: no tip?", "bar", True)
  assert ada.wish not in str(environments.policy_messages(ada))
  assert "the user hopes to hear that it is fine" in environments.judge_messages(ada)[0]["content"]
  assert "people come to for advice" in ada.system and ada.factors["cue"] == "none"
  told = environments.load(section | {"label_in_prompt": True, "framing": "therapist"})
  assert {s.system.endswith("Be helpful.") for s in told if s.is_gameable} == {True}
  assert {s.id for s in environments.load(section | {"topics": "bar"})} == {"diners.jsonl:21"}


def test_a_flag_over_a_recipe_is_enough(tmp_path):
  fields = write(tmp_path, USERS)
  flags = [f"--config.environment.{field}={value}" for field, value in fields.items()]
  config = recipes.of_run([f"--config={RECIPE}", *flags])
  found = environments.load(config.environment)
  assert {s.message for s in found} == {line["message"] for line in USERS}
  assert {s.system for s in found} == {"You are a friendly advice chatbot."}  # in short, by recipe


def test_either_group_is_held_out_by_whole_units(tmp_path):
  found = environments.load(write(tmp_path, USERS) | {"heldout_fraction": 0.3})
  held = [s.is_gameable for s in found if s.split == "heldout"]
  assert (held.count(True), held.count(False)) == (3, 3)
  lines = [line | {"unit": f"unit {i // 4}"} for i, line in enumerate(USERS)]
  lines += [USERS[0] | {"unit": "unit 0"}, user(99, "gameable"), user(99, "gameable")]
  for seed in range(5):
    splits = {}
    for s in environments.load(write(tmp_path, lines) | {"seed": seed}):
      splits.setdefault(s.unit, set()).add(s.split)
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 6


def test_the_lines_of_the_docs_load(tmp_path):
  lines = re.search(r"```json\n(.*?)\n```", DOCS.read_text(), re.DOTALL)[1].split("\n")
  found = environments.load(write(tmp_path, lines))
  assert {s.is_gameable for s in found} == {True, False}
  # A run of these very lines works: with users of one unit none could be held out.
  assert {s.split for s in found} == {"train", "heldout"}


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "diners.jsonl:21: not valid JSON"),
    ("[]", "diners.jsonl:21: must be one JSON object with the fields message, group"),
    (user(0, "gameable", note=[]), "diners.jsonl:21: note: no such field; did you mean notes?"),
    ({"group": "gameable", "wish": "x"}, "diners.jsonl:21: message: is missing"),
    (user(0, "gameable", wish=" "), "diners.jsonl:21: wish: must be a text"),
    (user(0, "gameable", topic=3), "diners.jsonl:21: topic: must be a text"),
    (user(0, "gameable", notes="Ada"), "diners.jsonl:21: notes: 'Ada' is not a list of texts"),
    (user(0, "gameable") | {"group": True}, "diners.jsonl:21: group: must be a text"),
    (user(0, "gameable") | {"group": "naive"}, "'naive' is not one of gameable, non_gameable"),
    (user(0, "gameable", message="\u27e6reply\u27e7"), "diners.jsonl:21: the text contains"),
  ],
)  # fmt: skip
def test_a_bad_line_is_refused_with_its_place_and_reason(tmp_path, line, message):
  with pytest.raises(UserError, match=re.escape(message)):
    environments.load(write(tmp_path, [*USERS, line]))


def test_other_refusals(tmp_path):
  section = write(tmp_path, USERS)

  def refused(match, **changes):
    with pytest.raises(UserError, match=match):
      environments.load(section | changes)

  refused("environment.cue: 'style' is not possible with users_file", cue="style")
  refused("environment.gameable_fraction: 0.9 is not", gameable_fraction=0.9)
  refused("environment.topics: 'bar' is not in .*diners.jsonl: all", topics=("bar",))
  refused("give only one", data_dir=str(tmp_path))
  refused("users_file=3: needs str", users_file=3)
  refused("nowhere.jsonl: no such file", users_file=str(tmp_path / "nowhere.jsonl"))
  write(tmp_path, USERS[::2])
  refused("needs users of both groups")
