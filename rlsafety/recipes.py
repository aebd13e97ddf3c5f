"""Recipes and flags -> the frozen config of a run.

A recipe in configs/ calls `base()`, changes what it is about and returns the result; its
docstring is the experiment's record. Any field of it is a flag, --config.a.b=VALUE.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import traceback
import typing
from collections.abc import Mapping, Sequence

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from rlsafety import environments, flags, sections
from rlsafety.config import Config, Model, Objective, to_json
from rlsafety.environments import Environment
from rlsafety.errors import UserError, first_line
from rlsafety.flags import did_you_mean, refuse
from rlsafety.sections import Section

# --- Recipes --------------------------------------------------------------------------


def base() -> ConfigDict:
  """All fields, mutable, for a recipe to change; a flag or a recipe cannot add one.

  Fields of `objective` and `environment` other than their names are unset (None): what is left
  so takes the value that the name brings with it.
  """
  c = ConfigDict()
  for field in dataclasses.fields(Config):
    value = field.default
    if field.name != "model":
      c[field.name] = ConfigDict(dataclasses.asdict(value)) if isinstance(value, Section) else value
  c.model = ConfigDict({field.name: field.default for field in dataclasses.fields(Model)})
  c.objective = sections.blank(Objective(), keep=("name",))
  c.environment = sections.blank(Environment(), keep=("name",))
  return c


def frozen(config: ConfigDict | Mapping) -> Config:
  """The typed, checked config of a recipe's or of stored values. Raises UserError by field."""
  values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  return Config.of({**values, "environment": environments.resolved(values["environment"])})


def replaced(config: Config, changes: Mapping[str, object]) -> Config:
  """config with {"a.b": value} changed; where a name changes, its own defaults come with it."""
  values = to_json(config)
  for field, value in changes.items():
    *path, last = field.split(".")
    node = values
    for part in path:
      node = node[part]
    if last == "name" and path in (["objective"], ["environment"]):
      node.clear()
    node[last] = value
  return frozen(values)


def load_recipe(recipe: str) -> ConfigDict:
  """FILE.py[:argument] -> what its get_config(argument) returns."""
  config = called(recipe, "get_config", "--config")
  if not isinstance(config, ConfigDict):
    raise UserError(f"--config={recipe.partition(':')[0]}: get_config() returns no ConfigDict")
  return config


def called(recipe: str, function: str, flag: str) -> object:
  """FILE.py[:argument] -> function(argument) of that file. Raises UserError naming the flag."""
  path, _, argument = recipe.partition(":")
  file = pathlib.Path(path)
  if not file.is_file() or file.suffix != ".py":
    folder = file.parent
    names = sorted(p.stem for p in folder.glob("*.py")) if folder.is_dir() else []
    near = did_you_mean(str(file.with_suffix(".py")), [str(folder / f"{n}.py") for n in names])
    problem = "is no Python file" if file.is_file() else "no such file"
    raise UserError(f"{flag}={path}: {problem}{near}")
  spec = importlib.util.spec_from_file_location("recipe", path)
  assert spec and spec.loader  # every .py file has both
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"{flag}={path}: cannot be read ({_said(error, path)})") from error
  if not callable(getattr(module, function, None)):
    raise UserError(f"{flag}={path}: has no {function}() function")
  make = getattr(module, function)
  try:
    return make(argument) if argument else make()
  except UserError:
    raise
  except Exception as error:
    if isinstance(error, TypeError) and "positional argument" in str(error):
      raise UserError(f"{flag}={recipe}: this recipe takes no argument") from None
    raise UserError(f"{flag}={recipe}: {function}() failed ({_said(error, path)})") from error


