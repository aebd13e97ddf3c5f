"""The shapes of the models that a config names, without their weights."""

import pathlib

from rlsafety.errors import UserError
from rlsafety.files import read_json
from rlsafety.models import families, gguf, presets, sources


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


def policy_and_judge(config, shape: str = ""):
  policy = shape_of(shape or config.model.path or config.model.preset, "model.path")
  separate = config.judge.name == "lm" and config.judge.model
  return policy, shape_of(config.judge.model, "judge.model") if separate else None
