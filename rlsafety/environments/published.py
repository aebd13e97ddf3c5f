"""Reader for the scenario files published with the study (arXiv 2604.12500).

`data_dir` is the folder that holds `action_advice/`, `therapy_talk/` and `political_qa/`:
`llm_agent/environments` in a clone of the study's repository. One JSON object per topic and
group; groups, topic names and histories are taken as they are. What the files leave open
stays a factor (framing, reward wording, label in the prompt, traits and equal style for
action_advice); what they fix is refused with a clear error.
"""

from pathlib import Path
from typing import Any, NoReturn

from rlsafety.environments.framing import user_turn
from rlsafety.environments.people import User, refuse_other, uniform
from rlsafety.errors import UserError
from rlsafety.files import read_json

# environment -> style cue on? -> (folder of gameable users, folder of the others)
FOLDERS = {
  "action_advice": {
    True: ("action_advice/chat_subenvs/gameable_v2", "action_advice/chat_subenvs/non_gameable"),
    False: (
      "action_advice/chat_subenvs/gameable_rand",
      "action_advice/chat_subenvs/non_gameable_rand",
    ),
  },
  "therapy_talk": {True: ("therapy_talk/therapist", "therapy_talk/therapist")},
  "political_qa": {True: ("political_qa/gameable_v2", "political_qa/non_gameable_v2")},
}
FOLDERS["neutral"] = FOLDERS["action_advice"]
PREFIX = {True: "vuln_", False: "normal_"}
# The published texts come in one length, one style and two fixed groups.
FIXED = {"length": "full", "cue_strength": 1, "gameable_fraction": 0.5}
# Which of the published texts a config gets that says no cue.
CUE = {
  "action_advice": "style",
  "therapy_talk": "style+traits",
  "political_qa": "style",
  "neutral": "none",
}
_NOTES_END = "</user_context>"


def read(factors: dict[str, Any]) -> list[User]:
  """All histories of one environment, gameable files first, topics and ids in file order.

  Raises:
    UserError: a folder or topic that is not there, a malformed file (file, key, reason), or
      a factor that the published texts fix.
  """
  root = Path(factors["data_dir"])
  cues = set(factors["cue"].split("+")) - {"none"}
  _refuse_fixed(factors, cues)
  folders = FOLDERS[factors["name"]]["style" in cues]
  found: dict[bool, dict[str, Path]] = {}
  for gameable, folder in zip((True, False), folders, strict=True):
    if not (root / folder).is_dir():
      raise UserError(
        f"environment.data_dir: {root / folder} is not a folder; data_dir must hold the "
        "published environments (action_advice, therapy_talk, political_qa)"
      )
    paths = sorted((root / folder).glob(f"{PREFIX[gameable]}*.json"))
    found[gameable] = {path.stem.removeprefix(PREFIX[gameable]): path for path in paths}
  available = sorted(found[True] | found[False])
  for topic in factors["topics"] or ["any"]:
    if not available or (factors["topics"] and topic not in available):
      raise UserError(
        f"environment.topics: no file for {topic!r} in {root / folders[0]}; "
        f"there are: {', '.join(available) or 'none'}"
      )
  return [
    user
    for gameable, files in found.items()
    for topic, path in files.items()
    if not factors["topics"] or topic in factors["topics"]
    for user in _read_file(path, topic, gameable, factors, cues)
  ]


def _refuse_fixed(factors: dict[str, Any], cues: set[str]) -> None:
  """Raises UserError for factors that the published texts do not come in."""
  refuse_other(factors, FIXED, "data_dir")
  name = factors["name"]
  if name not in FOLDERS:
    raise UserError(f"environment.data_dir: nothing is published for {name!r}; use data_dir=''")
  accepted = {"political_qa": [{"style"}], "therapy_talk": [{"style", "traits"}]}.get(
    name, [set(), {"style"}, {"traits"}, {"style", "traits"}]
  )
  if cues not in accepted:
    names = ", ".join(repr("+".join(sorted(one)) or "none") for one in accepted)
    raise UserError(
      f"environment.cue: {factors['cue']!r} is not in the published {name} texts; use {names}"
    )


def _read_file(
  path: Path, topic: str, gameable: bool, factors: dict[str, Any], cues: set[str]
) -> list[User]:
  name = factors["name"]

  def refuse(key: str, reason: str) -> NoReturn:
    raise UserError(f"{path}: {key}: {reason}")

  data = read_json(path)

  def text(key: str) -> str:
    if not isinstance(data.get(key), str) or not data[key].strip():
      refuse(key, "must be a non-empty string" if key in data else "is missing")
    return data[key].strip()

  if text("env_name") != topic:
    refuse("env_name", f"is {data['env_name']!r}, but the file name says {topic!r}")
  wish = text("pm_prompt")
  if name == "political_qa":
    group = f"holds {text('char_prompt')} political views, likes to be agreed with, and "
    wish = (group if gameable else "wants balance, dislikes bias and flattery, and ") + wish
  notes = []
  if "traits" in cues and name != "therapy_talk":
    notes = [line.lstrip("- ").strip() for line in text("character_traits").splitlines()]
  histories = data.get("histories")
  if not isinstance(histories, dict) or not histories:
    refuse("histories", "must be a non-empty object of histories")
  users = []
  for key, turns in histories.items():
    where = f"histories.{key}"
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
      refuse(where, "must be a list of exactly one message")
    role, content = turns[0].get("role"), turns[0].get("content")
    if role != "environment":
      refuse(f"{where}.role", f"is {role!r}, must be 'environment'")
    if not isinstance(content, str) or not content.strip():
      refuse(f"{where}.content", "must be a non-empty string")
    message = content.partition(_NOTES_END)[2].strip() if name == "therapy_talk" else content
    if not message:
      refuse(f"{where}.content", f"has no message after {_NOTES_END}")
    own = f"{path.parent.name}/{path.stem}/{key}"
    users.append(
      User(
        id=own,
        topic=topic,
        unit=own,  # every history is a user of its own
        is_heldout=uniform(factors["heldout_seed"], "heldout", own) < factors["heldout_fraction"],
        is_gameable=gameable,
        user=user_turn(notes, content),
        message=message,
        wish=wish,
      )
    )
  return users
