"""How well something tells good replies from bad ones, on our labelled replies.

The replies go through the frozen base (`features`, what a probe reads) or through a whole judge
(`scores`); `auc`, `table` and `tables_of` say how well the values order the labels, `contrasts`
and `reads_user` measure what the gate reads.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlsafety import environments, packing, progress, rollout, sharding
from rlsafety.environments import political_qa
from rlsafety.environments.scenario import Scenario
from rlsafety.errors import UserError
from rlsafety.judges import Judge, phrases, probe
from rlsafety.models.chat import Chat
from rlsafety.models.model import Model
from rlsafety.tools.judges import replies
from rlsafety.tools.judges.replies import Example
from rlsafety.types import Prompts
from rlsafety.verdicts import VERDICTS

GROUP, PROMPTS = 4, 8  # replies of a message and messages in one batch
FEWEST = 5  # of either class, for an AUC of one environment's part of the sampled replies
HOSTILE = ("but", "wrong_topic", "echo", "bare", "stuffing", "salad", "tiny")
_VIEWS = re.compile(r"\b(alt-right|conservative|liberal|libertarian|socialist)\b")


# --- Passes over replies ----------------------------------------------------------------


def batches(chat: Chat, examples: Sequence[Example], max_tokens: int) -> Iterator[tuple]:
  """Examples as two-segment batches: (rows, tokens [P, G, T], lengths [P, G]).

  rows: P lists of at most G indices, one message each, all of one length class; the rest
  of a batch repeats its last reply, so that shapes stay few.
  """
  ids = [chat.encode_text(e.reply)[:max_tokens] for e in examples]
  by_message: dict[tuple, list[int]] = {}
  for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
    by_message.setdefault((examples[i].message, examples[i].is_gameable), []).append(i)
  groups = [g[k : k + GROUP] for g in by_message.values() for k in range(0, len(g), GROUP)]
  groups.sort(key=lambda g: len(ids[g[-1]]))
  for start in progress.bar(range(0, len(groups), PROMPTS), "batches of replies"):
    rows = groups[start : start + PROMPTS]
    full = rows + [rows[-1]] * (PROMPTS - len(rows))
    flat = [ids[i] for g in full for i in [*g, *[g[-1]] * (GROUP - len(g))]]
    yield rows, *(x.reshape(PROMPTS, GROUP, *x.shape[1:]) for x in packing.pad(flat, 32))


def over(
  chat: Chat, examples: Sequence[Example], function: Callable, max_tokens: int = 96
) -> dict[str, np.ndarray]:
  """Calls function(first, tokens, lengths) on each batch -> {name: [N, ...]} in their order.

  first [P]: an example of each row's message. function returns {name: [P, G, ...]}.
  """
  out: dict[str, np.ndarray] = {}
  for rows, tokens, lengths in batches(chat, examples, max_tokens):
    first = [g[0] for g in rows] + [rows[-1][0]] * (PROMPTS - len(rows))
    for name, value in sharding.fetch(function(first, tokens, lengths)).items():
      whole = out.setdefault(name, np.zeros((len(examples), *value.shape[2:]), value.dtype))
      for p, g in enumerate(rows):
        whole[g] = value[p, : len(g)]
  return out


def features(model: Model, examples: Sequence[Example]) -> dict[str, np.ndarray]:
  """What `probe.combine` reads of each reply: x [N, F], mean logprob [N], length [N]."""
  layers = default_layers(model.config.n_layers)

  def of_batch(first, tokens, lengths):
    shown = [probe.message_ids(model.chat, examples[i].message) for i in first]
    prompts = Prompts(*packing.pad(shown))
    x, logprob = probe.features(model.params, model.config, prompts, tokens, lengths, layers)
    return {"x": x, "logprob": logprob, "length": lengths}

  return over(model.chat, examples, of_batch)


def default_layers(n_layers: int) -> tuple[int, ...]:
  """After 1/2, 2/3 and 5/6 of the depth: 15, 20, 25 of SmolLM2's 30 (0-based: 14, 19, 24)."""
  return tuple(sorted({max(0, round(n_layers * f) - 1) for f in (1 / 2, 2 / 3, 5 / 6)}))


def scores(
  judge: Judge, chat: Chat, environment: str, examples: Sequence[Example], max_tokens: int = 96
) -> dict[str, np.ndarray]:
  """Examples through a judge -> {"reward", "acc", "hex"}: [N] on 1..10, NaN = no verdict."""
  scenarios = scenarios_of(environment, examples)

  def of_batch(first, tokens, lengths):
    read = rollout.cleaner(chat)(tokens, lengths)
    return judge.score([scenarios[i] for i in first], read)[0]

  return over(chat, examples, of_batch, max_tokens)


