"""From a Hugging Face config.json to a ModelConfig and back.

A family is a handful of numbers. Every field of the file is either used here, known to
leave inference alone, or refused: a field that is quietly ignored is a wrong model. What is
used must have its type and range, since "false" counts as true and NaN passes most tests.
"""

import math
from typing import Any, NoReturn

from rlsafety.errors import UserError
from rlsafety.models.architecture import ModelConfig, Rope

# model_type -> what people call it.
FAMILIES = {
  "llama": "Llama 2, 3, 3.1, 3.2, 3.3, Yi, SmolLM2, TinyLlama",
  "mistral": "Mistral 7B",
  "qwen2": "Qwen1.5, Qwen2, Qwen2.5",
  "qwen3": "Qwen3 (dense)",
  "smollm3": "SmolLM3",
  "olmo2": "OLMo 2",
  "olmo3": "OLMo 3",
  "gemma": "Gemma 1, 1.1",
  "gemma2": "Gemma 2",
  "gemma3_text": "Gemma 3 (text; of gemma3 the text part)",
}

# Names, bookkeeping, generation defaults (of old files: newer ones have generation_config.json)
# and training-time settings.
_HARMLESS = set(
  "architectures model_type _name_or_path name_or_path torch_dtype dtype transformers_version "
  "initializer_range use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
  "decoder_start_token_id cache_implementation pretraining_tp chunk_size_feed_forward id2label "
  "label2id problem_type output_attentions output_hidden_states return_dict is_decoder "
  "_attn_implementation _attn_implementation_internal _attn_implementation_autoset "
  "attn_implementation _flash_attn_2_enabled use_flash_attn tokenizer_class "
  "max_window_layers transformers.js_config torchscript use_bfloat16 "
  "tf_legacy_loss finetuning_task task_specific_params _commit_hash prefix model_max_length "
  "unsloth_fixed unsloth_version neftune_noise_alpha gradient_checkpointing max_new_tokens "
  "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
  "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
  "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
  "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
  "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
  "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
  "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p "
  "typical_p".split()
)
# Fields that only these values of are supported.
_FIXED = {
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "attention_dropout": (0, 0.0, None),
  "use_bidirectional_attention": (False, None),
  "rope_interleaved": (False, None),
  "is_llama_config": (True, False, None),
  "partial_rotary_factor": (1, 1.0, None),
  "is_encoder_decoder": (False, None),
  "tie_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "pruned_heads": ({}, None),
}
# Of Gemma 3 with a vision tower, what is about images alone.
_VISION = set(
  "text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index "
  "image_token_index boi_token_id eoi_token_id image_token_id".split()
)
_GEMMA3_DEFAULTS = {
  "vocab_size": 262_208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 131_072,
  "sliding_window": 4096,
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
  "yarn": {
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
  },
}


class _Fields:
  """The fields of one file that are left to be used; `source` names the file in errors."""

  def __init__(self, values: dict[str, Any], source: str) -> None:
    self.left, self.source = dict(values), source

  def fail(self, field: str, value: Any, why: str) -> NoReturn:
    raise UserError(f"{self.source}: {field}={value!r:.200} {why}")

  def take(self, field: str, default: Any = None) -> Any:
    """A field's value, which is used up; null is the default too, as in transformers."""
    value = self.left.pop(field, None)
    return default if value is None else value

  def number(self, field: str, default: float | None = None, whole: bool = True,
             limit: float = 10**9) -> Any:  # fmt: skip
    """A number in (0, limit], an integer if `whole`."""
    return self.positive(field, self.take(field, default), whole, limit)

  def positive(self, field: str, value: Any, whole: bool = False, limit: float = 10**9) -> Any:
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= limit:
      self.fail(field, value, f"must be {'an integer' if whole else 'a number'} in (0, {limit}]")
    return value

  def flag(self, field: str, default: bool) -> bool:
    value = self.take(field, default)
    if not isinstance(value, bool):
      self.fail(field, value, "must be true or false")
    return value


