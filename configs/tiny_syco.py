"""The whole loop in seconds, on random weights: what the tests run.

  python -m rlsafety.train --config=configs/tiny_syco.py

2 CPU cores, about a minute with compilation. A model of 2 layers over pieces of words, rated by the
phrase judge, learns nothing of interest: it proves that every part works.
"""

from rlsafety.recipes import base


def get_config():
  c = base()
  c.name = "tiny_syco"
  c.steps = 6
  c.model.preset = "tiny"  # 2 layers, 512 tokens
  c.model.dtype = "float32"
  c.lora.dropout = 0.0  # so that sampler and learner agree to rounding
  c.environment.length = "short"  # a message of 35-60 words, one sentence wanted
  c.prompts_per_step = 4
  c.max_prompt_tokens = 256
  c.sampler.group = 4
  c.sampler.max_tokens = 24
  c.judge.name = "phrases"
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 2
  c.learner.microbatches = 2
  c.eval.every = 3
  c.eval.prompts = 8
  c.eval.samples = 4  # as the group: one compiled sampler serves both
  c.checkpoint.every = 2
  return c