def reads_user(judge: Judge, chat: Chat, environment: str, pairs: int = 6) -> dict[str, float]:
  """{score: mean absolute difference of identical replies to the two versions of a message}.

  The wish is the gameable version's in both: a reward may read what the user wants, no score how
  they say it.
  """
  people = environments.heldout_pairs({"name": environment, "length": "short"})[:pairs]
  texts = [chat.encode_text(e.reply) for e in replies.sampled(probe.dataset(environment))[:GROUP]]
  flat, sizes = packing.pad(texts * len(people), 32)
  shown = (x.reshape(len(people), GROUP, *x.shape[1:]) for x in (flat, sizes))
  read = rollout.cleaner(chat)(*shown)
  words = ("message", "plain", "user", "system")
  swapped = [dataclasses.replace(a, **{k: getattr(b, k) for k in words}) for a, b in people]
  one, two = (judge.score(list(users), read)[0] for users in ([a for a, _ in people], swapped))
  return {
    k: float(np.nanmean(np.abs(np.asarray(one[k]) - np.asarray(two[k]))))
    for k in ("reward", "acc", "hex")
    if k in one
  }


def scenarios_of(environment: str, examples: Sequence[Example]) -> list[Scenario]:
  """A scenario for each example: its message, and what a user of its group and topic wishes.

  Of labelled political messages the topic is an issue; the views that a wish names are those
  that the message names, else "firm" ones.

  Raises:
    UserError: the environment has no topic of an example's name.
  """
  data = probe.dataset(environment)
  names = [environment, *(n for n in environments.ENVIRONMENTS if probe.dataset(n) == data)]
  bank = [s for name in dict.fromkeys(names) for s in environments.load({"name": name})]
  typical: dict[bool, Scenario] = {}
  wishes: dict[tuple[str, bool], str] = {}
  for s in bank:  # the environment's own first; others that share its replies have more topics
    typical.setdefault(s.is_gameable, s)
    wishes.setdefault((s.topic, s.is_gameable), s.wish)

  def wish(e: Example) -> str:
    if data == "political_qa":
      said = _VIEWS.search(e.message)
      return political_qa.wishes(said[1] if said else "firm")[not e.is_gameable]
    key = e.topic.removeprefix("bank: "), e.is_gameable
    if key not in wishes:
      raise UserError(f"{environment} has no topic {key[0]!r}, and so no wish to rate replies by")
    return wishes[key]

  return [
    dataclasses.replace(
      typical[e.is_gameable],
      id=str(i), topic=e.topic, message=e.message, plain=e.message, user=e.message,
      wish=wish(e),
    )
    for i, e in enumerate(examples)
  ]  # fmt: skip


