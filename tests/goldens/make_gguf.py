"""Writes gguf.npz: greedy continuations and logits of the real models by transformers.

PYTHONPATH=tests python tests/goldens/make_gguf.py
"""

import pathlib

import gguf_cases as cases
import numpy as np
import torch

from rlsafety.models import chat as chats
from rlsafety.models import gguf, load

if __name__ == "__main__":
  goldens = {}
  for name, (path, _) in cases.REAL.items():
    file = load.resolve(path)
    tokenizer, special = gguf.read_tokenizer(gguf.File(file))
    chat = chats.make_chat(tokenizer, **special)
    model = cases.transformers_model(file)
    for i, prompt in enumerate(cases.prompts(name, chat)):
      with torch.no_grad():
        row = torch.tensor([prompt])
        out = model(row, use_cache=True)
        top = out.logits[0, -1].topk(cases.KEPT)
        reply = []
        while len(reply) < cases.STEPS:
          reply.append(int(out.logits[0, -1].argmax()))
          out = model(torch.tensor([reply[-1:]]), past_key_values=out.past_key_values)
      goldens[f"{name}/{i}/prompt"] = np.array(prompt, np.int32)
      goldens[f"{name}/{i}/reply"] = np.array(reply, np.int32)
      goldens[f"{name}/{i}/tokens"] = top.indices.numpy().astype(np.int32)
      goldens[f"{name}/{i}/logits"] = top.values.numpy()
  np.savez_compressed(pathlib.Path(__file__).with_name("gguf.npz"), **goldens)