def _said(error: Exception, path: str) -> str:
  """An error in the code of a recipe, with the line of its file where it has one."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == str(pathlib.Path(path).absolute())]
  lines = lines or [f.lineno for f in frames if f.filename == path]
  where = f"line {lines[-1]}, " if lines else ""
  return f"{where}{type(error).__name__}: {first_line(error)}"


def arguments(
  file: str, text: str, known: Mapping[str, tuple[str, ...]], flag: str = "--config"
) -> dict[str, str]:
  """A recipe's argument "key=value,..." -> {key: value}, the first value where none is given.

  known: the accepted values of each key, the default first; a tuple of one accepts any. flag: what
  an error names.
  """
  chosen = {key: values[0] for key, values in known.items()}
  for pair in filter(None, text.split(",")):
    key, equals, value = pair.partition("=")
    if key not in known or not equals:
      hint = did_you_mean(key, known)
      raise UserError(f"{flag}={file}:{pair}: arguments are {', '.join(known)}{hint}")
    if len(known[key]) > 1 and value not in known[key]:
      hint = did_you_mean(value, known[key])
      raise UserError(f"{flag}={file}:{key}={value}: choose from {', '.join(known[key])}{hint}")
    chosen[key] = value
  return chosen


# --- Command line ---------------------------------------------------------------------


class _Whole(absl_flags.ArgumentParser):
  """Whole numbers, also as 1e3."""

  def parse(self, argument: str | int) -> int:
    try:
      return int(argument)
    except ValueError:
      if float(argument) != int(float(argument)):
        raise ValueError(f"{argument} is no whole number") from None
      return int(float(argument))


class _List(absl_flags.ArgumentParser):
  """Tuples as q,v or (q, v)."""

  def parse(self, argument: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(argument, tuple):
      return argument
    return tuple(part.strip(" '\"") for part in argument.strip("()[]").split(",") if part.strip())


config_flags.register_flag_parser_for_type(int, _Whole())
config_flags.register_flag_parser_for_type(tuple, _List())


def from_flags(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[Config, argparse.Namespace]:
  """argv of a program -> the frozen config of --config and --config.a.b, and its own arguments.

  Raises UserError for whatever is unknown or ill-typed, naming the nearest field.
  """
  parser.add_argument("--config", metavar="FILE.py[:ARGUMENT]", help="recipe, see configs/")
  parser.epilog = f"fields of the config and their defaults, --config.FIELD=VALUE:\n{help_text()}"
  args, rest = parser.parse_known_args(list(argv[1:]))
  overrides = []
  while rest and rest[0].startswith("--config."):
    text = rest.pop(0)
    if "=" not in text and rest and not rest[0].startswith("--"):
      text += f"={rest.pop(0)}"
    overrides.append(text)
  fields = [f"--config.{field}" for field in all_fields(base())]
  refuse(parser, rest, {field.rpartition(".")[2]: field for field in fields})
  if not args.config:
    raise UserError(
      "no recipe: give --config=configs/<name>.py; configs/tiny_syco.py runs anywhere in a minute"
    )
  config = load_recipe(args.config)
  for override in overrides:
    override_field(config, override)
  return frozen(config), args


def of_run(arguments: Sequence[str]) -> Config:
  """The config that rlsafety.train would run with: launchers find a mistyped field by it."""
  parser = flags.parser(None, "train")
  parser.add_argument("--workdir")
  return from_flags(parser, ["train", *arguments])[0]


def override_field(config: ConfigDict, text: str) -> None:
  """Applies one `--config.a.b=value` through config_flags, by the type of the field."""
  field = text.removeprefix("--config.").partition("=")[0]
  node, parts = config, field.split(".")
  for i, part in enumerate(parts):
    if not isinstance(node, ConfigDict) or part not in node:
      known = all_fields(config)
      hint = did_you_mean(field, known, f"; fields: {', '.join(known)}")
      hint = hint.replace("did you mean ", "did you mean --config.")
      group = ""
      if i and isinstance(node, ConfigDict):
        group = f" ({'.'.join(parts[:i])} has {', '.join(node)})"
      where = ".".join(parts[: i + 1])
      raise UserError(f"--config.{field}: no such field at {where!r}{hint}{group}")
    node = node[part]
  if isinstance(node, ConfigDict):
    raise UserError(f"--config.{field}: is a group of fields; set one of {', '.join(node)}")
  values = absl_flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", text])
    values(["", text])
  except (absl_flags.Error, ValueError, TypeError, OverflowError) as error:
    kind = _kind(field)
    example = f" such as {node}" if node and kind in (int, float) else ""
    why = f" ({error})" if "=" not in text else ""
    raise UserError(f"{text:.99}: needs {kind.__name__}, {_WORDS[kind]}{example}{why}") from None


_WORDS = {
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  tuple: "values joined by commas",
  str: "a text",
}


def _kind(field: str) -> type:
  """The declared type of a dotted field, also where a recipe has left it unset."""
  kind = Config
  for name in field.split("."):
    kind = sections.field_types(kind)[name]
  return typing.get_origin(kind) or kind


def help_text() -> str:
  """One line a field: name, default, comment."""
  lines = []
  for name, kind in sections.field_types(Config).items():
    if issubclass(kind if isinstance(kind, type) else str, Section):
      lines.append(f"  {name}: {(kind.__doc__ or '').splitlines()[0]}")
      inner = {f.name: f.default for f in dataclasses.fields(kind)}
      lines += [_help_line(f"{name}.{k}", v, sections.comments(kind)[k]) for k, v in inner.items()]
    else:
      default = Config.__dataclass_fields__[name].default
      lines.append(_help_line(name, default, sections.comments(Config)[name]))
  return "\n".join(lines)


def _help_line(name: str, default: object, comment: str) -> str:
  shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
  return f"  {f'{name}={shown}':36} {comment}"


def all_fields(config: ConfigDict, prefix: str = "") -> list[str]:
  """Dotted names of all fields."""
  out = []
  for name in config:
    value = config[name]
    out += all_fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
    out += [] if isinstance(value, ConfigDict) else [prefix + name]
  return out
