"""Small models of every family with reproducible weights, run by us and by transformers.

Shared by test_families.py and goldens/make_families.py, so that the committed values and
the live comparison are about the same models.
"""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlsafety import sampler
from rlsafety.config import Lora
from rlsafety.models import architecture, assemble, families, hf, transformer
from rlsafety.models.lora import Adapter
from rlsafety.models.model import Model
from rlsafety.types import Prompts

P, G, S, T, V = 2, 2, 12, 64, 97
LORA = Lora(rank=4, alpha=8.0, rslora=True)
KEPT_STEPS = (0, 31, 63)  # decode steps whose logits are committed


def case(kind, heads, kv_heads, tied, **rest):
  base = {"model_type": kind, "vocab_size": V, "hidden_size": 8 * heads}
  base |= {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
  base |= {"intermediate_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
  return base | {"head_dim": 8, "tie_word_embeddings": tied} | rest


def rope(kind, theta=10_000.0, **rest):
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | rest}


_LLAMA3 = rope(
  "llama3",
  5e5,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=24,
)
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# Every window is shorter than the prompt plus its 64 tokens; one is shorter than the prompt.
CASES = {
  "llama2_mha": case("llama", 4, 4, False),
  "llama31_scaled": case("llama", 4, 2, False, **_LLAMA3),
  "llama32_scaled_tied": case("llama", 6, 2, True, **_LLAMA3),
  "yi_mqa": case("llama", 8, 1, False, **rope("default", 5e6)),
  "smollm2_9_3": case("llama", 9, 3, True, **rope("default", 1e5)),
  "mistral_window": case("mistral", 4, 2, False, sliding_window=16),
  "mistral_global": case("mistral", 4, 4, False, sliding_window=None, **rope("default", 1e6)),
  "qwen15_mha": case("qwen2", 4, 4, False, **rope("default", 1e6)),
  "qwen25_gqa_tied": case("qwen2", 4, 2, True, **rope("default", 1e6)),
  "qwen2_window": case(
    "qwen2", 4, 2, False, use_sliding_window=True, sliding_window=9, max_window_layers=1
  ),
  "qwen3_gqa": case("qwen3", 4, 2, False, head_dim=16, **rope("default", 1e6)),
  "qwen3_mha_tied": case("qwen3", 4, 4, True, head_dim=8, **rope("default", 1e6)),
  # transformers' own padding id lies outside of so small a vocabulary.
  "smollm3_gqa": case("smollm3", 4, 2, True, pad_token_id=0, **rope("default", 2e6))
  | {"num_hidden_layers": 4},
  "smollm3_chosen": case("smollm3", 4, 4, False, pad_token_id=0, **rope("default", 5e4))
  | {"no_rope_layers": [0, 1]},
  "olmo2_mha": case("olmo2", 4, 4, False, **rope("default", 5e5)),
  "olmo2_gqa": case("olmo2", 6, 2, False, **rope("default", 5e5)),
  "olmo3_window": case("olmo3", 4, 4, False, sliding_window=10)
  | {"num_hidden_layers": 4, "rope_parameters": {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
  "olmo3_yarn": case("olmo3", 4, 2, False, sliding_window=10, head_dim=16, rope_theta=5e5)
  | {"num_hidden_layers": 4, "rope_scaling": {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048,
    "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}},
  "qwen3_yarn": case("qwen3", 4, 2, False, head_dim=16, **rope(
    "yarn", 1e3, factor=4.0, original_max_position_embeddings=512)),
  "olmo3_types": case("olmo3", 4, 2, False, sliding_window=16, rope_theta=5e5)
  | {"layer_types": ["sliding_attention", "full_attention"]},
  "gemma_mqa": case("gemma", 4, 1, True, hidden_act="gelu_pytorch_tanh", head_dim=16),
  "gemma_mha": case("gemma", 4, 4, True, hidden_act="gelu", head_dim=8),
  "gemma2_gqa": case("gemma2", 4, 2, True, sliding_window=20, query_pre_attn_scalar=8, **_GELU),
  "gemma2_mha": case(
    "gemma2", 4, 4, True, sliding_window=7, query_pre_attn_scalar=24, head_dim=16, **_GELU
  )
  | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
  "gemma3_mqa": case("gemma3_text", 4, 1, True, sliding_window=10, query_pre_attn_scalar=8, **_GELU)
  | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
  "gemma3_scaled": case(
    "gemma3_text", 4, 2, True, sliding_window=16, query_pre_attn_scalar=12, **_GELU
  )
  | {"layer_types": ["sliding_attention", "full_attention"]}
  | {
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
  },
}


def noise(name: str, shape) -> np.ndarray:
  """Values in [-1, 1) that depend on the name alone and on no library's generator."""
  n = np.arange(np.prod(shape), dtype=np.float64) + zlib.crc32(name.encode()) % 9973
  x = np.sin(n * 12.9898) * 43758.5453
  return (2 * (x - np.floor(x)) - 1).reshape(shape).astype(np.float32)


def tensors(config) -> dict[str, np.ndarray]:
  """{Hugging Face name: weights} of one model."""
  flat, out = assemble.flat_weights(config), {}
  for path, name in assemble.hf_names(config).items():
    shape = flat[path].shape
    shape = shape[::-1] if assemble.is_transposed(path, shape) else shape
    x = noise(name, shape)
    if "norm" in name:
      x = 0.3 * x + (0.0 if config.norm_offset else 1.0)
    elif "bias" in name:
      x = 0.5 * x
    else:
      x = x * np.float32((3.0 / shape[-1]) ** 0.5)
    out[name] = x.astype(np.float32)
  return out


def write_folder(hf_config: dict, folder) -> None:
  """The model as a Hugging Face folder (without tokenizer)."""
  config = families.model_config(hf_config)
  (folder / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors(config), folder / "model.safetensors", metadata={"format": "pt"})


def adapter_of(config) -> Adapter:
  n, layer = config.n_layers, architecture.weights(config)["layers"][0]
  weights = {}
  for target in LORA.targets:
    d_in, d_out = layer[target].shape
    a = 0.5 * noise(f"{target}.a", (n, d_in, LORA.rank))
    b = 0.05 * noise(f"{target}.b", (n, LORA.rank, d_out))
    weights[target] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
  return Adapter(weights=weights, scale=LORA.scale)


def sequences():
  """prompt tokens [P, S], lengths [P] (one shorter than S), completions [P, G, T]."""
  rng = np.random.RandomState(0)  # a frozen generator
  tokens = rng.randint(0, V, (P, S)).astype(np.int32)
  return tokens, np.array([S, S - 5], np.int32), rng.randint(0, V, (P, G, T)).astype(np.int32)


def model_of(name: str, folder) -> Model:
  write_folder(CASES[name], folder)
  config = families.model_config(CASES[name])
  params = assemble.assemble(config, hf.read_tensors(folder), jnp.float32)
  return Model(config, params, None, {"path": str(folder)})


# Compiling takes longer than anything else here, and nothing runs twice.
_quick = functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


@_quick
def _forward_and_gradient(c, params, adapter, tokens, lengths, replies):
  def loss(adapter):
    prompts = Prompts(tokens=tokens, lengths=lengths)
    cache, first = transformer.prefill(params, adapter, c, prompts)
    hidden, _ = transformer.extend(params, adapter, c, cache, replies)
    logp = jax.nn.log_softmax(transformer.unembed(params, c, hidden))[:, :, :-1]
    loss = -jnp.mean(jnp.take_along_axis(logp, replies[:, :, 1:, None], -1))
    return loss, (cache, transformer.unembed(params, c, first))

  grads, (cache, first) = jax.grad(loss, has_aux=True)(adapter)
  return cache, first, grads.weights


@_quick
def _decode(c, params, adapter, prompt, replies):
  def step(cache, i):
    h, cache = transformer.decode(params, adapter, c, prompt, cache, replies[:, :, i], i)
    return cache, h

  prompt, cache = sampler.by_layer(prompt), sampler.init_cache(c, P, G, T, jnp.float32)
  _, hidden = jax.lax.scan(step, cache, jnp.arange(T))
  return jnp.moveaxis(transformer.unembed(params, c, hidden), 0, 2)


def ours(model: Model) -> dict[str, np.ndarray]:
  """prefill [P, S, V] (valid slots), decode [P, G, T, V], and one gradient per LoRA weight,
  all with the adapter."""
  c, adapter, (tokens, lengths, replies) = model.config, adapter_of(model.config), sequences()
  prompt, first, grads = _forward_and_gradient(c, model.params, adapter, tokens, lengths, replies)
  decoded = _decode(c, model.params, adapter, prompt, replies)
  out = {"prefill": np.asarray(first), "decode": np.asarray(decoded)}
  for target, ab in grads.items():
    out |= {f"{target}.{k}": np.asarray(x) for k, x in ab.items()}
  return out


def theirs(model: Model, folder) -> dict[str, np.ndarray]:
  """The same from transformers and peft, on the folder of `model_of`."""
  import peft
  import torch
  import transformers

  torch.set_num_threads(1)
  tokens, lengths, replies = (torch.tensor(x, dtype=torch.long) for x in sequences())
  load = transformers.AutoModelForCausalLM.from_pretrained
  base = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
  adapter = adapter_of(model.config)
  hf.save_peft(folder / "adapter", adapter, model, LORA)
  tuned = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
  prefill = np.zeros((P, S, V), np.float32)
  decode = np.zeros((P, G, T, V), np.float32)
  loss = 0.0
  for p in range(P):
    n = int(lengths[p])
    for g in range(G):
      logits = tuned(torch.cat([tokens[p, :n], replies[p, g]])[None]).logits[0]
      prefill[p, :n], decode[p, g] = logits[:n].detach(), logits[n:].detach()
      logp = torch.log_softmax(logits[n:-1], -1)
      loss = loss - logp.gather(1, replies[p, g, 1:, None]).sum() / (P * G * (T - 1))
  loss.backward()
  out = {"prefill": prefill, "decode": decode}
  grads = {name: x.grad.numpy().T for name, x in tuned.named_parameters() if x.grad is not None}
  for target in LORA.targets:
    for key in "ab":
      found = [x for name, x in grads.items() if f"{target}_proj.lora_{key.upper()}." in name]
      out[f"{target}.{key}"] = np.stack(found)
  return out


def digest(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What is committed: some logits whole, and of each gradient its norm and one projection."""
  _, lengths, _ = sequences()
  last = result["prefill"][np.arange(P), lengths - 1]
  out = {"prefill": last, "decode": result["decode"][:, 0, KEPT_STEPS]}
  grads = [result[f"{t}.{k}"].astype(np.float64) for t in LORA.targets for k in "ab"]
  norms = [np.linalg.norm(x) for x in grads]
  along = [float(np.sum(x * noise("direction", x.shape))) for x in grads]
  return out | {
    "grad_norms": np.array(norms, np.float32),
    "grad_along": np.array(along, np.float32),
  }
