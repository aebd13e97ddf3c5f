"""From a Hugging Face config.json to a ModelConfig and back.

A family is a handful of numbers. Every field of the file is either used here, known to
leave inference alone, or refused: a field that is quietly ignored is a wrong model.
"""

from rlsafety.errors import UserError
from rlsafety.models.architecture import ModelConfig, Rope

# model_type -> what people call it.
FAMILIES = {
  "llama": "Llama 2, 3, 3.1, 3.2, 3.3, Yi, SmolLM2, TinyLlama",
  "mistral": "Mistral 7B",
  "qwen2": "Qwen1.5, Qwen2, Qwen2.5",
  "qwen3": "Qwen3 (dense)",
  "gemma": "Gemma 1, 1.1",
  "gemma2": "Gemma 2",
  "gemma3_text": "Gemma 3 (text; of gemma3 the text part)",
}

# Names, bookkeeping, generation defaults and training-time initialisation.
_HARMLESS = set(
  "architectures model_type _name_or_path name_or_path torch_dtype dtype transformers_version "
  "initializer_range use_cache bos_token_id eos_token_id pad_token_id unk_token_id "
  "cache_implementation pretraining_tp chunk_size_feed_forward id2label label2id problem_type "
  "output_attentions output_hidden_states return_dict is_encoder_decoder _attn_implementation "
  "_attn_implementation_autoset attn_implementation tokenizer_class hidden_activation "
  "_sliding_window_pattern max_window_layers transformers.js_config".split()
)
# Fields that only one value of is supported.
_FIXED = {
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "attention_dropout": (0, 0.0, None),
  "use_bidirectional_attention": (False, None),
  "rope_interleaved": (False, None),
  "is_llama_config": (True, False, None),
  "partial_rotary_factor": (1, 1.0, None),
}
_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
_ROPE_FIELDS = {
  "default": set(),
  "linear": {"factor"},
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def model_config(hf: dict, source: str = "config.json") -> ModelConfig:
  """The ModelConfig of a config.json's content, with transformers' defaults where absent.

  Raises UserError naming `source` and the field for whatever is not supported.
  """
  left = dict(hf)
  if left.get("model_type") == "gemma3" and isinstance(left.get("text_config"), dict):
    # The text part states only what differs from transformers' defaults.
    left = _GEMMA3_DEFAULTS | left["text_config"] | {"model_type": "gemma3_text"}
  kind = left.get("model_type")
  if kind not in FAMILIES:
    supported = "; ".join(f"{k}: {v}" for k, v in FAMILIES.items())
    raise UserError(f"{source}: model_type={kind!r} is not supported. Supported: {supported}")
  if left.get("auto_map"):
    raise UserError(f"{source}: auto_map asks for remote code, which is never run")
  gemma = kind.startswith("gemma")

  def fail(field, value, why):
    raise UserError(f"{source}: {field}={value!r} {why}")

  def number(field, default=None, types=int, limit=10**9):
    value = left.pop(field, None)
    value = default if value is None else value
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value <= limit:
      fail(field, value, f"must be a number in (0, {limit}] (model_type {kind})")
    return value

  heads = number("num_attention_heads")
  width = number("hidden_size")
  depth = number("num_hidden_layers", limit=1000)
  kv_heads = number("num_key_value_heads", heads if kind in ("llama", "gemma") else None)
  if heads % kv_heads:
    fail("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
  head_dim = {"qwen3": 128}.get(kind, 256 if gemma else width // heads)
  head_dim = number("head_dim", head_dim)
  if head_dim % 2:
    fail("head_dim", head_dim, "must be even")
  config = {
    "vocab_size": number("vocab_size"),
    "d_model": width,
    "n_layers": depth,
    "n_heads": heads,
    "n_kv_heads": kv_heads,
    "head_dim": head_dim,
    "d_ff": number("intermediate_size"),
    "norm_eps": float(number("rms_norm_eps", 1e-6, (int, float))),
    "norm_offset": gemma,
    "embed_scale": float(width) ** 0.5 if gemma else 1.0,
    "qkv_bias": kind == "qwen2",
    "qk_norm": kind in ("qwen3", "gemma3_text"),
    "post_norms": kind in ("gemma2", "gemma3_text"),
    "tie_embeddings": bool(left.pop("tie_word_embeddings", gemma)),
    "max_positions": number("max_position_embeddings"),
  }
  activation = left.pop("hidden_act", None)
  if gemma:
    activation = left.get("hidden_activation") or activation or "gelu_pytorch_tanh"
    if kind == "gemma" and activation == "gelu":  # The first release meant the tanh form.
      activation = "gelu_pytorch_tanh"
  activation = activation or "silu"
  if activation not in _ACTIVATIONS:
    fail("hidden_act", activation, f"is not supported: {', '.join(_ACTIVATIONS)}")
  config["activation"] = _ACTIVATIONS[activation]
  config |= _windows(kind, left, depth, number, fail)
  config |= _ropes(kind, left, number, fail)
  if kind in ("gemma2", "gemma3_text"):
    config["query_scale"] = float(number("query_pre_attn_scalar", 256, (int, float))) ** -0.5
    for ours, theirs, default in (
      ("attn_softcap", "attn_logit_softcapping", 50.0),
      ("final_softcap", "final_logit_softcapping", 30.0),
    ):
      value = left.pop(theirs, default if kind == "gemma2" else None)
      config[ours] = None if value is None else float(value)
  for field, value in left.items():
    if field in _FIXED:
      if value not in _FIXED[field]:
        fail(field, value, f"is not supported, only {_FIXED[field][0]!r}")
    elif field not in _HARMLESS and value is not None:
      fail(field, value, f"is not known for model_type {kind}; it may change the numbers")
  return ModelConfig(**config)


_GEMMA3_DEFAULTS = {
  "vocab_size": 262_208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 131_072,
  "sliding_window": 4096,
}


def _windows(kind, left, depth, number, fail) -> dict:
  """Which layers see only the last `window` positions."""
  types = left.pop("layer_types", None)
  pattern = left.pop("sliding_window_pattern", left.get("_sliding_window_pattern", 6))
  switched_on = left.pop("use_sliding_window", False)
  window = left.pop("sliding_window", 4096 if kind != "llama" else None)
  if kind in ("llama", "gemma"):
    if kind == "llama" and window is not None:
      fail("sliding_window", window, "is not a field of llama models")
    local = [False] * depth
  elif kind == "mistral":
    local = [window is not None] * depth
  elif kind in ("qwen2", "qwen3"):
    first = left.get("max_window_layers", 28)
    local = [bool(switched_on) and window is not None and i >= first for i in range(depth)]
  else:
    period = 2 if kind == "gemma2" else pattern
    local = [(i + 1) % period != 0 for i in range(depth)]
  if types is not None:
    if len(types) != depth or set(types) - {"full_attention", "sliding_attention"}:
      fail("layer_types", types, f"must name full_attention or sliding_attention {depth} times")
    local = [t == "sliding_attention" for t in types]
  if not any(local):
    return {}
  if not isinstance(window, int) or window < 1:
    fail("sliding_window", window, "must be a positive number")
  return {"window": window, "local_layers": tuple(local)}


def _ropes(kind, left, number, fail) -> dict:
  """The rotary embedding, from rope_theta and rope_scaling or from rope_parameters."""

  def rope(fields, theta, where):
    fields = {k: v for k, v in (fields or {}).items() if v is not None}
    theta = fields.pop("rope_theta", theta)
    form = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    if form not in _ROPE_FIELDS:
      fail(where, form, f"is not supported: {', '.join(_ROPE_FIELDS)}")
    if set(fields) != _ROPE_FIELDS[form] and not (form == "default" and not fields):
      fail(where, fields, f"of rope_type {form} must have just {sorted(_ROPE_FIELDS[form])}")
    original = fields.pop("original_max_position_embeddings", 8192)
    return Rope(float(theta), form, original_positions=int(original), **fields)

  gemma3 = kind == "gemma3_text"
  theta = number("rope_theta", 1_000_000.0 if gemma3 else 10_000.0, (int, float))
  scaling, parameters = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
  if scaling is not None and parameters is not None:
    fail("rope_scaling", scaling, "and rope_parameters are both given; keep one")
  local_theta = number("rope_local_base_freq", 10_000.0, (int, float)) if gemma3 else None
  if not gemma3:
    where = "rope_scaling" if parameters is None else "rope_parameters"
    return {"rope": rope(scaling or parameters, theta, where)}
  both = parameters or {"full_attention": scaling}
  if set(both) - {"full_attention", "sliding_attention"}:
    fail("rope_parameters", parameters, "must have full_attention and sliding_attention")
  return {
    "rope": rope(both.get("full_attention"), theta, "rope_parameters.full_attention"),
    "local_rope": rope(both.get("sliding_attention"), local_theta, "rope_parameters.sliding"),
  }


def family(config: ModelConfig) -> str:
  """The model_type whose numbers `config` has."""
  if config.post_norms:
    return "gemma3_text" if config.qk_norm else "gemma2"
  if config.norm_offset:
    return "gemma"
  if config.qk_norm:
    return "qwen3"
  if config.qkv_bias:
    return "qwen2"
  return "mistral" if any(config.local_layers) else "llama"


def hf_config(config: ModelConfig) -> dict:
  """The config.json content that `model_config` reads back as `config`."""
  kind = family(config)
  classes = {"gemma3_text": "Gemma3ForCausalLM"}
  hf = {
    "architectures": [classes.get(kind, f"{kind.capitalize()}ForCausalLM")],
    "model_type": kind,
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": config.n_heads,
    "num_key_value_heads": config.n_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.d_ff,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_positions,
  }
  activation = {v: k for k, v in reversed(_ACTIVATIONS.items())}[config.activation]
  hf["hidden_activation" if config.post_norms else "hidden_act"] = activation

  def scaling(rope):
    if rope.kind == "default":
      return None
    fields = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
      fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
      fields["original_max_position_embeddings"] = rope.original_positions
    return fields

  hf |= {"rope_theta": config.rope.theta, "rope_scaling": scaling(config.rope)}
  if kind == "gemma3_text":
    hf["rope_local_base_freq"] = config.local_rope.theta
  if kind in ("qwen2", "qwen3"):
    hf["use_sliding_window"] = any(config.local_layers)
  if any(config.local_layers) or kind == "mistral":
    hf["sliding_window"] = config.window
  if any(config.local_layers) and kind != "mistral":
    names = {True: "sliding_attention", False: "full_attention"}
    hf["layer_types"] = [names[local] for local in config.local_layers]
  if config.post_norms:
    hf["query_pre_attn_scalar"] = round(config.query_scale**-2)  # transformers takes integers
    hf["attn_logit_softcapping"] = config.attn_softcap
    hf["final_logit_softcapping"] = config.final_softcap
  if model_config(hf, "the exported config") != config:
    raise UserError(f"this ModelConfig is of no Hugging Face architecture (nearest: {kind})")
  return hf
