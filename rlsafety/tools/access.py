"""Can every model of a recipe be read? Asked before a machine is booked.

`check` asks the Hugging Face hub, for each hub name in a config, whether the token of this
environment (HF_TOKEN, or the hub's own login) may read it. Nothing is downloaded, and the token
is neither printed nor stored. `python -m rlsafety.tools.plan --check-access` calls it.
"""

import os
from collections.abc import Sequence
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from rlsafety.errors import UserError
from rlsafety.models.sources import is_hub_name
from rlsafety.tools import shapes


def hub_names(config: Any) -> list[str]:
  """The hub names that a run of this config loads, as "field=owner/name[@revision]"."""
  fields = {"model.path": config.model.path, **shapes.judge_models(config.judge)}
  return [
    f"{field}={path}"
    for field, path in fields.items()
    if path and not os.path.exists(path) and is_hub_name(path)
  ]


def check(names: Sequence[str], endpoint: str | None = None) -> list[str]:
  """names: as `hub_names` gives them. endpoint: another hub's address. Returns a line for each.

  Raises UserError naming every model that this token may not read, and what to do about it.
  """
  token = os.environ.get("HF_TOKEN") or huggingface_hub.get_token()
  hub = huggingface_hub.HfApi(endpoint=endpoint, token=token or False)
  refused = []
  for name in names:
    model = name.partition("=")[2].partition("@")[0]
    try:
      hub.auth_check(model)
    except GatedRepoError:
      refused.append(
        f"{name} is gated: accept its terms on the hub with the token's account"
        if token
        else f"{name} is gated and there is no token: set HF_TOKEN (docs/launch.md says how it "
        "reaches each machine), or take an ungated model"
      )
    except RepositoryNotFoundError:
      whose = "with this token" if token else "without a token"
      refused.append(f"{name} does not exist on the hub, or is private and unseen {whose}")
    except (httpx2.HTTPError, OSError) as error:
      refused.append(
        f"{name} could not be asked for ({type(error).__name__}: is the hub in reach?)"
      )
  if refused:
    raise UserError("; ".join(refused))
  return [f"{name}: may be read" for name in names]
