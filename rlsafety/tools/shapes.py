"""The shapes of the models that a config names, without their weights."""

import pathlib

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.models import architecture, families, gguf, presets, sources


def shape_of(name: str, field: str):
  """ModelConfig of a preset, a local folder, a GGUF file, or a hub name whose shape we know."""
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    path = folder / "config.json"
    return families.model_config(read_json(path), str(path))
  if name.startswith("package:") or folder.suffix == ".gguf":
    path = sources.resolve(name)
    return families.model_config(gguf.read_config(gguf.open_file(path)), str(path))
  short = name.split("/")[-1].split("@")[0].lower().removeprefix("meta-").removesuffix("-hf")
  known = presets.PRESETS
  if short not in known:  # a base model has the shape of its chat version
    chat = (short + "-", short.replace("gemma-", "gemma-1.1-") + "-")
    short = next((k for k in known if k.startswith(chat)), short)
  if short not in known and "/" in name:
    raise UserError(f"{field}={name}: no known shape; name a local folder or --shape=PRESET")
  return presets.preset(short)


def judge_models(judge) -> dict[str, str]:
  """{field: path} of the models that judges load, "" where the policy's base judges."""
  reads = ("lm", "questions")
  evaluator = judge.evaluator or judge.name
  fields, own = {}, evaluator in reads and judge.evaluator_model  # in place of judge.model
  rewards = [judge.name, *(text.partition("=")[0] for text in judge.also)]
  if set(reads) & {*rewards, *([] if own else [evaluator])} and judge.name not in ("probe", "http"):
    fields["judge.model"] = judge.model
  if own:
    fields["judge.evaluator_model"] = judge.evaluator_model
  if judge.base:
    fields["judge.base"] = judge.base
  return fields


def judges(config) -> list:
  """ModelConfigs of the models that judge beside the policy's base, each once, largest first."""
  paths = {path: field for field, path in judge_models(config.judge).items() if path}
  models = [shape_of(path, field) for path, field in paths.items()]
  return sorted(models, key=architecture.params_count, reverse=True)


def policy_and_judge(config, shape: str = ""):
  """ModelConfigs of the policy and of its judge, None where the policy's base judges; of several
  models that judge, the largest."""
  policy = shape_of(shape or config.model.path or config.model.preset, "model.path")
  return policy, next(iter(judges(config)), None)
