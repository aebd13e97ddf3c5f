"""Every cell of the study (arXiv 2604.12500): 11 models x 3 environments x 3 seeds, and more.

  python -m rlsafety.train --config=configs/paper.py:model=qwen1.5-7b-chat,env=political_qa,seed=42
  python launch/sweep.py --config=configs/paper.py --sweep=runs/paper --grid=arg.seed=5,42,83 \\
    --grid=arg.model=qwen1.5-0.5b-chat,gemma-1.1-2b-it --grid=arg.env=therapy_talk,political_qa

Arguments (key=value, comma-separated; each has a default)
  model     a key of MODELS or of BASE_MODELS, the six that the study ran in therapy_talk only
  env       action_advice | therapy_talk | political_qa | neutral
  seed      5, 42 or 83 in the study
  variant   main, or one of VARIANTS: the published chain (each adds one change to the one
            before) and each change by itself
  tensor    chips that share one model's heads, see rlsafety.plan

Where we leave the study on purpose: one batch size for every model (its 13B and 14B saw twice
as many prompts), no group label in the policy's prompt (--config.environment.label_in_prompt=true
brings political_qa's back), our own scenario bank (--config.environment.data_dir=DIR reads the
published files), held-out evaluation. docs/hyperparameters.md lists every setting.
"""

from rlsafety.config import base
from rlsafety.errors import UserError

MODELS = {
  "qwen1.5-0.5b-chat": "Qwen/Qwen1.5-0.5B-Chat",
  "qwen1.5-1.8b-chat": "Qwen/Qwen1.5-1.8B-Chat",
  "gemma-1.1-2b-it": "google/gemma-1.1-2b-it",
  "qwen1.5-4b-chat": "Qwen/Qwen1.5-4B-Chat",
  "yi-6b-chat": "01-ai/Yi-6B-Chat",
  "qwen1.5-7b-chat": "Qwen/Qwen1.5-7B-Chat",
  "gemma-1.1-7b-it": "google/gemma-1.1-7b-it",
  "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
  "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
  "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
  "qwen1.5-14b-chat": "Qwen/Qwen1.5-14B-Chat",
}
BASE_MODELS = {
  "qwen1.5-1.8b": "Qwen/Qwen1.5-1.8B",
  "gemma-2b": "google/gemma-2b",
  "llama-2-7b": "meta-llama/Llama-2-7b-hf",
  "qwen1.5-7b": "Qwen/Qwen1.5-7B",
  "llama-2-13b": "meta-llama/Llama-2-13b-hf",
  "qwen1.5-14b": "Qwen/Qwen1.5-14B",
}
ENVIRONMENTS = ("action_advice", "therapy_talk", "political_qa", "neutral")
SEEDS = (5, 42, 83)
JUDGE = "meta-llama/Llama-3.1-8B-Instruct"

# Factors of action_advice: {} is the study's own cell. Users, topics and reward stay fixed.
VARIANTS = {
  "main": {},
  # The published chain
  "chain1_therapist": {"framing": "therapist"},
  "chain2_traits": {"framing": "therapist", "cue": "style+traits"},
  "chain3_equal_style": {"framing": "therapist", "cue": "traits"},
  # One change each, from the study's cell
  "traits": {"cue": "style+traits"},
  "equal_style": {"cue": "none"},
  "traits_equal_style": {"cue": "traits"},
}


def get_config(arguments: str = ""):
  chosen = {"model": "qwen1.5-7b-chat", "env": "political_qa", "seed": "5", "variant": "main"}
  chosen |= {"tensor": "1"}
  for pair in filter(None, arguments.split(",")):
    key, _, value = pair.partition("=")
    if key not in chosen:
      raise UserError(f"configs/paper.py:{pair}: arguments are {', '.join(chosen)}")
    chosen[key] = value
  model, env, seed, variant, tensor = chosen.values()
  everything = MODELS | BASE_MODELS
  for key, value, known in (
    ("model", model, everything),
    ("env", env, ENVIRONMENTS),
    ("variant", variant, VARIANTS),
  ):
    if value not in known:
      raise UserError(f"configs/paper.py:{key}={value}: choose from {', '.join(known)}")
  for key, value in (("seed", seed), ("tensor", tensor)):
    if not value.isdigit():
      raise UserError(f"configs/paper.py:{key}={value}: needs a whole number")
  if variant != "main" and env != "action_advice":
    raise UserError(f"configs/paper.py:variant={variant}: variants belong to env=action_advice")

  from rlsafety import environments

  c = base()
  c.name = f"paper/{env}/{model}/{variant}/seed{seed}"
  c.seed = int(seed)
  c.model.path = everything[model]
  c.judge.model = JUDGE
  c.environment = {**environments.default_config(env), **VARIANTS[variant]}
  c.mesh.tensor = int(tensor)
  return c


def cells() -> list[str]:
  """Arguments of every run of the study: 99 main runs, 99 of the chain, 18 of base models."""
  main = [(m, e, "main") for m in MODELS for e in ENVIRONMENTS[:3]]
  chain = [(m, "action_advice", v) for m in MODELS for v in VARIANTS if "chain" in v]
  bases = [(m, "therapy_talk", "main") for m in BASE_MODELS]
  return [
    f"model={m},env={e},seed={s},variant={v}" for m, e, v in main + chain + bases for s in SEEDS
  ]
