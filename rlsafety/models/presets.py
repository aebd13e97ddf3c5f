"""Shapes of published models by name, to plan and benchmark without a download.

The numbers are those of each model's config.json; `families.model_config` reads them like
a file. The first eleven are the policies of the study (arXiv 2604.12500).
"""

import difflib
from typing import Any

from rlsafety.errors import UserError
from rlsafety.models import families
from rlsafety.models.architecture import ModelConfig


def _shape(
  kind: str, vocab: int, width: int, depth: int, heads: int, kv_heads: int, mlp: int,
  positions: int, **rest: Any,
) -> dict[str, Any]:  # fmt: skip
  return {
    "model_type": kind,
    "vocab_size": vocab,
    "hidden_size": width,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": mlp,
    "max_position_embeddings": positions,
    "rms_norm_eps": 1e-5 if kind in ("llama", "mistral") else 1e-6,
  } | rest


def _llama31(factor: float) -> dict[str, Any]:
  scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
  scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
  return {"rope_theta": 5e5, "rope_scaling": scaling}


_M1 = {"rope_theta": 1e6}  # base frequency of Qwen and later Mistral
_TIED = {"tie_word_embeddings": True}
_SMALL3 = {"sliding_window": 512, "sliding_window_pattern": 6}  # Gemma 3
_LARGE3 = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_OLMO3 = {"rope_theta": 5e5, "rope_scaling": {
  "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
  "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
}}  # fmt: skip

