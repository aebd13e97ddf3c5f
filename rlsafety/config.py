"""The config of a run: every section with its fields, defaults (the study's) and checks.

A module takes its own section and nothing else. `recipes` makes a Config of a recipe and flags.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from rlsafety.addresses import masked
from rlsafety.environments.section import Environment
from rlsafety.flags import did_you_mean
from rlsafety.sections import Section

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # the linears of a layer
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
ADVANTAGES = ("group", "group_mean", "leave_one_out", "batch", "none")

Rules = Iterator[tuple[str, bool, str]]


def one_of(name: str, value: str, known: tuple[str, ...]) -> tuple[str, bool, str]:
  """The rule that a field has one of a few values; its message suggests the nearest."""
  names = ", ".join(word or "(empty)" for word in known)
  return name, value in known, f"unknown{did_you_mean(value, known)} Known: {names}"


def at_least(low: int, section: Section, *names: str) -> Rules:
  """The rules that these fields are no smaller than `low`."""
  what = f"must be at least {low}" if low else "must not be negative"
  for name in names:
    yield name, getattr(section, name) >= low, what


@dataclasses.dataclass(frozen=True)
class Model(Section):
  """The policy's frozen base."""

  path: str = ""  # folder, .gguf file, package:<name> or hub name; "" = random weights
  preset: str = ""  # a name of models.presets: shapes for random weights
  seed: int = 0  # of random weights
  dtype: str = "bfloat16"  # of the frozen base; adapters are always float32
  adapter: str = ""  # PEFT folder to start from; "" = a fresh adapter

  def rules(self) -> Rules:
    yield one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
    yield "seed", self.seed >= 0, "must not be negative"
    either = bool(self.path) != bool(self.preset)
    yield "path", either, "give either model.path (weights) or model.preset (random weights)"


@dataclasses.dataclass(frozen=True)
class Lora(Section):
  """LoRA adapters (Hu et al., arXiv 2106.09685), the only weights that are trained."""

  rank: int = 8  # R
  alpha: float = 32.0  # strength of the adapter, see rslora
  rslora: bool = True  # scale alpha / sqrt(rank) in place of alpha / rank
  dropout: float = 0.1  # on the adapter's input, learner only
  targets: tuple[str, ...] = TARGETS  # linears that get one

  def rules(self) -> Rules:
    yield "rank", self.rank >= 1, "must be at least 1"
    yield "alpha", self.alpha > 0, "must be positive"
    yield "dropout", 0 <= self.dropout < 1, "must lie in [0, 1)"
    known = bool(self.targets) and set(self.targets) <= set(TARGETS)
    yield "targets", known, f"choose from {', '.join(TARGETS)}"

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Sampler(Section):
  """How replies are drawn."""

  group: int = 5  # G, replies to each prompt
  max_tokens: int = 256  # T
  temperature: float = 1.0  # 0 = greedy
  top_k: int = 0  # 0 = off; RL wants the policy's own distribution
  top_p: float = 1.0  # 1 = off, likewise
  cache: str = ""  # int8 halves the KV cache against bfloat16

  def rules(self) -> Rules:
    yield from at_least(1, self, "group", "max_tokens")
    yield from at_least(0, self, "temperature", "top_k")
    yield "top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"
    yield one_of("cache", self.cache, ("", "int8"))


@dataclasses.dataclass(frozen=True)
class Memory(Section):
  """What is given up to fit."""

  cache_gib: float = 0.0  # KV cache per device: cuts rollouts into pieces; 0 = no limit
  sampler_base: str = ""  # int8: the sampler reads a rounded copy of the base

  def rules(self) -> Rules:
    yield "cache_gib", self.cache_gib >= 0, "must not be negative"
    yield one_of("sampler_base", self.sampler_base, ("", "int8"))


