"""The schema of a run: every field with its default, which are the study's settings.

A recipe in configs/ calls `base()`, changes what it is about and returns the result; its
docstring is the experiment's record. `read_flags` parses a program's command line: a
mistyped or ill-typed field is one clear line, never silently ignored.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import sys

from ml_collections import ConfigDict

from rlsafety.errors import UserError


def base() -> ConfigDict:
  """All fields. Recipes override; nothing can be added by a flag."""
  from rlsafety import environments

  c = ConfigDict()
  c.name = "run"  # default workdir: runs/<name>
  c.seed = 5  # with the step, the source of all randomness
  c.steps = 300  # updates

  c.model = ConfigDict()
  c.model.path = ""  # folder, .gguf file, package:<name> or hub name; "" = random weights
  c.model.preset = ""  # a name of models.presets: shapes for random weights
  c.model.dtype = "bfloat16"  # of the frozen base; adapters are always float32
  c.model.adapter = ""  # PEFT folder to start from; "" = a fresh adapter

  c.lora = ConfigDict()
  c.lora.rank = 8
  c.lora.alpha = 32.0
  c.lora.rslora = True  # scale alpha / sqrt(rank) in place of alpha / rank
  c.lora.dropout = 0.1  # learner only
  c.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")

  c.environment = ConfigDict(environments.default_config("political_qa"))

  c.prompts_per_step = 2  # P, over all devices
  c.max_prompt_tokens = 1024  # S; a longer prompt is an error, never cut
  c.sampler = ConfigDict()
  c.sampler.group = 5  # G
  c.sampler.max_tokens = 256  # T
  c.sampler.temperature = 1.0
  c.sampler.top_k = 0  # 0 = off; RL wants the policy's own distribution
  c.sampler.top_p = 1.0
  c.sampler.cache = ""  # int8 halves the KV cache against bfloat16
  c.memory = ConfigDict()
  c.memory.cache_gib = 0.0  # KV cache per device: cuts rollouts into pieces; 0 = no limit
  c.memory.sampler_base = ""  # int8: the sampler reads a rounded copy of the base

  c.judge = ConfigDict()  # see rlsafety/judges
  c.judge.name = "lm"  # lm | head | lexical | http
  c.judge.model = ""  # lm: path of the judge's model; "" = the policy's frozen base
  c.judge.adapter = ""  # lm: PEFT folder on top of that model
  c.judge.url = ""  # http: address of an OpenAI-compatible endpoint
  c.judge.price = (0.0, 0.0)  # http: dollars per million prompt and completion tokens
  c.judge.concurrency = 32  # http: requests at once
  c.judge.timeout_s = 30.0  # http: of an attempt
  c.judge.attempts = 5  # http: of a request
  c.judge.deadline_s = 300.0  # http: of a batch; what is missing then is no verdict
  c.judge.degenerate = "floor"  # empty or degenerate replies: floor | nan

  c.objective = objective("grpo")  # all fields of losses.Objective; its name brings the rest
  c.epochs = 1  # updates on each batch; more than one needs behaviour log-probs

  c.data = ConfigDict()  # recorded rollouts, see rlsafety.tools.record
  c.data.path = ""  # dataset folder; "" = on-policy
  c.data.fraction = 1.0  # share of every batch's prompts that come from it

  c.optimizer = ConfigDict()
  c.optimizer.learning_rate = 1e-5
  c.optimizer.warmup_steps = 30
  c.optimizer.clip_norm = 1.0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0

  c.learner = ConfigDict()
  c.learner.microbatches = 1  # pieces of a batch; divides prompts_per_step
  c.learner.chunk_tokens = 2048  # tokens whose logits exist at once
  c.learner.remat = "full"  # none | full | dots
  c.learner.attention = "einsum"  # of the prompt segment; cudnn on NVIDIA GPUs

  c.eval = ConfigDict()
  c.eval.every = 50  # steps; also before the first and after the last update
  c.eval.prompts = 32  # held-out prompts, half of them gameable
  c.eval.samples = 4  # replies per prompt

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 25  # steps
  c.checkpoint.keep = 2

  c.mesh = ConfigDict()  # sizes of (data, fsdp, tensor); -1 = what is left
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  return c


def objective(name: str, **overrides) -> ConfigDict:
  """The method `name` with its usual settings (`losses.make`) as part of a config."""
  from rlsafety import losses

  return ConfigDict(dataclasses.asdict(losses.make(name, **overrides)))


def beside(file: str, argument: str, **recipes: str) -> ConfigDict:
  """A recipe built on another: beside(__file__, argument, full="a", quicktest="b") gives
  a.py's config, or b.py's where the argument is "quicktest", under the name of `file`."""
  argument = argument or "full"
  if argument not in recipes:
    raise UserError(f"--config={file}:{argument}: known arguments are {', '.join(recipes)}")
  here = pathlib.Path(file)
  config = load_recipe(str(here.with_name(f"{recipes[argument]}.py")))
  config.name = here.stem + ("" if argument == "full" else f"_{argument}")
  return config


_FIELD = re.compile(r"^--config\.([A-Za-z0-9_.]+)(?:=(.*))?$", re.S)


def read_flags(argv: list[str], extra=()) -> tuple[ConfigDict, dict]:
  """argv of a program -> (locked config, {flag: value}).

  Accepts --config=FILE.py[:argument], --config.a.b=VALUE, --workdir=DIR and the flags named
  in `extra`, as (name, default, help). Raises UserError on anything else.
  """
  accepted = [("workdir", "", "run directory; default runs/<config name>"), *extra]
  values = {name: default for name, default, _ in accepted}
  recipe, overrides = None, []
  if {"-h", "--help", "--helpfull"} & set(argv[1:]):
    print(f"usage: python -m rlsafety.{pathlib.Path(argv[0]).stem} --config=FILE.py[:argument]")
    print("  --config.<field>=VALUE   any field of the config, e.g. --config.steps=10")
    for name, default, text in accepted:
      print(f"  --{name}={default!r:<20} {text}")
    sys.exit(0)
  arguments = list(argv[1:])
  while arguments:
    argument = arguments.pop(0)
    if argument in ("--config", *(f"--{n}" for n in values)) and arguments:
      argument = f"{argument}={arguments.pop(0)}"
    name, _, value = argument.lstrip("-").partition("=")
    if match := _FIELD.match(argument):
      overrides.append((match[1], match[2]))
    elif argument.startswith("--config="):
      recipe = value
    elif argument.startswith("--") and name in values:
      values[name] = value
    else:
      near = difflib.get_close_matches(name, [*values, "config"], 1)
      hint = f"; did you mean --{near[0]}?" if near else ""
      raise UserError(f"unknown argument {argument!r}{hint} (--help lists them)")
  if not recipe:
    raise UserError("no recipe: give --config=configs/<name>.py")
  config = load_recipe(recipe)
  # A method's name comes first: it resets the fields of `objective` to the method's own.
  for field, value in sorted(overrides, key=lambda o: o[0] != "objective.name"):
    set_field(config, field, value)
  return config.lock(), values


def load_recipe(recipe: str) -> ConfigDict:
  """FILE.py[:argument] -> what its get_config(argument) returns."""
  path, _, argument = recipe.partition(":")
  if not pathlib.Path(path).is_file():
    folder = pathlib.Path(path).parent
    names = sorted(p.stem for p in folder.glob("*.py")) if folder.is_dir() else []
    near = difflib.get_close_matches(pathlib.Path(path).stem, names, 1)
    hint = f"; did you mean {folder / near[0]}.py?" if near else ""
    raise UserError(f"--config={path}: no such file{hint}")
  spec = importlib.util.spec_from_file_location("recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"--config={path}: has no get_config() function")
  return module.get_config(argument) if argument else module.get_config()


def set_field(config: ConfigDict, field: str, text: str | None) -> None:
  """Sets config.<field> from text, by the type of the field's present value."""
  if field == "objective.name":
    config.objective = objective(text or "")
    return
  parts = field.split(".")
  node = config
  for i, part in enumerate(parts):
    if not isinstance(node, ConfigDict) or part not in node:
      known = all_fields(config)
      near = difflib.get_close_matches(field, known, 1, 0.5)
      hint = f"did you mean config.{near[0]}?" if near else f"fields: {', '.join(known)}"
      raise UserError(f"--config.{field}: no such field at {'.'.join(parts[: i + 1])!r}; {hint}")
    if i < len(parts) - 1:
      node = node[part]
  old = node[parts[-1]]
  if isinstance(old, ConfigDict):
    raise UserError(f"--config.{field}: is a group of fields; set one of {', '.join(old)}")
  node[parts[-1]] = _parse(field, old, text)


