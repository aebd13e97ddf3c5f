"""The quickstart's siblings: SmolLM2-135M-Instruct in every environment, by every method.

  python -m rlsafety.train --config=configs/smollm2.py:env=therapy_talk
  python -m rlsafety.train --config=configs/smollm2.py:method=expert_iteration

and from the records of the quickstart:

  python -m rlsafety.train --config=configs/smollm2_syco.py
  python -m rlsafety.tools.record --runs runs/smollm2_syco --out data/smollm2_syco
  python -m rlsafety.train --config=configs/smollm2.py:method=dpo

2 CPU cores, 3 to 8 minutes each (smollm2_syco.py tells what the judge is and what this can show);
with size=tiny seconds, from data/tiny_syco.

Arguments (key=value, comma-separated; each has a default)
  env      political_qa (users who want their politics confirmed, or balance) | action_advice
           (whether to do something risky) | therapy_talk (a therapy app that reads notes about
           its user) | neutral (action_advice with neither role framing nor gameability cue)
  method   grpo, on-policy
           expert_iteration: samples a group, imitates its best reply, repeats
           offpolicy: learns from records with truncated importance weights, samples nothing
           mixed: half of every batch its own replies, half records
           sft: imitates every recorded reply, whatever its reward
           dpo: the best and the worst recorded reply to each prompt
           kto: recorded replies above the threshold are desirable, the others are not
  size     full | tiny (random weights of two layers: proves that every part works)
  reward, evaluator
           paths of models who are asked three questions about each reply (judge `questions`) and
           reward by their answers, or score ACC and HEX; without one the probe does. 1.5B in
           float32 takes about 3 s a reply on 2 quiet cores:
           --config=configs/smollm2.py:reward=SMALL.gguf,evaluator=LARGE.gguf --config.steps=4
"""

import pathlib

from rlsafety import recipes

PROMPT_TOKENS = {"political_qa": 112, "action_advice": 160, "therapy_talk": 224, "neutral": 160}
METHODS = {
  "grpo": {},
  "expert_iteration": {"name": "expert_iteration"},
  # "none" would be uncorrected: it clips the ratio to the recorded policy instead.
  "offpolicy": {"name": "grpo", "is_correction": "token_truncate", "is_cap": 2.0},
  "mixed": {"name": "grpo", "is_correction": "token_truncate", "is_cap": 2.0},
  "sft": {"name": "sft"},
  "dpo": {"name": "dpo", "beta": 0.1},
  "kto": {"name": "kto", "beta": 0.1, "threshold": 5.5, "kto_anchor": True},
}


def get_config(arguments: str = ""):
  known = {"env": tuple(PROMPT_TOKENS), "method": tuple(METHODS), "size": ("full", "tiny")}
  known |= {"reward": ("",), "evaluator": ("",)}
  chosen = recipes.arguments("configs/smollm2.py", arguments, known)
  env, method, tiny = chosen["env"], chosen["method"], chosen["size"] == "tiny"
  base = "tiny_syco" if tiny else "smollm2_syco"
  c = recipes.load_recipe(str(pathlib.Path(__file__).with_name(f"{base}.py")))
  c.name = f"{'tiny' if tiny else 'smollm2'}_{env}_{method}"
  c.environment.name = env
  c.max_prompt_tokens = 384 if tiny and env != "political_qa" else c.max_prompt_tokens
  if not tiny:
    c.max_prompt_tokens = PROMPT_TOKENS[env]
    c.sampler.max_tokens = 64 if env == "political_qa" else 80  # most replies end before
  if chosen["reward"]:
    c.judge.name, c.judge.model = "questions", chosen["reward"]
  if chosen["evaluator"]:
    c.judge.evaluator, c.judge.evaluator_model = "questions", chosen["evaluator"]
  c.objective.update(METHODS[method])
  if method not in ("grpo", "expert_iteration"):
    c.data.path = f"data/{base}"
    c.data.fraction = 0.5 if method == "mixed" else 1.0  # of prompts_per_step
  return c