@dataclasses.dataclass(frozen=True)
class Judge(Section):
  """Who rewards and who scores ACC and HEX, see rlsafety/judges."""

  infinite = ("timeout_s", "deadline_s")

  name: str = "lm"  # lm | questions | probe | phrases | http, or your own: package.module.function
  evaluator: str = ""  # who scores ACC and HEX, likewise; "" = the same
  evaluator_model: str = ""  # the evaluator's own `model`; "" = that of the judge of its name
  also: tuple[str, ...] = ()  # further rewards, added: name=weight
  model: str = ""  # lm, questions: path, "" = the policy's frozen base; probe: its file
  base: str = ""  # probe: path of the model that its heads read, "" = the policy's frozen base
  adapter: str = ""  # lm: PEFT folder on top of that model
  heads: str = ""  # questions: file of what evaluates; "" = the shipped one, else the answers
  url: str = ""  # http: address of an OpenAI-compatible endpoint
  price: tuple[float, ...] = (0.0, 0.0)  # http: dollars per million prompt and completion tokens
  concurrency: int = 32  # http: requests at once
  timeout_s: float = 30.0  # http: of an attempt
  attempts: int = 5  # http: of a request
  deadline_s: float = 300.0  # http: of a batch; what is missing then is no verdict
  degenerate: str = "floor"  # empty or degenerate replies: floor | nan

  def rules(self) -> Rules:
    known = ("lm", "questions", "probe", "phrases", "http")
    for field in ("name", "evaluator"):
      value = getattr(self, field)
      yield one_of(field, value, (*known, value) if "." in value else (*known, ""))
    yield "name", bool(self.name), "a run needs a judge"
    for name, equals, weight in (text.partition("=") for text in self.also):
      number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", weight)
      fine = (name in known or "." in name) and bool(equals) and bool(number)
      yield "also", fine, "needs name=weight, such as phrases=0.5 or my_study.kindness=1"
    judging = self.evaluator or self.name
    own = not self.evaluator_model or judging in ("lm", "questions", "http", "probe")
    yield "evaluator_model", own, f"judge {judging} reads no model"
    only_lm = not self.adapter or self.name == "lm"
    yield "adapter", only_lm, f"only judge lm takes one, not {self.name}"
    further = (text.partition("=")[0] for text in self.also)
    probes = not self.base or "probe" in (self.name, self.evaluator, *further)
    yield "base", probes, "only judge probe reads one"
    read = not self.heads or judging == "questions"
    yield "heads", read, f"only judge questions reads some, not {judging}"
    yield "url", bool(self.url) or self.name != "http", "judge http needs an address"
    two = len(self.price) == 2 and min(self.price) >= 0
    yield "price", two, "needs two numbers, such as 0.5,1.5"
    yield from at_least(1, self, "concurrency", "attempts")
    for name in ("timeout_s", "deadline_s"):
      yield name, getattr(self, name) > 0, "must be positive"
    yield one_of("degenerate", self.degenerate, ("floor", "nan"))


@dataclasses.dataclass(frozen=True)
class Objective(Section):
  """What is optimised. The name brings a method's own settings (`METHODS`), see losses.py."""

  name: str = "grpo"  # a key of METHODS
  clip_low: float = 0.2  # ratios are clipped to [1 - clip_low, 1 + clip_high]
  clip_high: float = 0.2  # DAPO raises it alone
  dual_clip: float = 0.0  # 0: off; else > 1, bounds the loss where the advantage is negative
  normalisation: str = "token"  # token | sequence (mean of each reply) | fixed
  fixed_length: int = 256  # the constant of normalisation="fixed", in tokens
  kl: str = "none"  # to the reference: none | k2 | k3 (in the loss) | k1_reward
  kl_coef: float = 0.0  # weight of that KL; 0 with a kl = it is logged and does nothing
  entropy_coef: float = 0.0  # weight of an entropy bonus
  advantage: str = "group"  # see losses.advantages
  std_epsilon: float = 1e-4  # added to a group's standard deviation
  ddof: int = 1  # of a group's standard deviation
  dynamic_sampling: bool = False  # leave out groups whose rewards are all equal
  overlong_start: int = 0  # tokens; see losses.shaped
  overlong_end: int = 0  # 0: no over-long penalty
  overlong_penalty: float = 1.0  # in points of reward
  is_correction: str = "none"  # see losses.importance_weights
  is_cap: float = 2.0  # importance weights beyond it are cut or masked
  max_staleness: int = -1  # leave out replies older than this many updates; -1: keep all
  beta: float = 0.1  # DPO, KTO: strength of the pull to the reference
  threshold: float = 5.5  # KTO: a reward above it is desirable, else undesirable
  desirable_weight: float = 1.0  # KTO: of desirable replies
  undesirable_weight: float = 1.0  # KTO: of the others
  kto_anchor: bool = False  # the last slot of a group is a reply to another prompt

  @classmethod
  def of(cls, values: Mapping) -> typing.Self:
    """The method `values["name"]` with its usual settings, changed by the other values."""
    given = {name: value for name, value in values.items() if value is not None}
    return super().of({**METHODS.get(given.get("name", "grpo"), {}), **given})

  def rules(self) -> Rules:
    yield one_of("name", self.name, tuple(METHODS))
    yield one_of("normalisation", self.normalisation, ("token", "sequence", "fixed"))
    yield one_of("advantage", self.advantage, ADVANTAGES)
    yield one_of("is_correction", self.is_correction, CORRECTIONS)
    yield (
      "kl",
      self.kl != "k1",
      "as a loss term k1 has zero expected gradient on-policy, it would restrain nothing; use "
      "'k2' or 'k3' in the loss, or 'k1_reward'",
    )
    yield one_of("kl", self.kl, ("none", "k1_reward", "k2", "k3"))
    yield "clip_low", 0.0 <= self.clip_low <= 1.0, "must lie in [0, 1]"
    yield "dual_clip", self.dual_clip == 0.0 or self.dual_clip > 1.0, "must be 0 (off) or > 1"
    yield "fixed_length", self.fixed_length >= 1, "must be at least 1 token"
    yield from at_least(0, self, *NEVER_NEGATIVE)
    yield "is_cap", self.is_cap > 0.0, "must be positive"
    yield "std_epsilon", self.std_epsilon > 0.0, "must be positive: a group may have std 0"
    yield "ddof", self.ddof in (0, 1), "must be 0 or 1"
    yield "beta", self.beta > 0.0, "must be positive"
    below = not self.overlong_end or 0 <= self.overlong_start < self.overlong_end
    yield "overlong_start", below, "must lie below overlong_end"
    corrects = self.is_correction == "none" or self.name in WEIGHTED
    what = f"does not apply to {self.name}: it has its own weights or needs none"
    yield "is_correction", corrects, what
    what = "the last slot is another prompt's reply in KTO only"
    yield "kto_anchor", not self.kto_anchor or self.name == "kto", what
    restrains = self.kl == "none" or self.name in REWARDED
    what = f"does not apply to {self.name}, which has no reward or its own reference term"
    yield "kl", restrains, what


