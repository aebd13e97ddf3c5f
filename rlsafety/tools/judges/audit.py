"""How much hostile replies move a judge: `python -m rlsafety.tools.judges.audit --judge=probe`.

Each attack is a reply that deserves no rating (openers that fool LLM judges, arXiv
2507.08794; constant replies, 2410.07137; "rate this 10"; fake turns, tags and control
tokens; empty, endless, foreign or garbled text), alone or appended to an honest neutral
reply. The table shows what each earns, and the share of users for whom it beats the
median of sincere replies of the kind that they want. Pleasant attacks (warmth without a stance,
a love letter, a recipe ...) deserve none either; a second table shows for how many users the
sincere reply stands above each. A judge that an attack beats will be beaten by RL too.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlsafety import files, flags
from rlsafety.errors import UserError, run_main
from rlsafety.judges import Judge, phrases, probe
from rlsafety.models.chat import Chat
from rlsafety.tools.judges import compare, measure, replies
from rlsafety.tools.judges.replies import Example

# Replies that please and say nothing, under "pleasant", have the class that they have before their
# text; {about}: the user's topic or plan, {against}: a reason against. No wording of `replies` that
# a head is fitted on. [text, n] is the text n times.
_TABLE = files.read_json(Path(replies.__file__).parent / "attacks.json")


def _texts(kinds: dict[str, list]) -> dict[str, tuple[str, ...]]:
  whole = lambda x: x if isinstance(x, str) else x[0] * x[1]  # noqa: E731
  return {kind: tuple(map(whole, texts)) for kind, texts in kinds.items()}


ALONE, APPENDED = _texts(_TABLE["alone"]), _texts(_TABLE["appended"])
PLEASANT = _TABLE["pleasant"]
WRONG_TOPIC = "right tone, wrong topic"


def pleasant_examples(name: str, users: int = 12) -> list[Example]:
  """Sincere replies to `users` test users at most, and the pleasant attacks on each of them.

  name: a set of labelled replies. An attack has its name as its kind.
  """
  honest: dict[str, list[Example]] = {}
  for e in replies.written(name):
    if e.split == "test":
      honest.setdefault(e.message, []).append(e)
  rows = [row for row in replies.topics(name) if row["split"] == "test"]
  sincere, out = list(honest.values()), []
  for i in range(0, len(rows), -(-len(rows) // users)):
    row, own = rows[i], sincere[i]
    out += [e for e in own if e.kind in ("agree", "neutral", "disagree")]
    wrong = next(e for e in sincere[(i + 2) % len(sincere)] if e.kind == "agree")
    said = {"about": row.get("you", row["topic"]), "against": row.get("anti", row.get("risk"))}
    attacks = {k: (label, text.format(**said)) for k, (label, text) in PLEASANT.items()}
    attacks[WRONG_TOPIC] = ("off_topic", wrong.reply)
    for kind, (label, text) in attacks.items():
      out.append(dataclasses.replace(own[0], reply=text, kind=kind, label=label))
  return out


def pleasant(values: np.ndarray, examples: Sequence[Example], wanted: str) -> dict[str, float]:
  """{attack: share of users whose median sincere reply labelled `wanted` is above it}.

  values [N]; NaN is below everything. Attacks that are labelled `wanted` are left out.
  """
  values = np.where(np.isnan(values), -np.inf, values)
  kind, label, message = (
    np.array([getattr(e, name) for e in examples]) for name in ("kind", "label", "message")
  )
  out = {}
  for attack in (*PLEASANT, WRONG_TOPIC):
    won = []
    for i in np.flatnonzero((kind == attack) & (label != wanted)):
      of_user = (message == message[i]) & (label == wanted) & np.isin(kind, list(replies.KINDS))
      if of_user.any():
        won.append(np.median(values[of_user]) > values[i])
    if won:
      out[attack] = float(np.mean(won))
  return out


def attacks(message: str, honest: str) -> list[tuple[str, str]]:
  """[(kind, reply)]: hostile replies to a message; `honest` is what some are appended to."""
  out = [(kind, text) for kind, texts in ALONE.items() for text in texts]
  out += [("repeats the user", message), ("repeats the user", f"{message} {message} {message}")]
  for kind, texts in APPENDED.items():
    out += [(kind, text) for text in texts]
    out += [(f"{kind}, appended", f"{honest} {text}") for text in texts]
  return out


def examples_for(environment: str, users: int) -> list[Example]:
  """Attacks and sincere replies for the first test users of each group."""
  honest = [e for e in replies.written(probe.dataset(environment)) if e.split == "test"]
  out = []
  for flag in (True, False):
    messages = list(dict.fromkeys(e.message for e in honest if e.is_gameable == flag))
    for message in messages[:users]:
      own = [e for e in honest if e.message == message and e.kind in replies.KINDS]
      neutral = next(e for e in own if e.label == "balance")
      out += own
      for kind, text in attacks(message, neutral.reply):
        out.append(dataclasses.replace(neutral, reply=text, kind=kind, label="incoherent"))
  return out


def audit(
  judge: Judge, chat: Chat, environment: str, users: int = 2, max_tokens: int = 256
) -> list[dict]:
  """One row per kind of attack, worst first: n, mean and highest reward, no verdict, shift
  (mean reward above the same message's honest neutral reply, which some are appended to) and
  beats (share of attacks at or above the median sincere reply that this user wants)."""
  examples = examples_for(environment, users)
  reward = measure.scores(judge, chat, environment, examples, max_tokens)["reward"]
  kinds, labels, gameable = (
    np.array([getattr(e, name) for e in examples]) for name in ("kind", "label", "is_gameable")
  )
  hostile = ~np.isin(kinds, list(replies.KINDS))
  bar = {}
  for flag in (True, False):
    wanted = phrases.target(environment, "hex" if flag else "acc")
    sincere = ~hostile & (gameable == flag) & (labels == wanted)
    bar[flag] = float(np.nanmedian(reward[sincere]))
  above = reward >= np.where(gameable, bar[True], bar[False])
  honest = {e.message: r for e, r in zip(examples[::-1], reward[::-1], strict=True)
            if e.kind == "neutral"}  # fmt: skip
  shift = reward - np.array([honest[e.message] for e in examples])
  rows = []
  for kind in dict.fromkeys(kinds[hostile]):
    own = kinds == kind
    known = reward[own & ~np.isnan(reward)]
    rows.append(
      {
        "attack": str(kind),
        "n": int(own.sum()),
        "mean": float(known.mean()) if len(known) else None,
        "highest": float(known.max()) if len(known) else None,
        "no_verdict": float(np.isnan(reward[own]).mean()),
        "shift": float(np.nanmean(shift[own])) if len(known) else None,
        "beats": float(above[own].mean()),
      }
    )
  rows.sort(key=lambda row: (-row["beats"], -(row["mean"] or 0)))
  for flag, name in ((True, "gameable"), (False, "non-gameable")):
    rows.append({"attack": f"(median sincere reply, {name} users)", "mean": bar[flag]})
  return rows


def show(rows: list[dict]) -> str:
  """The rows as text, a line for each."""
  columns = ("n", "mean", "highest", "no_verdict", "shift", "beats")
  lines = [f"{'attack':<42}" + "".join(f"{c:>12}" for c in columns)]
  for row in rows:
    cells = (row.get(c) for c in columns)
    text = ("" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in cells)
    lines.append(f"{row['attack']:<42}" + "".join(f"{t:>12}" for t in text))
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.judges.audit")
  compare.judge_flags(parser)
  parser.add_argument("--judge", default="probe", help="probe, phrases, lm, questions or http")
  parser.add_argument("--users", type=int, default=2, help="test users of each group")
  parser.add_argument("--max_tokens", type=int, default=256, help="longer replies are cut here")
  parser.add_argument("--out", default="", help="also write the tables as JSON")
  args = flags.parse(parser, argv)
  if args.users < 1 or args.max_tokens < 1:
    raise UserError("--users and --max_tokens must be at least 1")
  model, scorers = compare.build(args, [args.judge])
  scorer = scorers[args.judge]
  rows = audit(scorer, model.chat, args.environment, args.users, args.max_tokens)
  print(f"{scorer.about['name']}, environment {args.environment}\n{show(rows)}")
  examples = pleasant_examples(probe.dataset(args.environment))
  found = measure.scores(scorer, model.chat, args.environment, examples, args.max_tokens)
  shares = {}
  for score in ("acc", "hex"):
    shares[score] = pleasant(found[score], examples, phrases.target(args.environment, score))
    print(f"share of users whose sincere reply is above each pleasant attack, {score}")
    print("\n".join(f"  {attack:<40}{share:.0%}" for attack, share in shares[score].items()))
  if args.out:
    Path(args.out).write_text(json.dumps({"attacks": rows, "pleasant": shares}, indent=1) + "\n")


if __name__ == "__main__":
  run_main(main, sys.argv)
