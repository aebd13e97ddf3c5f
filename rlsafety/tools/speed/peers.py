"""transformers generating and PEFT training at a benchmark's shapes, in a process of its own.

`measure` starts it before JAX takes the GPU's memory. A share of the batch is timed, as many
rows as fit, and the time is scaled to all rows: both work through a batch piece by piece anyway.
"""

import json
import subprocess
import sys
import time

from rlsafety.models import families, presets


def measure(f, model: str, seconds: float) -> list[dict]:
  """Rows {name, seconds, tokens, rows} for the flags f of the benchmark; [] where torch or peft
  is missing, and a row that says why where it fails or takes longer than `seconds`."""
  names = ("prompts", "prompt_tokens", "group", "completion_tokens", "rank")
  shape = {name: getattr(f, name) for name in names}
  shape |= {"model": model, "dtype": f.dtype, "rows": f.peer_rows}
  name = f"{model} transformers + PEFT"
  command = [sys.executable, "-m", "rlsafety.tools.speed.peers", json.dumps(shape)]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    return [{"name": f"{name}: not within {seconds:.0f} s", "value": float("nan")}]
  lines = done.stdout.splitlines()
  if done.returncode or not lines:
    why = (done.stderr.strip() or "no output").splitlines()[-1]
    return [{"name": f"{name}: {why[:120]}", "value": float("nan")}]
  return [{**row, "name": f"{name} {row['name']}"} for row in json.loads(lines[-1])]


def run(model, dtype, prompts, prompt_tokens, group, completion_tokens, rank, rows) -> list[dict]:
  """The measurement itself; out of memory is a row without a time."""
  import peft  # an extra
  import torch  # an extra
  import transformers  # heavy, and of use here with torch alone

  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = presets.preset(model)
  S, T, N = prompt_tokens, completion_tokens, prompts * group
  rows = min(rows, N)
  with torch.device(device):
    network = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**families.hf_config(config)), dtype=getattr(torch, dtype)
    )
  settings = peft.LoraConfig(
    r=rank, lora_alpha=32, use_rslora=True, target_modules="all-linear", lora_dropout=0.0
  )
  network = peft.get_peft_model(network, settings)
  network.enable_input_require_grads()
  network.gradient_checkpointing_enable()
  whole = torch.randint(3, config.vocab_size, (rows, S + T), device=device)

  def generate(tokens):
    network.eval()
    with torch.no_grad():
      network.generate(
        whole[:, :S], attention_mask=torch.ones_like(whole[:, :S]), do_sample=True,
        pad_token_id=0, min_new_tokens=tokens, max_new_tokens=tokens, use_cache=True,
      )  # fmt: skip

  def train(count):
    network.train()
    for piece in whole[:count].split(max(1, min(8, count))):
      logits = network(piece, logits_to_keep=T + 1).logits[:, :-1]
      picked = torch.log_softmax(logits.float(), -1).gather(-1, piece[:, S:, None])
      (-picked.mean()).backward()
    network.zero_grad()

  out = []
  for name, fn, short, full in (("generate", generate, 2, T), ("train", train, 8, rows)):
    try:
      fn(short)  # warm-up
      if device == "cuda":
        torch.cuda.synchronize()
      began = time.perf_counter()
      fn(full)
      if device == "cuda":
        torch.cuda.synchronize()
      seconds = (time.perf_counter() - began) * N / rows
      out.append({"name": name, "seconds": seconds, "tokens": N * T, "rows": rows})
    except torch.OutOfMemoryError:
      out.append({"name": f"{name}: out of memory", "value": float("nan")})
  return out


if __name__ == "__main__":
  try:
    print(json.dumps(run(**json.loads(sys.argv[1]))))
  except ImportError as error:
    sys.exit(f"not measured: {error}")
