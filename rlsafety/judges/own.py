"""A judge of your own: any function that you name by its dotted path, such as my_study.kindness.

  def kindness(users, texts):
    return {"reward": [[1.0 + 9.0 * ("thank" in text) for text in group] for group in texts]}

users: P `Scenario`s. texts: P lists of G replies, cut at their end. It returns a mapping with
"reward", "acc" or "hex", each [P][G] numbers; NaN or None is no verdict. A function with the
attribute `on_tokens = True` is given `Replies` in place of texts and may be jitted. Empty and
broken replies never reach the result: they get `judge.degenerate`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rlsafety import sharding
from rlsafety.environments import Scenario
from rlsafety.errors import UserError, import_own, own_code
from rlsafety.metrics.gaps import SCORES
from rlsafety.models.chat import Chat
from rlsafety.types import Replies


def find(name: str) -> Callable:
  """The function that `name` names. Raises UserError if it cannot be imported or called."""
  module, _, function = name.rpartition(".")
  found = getattr(import_own("judge.name", name, module), function, None)
  if found is None:
    raise UserError(f"judge.name={name}: {module} has no {function}; it is package.module.function")
  if not callable(found):
    raise UserError(f"judge.name={name}: is a {type(found).__name__}, not a function")
  return found


def make(name: str, chat: Chat, unusable: float = 1.0) -> Callable[..., tuple[dict, dict]]:
  """Returns score(scenarios, replies) -> ({reward, acc, hex}: [P, G], metrics).

  What the function does not score is NaN. Raises UserError naming it where it raises, and for an
  answer that is no mapping, has other names or shapes, or holds an infinity.
  """
  function = find(name)

  def score(scenarios: Sequence[Scenario], replies: Replies):
    host = sharding.fetch(replies)
    P, G = host.lengths.shape
    shown = replies
    if not getattr(function, "on_tokens", False):
      text = lambda p, g: chat.decode(host.tokens[p, g, : host.lengths[p, g]].tolist())  # noqa: E731
      shown = [[text(p, g) for g in range(G)] for p in range(P)]
    with own_code(f"judge.name={name}"):
      found = function(scenarios, shown)
    ok = (host.lengths > 0) & ~host.broken
    return _checked(name, found, ok, unusable), {"judge_degenerate": float(np.mean(~ok))}

  return score


def _checked(name: str, found, ok: np.ndarray, unusable: float) -> dict[str, np.ndarray]:
  if not isinstance(found, dict) or not found or set(found) - set(SCORES):
    keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise UserError(f"judge.name={name}: returned {keys}; a dict of {', '.join(SCORES)} is needed")
  out = {}
  for key in SCORES:
    if key not in found:
      out[key] = np.full(ok.shape, np.nan, np.float32)
      continue
    try:
      values = np.array(sharding.fetch(found[key]), np.float32)  # None becomes NaN
    except (TypeError, ValueError) as error:
      raise UserError(f"judge.name={name}: {key} holds no numbers ({error})") from None
    if values.shape != ok.shape or np.isinf(values).any():
      raise UserError(
        f"judge.name={name}: {key} has shape {values.shape}, {ok.shape} finite numbers are needed"
      )
    out[key] = np.where(ok, values, np.float32(unusable))
  return out


def describe(name: str) -> dict[str, str]:
  return {"name": f"the function {name}", "limits": "its own; it was not measured here"}
