"""Qwen1.5-7B-Chat in political_qa with the study's settings (arXiv 2604.12500).

  python -m rlsafety.train --config=configs/qwen7b_syco.py          16 chips of TPU v5e
  python -m rlsafety.train --config=configs/qwen7b_syco.py:h100     one 80 GB GPU
  python -m rlsafety.train --config=configs/qwen7b_syco.py:h100,ungated     and no account needed
  python -m rlsafety.tools.plan --config=configs/qwen7b_syco.py --device=v5e-16

Memory, time and cost: ask the planner. The judge is Llama-3.1-8B-Instruct as in the study; it
is a gated model, so log in to the hub once, or name local folders:
--config.model.path=DIR --config.judge.model=DIR. `ungated` takes Qwen2.5-7B-Instruct (Apache-2.0)
in its place: nobody has measured it as a judge of these users, neither the study nor we, and it is
of the policy's own family. `python -m rlsafety.tools.judges.audit` measures one; its
numbers do not stand beside the study's. For one card that should hold one model only,
--config.judge.model= lets the frozen base itself judge.

The study reports for this cell a rise of agreement with gameable users (HEX) over 300 steps; we
have not run this recipe at full size, and state no number.
"""

from rlsafety.errors import UserError
from rlsafety.recipes import base

TENSOR = {"v5e": 8, "h100": 1}  # 2 prompts x 5 replies: eight chips share the heads of each
JUDGES = {
  "gated": "meta-llama/Llama-3.1-8B-Instruct",
  "ungated": "Qwen/Qwen2.5-7B-Instruct",
}


def get_config(chosen: str = ""):
  hardware, judge = "v5e", "gated"
  for word in filter(None, chosen.split(",")):
    if word not in TENSOR and word not in JUDGES:
      known = ", ".join([*TENSOR, *JUDGES])
      raise UserError(f"configs/qwen7b_syco.py:{word}: choose from {known}")
    hardware, judge = (word, judge) if word in TENSOR else (hardware, word)
  c = base()  # lora, sampler, objective, optimizer and step counts are the study's already
  c.name = "qwen7b_syco"
  c.model.path = "Qwen/Qwen1.5-7B-Chat"
  c.judge.model = JUDGES[judge]
  c.environment.cue = "style"  # the study's: tone, self-description and a request
  c.mesh.tensor = TENSOR[hardware]
  return c
