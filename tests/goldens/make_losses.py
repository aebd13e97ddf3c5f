"""Writes losses.json: what TRL and PyTorch make of fixed tensors, in float64.

  pip install torch trl && python tests/goldens/make_losses.py

TRL's own loss functions are called, with its models replaced by the tensors themselves.
Development only: the tests read the JSON and need neither package.
"""

import collections
import json
import pathlib
from types import SimpleNamespace

import torch
import trl
from trl.trainer.utils import nanstd

P, G, T = 3, 4, 5
BASE = dict(loss_type="dapo", eps=(0.2, 0.2), level="token", beta=0.0, delta=None, entropy=0.0)
CASES = {
  "grpo": {},
  "clip_higher": dict(eps=(0.2, 0.28)),
  "sequence": dict(loss_type="grpo"),
  "dr_grpo": dict(loss_type="dr_grpo"),
  "gspo": dict(loss_type="grpo", level="sequence", eps=(3e-4, 4e-4)),
  "dual_clip": dict(delta=3.0),
  "k3": dict(beta=0.04),
  "cispo": dict(loss_type="cispo", eps=(1.0, 5.0)),
  "entropy": dict(entropy=0.01),
  "token_truncate": dict(weights="token_truncate"),
  "token_mask": dict(weights="token_mask"),
  "sequence_truncate": dict(weights="sequence_truncate"),
  "sequence_mask": dict(weights="sequence_mask"),
}


class Accelerator:
  """One process: every collective is the identity."""

  device, num_processes, sync_gradients = "cpu", 1, True

  def gather(self, x):
    return x

  def reduce(self, x, reduction):
    return x

  gather_for_metrics = gather


def grpo(data, case):
  options = BASE | case
  logps = data["logprobs"].clone().requires_grad_()
  mask = torch.arange(T) < data["lengths"][:, None]
  trainer = SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *a, **k: (logps, data["entropy"], None),
    accelerator=Accelerator(),
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level=options["level"],
    beta=options["beta"],
    loss_type=options["loss_type"],
    epsilon_low=options["eps"][0],
    epsilon_high=options["eps"][1],
    args=SimpleNamespace(
      use_bias_correction_kl=False, delta=options["delta"], steps_per_generation=1
    ),
    model=SimpleNamespace(training=True),
    use_vllm="weights" in options,
    vllm_importance_sampling_correction=True,
    current_gradient_accumulation_steps=1,
    max_completion_length=T,
    _entropy_bonus_enabled=options["entropy"] > 0,
    use_adaptive_entropy=False,
    entropy_coef=options["entropy"],
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
  )
  ids = torch.zeros(P * G, T, dtype=torch.long)
  inputs = dict(
    prompt_ids=ids,
    prompt_mask=mask,
    completion_ids=ids,
    completion_mask=mask.long(),
    advantages=data["advantages"],
    old_per_token_logps=data["behaviour"],
    ref_per_token_logps=data["reference"],
    num_items_in_batch=mask.sum(),
  )
  if "weights" in options:  # the correction is for the sampler; the policy itself is current
    log = (data["logprobs"] - data["behaviour"]) * mask
    if options["weights"].startswith("sequence"):
      log = log.sum(-1, keepdim=True)
    weight = log.exp()
    cut = weight.clamp(max=2.0) if "truncate" in options["weights"] else weight * (weight <= 2.0)
    inputs |= dict(old_per_token_logps=None, importance_sampling_ratio=cut)
  loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
  loss.backward()
  return {"loss": loss.item(), "grad": logps.grad.tolist()}


def preference(trainer_class, data, rows, extra_self, extra_inputs, kl_rows=None):
  """TRL shifts by one token: slot 0 of its completion mask belongs to the prompt."""
  logps = data["logprobs"].clone().requires_grad_()
  mask = torch.arange(T) < data["lengths"][:, None]
  full = torch.cat([torch.zeros(P * G, 1, dtype=torch.bool), mask], 1).long()

  def model(input_ids, **_):
    own = input_ids[:, 0]
    flat = torch.zeros(len(own), T, dtype=torch.float64)
    return SimpleNamespace(
      log_probs=logps[own] * mask[own],
      entropy=flat,
      mean_logits=flat,
      is_top1=torch.zeros(len(own), T, dtype=torch.bool),
      aux_loss=None,
    )

  ref = (data["reference"] * mask).sum(-1)
  trainer = SimpleNamespace(
    accelerator=Accelerator(),
    aux_loss_enabled=False,
    model=SimpleNamespace(training=False),
    precompute_ref_logps=True,
    beta=0.1,
    _total_train_tokens=0,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    **extra_self,
  )
  ids = rows[:, None].expand(-1, T + 1)
  inputs = dict(input_ids=ids, attention_mask=full[rows], completion_mask=full[rows])
  inputs |= {name: make(ref, rows) for name, make in extra_inputs.items()}
  if kl_rows is not None:
    inputs |= dict(
      KL_input_ids=kl_rows[:, None].expand(-1, T + 1),
      KL_attention_mask=full[kl_rows],
      KL_completion_mask=full[kl_rows],
      ref_KL_logps=ref[kl_rows],
    )
    trainer._compute_kl_logps = lambda m, b: trl.KTOTrainer._compute_kl_logps(trainer, m, b)
  elif trainer_class is trl.KTOTrainer:
    trainer._compute_kl_logps = lambda m, b: None
  loss = trainer_class._compute_loss(trainer, model, inputs, False)
  loss.backward()
  return loss.item(), logps.grad


