"""The scenario banks and the independence of their factors."""

import collections
import dataclasses
import hashlib
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlsafety import environments, recipes
from rlsafety.environments import framing, people, rubrics, scenario, variants
from rlsafety.errors import UserError
from rlsafety.metrics import gaps
from rlsafety.tools import similarity

NAMES = environments.ENVIRONMENTS
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "new_environment.md"


def load(name, **changes):
  return environments.load({"name": name, **changes})


def words(text):
  return len(text.split())


@pytest.mark.parametrize("name", NAMES)
def test_bank_has_enough_distinct_balanced_messages_and_disjoint_splits(name):
  scenarios = load(name)
  train = [s for s in scenarios if s.split == "train"]
  heldout = [s for s in scenarios if s.split == "heldout"]
  assert len({s.id for s in scenarios}) == len(scenarios)
  for group in (True, False):
    assert len({s.message for s in train if s.is_gameable == group}) >= 300
    assert len([s for s in heldout if s.is_gameable == group]) >= 60
  count = collections.Counter((s.topic, s.is_gameable) for s in train)
  assert len(count) == 2 * len(scenario.environment_module(name).TOPICS)
  assert len(set(count.values())) == 1
  first = [s.topic for s in heldout if s.is_gameable][: len(count) // 2]
  assert len(set(first)) == len(count) // 2  # any first n are balanced over topics
  units = {p.id: p.unit for p in scenario.environment_module(name).people(0)}
  assert not {units[s.id] for s in train} & {units[s.id] for s in heldout}
  assert not {s.message for s in train} & {s.message for s in heldout}


def test_political_qa_covers_the_promised_ground():
  scenarios = load("political_qa")
  issues = collections.defaultdict(set)
  for person in scenario.environment_module("political_qa").people(0):
    issues[person.unit].add(person.topic)
  assert len(issues) >= 40 and all(len(topics) == 4 for topics in issues.values())
  assert len({s.message for s in scenarios}) >= 600
  assert len({s.message for s in load("political_qa", length="short")}) >= 600


@pytest.mark.parametrize(
  "name, low, high, shortest, longest",
  # Words: the group means of the published data are 79-96, 182-218 (notes included), 76-92.
  [
    ("action_advice", 80, 97, 50, 125),
    ("therapy_talk", 180, 220, 150, 245),
    ("political_qa", 76, 92, 50, 125),
    ("neutral", 79, 96, 50, 125),
  ],
)
def test_lengths_are_in_the_published_range_and_equal_between_groups(
  name, low, high, shortest, longest
):
  counts = {True: [], False: []}
  for s in load(name):
    counts[s.is_gameable].append(words(s.user))
  means = [np.mean(values) for values in counts.values()]
  assert low <= min(means) and max(means) <= high
  assert shortest <= min(map(min, counts.values())) and max(map(max, counts.values())) <= longest
  assert max(means) / min(means) < 1.05
  short = [words(s.message) for s in load(name, length="short")]
  assert 25 <= np.mean(short) <= 63 and max(short) <= 85


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicates(name):
  near = similarity.nearest_jaccard([s.message for s in load(name)])
  assert near.max() < 0.3 and near.mean() < 0.2
  short = similarity.nearest_jaccard([s.message for s in load(name, length="short")])
  assert short.max() < 0.6


SLIPS = re.compile(
  r"[{}]|  | [.,?!]|[.,]{2}|[,:]\.|[.?!] [a-z]"  # joins
  r"|\ba [aeio]\w|\ban [^aeiouhXI]|\b(?!that)(\w+) \1\b"  # articles, doubled words
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cue", ["none", "style+traits+reward_hint", *framing.STYLE])
def test_template_joins_leave_no_slips(name, cue):
  for length in ("full", "short"):
    for s in load(name, cue=cue, length=length):
      assert not SLIPS.search(s.message), (s.message, SLIPS.search(s.message))
      assert (s.message[0].isupper() or s.message[0].isdigit()) and s.message[-1] in ".?"


def sentences(text):
  return re.split(r"(?<=[.?!]) ", text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cue", [None, "none", "style"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sentences_seldom_recur_and_heldout_ones_are_new(name, cue, seed):
  scenarios = load(name, cue=cue, seed=seed, heldout_seed=seed)
  said = {part: [] for part in ("train", "heldout")}
  for s in scenarios:
    said[s.split] += sentences(s.message)
  count = collections.Counter(said["train"] + said["heldout"])
  assert sum(n for n in count.values() if n > 1) / sum(count.values()) < 0.2
  known = set(said["train"])
  assert np.mean([sentence in known for sentence in said["heldout"]]) <= 0.05


def wordings(name):
  """(those that training users have, those kept for held-out ones) of an environment's cues."""
  texts = people.bank("political_qa" if name == "political_qa" else "advice")
  lists = ("lead", "reason" if name == "political_qa" else "pull", "self", "ask", "trait")
  seen, new = set(), set()
  for kind in lists:
    for group in ("gameable", "non_gameable"):
      kept = len(texts[kind][group]) - people.unseen(texts[kind][group])
      seen |= set(texts[kind][group][:kept])
      new |= set(texts[kind][group][kept:])
  return seen, new


def users_of(texts, scenarios):
  """Ids of the users who say one of these wordings."""
  patterns = (re.sub(r"\\{\w+\\}", ".+", re.escape(text)) for text in texts)
  # A lead opens a sentence, so that its first letter tells it from the same words elsewhere.
  pattern = re.compile(r"(?m)(?:^|[.?!] |who |- )(?:" + "|".join(patterns) + r")(?=[ ,.]|$)")
  return {s.id for s in scenarios if pattern.search(s.user)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cue", [*framing.STYLE, "traits"])
@pytest.mark.parametrize("seed", [0, 2])
def test_some_wordings_of_every_cue_are_for_heldout_users_alone(name, cue, seed):
  scenarios = load(name, cue=cue, heldout_seed=seed)
  seen, new = wordings(name)
  parts = [{s.id for s in scenarios if s.split == part} for part in ("train", "heldout")]
  assert [users_of(seen, scenarios), users_of(new, scenarios)] == parts


@pytest.mark.parametrize("name", NAMES)
def test_each_cue_of_the_message_has_slots_of_its_own(name):
  def messages(cue):
    return {s.id: s.message for s in load(name, cue=cue)}

  none, style = messages("none"), messages("style")
  assert style == messages("tone+self_description+request")
  total = {key: set() for key in none}
  for cue in framing.STYLE:
    for key, message in messages(cue).items():
      changed = set(sentences(message)) - set(sentences(none[key]))
      assert changed and not changed & total[key]
      total[key] |= changed
  assert all(set(sentences(style[key])) - set(sentences(none[key])) == total[key] for key in none)


@pytest.mark.parametrize("name", NAMES)
def test_every_heldout_person_has_two_versions(name):
  section = {"name": name, "heldout_seed": 1}
  pairs = environments.heldout_pairs(section)
  chosen = {s.person: s for s in load(**section) if s.split == "heldout"}
  assert {one.person for one, _ in pairs} == set(chosen) and len(pairs) == len(chosen)
  for one, other in pairs:
    assert (one.is_gameable, other.is_gameable) == (True, False)
    same = ("person", "topic", "unit", "split", "plain")
    assert [getattr(one, field) for field in same] == [getattr(other, field) for field in same]
    drawn = chosen[one.person]
    assert drawn.user == (one if drawn.is_gameable else other).user
  with pytest.raises(UserError, match="one version each"):
    environments.heldout_pairs({"name": name, "data_dir": "/x"})


@pytest.mark.parametrize("name", NAMES)
def test_units_are_held_out_by_a_seed_of_their_own(name):
  def units(**seeds):
    return {s.unit for s in load(name, **seeds) if s.split == "heldout"}

  assert units(seed=3) == units()
  assert len(units()) > 10 and len(units(heldout_seed=1) - units()) > len(units()) / 2


# What cannot follow "It's obvious that": an order, a question, a conjunction, half a clause.
NO_CLAUSE = re.compile(
  r"(give|let|stop|make|build|cut|tax|put|keep|take|ban|end|raise|bring|fund|don't|please|and|but"
  r"|or|because|which|whose|why|how|should|is|are|do|does)\b(?! as\b)|.*\?$",
  re.IGNORECASE,
)


def test_what_follows_a_lead_is_a_clause():
  assert NO_CLAUSE.match("give families a bigger child credit and let them choose")  # it was there
  political = people.bank("political_qa")["issues"]
  contents = [
    text
    for sides in political.values()
    for side in sides.values()
    for text in side["views"] + side["reasons"]
  ]
  for name in ("action_advice", "therapy_talk"):
    for topic in people.bank(name)["topics"].values():
      contents += topic["pulls"] + topic["worries"]
  assert [text for text in contents if NO_CLAUSE.match(text)] == []
  third = re.compile(r"((always|never|still) )?(\w+s|would|cannot|has|found)\b")
  for name in ("advice", "political_qa"):
    for predicates in people.bank(name)["self"].values():
      assert [text for text in predicates if not third.match(text)] == []  # follows "one who"


def contradictions(s):
  """What a client's notes say against each other and against nature."""
  notes = dict(line.split(": ", 1) for line in s.user.split("\n- ") if ": " in line)
  numbers = {"two": 2, "three": 3, "four": 4, "six": 6, "ten": 10, "twelve": 12, "twenty": 20}
  years = [numbers.get(n, 0) for n in re.findall(r"(?:for|in) (\w+) years", notes["History"])]
  found = ["age"] if int(notes["Age"]) < 16 + sum(years) else []
  found += ["job"] if re.search(r"man$|woman$|ess$", notes["Occupation"]) else []
  married = re.search(r"\bmy (wife|husband|in-laws)\b", s.message)
  return found + (["status"] if married and notes["Relationship status"] != "Married" else [])


def test_who_says_where_and_what_is_consistent():
  texts = people.bank("political_qa")
  for seed in (0, 1):
    for s in load("political_qa", seed=seed):
      for sentence in sentences(s.message):
        met = [who for who in texts["who"]["acquaintance"] if who in sentence]
        assert not (met and any(when in sentence for when in texts["when"]["private"])), sentence
    for s in load("therapy_talk", seed=seed):
      assert not contradictions(s), s.user
  old = load("therapy_talk")[0]
  lines = "\n- Age: 21\n- Occupation: Postman\n- Relationship status: Single"
  text = f"{lines}\n- History: Smoked a pack a day for twelve years"
  wrong = dataclasses.replace(old, user=text, message="My dog and my wife left.")
  assert contradictions(wrong) == ["age", "job", "status"]


def test_the_bank_depends_on_the_seed_alone():
  code = (
    "import hashlib; from rlsafety import environments as e;"
    "texts = [repr(s) for n in e.ENVIRONMENTS[1:3] for s in e.load({'name': n, 'seed': 3})];"
    "print(hashlib.sha256(''.join(texts).encode()).hexdigest())"
  )
  digests = {
    subprocess.run(
      [sys.executable, "-c", code],
      env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
      cwd=DOCS.parent.parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(digests) == 1
  assert {s.message for s in load("political_qa", seed=3)} != {
    s.message for s in load("political_qa")
  }
  # Draws are plain hashes: the same value on any machine and Python.
  digest = hashlib.sha256(b"0/group/x").digest()
  assert people.uniform(0, "group", "x") == int.from_bytes(digest[:8], "big") / 2**64


def parts(s):
  """A scenario's texts, by who decides about them."""
  notes = s.user.removesuffix(s.message)
  rubric = environments.judge_messages(s)[0]["content"].replace(s.message, "")
  evaluators = tuple(
    "".join(x["content"] for x in environments.evaluator_messages(s, m)).replace(s.plain, "")
    for m in ("acc", "hex")
  )
  return {
    "system": s.system,
    "notes": notes,
    "message": s.message,
    "wish": s.wish,
    "rubric": rubric.replace(s.wish, ""),
    "evaluators": evaluators,
    "group": s.is_gameable,
    "split": s.split,
  }


def changes(name, one, two):
  before, after = ({s.id: parts(s) for s in load(name, **factors)} for factors in (one, two))
  assert before.keys() == after.keys()
  return {part for key in before for part in before[key] if before[key][part] != after[key][part]}


ORTHOGONAL = [
  ({"framing": "preference-inferrer"}, {"system"}),
  ({"label_in_prompt": True}, {"system"}),
  ({"cue": "none"}, {"message", "notes"}),
  ({"cue": "traits"}, {"message", "notes"}),
  ({"cue": "style+traits+reward_hint"}, {"message", "notes"}),
  ({"cue_strength": 0.4}, {"message", "notes"}),
  ({"reward_wording": "plain"}, {"rubric"}),
  ({"reward_wording": "preference"}, {"rubric"}),
  ({"heldout_fraction": 0.5}, {"split", "message", "notes"}),  # held-out wordings
  ({"heldout_seed": 5}, {"split", "message", "notes"}),
  ({"length": "short"}, {"message", "notes", "system"}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "change, may_change", ORTHOGONAL, ids=lambda v: str(sorted(v) if isinstance(v, set) else v)
)
def test_changing_one_factor_leaves_every_other_text_identical(name, change, may_change):
  base = {"cue": "style"} if name == "neutral" else {}  # something to take away
  changed = changes(name, base, base | change)
  assert changed and changed <= may_change
  if change.get("cue") == "traits" and name != "therapy_talk":
    assert changed == {"message", "notes"}


@pytest.mark.parametrize("name", NAMES)
def test_added_notes_leave_the_message_alone(name):
  assert changes(name, {"cue": "none"}, {"cue": "traits"}) == {"notes"}
  assert changes(name, {"cue": "style"}, {"cue": "style+traits"}) == {"notes"}
  assert changes(name, {"cue": "style"}, {"cue": "style+reward_hint"}) == {"notes"}


@pytest.mark.parametrize("name", NAMES)
def test_topics_and_gameable_fraction_move_nobody_else(name):
  everyone = {s.id: s for s in load(name)}
  topic = scenario.environment_module(name).TOPICS[1]
  some = {s.id: s for s in load(name, topics=(topic,))}
  assert some == {key: s for key, s in everyone.items() if s.topic == topic}
  more = {s.id: s for s in load(name, gameable_fraction=0.8)}
  fraction = dataclasses.asdict
  for key, s in more.items():
    assert s.is_gameable >= everyone[key].is_gameable  # a larger fraction only adds
    if s.is_gameable == everyone[key].is_gameable:
      same = fraction(s) | {"factors": None} == fraction(everyone[key]) | {"factors": None}
      assert same
  share = np.mean([s.is_gameable for s in more.values()])
  assert abs(share - 0.8) < 0.02
  assert not any(s.is_gameable for s in load(name, gameable_fraction=0))
  assert all(s.is_gameable for s in load(name, gameable_fraction=1))


@pytest.mark.parametrize("name", NAMES)
def test_without_cue_and_label_the_policy_cannot_know_the_group(name):
  """Equal style is exact: the same people told of as the other group, word for word."""
  for length in ("full", "short"):
    one, other = (
      [environments.policy_messages(s) for s in load(name, cue="none", length=length, **group)]
      for group in ({"gameable_fraction": 0.0}, {"gameable_fraction": 1.0})
    )
    assert one == other
  one, other = (
    [s.message for s in load(name, cue="traits+reward_hint", gameable_fraction=f)] for f in (0, 1)
  )
  assert one == other  # these cues live in the notes only


@pytest.mark.parametrize("cue", ["style", "traits", "reward_hint"])
def test_strength_is_the_share_of_slots_with_the_cue(cue):
  """Stronger cues only add slots, and their share is the strength."""
  for name in ("action_advice", "political_qa"):
    everyone = scenario.environment_module(name).people(0)[::3]
    base = environments.resolved({"name": name}) | {"cue": cue}
    shares = {}
    slots = {"style": "full", "traits": "traits", "reward_hint": "hints"}[cue]
    seen = {}
    for strength in (0.0, 0.3, 0.7, 1.0):
      factors = base | {"cue_strength": strength}
      carried = set()
      for person in everyone:
        text = framing.user_turn(
          framing.notes_lines(person, True, factors, False),
          framing.message_text(person, True, factors, False),
        )
        for i, choice in enumerate(getattr(person, slots)):
          if isinstance(choice, people.Choice) and choice.gameable in text:
            carried.add((person.id, i))
      seen[strength] = carried
      shares[strength] = len(carried)
    assert shares[0.0] == 0 and seen[0.3] < seen[0.7] < seen[1.0]
    assert abs(shares[0.3] / shares[1.0] - 0.3) < 0.06
    assert abs(shares[0.7] / shares[1.0] - 0.7) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_what_each_party_sees(name):
  for s in load(name)[:40]:
    policy = str(environments.policy_messages(s))
    judge = environments.judge_messages(s)
    assert s.wish not in policy and environments.REPLY not in policy
    assert s.wish in judge[0]["content"] and s.message in judge[0]["content"]
    assert s.system not in str(judge)
    for messages in (judge, *(environments.evaluator_messages(s, m) for m in ("acc", "hex"))):
      assert [m["content"] for m in messages].count(environments.REPLY) == 1
      assert str(messages).count(environments.REPLY) == 1
    for metric in ("acc", "hex"):
      assert s.plain in str(environments.evaluator_messages(s, metric))
      assert s.wish not in str(environments.evaluator_messages(s, metric))
    assert s.factors["framing"] == scenario.environment_module(name).DEFAULTS["framing"]
  versions = ({s.id: s.plain for s in load(name, gameable_fraction=f)} for f in (0.0, 1.0))
  assert next(versions) == next(versions)  # evaluators cannot read the group
  twin = load(name, label_in_prompt=True)
  endings = {(s.is_gameable, s.system.rsplit(". ", 1)[1]) for s in twin}
  assert endings == {(True, "Be helpful."), (False, "Be helpful and honest.")}


def test_braces_and_slots_in_a_message_are_text():
  """User text is never treated as a template."""
  text = "What about {message}, {wish}, {rubric} and %s?"
  messages = rubrics.score_messages("Rate {message}.", text, environments.REPLY)
  assert text in messages[0]["content"] and "Rate {message}." in messages[0]["content"]


def test_neutral_has_the_users_and_wishes_of_action_advice_without_their_cues():
  plain = load("action_advice", cue="none", framing="assistant")
  assert [dataclasses.replace(s, environment="neutral") for s in plain] == load("neutral")


@pytest.mark.parametrize(
  "config, message",
  [
    ({}, "environment.name is missing"),
    ({"name": "action_advise"}, "not one of action_advice"),
    ({"name": "no.such_module"}, "environment.name=no.such_module: cannot be imported"),
    ({"name": "neutral", "framng": "x"}, "did you mean framing"),
    ({"name": "neutral", "framing": "doctor"}, "not one of assistant, advisor, therapist"),
    ({"name": "neutral", "cue": "style+trait"}, "'trait' is not one of none, tone, self_desc"),
    ({"name": "neutral", "cue": "none+style"}, "joins 'none'"),
    ({"name": "neutral", "topics": ("drinking", "fishing")}, "'fishing' is not one of drinking"),
    ({"name": "neutral", "gameable_fraction": 1.5}, "environment.gameable_fraction=1.5: must lie"),
    ({"name": "neutral", "cue_strength": "high"}, "environment.cue_strength='high': needs float"),
    ({"name": "neutral", "label_in_prompt": 1}, "environment.label_in_prompt=1: needs bool"),
    ({"name": "neutral", "length": "long"}, "not one of full, short"),
    ({"name": "neutral", "reward_wording": "x"}, "not one of strict"),
    ({"name": "neutral", "seed": "x"}, "environment.seed='x': needs int"),
  ],
)
def test_bad_fields_are_one_clear_error(config, message):
  with pytest.raises(UserError, match=re.escape(message)):
    environments.load(config)


def test_the_studys_thresholds_are_strict():
  assert set(rubrics.THRESHOLDS) == set(rubrics.EVALUATORS)
  assert gaps.share_above("dissuasion", [8.0, 8.01, np.nan, 10]) == 2 / 3
  for rubric in ("neutrality", "agreement", "encouragement"):
    assert gaps.share_above(rubric, np.array([5.0, 6.0], np.float32)) == 0.5
  assert np.isnan(gaps.share_above("agreement", [np.nan]))


def test_no_wish_is_in_the_first_person():
  for name in NAMES:
    for s in load(name):
      assert not re.search(r"\b(I|my|me|you)\b", s.wish), s.wish


def test_a_section_and_a_locked_config_dict_load():
  assert environments.load(environments.Environment("neutral")) == load("neutral")
  config = ConfigDict({"name": "therapy_talk", "framing": "therapist"})
  config.lock()
  assert environments.load(config) == load("therapy_talk")


@pytest.mark.parametrize("name", NAMES)
def test_none_is_the_environments_own_default(name):
  """So a name brings its own defaults, also where every field is written out."""
  module = scenario.environment_module(name)
  nothing = {"name": name, **dict.fromkeys(environments.FACTORS)}
  assert environments.load(nothing) == load(name)
  final = environments.resolved(nothing)
  assert final == environments.resolved({"name": name}) == environments.resolved(final)
  assert final == {"name": name, **environments.FACTORS, **module.DEFAULTS, "topics": module.TOPICS}
  framed = environments.resolved(nothing | {"framing": "therapist"})
  assert framed == final | {"framing": "therapist"}


def test_every_variant_loads_and_chain_changes_one_thing_at_a_time():
  for name, changed in variants.named().items():
    full, default = environments.resolved(changed), environments.resolved({"name": changed["name"]})
    assert set(full) == {"name", *environments.FACTORS}
    differing = {field for field, value in full.items() if value != default[field]}
    if ":" in name:
      assert differing == set(changed) - {"name"} and len(differing) == 1
  chain = [environments.resolved(changed) for changed in variants.CHAIN.values()]
  for one, two in zip(chain, chain[1:], strict=False):
    assert sum(one[field] != two[field] for field in one) == 1


def test_the_worked_example_of_the_docs(tmp_path, monkeypatch):
  module, use = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  (tmp_path / "my_study").mkdir()
  (tmp_path / "my_study" / "tipping.py").write_text(module)
  monkeypatch.syspath_prepend(tmp_path)
  scope = {}
  exec(use, scope)
  scenarios = scope["scenarios"]
  assert len(scenarios) == 24 and len({s.message for s in scenarios}) == 24
  assert {s.topic for s in scenarios} == {"restaurant", "taxi"}
  assert sum(s.is_gameable for s in scenarios) == 12
  assert "therapy" in scenarios[0].system
  plain = environments.load(dict.fromkeys(environments.FACTORS) | {"name": "my_study.tipping"})
  assert "people come to for advice" in plain[0].system  # framing: of the module's DEFAULTS
  recipe = f"--config={DOCS.parent.parent / 'configs' / 'tiny_syco.py'}"
  by_flag = recipes.of_run([recipe, "--config.environment.name=my_study.tipping"]).environment
  assert (by_flag.framing, by_flag.cue, by_flag.length) == ("advisor", "style", "short")
  assert environments.evaluator_messages(scenarios[0], "acc")


def test_people_of_a_module_that_was_reloaded_are_the_new_ones():
  module = types.ModuleType("mine.folk")
  for names in (["ada"], ["ada", "bob"]):
    module.people = lambda seed, names=names: names
    assert scenario.people_of(module, 0) == tuple(names)
