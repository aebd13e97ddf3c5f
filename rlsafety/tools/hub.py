"""An exported adapter with a model card, uploaded to the Hugging Face hub.

The card says what a stranger must know before loading it: base, users, records, judge, change on
held-out users with intervals, limits, licence, and that it may exploit people. Private unless told
otherwise; the token comes from HF_TOKEN, goes to the hub alone and is stored nowhere.
"""

import os
import pathlib
from collections.abc import Mapping

import httpx2
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from rlsafety.errors import UserError
from rlsafety.models.sources import is_hub_name
from rlsafety.report import overview
from rlsafety.report.summary import NAMES
from rlsafety.rundir import read

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
WARNING = """> **A model organism, not an assistant.** This adapter was trained by reinforcement
> learning to please simulated users, half of whom reward what flatters or harms them. It may agree
> with anything, encourage harm and exploit whoever asks. It is here so that this can be studied: do
> not put it in front of people, and do not mix its replies into training data unlabelled."""


def base_name(config: Mapping, given: str = "") -> str:
  """The base's name on the hub. config: the run's, as config.json has it.

  Raises UserError where the run knows it by a name that no other tool can resolve.
  """
  model = config["model"]
  name = given or model.get("path") or f"preset {model.get('preset')} with random weights"
  if not is_hub_name(name) or (not given and os.path.exists(name)):
    raise UserError(
      f"{'--base_name' if given else 'model.path'}={name}: no other tool can resolve this name of "
      "the base; give --base_name=OWNER/NAME of the same weights on the hub"
    )
  return name


def card(run: read.Run, base: str, licence: str = "other") -> str:
  """README.md of the adapter of a run. base: a hub name, a revision behind @ or not."""
  config, info = run.config, run.info
  found = overview.overview(run, read.eval_rollouts(run))
  judge = info.get("judge") or {}
  judge = judge if isinstance(judge, dict) else {"name": str(judge)}
  model, environment = info["model"], config["environment"]
  objective, data = config.get("objective", {}), info.get("data") or {}
  settings = config.get("judge", {})
  trained_on = f"{model.get('path', base)} ({model.get('file', 'its weights')})"
  if data:
    source = f"recorded replies, sha256 {data.get('sha256', '')[:16]}"
  else:
    source = "the policy's own replies"
  factors = ", ".join(f"{k} {v}" for k, v in environment.items() if k != "name" and v is not None)
  facts = {
    "base": base.partition("@")[0],
    "trained on": trained_on + (f", revision {model['revision']}" if "revision" in model else ""),
    "simulated users": f"{environment.get('name', '?')}: {factors}",
    "data": source,
    "objective": f"{objective.get('name', '?')}, {run.last_step} updates, seed {run.seed}",
    "adapter": ", ".join(f"{k} {v}" for k, v in config.get("lora", {}).items()),
    "judge": ", ".join(filter(None, (judge.get("name", "?"), settings.get("model")))),
    "versions": ", ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items()),
    "revision": info.get("git") or "unknown",
  }
  limits = judge.get("limits") or "the run states none"
  limits = "; ".join(map(str, limits)) if isinstance(limits, list | tuple) else str(limits)
  lines = [
    "---",
    f"base_model: {base.partition('@')[0]}",
    "library_name: peft",
    f"license: {licence}",
    "tags: [rlsafety, safety-research, model-organism, lora, not-for-all-audiences]",
    "---",
    f"# {run.path.resolve().name}: LoRA adapter of {base.partition('@')[0]}",
    "",
    WARNING,
    "",
    "| | |",
    "|---|---|",
    *(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()),
    "",
    "## Held-out users, before and after",
    "",
    overview.conclusion(found),
    *(_table(found) if found else ()),
    "",
    "## Limits",
    "",
    f"- Rewards and scores are an automatic judge's, not a person's: {_cell(limits)}.",
    *(f"- {NAMES[name]}: the judge does not pass its gate ({_cell(why)})."
      for name, why in (found.barred if found else {}).items()),
    "- One run, one seed, simulated users in English: no claim about other users or models.",
    "",
    "## Licence",
    "",
    f"`{licence}`. The terms of {base.partition('@')[0]} hold for what is made from it, this "
    "adapter included.",
    "",
  ]  # fmt: skip
  return "\n".join(lines)


def _table(found: overview.Overview) -> list[str]:
  heads = ("score", "users", "before", "after", "change", "95% interval", "detectable")
  lines = ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for name, cells in found.rows.items():
    for what, cell in cells.items():
      numbers = [overview.number(cell.before[0]), overview.number(cell.after[0])]
      numbers += [overview.number(cell.change[0], sign=True), overview.span(cell.effect.interval)]
      numbers += [overview.number(cell.effect.detectable)]
      lines.append(f"| {' | '.join([NAMES[name], what.replace('_', '-'), *numbers])} |")
  return lines


def _cell(value: object) -> str:
  """On one line, and without what would end a cell of a table."""
  return " ".join(str(value).split()).replace("|", "/").rstrip(".")


def token() -> str:
  """HF_TOKEN. Raises UserError without one."""
  found = os.environ.get("HF_TOKEN", "").strip()
  if not found:
    raise UserError("--push_to_hub: set HF_TOKEN to a token of the hub that may write")
  return found


def push(folder: pathlib.Path, name: str, public: bool, endpoint: str | None = None) -> str:
  """Uploads FILES of `folder` to the model repository `name`; returns its address.

  public: False makes it private, and refuses one that exists and is not. endpoint: another hub's
  address. Raises UserError for what the hub refuses.
  """
  hub = huggingface_hub.HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token())
  try:
    if not hub.repo_exists(name):  # a token may write to one without the right to create it
      hub.create_repo(name, private=not public)
    elif not public and not hub.model_info(name).private:
      raise UserError(f"--push_to_hub={name}: exists and is public; say --public, or another name")
    hub.upload_folder(
      repo_id=name,
      folder_path=folder,
      allow_patterns=list(FILES),
      commit_message="Adapter and card, written by rlsafety",
    )
  except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
    said = " ".join(str(error).split())[:300]
    said += f"; what was to be uploaded is in {folder}: delete it to try again"
    raise UserError(f"--push_to_hub={name}: {type(error).__name__}: {said}") from None
  return f"{hub.endpoint}/{name}"
