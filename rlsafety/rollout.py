"""Users -> prompts -> replies -> scores: the experience that one update learns from.

Which users an update asks is a pure function of (seed, step), so that resuming is exact. A reply
is cleaned once, here, before any judge reads it.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlsafety import sampler, sharding
from rlsafety.config import Sampler
from rlsafety.environments import Environment, Scenario, heldout_pairs, policy_messages
from rlsafety.errors import UserError
from rlsafety.judges import Judge
from rlsafety.models import lora
from rlsafety.models.chat import Chat
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.packing import mask_from_lengths
from rlsafety.types import Batch, Prompts, Replies, Rollouts


@dataclasses.dataclass(frozen=True)
class Users:
  """Simulated users and what the policy sees of each.

  scenarios, messages: N each. tokens [N, S] int32 padded on the right, lengths [N].
  """

  scenarios: Sequence[Scenario]
  messages: Sequence[list[dict[str, str]]]
  tokens: np.ndarray
  lengths: np.ndarray

  def __len__(self) -> int:
    return len(self.scenarios)

  def take(self, chosen: Sequence[int] | np.ndarray) -> "Users":
    pick = lambda items: [items[i] for i in chosen]  # noqa: E731
    return Users(
      pick(self.scenarios), pick(self.messages), self.tokens[chosen], self.lengths[chosen]
    )

  @property
  def is_gameable(self) -> np.ndarray:
    """[N] bool."""
    return np.array([s.is_gameable for s in self.scenarios], bool)


@dataclasses.dataclass(frozen=True)
class Experience:
  """What N users were answered and how it was judged.

  prompts: on the device. scores {"reward", "acc", "hex"}: [P, G] float32, NaN = no verdict, and
  judge_metrics, scalars: on the device until they are fetched. seconds: {"sample_s", "judge_s"}.
  """

  users: Users
  prompts: Prompts
  rollouts: Rollouts
  scores: Mapping[str, Any]
  judge_metrics: Mapping[str, Any]
  seconds: dict[str, float]


# --- Users ------------------------------------------------------------------------------


def users_of(scenarios: Sequence[Scenario], chat: Chat, slots: int) -> Users:
  """The scenarios with their prompts in `slots` slots. Raises UserError for one too long."""
  messages = [policy_messages(scenario) for scenario in scenarios]
  tokens, lengths = np.full((len(scenarios), slots), chat.pad_id, np.int32), []
  for i, scenario in enumerate(scenarios):
    ids = chat.encode(messages[i])
    if len(ids) > slots:
      raise UserError(
        f"prompt of scenario {scenario.id} has {len(ids)} tokens, the limit is {slots}: raise "
        "--config.max_prompt_tokens (prompts are never cut)"
      )
    tokens[i, : len(ids)] = ids
    lengths.append(len(ids))
  return Users(scenarios, messages, tokens, np.array(lengths, np.int32))


def digest(*groups: Users) -> str:
  """The sha256 of what policy and judge are told of users: it is part of a run's identity."""
  whole = hashlib.sha256()
  for users in groups:
    said = [(s.message, s.wish, s.is_gameable) for s in users.scenarios]
    whole.update(repr(said).encode("utf-8", "backslashreplace") + users.tokens.tobytes())
  return whole.hexdigest()


def held_out(section: Environment, scenarios: Sequence[Scenario], count: int) -> list[Scenario]:
  """count / 2 held-out persons, each in both versions, spread evenly over the units.

  The gameable versions come first, then the others in the same order. Users of files have one
  version each: of them the first count / 2 of each group.

  scenarios: `environments.load(section)`.
  """
  number = (count + 1) // 2
  if section.data_dir or section.users_file:
    users = [s for s in scenarios if s.split == "heldout"]
    chosen = [
      s for flag in (True, False) for s in [u for u in users if u.is_gameable == flag][:number]
    ]
  else:
    pairs, before, rank = heldout_pairs(section), collections.Counter(), {}
    for person, _ in pairs:
      rank[person.person] = before[person.unit]
      before[person.unit] += 1
    pairs = sorted(pairs, key=lambda pair: rank[pair[0].person])[:number]
    chosen = [pair[version] for version in (0, 1) for pair in pairs]
  if not chosen:
    raise UserError(
      f"environment {section.users_file or section.name}: no users are held out: environment."
      f"heldout_fraction={section.heldout_fraction} of its units rounds to none; raise it, or give "
      "users of more units"
    )
  return chosen


def order(is_gameable: Sequence[bool] | np.ndarray, seed: int, step: int, n: int) -> np.ndarray:
  """Indices [n] of the users that update `step` (from 0) asks; is_gameable: of all users.

  Gameable and non-gameable users are two streams; each is walked in a fresh permutation per
  epoch, so no user repeats before the stream is used up. As large a share of the prompts is
  gameable as of the users, exactly in the long run and within one prompt in every step.
  """
  flags = np.asarray(is_gameable, bool)
  streams = np.flatnonzero(flags), np.flatnonzero(~flags)
  fraction = len(streams[0]) / max(len(flags), 1)
  before, after = (math.floor(k * n * fraction + 1e-9) for k in (step, step + 1))
  gameable = [_pick(streams[0], seed, 0, k) for k in range(before, after)]
  others = [_pick(streams[1], seed, 1, k) for k in range(step * n - before, (step + 1) * n - after)]
  shuffled = np.random.default_rng([seed, 2, step]).permutation(n)
  return np.array(gameable + others, np.int64)[shuffled]