PRESETS = {
  # The study
  "qwen1.5-0.5b-chat": _shape("qwen2", 151936, 1024, 24, 16, 16, 2816, 32768, **_M1, **_TIED),
  "qwen1.5-1.8b-chat": _shape("qwen2", 151936, 2048, 24, 16, 16, 5504, 32768, **_M1),
  "gemma-1.1-2b-it": _shape("gemma", 256000, 2048, 18, 8, 1, 16384, 8192),
  "qwen1.5-4b-chat": _shape("qwen2", 151936, 2560, 40, 20, 20, 6912, 32768, rope_theta=5e6),
  "yi-6b-chat": _shape("llama", 64000, 4096, 32, 32, 4, 11008, 4096, rope_theta=5e6),
  "qwen1.5-7b-chat": _shape("qwen2", 151936, 4096, 32, 32, 32, 11008, 32768, **_M1),
  "gemma-1.1-7b-it": _shape("gemma", 256000, 3072, 28, 16, 16, 24576, 8192),
  "llama-2-7b-chat": _shape("llama", 32000, 4096, 32, 32, 32, 11008, 4096),
  "llama-3-8b-instruct": _shape("llama", 128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=5e5),
  "llama-2-13b-chat": _shape("llama", 32000, 5120, 40, 40, 40, 13824, 4096),
  "qwen1.5-14b-chat": _shape("qwen2", 152064, 5120, 40, 40, 40, 13696, 32768, **_M1),
  # Judges and newer policies
  "llama-3.1-8b-instruct": _shape("llama", 128256, 4096, 32, 32, 8, 14336, 131072, **_llama31(8.0)),
  "llama-3.1-70b-instruct": _shape(
    "llama", 128256, 8192, 80, 64, 8, 28672, 131072, **_llama31(8.0)
  ),
  "llama-3.2-1b-instruct": _shape(
    "llama", 128256, 2048, 16, 32, 8, 8192, 131072, **_llama31(32.0), **_TIED
  ),
  "llama-3.2-3b-instruct": _shape(
    "llama", 128256, 3072, 28, 24, 8, 8192, 131072, **_llama31(32.0), **_TIED
  ),
  "mistral-7b-instruct-v0.1": _shape(
    "mistral", 32000, 4096, 32, 32, 8, 14336, 32768, sliding_window=4096
  ),
  "mistral-7b-instruct-v0.3": _shape(
    "mistral", 32768, 4096, 32, 32, 8, 14336, 32768, sliding_window=None, **_M1
  ),
  "qwen2.5-0.5b-instruct": _shape("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, **_M1, **_TIED),
  "qwen2.5-1.5b-instruct": _shape("qwen2", 151936, 1536, 28, 12, 2, 8960, 32768, **_M1, **_TIED),
  "qwen2.5-3b-instruct": _shape("qwen2", 151936, 2048, 36, 16, 2, 11008, 32768, **_M1, **_TIED),
  "qwen2.5-7b-instruct": _shape("qwen2", 152064, 3584, 28, 28, 4, 18944, 32768, **_M1),
  "qwen2.5-14b-instruct": _shape("qwen2", 152064, 5120, 48, 40, 8, 13824, 32768, **_M1),
  "qwen3-0.6b": _shape("qwen3", 151936, 1024, 28, 16, 8, 3072, 40960, **_M1, **_TIED),
  "qwen3-1.7b": _shape("qwen3", 151936, 2048, 28, 16, 8, 6144, 40960, **_M1, **_TIED),
  "qwen3-4b": _shape("qwen3", 151936, 2560, 36, 32, 8, 9728, 40960, **_M1, **_TIED),
  "qwen3-8b": _shape("qwen3", 151936, 4096, 36, 32, 8, 12288, 40960, **_M1),
  "qwen3-14b": _shape("qwen3", 151936, 5120, 40, 40, 8, 17408, 40960, **_M1),
  "qwen3-32b": _shape("qwen3", 151936, 5120, 64, 64, 8, 25600, 40960, **_M1),
  "gemma-2-2b-it": _shape("gemma2", 256000, 2304, 26, 8, 4, 9216, 8192),
  "gemma-2-9b-it": _shape("gemma2", 256000, 3584, 42, 16, 8, 14336, 8192),
  "gemma-2-27b-it": _shape(
    "gemma2", 256000, 4608, 46, 32, 16, 36864, 8192, head_dim=128, query_pre_attn_scalar=144
  ),
  "gemma-3-270m-it": _shape("gemma3_text", 262144, 640, 18, 4, 1, 2048, 32768, **_SMALL3),
  "gemma-3-1b-it": _shape("gemma3_text", 262144, 1152, 26, 4, 1, 6912, 32768, **_SMALL3),
  "gemma-3-4b-it": _shape("gemma3_text", 262208, 2560, 34, 8, 4, 10240, 131072, **_LARGE3),
  "gemma-3-12b-it": _shape("gemma3_text", 262208, 3840, 48, 16, 8, 15360, 131072, **_LARGE3),
  "gemma-3-27b-it": _shape(
    "gemma3_text", 262208, 5376, 62, 32, 16, 21504, 131072, **_LARGE3, head_dim=128,
    query_pre_attn_scalar=168
  ),
  "smollm2-135m-instruct": _shape(
    "llama", 49152, 576, 30, 9, 3, 1536, 8192, rope_theta=1e5, **_TIED
  ),
  "smollm2-360m-instruct": _shape(
    "llama", 49152, 960, 32, 15, 5, 2560, 8192, rope_theta=1e5, **_TIED
  ),
  "smollm2-1.7b-instruct": _shape(
    "llama", 49152, 2048, 24, 32, 32, 8192, 8192, rope_theta=130_000.0, **_TIED
  ),
  "smollm3-3b": _shape(
    "smollm3", 128256, 2048, 36, 16, 4, 11008, 65536, rope_theta=5e6, **_TIED
  ),
  "olmo-2-1b-instruct": _shape("olmo2", 100352, 2048, 16, 16, 16, 8192, 4096, rope_theta=5e5),
  "olmo-2-7b-instruct": _shape("olmo2", 100352, 4096, 32, 32, 32, 11008, 4096, rope_theta=5e5),
  "olmo-3-7b-instruct": _shape("olmo3", 100278, 4096, 32, 32, 32, 11008, 65536, **_OLMO3),
  "olmo-3.1-32b-instruct": _shape("olmo3", 100278, 5120, 64, 40, 8, 27648, 65536, **_OLMO3),
  # For tests: seconds on a laptop
  "tiny": _shape("llama", 512, 64, 2, 4, 2, 128, 4096, **_TIED),
}


def preset(name: str) -> ModelConfig:
  """The ModelConfig of a name in PRESETS. Raises UserError suggesting the nearest name."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, 3) or PRESETS
    raise UserError(f"unknown model preset {name!r}; did you mean {', '.join(near)}?")
  return families.model_config(PRESETS[name], f"preset {name}")