def main():
  torch.manual_seed(0)

  def draw(scale):
    return torch.randn(P * G, T, dtype=torch.float64) * scale

  behaviour = -1.5 + draw(0.5)
  data = {
    "logprobs": behaviour + draw(0.7),
    "behaviour": behaviour,
    "reference": behaviour + draw(0.3),
    "entropy": 1.0 + draw(0.2),
    "lengths": torch.randint(1, T + 1, (P * G,)),
    "advantages": torch.randn(P * G, dtype=torch.float64),
    "rewards": 1 + 9 * torch.rand(P * G, dtype=torch.float64),
  }
  out = {name: grpo(data, case) for name, case in CASES.items()}

  first = torch.arange(P) * G  # DPO: slots 0 (chosen) and 1 (rejected) of each group
  loss, grad = preference(
    trl.DPOTrainer,
    data,
    torch.cat([first, first + 1]),
    dict(
      ld_alpha=None,
      f_divergence_type="reverse_kl",
      loss_types=["sigmoid"],
      loss_weights=[1.0],
      use_weighting=False,
    ),
    dict(
      ref_chosen_logps=lambda r, rows: r[rows[:P]], ref_rejected_logps=lambda r, rows: r[rows[P:]]
    ),
  )
  out["dpo"] = {"loss": loss, "grad": grad.tolist()}

  labels = dict(
    label=lambda r, rows: data["rewards"][rows] > 5.5, ref_logps=lambda r, rows: r[rows]
  )
  weights = dict(desirable_weight=1.0, undesirable_weight=1.5)
  rows = torch.arange(P * G)
  zero = dict(loss_type="apo_zero_unpaired", calculate_KL=False, **weights)
  loss, grad = preference(trl.KTOTrainer, data, rows, zero, labels)
  out["kto"] = {"loss": loss, "grad": grad.tolist()}
  # One call per group: TRL's anchor is a mean over the batch it sees, ours belongs to a group.
  losses, grads = [], torch.zeros(P * G, T, dtype=torch.float64)
  for p in range(P):
    rows = torch.arange(p * G, p * G + G - 1)
    kto = dict(loss_type="kto", calculate_KL=True, **weights)
    loss, grad = preference(trl.KTOTrainer, data, rows, kto, labels, torch.tensor([p * G + G - 1]))
    losses.append(loss / P)
    grads += grad / P
  out["kto_anchor"] = {"loss": sum(losses), "grad": grads.tolist()}

  vocab = 7
  logits = torch.randn(P * G, T, vocab, dtype=torch.float64, requires_grad=True)
  tokens = torch.randint(0, vocab, (P * G, T))
  masked = tokens.masked_fill(torch.arange(T) >= data["lengths"][:, None], -100)
  loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), masked, ignore_index=-100)
  loss.backward()
  out["sft"] = {
    "loss": loss.item(),
    "logits": logits.tolist(),
    "tokens": tokens.tolist(),
    "grad": logits.grad.tolist(),
  }

  rewards = data["rewards"].view(P, G).clone()
  rewards[0, 2] = rewards[2, 0] = float("nan")
  centred = rewards - torch.nanmean(rewards, 1, keepdim=True)
  count = (~rewards.isnan()).sum(1, keepdim=True)
  siblings = (torch.nansum(rewards, 1, keepdim=True) - rewards) / (count - 1)
  out["advantages"] = {
    "rewards": rewards.tolist(),
    "group": (centred / (nanstd(rewards, dim=1).view(P, 1) + 1e-4)).nan_to_num(0.0).tolist(),
    "group_mean": centred.nan_to_num(0.0).tolist(),
    "leave_one_out": (rewards - siblings).nan_to_num(0.0).tolist(),
    "batch": ((rewards - rewards.nanmean()) / (nanstd(rewards) + 1e-4)).nan_to_num(0.0).tolist(),
  }
  out = {
    "made_with": {"trl": trl.__version__, "torch": torch.__version__},
    "shape": [P, G, T],
    "data": {name: value.tolist() for name, value in data.items()},
    **out,
  }
  path = pathlib.Path(__file__).with_name("losses.json")
  path.write_text(json.dumps(out).replace("NaN", "null") + "\n")
  print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
  main()