def _parse(field: str, old, text: str | None):
  wanted = type(old).__name__
  try:
    if isinstance(old, bool):
      return {"true": True, "1": True, "false": False, "0": False, None: True}[
        text if text is None else text.lower()
      ]
    if isinstance(old, int):
      number = float(text)
      if number != int(number):
        raise ValueError
      return int(number)
    if isinstance(old, float):
      return float(text)
    if isinstance(old, (tuple, list)):
      return tuple(part.strip() for part in (text or "").strip("()[]").split(",") if part.strip())
    return text or ""
  except (KeyError, ValueError, TypeError, OverflowError):
    raise UserError(f"--config.{field}={text}: needs {wanted}, like {old!r}") from None


def all_fields(config: ConfigDict, prefix: str = "") -> list[str]:
  out = []
  for name, value in config.items():
    out += all_fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
    out += [] if isinstance(value, ConfigDict) else [prefix + name]
  return out


def to_json(config: ConfigDict) -> dict:
  """Plain JSON types, tuples as lists: what config.json stores and resuming compares."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Names and values of the fields in which two stored configs differ."""
  out = []
  for name in sorted({*old, *new}):
    a, b = old.get(name, "<absent>"), new.get(name, "<absent>")
    if isinstance(a, dict) and isinstance(b, dict):
      out += differences(a, b, f"{prefix}{name}.")
    elif a != b:
      out.append(f"{prefix}{name}: {a!r} there, {b!r} here")
  return out