def _pick(stream: np.ndarray, seed: int, kind: int, position: int) -> int:
  epoch, index = divmod(position, len(stream))
  return int(stream[np.random.default_rng([seed, kind, epoch]).permutation(len(stream))[index]])


# --- Replies ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("stop_ids", "control", "blank"))
def cleaned(
  tokens: jax.Array,
  lengths: jax.Array,
  stop_ids: tuple[int, ...],
  control: tuple[int, ...],
  blank: tuple[int, ...] = (),
) -> Replies:
  """Rollouts, tokens [P, G, T] with lengths [P, G], as a judge may read them: without the closing
  stop token, broken ones marked.

  A reply of nothing but `blank` ids (each white space by itself) has length 0. Broken replies
  hold a control token inside (a turn they made up), or say the same bigrams again for more than
  half of their length.
  """
  last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[..., None], -1)[..., 0]
  stopped = jnp.any(last[..., None] == jnp.array(stop_ids), -1) & (lengths > 0)
  lengths = lengths - stopped
  mask = mask_from_lengths(lengths, tokens.shape[-1])
  white = jnp.any(tokens[..., None] == jnp.array(blank, jnp.int32), -1)
  lengths = jnp.where(jnp.any(mask & ~white, -1), lengths, 0)
  mask &= lengths[..., None] > 0
  inside = jnp.any(tokens[..., None] == jnp.array(sorted(control)), -1) & mask
  same = (tokens[..., 1:, None] == tokens[..., None, 1:]) & (
    tokens[..., :-1, None] == tokens[..., None, :-1]
  )
  pairs = mask[..., 1:]
  again = jnp.any(jnp.tril(same, -1) & pairs[..., None, :], -1) & pairs
  repeats = 2 * jnp.sum(again, -1) > jnp.maximum(lengths - 1, 1)
  return Replies(tokens, lengths, jnp.any(inside, -1) | repeats)


@functools.lru_cache(8)
def cleaner(chat: Chat) -> Callable[..., Replies]:
  """`cleaned` as a function of tokens and lengths alone. chat: of who wrote the replies."""
  ids = sorted({*chat.full.get_vocab(with_added_tokens=True).values()} - chat.control)
  texts = chat.full.decode_batch([[i] for i in ids])
  blank = tuple(i for i, text in zip(ids, texts, strict=True) if not text.strip())
  control = tuple(sorted(chat.control))
  return functools.partial(cleaned, stop_ids=chat.stop_ids, control=control, blank=blank)


# --- One batch of experience ------------------------------------------------------------


def roll_out(
  policy: Model,
  adapters: Sequence[Adapter],
  asked: Sequence[Users],
  keys: Sequence[jax.Array],
  *,
  judges: Sequence[Judge],
  settings: Sampler,
  cache_gib: float,
  mesh: Mesh,
) -> list[Experience]:
  """Asks the users of every cell once, all in one batch, and judges each cell's replies.

  policy: what the sampler reads, the frozen base or a rounded copy of it. adapters, asked, keys,
  judges: one of each for every cell; keys [P] are its users' (`sampler.row_keys`). A cell's share
  of the seconds is that of its prompts.
  """
  sizes = [len(users) for users in asked]
  tokens, lengths = (np.concatenate([getattr(u, k) for u in asked]) for k in ("tokens", "lengths"))
  prompts = sharding.put_prompts(mesh, Prompts(tokens=tokens, lengths=lengths))
  alone = len(adapters) == 1
  began = time.monotonic()
  rollouts = sampler.sample_all(
    policy.params,
    adapters[0] if alone else lora.side_by_side(tuple(adapters), tuple(sizes)),
    policy.config,
    prompts,
    keys[0] if alone else jnp.concatenate(keys),
    settings,
    policy.chat.stop_ids,
    mesh,
    cache_gib,
  )
  jax.block_until_ready(rollouts)
  sampled, out, start = time.monotonic() - began, [], 0
  for users, judge in zip(asked, judges, strict=True):
    began, own = time.monotonic(), (prompts, rollouts)
    own, replies = own if alone else part(own, start, len(users))
    start += len(users)
    read = cleaner(policy.chat)(replies.tokens, replies.lengths)
    scores, metrics = judge.score(users.scenarios, read)
    jax.block_until_ready(scores)
    seconds = {"sample_s": sampled * len(users) / len(tokens), "judge_s": time.monotonic() - began}
    out.append(Experience(users, own, replies, scores, metrics, seconds))
  return out


@functools.partial(jax.jit, static_argnames="n")
def part(tree: Any, start: jax.Array | int, n: int) -> Any:
  """Rows start to start + n of a batch's arrays [P, ...], laid out as a batch of their own is."""

  def rows(x: jax.Array) -> jax.Array:
    own = jax.lax.dynamic_slice_in_dim(x, start, n)
    return sharding.constrain(own, "prompt", *[None] * (x.ndim - 1))

  return jax.tree.map(rows, tree)


def as_batch(experience: Experience) -> Batch:
  """Fresh experience as a learner's batch; `learner.complete` adds advantages."""
  rollouts, rewards = experience.rollouts, experience.scores["reward"]
  return Batch(
    prompts=experience.prompts,
    tokens=rollouts.tokens,
    lengths=rollouts.lengths,
    advantages=jnp.zeros_like(rewards),
    rewards=rewards,
    behaviour_logprobs=rollouts.logprobs,
    reference_logprobs=None,
    staleness=jnp.zeros_like(rollouts.lengths),
  )