def model_config(hf: dict[str, Any], source: str = "config.json") -> ModelConfig:
  """The ModelConfig of a config.json's content, with transformers' defaults where absent.

  Raises UserError naming `source` and the field for whatever is not supported.
  """
  if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), dict):
    # The text part states only what differs from transformers' defaults. What the file says
    # beside the two parts holds for the whole, above all whether the head is tied.
    text = {k: v for k, v in hf["text_config"].items() if k != "tie_word_embeddings"}
    for field in sorted(set(hf) - _VISION - _HARMLESS - {"tie_word_embeddings"}):
      if hf[field] not in _FIXED.get(field, (None,)) and hf[field] != text.get(field):
        raise UserError(f"{source}: {field}={hf[field]!r} stands beside text_config, not in it")
    text["tie_word_embeddings"] = hf.get("tie_word_embeddings")
    hf = _GEMMA3_DEFAULTS | text | {"model_type": "gemma3_text"}
  kind = hf.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    supported = "; ".join(f"{k}: {v}" for k, v in FAMILIES.items())
    raise UserError(f"{source}: model_type={kind!r} is not supported. Supported: {supported}")
  fields = _Fields(hf, source)
  if fields.take("auto_map"):
    raise UserError(f"{source}: auto_map asks for remote code, which is never run")
  gemma, olmo = kind.startswith("gemma"), kind in ("olmo2", "olmo3")
  heads = fields.number("num_attention_heads")
  width = fields.number("hidden_size")
  depth = fields.number("num_hidden_layers", limit=1000)
  usual = {"smollm3": 4, "gemma": 16} | dict.fromkeys(("llama", "olmo2", "olmo3"), heads)
  kv_heads = fields.number("num_key_value_heads", usual.get(kind))
  if heads % kv_heads:
    fields.fail("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
  head_dim = {"qwen3": 128}.get(kind, 256 if gemma else width // heads)
  head_dim = fields.number("head_dim", head_dim)
  if head_dim % 2:
    fields.fail("head_dim", head_dim, "must be even")
  config = {
    "vocab_size": fields.number("vocab_size"),
    "d_model": width,
    "n_layers": depth,
    "n_heads": heads,
    "n_kv_heads": kv_heads,
    "head_dim": head_dim,
    "d_ff": fields.number("intermediate_size"),
    "norm_eps": float(fields.number("rms_norm_eps", 1e-5 if olmo else 1e-6, whole=False)),
    "norm_offset": gemma,
    "embed_scale": float(width) ** 0.5 if gemma else 1.0,
    "qkv_bias": kind == "qwen2",
    "qk_norm": kind in ("qwen3", "gemma3_text"),
    "qk_norm_whole": olmo,
    "pre_norms": not olmo,
    "post_norms": olmo or kind in ("gemma2", "gemma3_text"),
    "tie_embeddings": fields.flag("tie_word_embeddings", gemma or kind == "smollm3"),
    "max_positions": fields.number("max_position_embeddings"),
  }
  config["activation"] = _ACTIVATIONS[_activation(kind, fields)]
  config |= _windows(kind, fields, depth)
  config |= _ropes(kind, fields)
  if kind in ("gemma2", "gemma3_text"):
    config["query_scale"] = float(fields.number("query_pre_attn_scalar", 256, False)) ** -0.5
    for ours, theirs, default in (
      ("attn_softcap", "attn_logit_softcapping", 50.0),
      ("final_softcap", "final_logit_softcapping", 30.0),
    ):
      # null is no cap: not the default, which holds where the field is absent.
      value = fields.left.pop(theirs, default if kind == "gemma2" else None)
      config[ours] = None if value is None else float(fields.positive(theirs, value))
  for field, value in fields.left.items():
    if field in _FIXED:
      if value not in _FIXED[field]:
        fields.fail(field, value, f"is not supported, only {_FIXED[field][0]!r}")
    elif field not in _HARMLESS and value is not None:
      fields.fail(field, value, f"is not known for model_type {kind}; it may change the numbers")
  return ModelConfig(**config)


def _activation(kind: str, fields: _Fields) -> str:
  """The MLP's activation. Gemma's files have two names for it: transformers reads the one or the
  other by its version, so they must agree."""
  name, other, usual = "hidden_act", "hidden_activation", "silu"
  if kind.startswith("gemma"):
    name, other = (name, other) if kind == "gemma" else (other, name)
    usual = "gelu_pytorch_tanh"
  value, second = fields.take(name, usual), fields.take(other)
  if kind == "gemma" and value == "gelu":  # the first release meant the tanh form
    value = usual
  if not isinstance(value, str) or value not in _ACTIVATIONS:
    fields.fail(name, value, f"is not supported: {', '.join(_ACTIVATIONS)}")
  if second not in (None, value):
    fields.fail(other, second, f"disagrees with {name}={value!r}; keep one")
  return value


def _windows(kind: str, fields: _Fields, depth: int) -> dict[str, Any]:
  """Which layers see only the last `window` positions."""
  types = fields.take("layer_types")
  pattern = fields.number("sliding_window_pattern", 6)
  older = fields.take("_sliding_window_pattern", pattern)
  if types is None and older != pattern:  # as transformers writes it, and does not read it
    fields.fail("_sliding_window_pattern", older, "counts only as sliding_window_pattern")
  switched_on = fields.flag("use_sliding_window", False)
  # null is no window: not the default, which holds where the field is absent.
  without = kind in ("llama", "olmo2", "smollm3")
  window = fields.left.pop("sliding_window", None if without else 4096)
  if kind == "smollm3":
    return _unrotated(fields, depth, types, switched_on)
  if without or kind == "gemma":
    if without and window is not None:
      fields.fail("sliding_window", window, f"is not a field of {kind} models")
    local = [False] * depth
  elif kind == "mistral":
    local = [window is not None] * depth
  elif kind in ("qwen2", "qwen3"):
    first = fields.left.get("max_window_layers")
    first = 28 if first is None else first
    if not isinstance(first, int) or isinstance(first, bool):
      fields.fail("max_window_layers", first, "must be an integer")
    local = [switched_on and window is not None and i >= first for i in range(depth)]
  else:
    period = {"gemma2": 2, "olmo3": 4, "gemma3_text": pattern}[kind]
    local = [(i + 1) % period != 0 for i in range(depth)]
  if types is not None:
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != depth or any(t not in known for t in types):
      fields.fail("layer_types", types, f"must name {' or '.join(known)} {depth} times")
    named = [t == "sliding_attention" for t in types]
    if named != local and kind in ("llama", "mistral", "gemma", "olmo2"):
      fields.fail("layer_types", types, f"is no field of {kind} models, whose layers are alike")
    if any(named) and not switched_on and kind in ("qwen2", "qwen3"):
      fields.fail("layer_types", types, "names sliding_attention, but use_sliding_window is false")
    local = named
  if not any(local):
    return {}
  window = fields.positive("sliding_window", window, whole=True)
  return {"window": window, "local_layers": tuple(local)}


def _unrotated(fields: _Fields, depth: int, types: Any, switched_on: bool) -> dict[str, Any]:
  """SmolLM3: which layers rotate nothing. They are its local layers, though they see all."""
  if switched_on or (types is not None and types != ["full_attention"] * depth):
    fields.fail("use_sliding_window", switched_on, "or layer_types name sliding attention")
  every = fields.number("no_rope_layer_interval", 4)
  rotated = fields.take("no_rope_layers")
  if rotated is None:
    rotated = [int((i + 1) % every != 0) for i in range(depth)]
  if not isinstance(rotated, list) or any(r not in (0, 1) for r in rotated) or len(rotated) < depth:
    fields.fail("no_rope_layers", rotated, f"must hold 0 or 1 for each of {depth} layers")
  local = tuple(not r for r in rotated[:depth])
  return {"local_layers": local} if any(local) else {}


def _ropes(kind: str, fields: _Fields) -> dict[str, Rope]:
  """The rotary embedding, from rope_theta and rope_scaling or from rope_parameters."""

  def table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
      fields.fail(where, value, "must be an object")
    return {k: v for k, v in (value or {}).items() if v is not None}

  two = kind in ("gemma3_text", "olmo3")

  def rope(value: Any, theta: float, where: str) -> Rope:
    given = table(where, value)
    theta = fields.positive(f"{where}.rope_theta", given.pop("rope_theta", theta), limit=10**12)
    older = given.pop("type", "default")
    if two and "rope_type" not in given and older != "default":  # read by transformers 4 alone
      fields.fail(f"{where}.type", older, "must be called rope_type")
    form = given.pop("rope_type", older)
    if not isinstance(form, str) or form not in _ROPE_FIELDS:
      fields.fail(where, form, f"is not supported: {', '.join(_ROPE_FIELDS)}")
    if form == "yarn":  # what may be absent; a factor that is no number is refused below
      factor = given.get("factor")
      grown = factor if isinstance(factor, (int, float)) and factor > 1 else 1
      usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": 0.1 * math.log(grown) + 1}
      given = usual | given
    if given.pop("partial_rotary_factor", 1) != 1:
      fields.fail(where, value, "turns a part of each head only, which is not supported")
    if set(given) != _ROPE_FIELDS[form]:
      fields.fail(where, given, f"of rope_type {form} must have just {sorted(_ROPE_FIELDS[form])}")
    for name, x in given.items():
      fields.positive(f"{where}.{name}", x, name == "original_max_position_embeddings")
    if form == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
      fields.fail(where, given, "must have low_freq_factor below high_freq_factor")
    if form == "yarn" and (given["beta_slow"] >= given["beta_fast"] or theta <= 1):
      fields.fail(where, given, "must have beta_slow below beta_fast and a rope_theta above 1")
    original = given.pop("original_max_position_embeddings", 8192)
    return Rope(float(theta), form, original_positions=original, **given)

  usual = {"gemma3_text": 1e6, "olmo3": 5e5, "smollm3": 2e6}.get(kind, 1e4)
  theta = fields.number("rope_theta", usual, False, 10**12)
  scaling, parameters = fields.take("rope_scaling"), fields.take("rope_parameters")
  if scaling is not None and parameters is not None:
    fields.fail("rope_scaling", scaling, "and rope_parameters are both given; keep one")
  if not two:
    where = "rope_scaling" if parameters is None else "rope_parameters"
    found = {"rope": rope(scaling if parameters is None else parameters, theta, where)}
    return found | ({"local_rope": Rope(kind="none")} if kind == "smollm3" else {})
  local_theta = theta
  if kind == "gemma3_text":
    local_theta = fields.number("rope_local_base_freq", 10_000.0, False, 10**12)
  elif parameters is None and theta != usual:  # transformers 4 and 5 turn local layers differently
    fields.fail("rope_theta", theta, "must stand in rope_parameters, for both kinds of layers")
  both = {"full_attention": scaling}
  if parameters is not None:
    both = table("rope_parameters", parameters)
  if set(both) - {"full_attention", "sliding_attention"}:
    fields.fail("rope_parameters", parameters, "must have full_attention and sliding_attention")
  where = "rope_scaling" if parameters is None else "rope_parameters.full_attention"
  local = rope(both.get("sliding_attention"), local_theta, "rope_parameters.sliding_attention")
  return {"rope": rope(both.get("full_attention"), theta, where), "local_rope": local}


def family(config: ModelConfig) -> str:
  """The model_type whose numbers `config` has."""
  if not config.pre_norms:
    return "olmo3" if any(config.local_layers) else "olmo2"
  if config.post_norms:
    return "gemma3_text" if config.qk_norm else "gemma2"
  if config.local_rope is not None:
    return "smollm3"
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
  classes = {"gemma3_text": "Gemma3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
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
  gemma = config.norm_offset
  hf["hidden_activation" if gemma and config.post_norms else "hidden_act"] = activation

  def scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
      return None
    fields = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
      fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
      fields["original_max_position_embeddings"] = rope.original_positions
    if rope.kind == "yarn":
      fields |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
      fields |= {"attention_factor": rope.attention_factor}
      fields["original_max_position_embeddings"] = rope.original_positions
    return fields

  hf |= {"rope_theta": config.rope.theta, "rope_scaling": scaling(config.rope)}
  if kind == "gemma3_text" and config.local_rope:
    hf["rope_local_base_freq"] = config.local_rope.theta
  if kind == "smollm3":
    local = config.local_layers or (False,) * config.n_layers
    return _checked(hf | {"no_rope_layers": [int(not x) for x in local]}, config)
  if kind == "olmo3":
    both = {"full_attention": config.rope, "sliding_attention": config.local_rope}
    hf["rope_parameters"] = {
      name: {"rope_theta": r.theta} | (scaling(r) or {"rope_type": "default"})
      for name, r in both.items()
    }
    del hf["rope_theta"], hf["rope_scaling"]
  if kind in ("qwen2", "qwen3"):
    hf["use_sliding_window"] = any(config.local_layers)
  if any(config.local_layers) or kind == "mistral":
    hf["sliding_window"] = config.window
  if any(config.local_layers) and kind != "mistral":
    names = {True: "sliding_attention", False: "full_attention"}
    hf["layer_types"] = [names[local] for local in config.local_layers]
  if gemma and config.post_norms:
    hf["query_pre_attn_scalar"] = round(config.query_scale**-2)  # transformers takes integers
    hf["attn_logit_softcapping"] = config.attn_softcap
    hf["final_logit_softcapping"] = config.final_softcap
  return _checked(hf, config)


def _checked(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
  kind = hf["model_type"]
  if model_config(hf, "the exported config") != config:
    raise UserError(f"this ModelConfig is of no Hugging Face architecture (nearest: {kind})")
  return hf