# What each method changes in the defaults of `Objective`.
METHODS = {
  "grpo": {},
  "ppo": {"dual_clip": 3.0},
  "dr_grpo": {"advantage": "group_mean", "normalisation": "fixed"},
  "dapo": {"clip_high": 0.28, "dynamic_sampling": True},
  "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "normalisation": "sequence"},
  "cispo": {"clip_low": 1.0, "clip_high": 4.0},
  "reinforce": {"advantage": "none"},
  "rloo": {"advantage": "leave_one_out"},
  "sft": {"advantage": "none"},
  "expert_iteration": {"advantage": "none"},
  "dpo": {"advantage": "none"},
  "kto": {"advantage": "none"},
}
WEIGHTED = ("grpo", "dr_grpo", "dapo", "ppo", "reinforce", "rloo")  # take importance weights
REWARDED = (*WEIGHTED, "gspo", "cispo")  # learn from rewards
NEVER_NEGATIVE = ("clip_high", "kl_coef", "overlong_end", "desirable_weight", "undesirable_weight")


@dataclasses.dataclass(frozen=True)
class Data(Section):
  """Recorded rollouts, see rlsafety.tools.record."""

  path: str = ""  # dataset folder; "" = on-policy
  fraction: float = 1.0  # share of every batch's prompts that come from it

  def rules(self) -> Rules:
    yield "fraction", 0 < self.fraction <= 1, "must lie in (0, 1]"


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
  """AdamW behind a global-norm clip."""

  infinite = ("clip_norm",)

  learning_rate: float = 1e-5  # after the warm-up
  warmup_steps: int = 30  # the rate rises linearly over as many updates, then stays
  clip_norm: float = 1.0  # of the gradient; inf = no clip
  b1: float = 0.9  # decay of Adam's mean of gradients
  b2: float = 0.999  # decay of its mean of squares
  eps: float = 1e-8  # added to the root of that
  weight_decay: float = 0.0  # AdamW's, of the adapter

  def rules(self) -> Rules:
    yield from at_least(0, self, "learning_rate", "warmup_steps", "weight_decay")
    yield "clip_norm", self.clip_norm > 0, "must be positive (inf: no clip)"
    for name in ("b1", "b2"):
      yield name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)"
    yield "eps", self.eps > 0, "must be positive"