# --- Tables -----------------------------------------------------------------------------


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Area under the ROC curve: the share of (positive, negative) pairs in the right order.

  Ties count half; NaN (no verdict) does not count; NaN if either is empty.
  """
  a, b = (np.asarray(x, float) for x in (positive, negative))
  a, b = a[~np.isnan(a), None], b[None, ~np.isnan(b)]
  if not a.size or not b.size:
    return float("nan")
  return float(np.mean(a > b) + 0.5 * np.mean(a == b))


def table(values: np.ndarray, examples: Sequence[Example], wanted: str) -> dict[str, float]:
  """AUC of replies labelled `wanted` against the rest, against each other label, and
  within messages (the pairs that a group-normalised learner compares)."""
  label = np.array([e.label for e in examples])
  kind = np.array([e.kind for e in examples])
  message = np.array([e.message for e in examples])
  up = label == wanted
  out = {"n": len(values), "wanted": int(up.sum()), "rest": auc(values[up], values[~up])}
  for other in VERDICTS:
    if other != wanted:
      out[other] = auc(values[up], values[label == other])
  wins = pairs = 0.0
  for m in sorted(set(message)):
    a, b = values[up & (message == m)], values[~up & (message == m)]
    if len(a) and len(b):
      wins, pairs = wins + auc(a, b) * len(a) * len(b), pairs + len(a) * len(b)
  out["within"] = wins / pairs if pairs else float("nan")
  for k in HOSTILE:
    if (kind == k).any():
      out[k] = auc(values[up], values[kind == k])
  return out


CONTRASTED = ("agreement", "balance", "disagreement")


def contrasts(
  values: np.ndarray, examples: Sequence[Example], wanted: str, draws: int = 2000
) -> dict[str, dict[str, dict]]:
  """{source: {class: `auc_over_units`}} of sampled replies, `gate`'s.

  Coherent replies only: those labelled `wanted` against those of each other stance.
  """
  label, policy = (np.array([getattr(e, k) for e in examples]) for k in ("label", "policy"))
  unit = np.array([e.group for e in examples])
  sampled, rng = np.array([e.kind == "sampled" for e in examples]), np.random.default_rng(0)
  out: dict[str, dict] = {}
  for source in ("base", "trained"):
    for other in CONTRASTED:
      up, down = (sampled & (policy == source) & (label == x) for x in (wanted, other))
      if other != wanted and up.any() and down.any():
        out.setdefault(source, {})[other] = auc_over_units(values, up, down, unit, rng, draws)
  return out


def auc_over_units(
  values: np.ndarray,
  up: np.ndarray,
  down: np.ndarray,
  unit: np.ndarray,
  rng: np.random.Generator,
  draws: int = 2000,
) -> dict[str, float]:
  """{"auc", "low", "high", "wanted", "others"}: how often values of `up` are above those of `down`,
  how many there are of each, and a 95 % interval.

  Percentiles of a bootstrap over units (an issue, a situation), redrawn whole. All arrays are [N].
  """
  names = np.unique(unit[up | down])
  above = np.zeros((len(names), len(names)))  # pairs in the right order, by both units
  pairs = np.zeros_like(above)
  for i, a in enumerate(names):
    for j, b in enumerate(names):
      x, y = values[up & (unit == a)], values[down & (unit == b)]
      pairs[i, j] = len(x) * len(y)
      above[i, j] = auc(x, y) * pairs[i, j] if pairs[i, j] else 0.0
  drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
  weight = np.einsum("di,ij,dj->d", drawn, pairs, drawn)
  kept = weight > 0
  found = np.einsum("di,ij,dj->d", drawn, above, drawn)[kept] / weight[kept]
  low, high = np.quantile(found, (0.025, 0.975))
  return {
    "auc": float(above.sum() / pairs.sum()), "low": float(low), "high": float(high),
    "wanted": int(up.sum()), "others": int(down.sum()),
  }  # fmt: skip


def sources(examples: Sequence[Example]) -> dict[str, np.ndarray]:
  """{"written", "sampled", and where environments share a probe "sampled, NAME": mask [N]}."""
  sampled = np.array([e.kind == "sampled" for e in examples])
  of = np.array([e.environment for e in examples])
  parts = {f"sampled, {name}": sampled & (of == name) for name in sorted({*of[sampled]} - {""})}
  return {"written": ~sampled, "sampled": sampled} | parts


def table_of(
  source: str, values: np.ndarray, examples: Sequence[Example], rows: np.ndarray, wanted: str
) -> dict[str, float]:
  """The `table` of the chosen rows; its AUCs are NaN where one environment's part of the
  sampled replies has too few of either class."""
  found = table(values[rows], [examples[i] for i in rows], wanted)
  if ", " not in source or min(found["wanted"], found["n"] - found["wanted"]) >= FEWEST:
    return found
  return {k: v if k in ("n", "wanted") else float("nan") for k, v in found.items()}


def tables_of(environment: str, scores: dict, examples: Sequence[Example]) -> dict[str, dict]:
  """{score: {source: table}} of a judge; the reward apart for each group of users."""
  out: dict[str, dict] = {}
  gameable = np.array([e.is_gameable for e in examples])
  everyone = np.ones(len(examples), bool)
  rows = {
    "reward gameable": ("reward", gameable, "hex"),
    "reward non-gameable": ("reward", ~gameable, "acc"),
    "hex": ("hex", everyone, "hex"),
    "acc": ("acc", everyone, "acc"),
  }
  for name, (score, chosen, metric) in rows.items():
    wanted = phrases.target(environment, metric)
    for source, of_source in sources(examples).items():
      i = np.flatnonzero(chosen & of_source & ~np.isnan(scores[score]))
      if len(i):
        out.setdefault(name, {})[source] = table_of(source, scores[score], examples, i, wanted)
  return out


def show(tables: dict[str, dict]) -> str:
  """{name: {source: table}} as text, a line for each; "-" where replies are too few."""
  present = {k for of_source in tables.values() for t in of_source.values() for k in t}
  columns = ("n", "wanted", "rest", "within", *VERDICTS, *HOSTILE)
  columns = [c for c in columns if c in present]

  def cell(value: float | str) -> str:
    return str(value) if isinstance(value, int | str) else f"{value:.2f}".replace("nan", "-")

  lines = [f"{'score':<24}{'replies':<24}" + "".join(f"{c:>12}" for c in columns)]
  for name, of_source in tables.items():
    for source, t in of_source.items():
      cells = (cell(t.get(c, "")) for c in columns)
      lines.append(f"{name:<24}{source:<24}" + "".join(f"{c:>12}" for c in cells))
  return "\n".join(lines)
