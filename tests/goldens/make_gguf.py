"""Writes gguf.npz: greedy continuations and logits of the real models by transformers.

PYTHONPATH=tests python tests/goldens/make_gguf.py
"""

import pathlib

import gguf_cases as cases
import numpy as np
import torch

from rlsafety.models import chat as chats
from rlsafety.models import gguf, gguf_tokenizer, sources


def greedy(model, prompts: list[list[int]]) -> np.ndarray:
  """[prompts, STEPS] likeliest tokens, all prompts together (padded on the left)."""
  width = max(map(len, prompts))
  ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
  position = (mask.cumsum(1) - 1).clamp(min=0)
  cache, replies = None, []
  for _ in range(cases.STEPS):
    out = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
    cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    position = position[:, -1:] + 1
    replies.append(ids)
  return torch.cat(replies, 1).numpy()


if __name__ == "__main__":
  torch.set_num_threads(1)
  torch.set_grad_enabled(False)
  goldens = {}
  for name, (path, _) in cases.REAL.items():
    file = sources.resolve(path)
    tokenizer, special = gguf_tokenizer.read_tokenizer(gguf.open_file(file))
    prompts = cases.prompts(name, chats.make_chat(tokenizer, **special))
    model = cases.transformers_model(file)
    for i, (prompt, reply) in enumerate(zip(prompts, greedy(model, prompts), strict=True)):
      # Once more without padding: the same tokens, and the logits to keep.
      logits = model(torch.tensor([[*prompt, *reply[:-1]]])).logits[0, len(prompt) - 1 :]
      assert (logits.argmax(-1).numpy() == reply).all()
      top = logits[0].topk(cases.KEPT)
      goldens[f"{name}/{i}/prompt"] = np.array(prompt, np.int32)
      goldens[f"{name}/{i}/reply"] = reply.astype(np.int32)
      goldens[f"{name}/{i}/tokens"] = top.indices.numpy().astype(np.int32)
      goldens[f"{name}/{i}/logits"] = top.values.numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("gguf.npz"), **goldens)
