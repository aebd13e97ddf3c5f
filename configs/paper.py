"""Every cell of the study (arXiv 2604.12500): 11 models x 3 environments x 3 seeds, and more.

  python -m rlsafety.train --config=configs/paper.py:model=qwen1.5-7b-chat,env=political_qa,seed=42
  python launch/sweep.py --config=configs/paper.py --sweep=runs/paper --grid=arg.seed=5,42,83 \\
    --grid=arg.model=qwen1.5-0.5b-chat,gemma-1.1-2b-it --grid=arg.env=therapy_talk,political_qa

Arguments (key=value, comma-separated; each has a default)
  model     a key of MODELS or of BASE_MODELS, the six that the study ran in therapy_talk only
  env       action_advice | therapy_talk | political_qa | neutral
  seed      5, 42 or 83 in the study
  variant   main; one of CHAIN: the published chain, each adds one change to the one before; or
            any name of rlsafety.environments.variants.named(), among them every change of one
            factor: env=political_qa,variant=political_qa:cue_strength=0.5
  judge     gated: Llama-3.1-8B-Instruct, the study's; ungated: Qwen2.5-7B-Instruct, which nobody
            has measured as a judge of these users: its numbers do not stand beside the study's
  tensor    chips that share one model's heads, see rlsafety.tools.plan

Where we leave the study on purpose: one batch size for every model (its 13B and 14B saw twice
as many prompts), no group label in the policy's prompt (--config.environment.label_in_prompt=true
brings political_qa's back), our own scenario bank (--config.environment.data_dir=DIR reads the
published files), held-out evaluation. `main` and the chain have the study's cues, a request among
them; env=political_qa,variant=political_qa has our default, which asks for nothing.
docs/hyperparameters.md lists every setting.
"""

from rlsafety import recipes
from rlsafety.environments import variants
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
JUDGES = {
  "gated": "meta-llama/Llama-3.1-8B-Instruct",
  "ungated": "Qwen/Qwen2.5-7B-Instruct",
}

# The published chain: our short names for those of `variants.CHAIN`.
CHAIN = {
  "chain1_therapist": "action_advice+therapist",
  "chain2_traits": "action_advice+therapist+traits",
  "chain3_equal_style": "action_advice+therapist+traits+equal_style",
}


def get_config(arguments: str = ""):
  named = variants.named()
  known = {
    "model": ("qwen1.5-7b-chat", *MODELS, *BASE_MODELS),
    "env": ("political_qa", *ENVIRONMENTS),
    "seed": ("5",),
    "variant": ("main", *CHAIN, *named),
    "judge": tuple(JUDGES),
    "tensor": ("1",),
  }
  chosen = recipes.arguments("configs/paper.py", arguments, known)
  env, variant = chosen["env"], chosen["variant"]
  for key in ("seed", "tensor"):
    if not chosen[key].isdigit():
      raise UserError(f"configs/paper.py:{key}={chosen[key]}: needs a whole number")
  setting = {"main": env, **CHAIN}.get(variant, variant)
  of_env = [name for name, change in named.items() if change["name"] == env]
  if setting not in of_env:
    short = ["main", *(name for name, full in CHAIN.items() if full in of_env)]
    raise UserError(
      f"configs/paper.py:variant={variant}: choose for env={env} from {', '.join(short + of_env)}"
    )

  c = recipes.base()
  c.name = f"paper/{env}/{chosen['model']}/{variant.removeprefix(f'{env}:')}/seed{chosen['seed']}"
  if chosen["judge"] != "gated":  # other runs, in directories of their own
    c.name += f"+{chosen['judge']}"
  c.seed = int(chosen["seed"])
  c.model.path = (MODELS | BASE_MODELS)[chosen["model"]]
  c.judge.model = JUDGES[chosen["judge"]]
  c.environment.update(variants.PUBLISHED[env] if variant == "main" else named[setting])
  c.mesh.tensor = int(chosen["tensor"])
  return c


def cells() -> list[str]:
  """Arguments of every run of the study: 99 main runs, 99 of the chain, 18 of base models."""
  main = [(m, e, "main") for m in MODELS for e in ENVIRONMENTS[:3]]
  chain = [(m, "action_advice", v) for m in MODELS for v in CHAIN]
  bases = [(m, "therapy_talk", "main") for m in BASE_MODELS]
  return [
    f"model={m},env={e},seed={s},variant={v}" for m, e, v in main + chain + bases for s in SEEDS
  ]