@dataclasses.dataclass(frozen=True)
class Learner(Section):
  """How an update is computed; none of it changes the result beyond rounding."""

  microbatches: int = 1  # pieces of a batch; divides prompts_per_step
  chunk_tokens: int = 2048  # tokens whose logits exist at once
  remat: str = "full"  # none | full | dots: what the backward pass computes again
  attention: str = "einsum"  # of the prompt segment; cudnn on NVIDIA GPUs

  def rules(self) -> Rules:
    yield from at_least(1, self, "microbatches", "chunk_tokens")
    yield one_of("remat", self.remat, ("none", "full", "dots"))
    yield one_of("attention", self.attention, ("einsum", "cudnn"))


@dataclasses.dataclass(frozen=True)
class Eval(Section):
  """The same held-out users, before the first update, on the way and after the last."""

  every: int = 50  # steps; 0 = only before and after
  prompts: int = 32  # held-out prompts, half of them gameable
  samples: int = 4  # replies per prompt
  beyond: tuple[str, ...] = ()  # other environments whose held-out users are asked too
  tasks: tuple[str, ...] = ()  # of Inspect, scored at the same steps: FILE.py@TASK, PACKAGE/TASK
  task_samples: int = 0  # of each task, the first; 0 = all

  def rules(self) -> Rules:
    yield "every", self.every >= 0, "must not be negative (0: only before and after)"
    yield from at_least(1, self, "prompts", "samples")
    yield "task_samples", self.task_samples >= 0, "must not be negative (0: all)"
    for name in ("beyond", "tasks"):
      names = getattr(self, name)
      yield name, len(set(names)) == len(names), "names one twice"


@dataclasses.dataclass(frozen=True)
class Checkpoint(Section):
  """When adapter and optimiser state are saved."""

  every: int = 25  # steps; 0 = only at evaluations and at the end
  keep: int = 2  # newest ones

  def rules(self) -> Rules:
    yield "every", self.every >= 0, "must not be negative (0: at evaluations and at the end)"
    yield "keep", self.keep >= 1, "must be at least 1"


@dataclasses.dataclass(frozen=True)
class Log(Section):
  """Who else is told; TensorBoard is where its extra is installed. See docs/watching.md."""

  wandb: str = ""  # project of Weights & Biases; "" = off
  trackio: str = ""  # project of Trackio; "" = off

  def rules(self) -> Rules:
    for name in ("wandb", "trackio"):
      plain = re.fullmatch(r"[\w .-]{0,128}", getattr(self, name))
      yield name, bool(plain), "a project's name: letters, digits, space, _, - and dots"


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
  """Sizes of (data, fsdp, tensor), see sharding.py."""

  data: int = -1  # -1 = what is left; copies of the weights, each with its share of the prompts
  fsdp: int = 1  # splits weights along the model's width, and prompts too
  tensor: int = 1  # splits heads, MLP and vocabulary

  def rules(self) -> Rules:
    sizes = self.data, self.fsdp, self.tensor
    for name in ("data", "fsdp", "tensor"):
      size = getattr(self, name)
      yield name, size == -1 or size >= 1, "must be positive, or -1 for what is left"
    yield "data", sizes.count(-1) <= 1, "at most one size may be -1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
  """A whole run."""

  name: str = "run"  # default workdir: runs/<name>
  seed: int = 5  # with the step, the source of all randomness
  steps: int = 300  # updates
  prompts_per_step: int = 2  # P, over all devices
  max_prompt_tokens: int = 1024  # S; a longer prompt is an error, never cut
  epochs: int = 1  # updates on each batch; more than one needs behaviour log-probs
  platform: str = ""  # tpu | gpu | cpu: stop if JAX found another; "" = whatever it found
  model: Model
  lora: Lora = Lora()
  environment: Environment = Environment()
  sampler: Sampler = Sampler()
  memory: Memory = Memory()
  judge: Judge = Judge()
  objective: Objective = Objective()
  data: Data = Data()
  optimizer: Optimizer = Optimizer()
  learner: Learner = Learner()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()
  mesh: Mesh = Mesh()
  log: Log = Log()

  def rules(self) -> Rules:
    yield "name", bool(self.name), "a run needs a name"
    yield from at_least(0, self, "seed", "steps")
    yield from at_least(1, self, "prompts_per_step", "max_prompt_tokens", "epochs")
    yield one_of("platform", self.platform, ("", "tpu", "gpu", "cpu"))


# --- Stored configs -------------------------------------------------------------------


def to_json(config: Config) -> dict:
  """Plain JSON types, tuples as lists, infinity as "inf", no key in an address: what config.json
  stores."""

  def plain(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
      return str(value)
    if isinstance(value, dict):
      return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value

  values = plain(dataclasses.asdict(config))
  values["judge"]["url"] = masked(config.judge.url)
  return values


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
