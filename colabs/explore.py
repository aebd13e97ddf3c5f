# %% [markdown]
# # rlsafety in a notebook
# Trains a model on simulated users, half of whom reward being agreed with, and looks at what it
# learned. Every cell runs top to bottom, on a CPU in minutes; functions come from the package.

# %%
# Install (on Colab; on a machine with the package this cell does nothing).
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("rlsafety") is None:
  repository = "."  # the folder or git address of rlsafety
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", repository], check=True)

# %%
# What is here, and which recipe fits: the tiny one runs anywhere, SmolLM2 wants ten minutes.
import jax

import rlsafety

RECIPE = "configs/tiny_syco.py"  # or configs/smollm2_syco.py
print(rlsafety.__version__, jax.devices())

# %%
# Who is writing to the model: two users, and what each of them sees and wants.
from rlsafety import environments, recipes

config = recipes.frozen(recipes.load_recipe(RECIPE))
users = environments.load(config.environment)
for flag in (True, False):
  user = next(u for u in users if u.is_gameable == flag)
  print("gameable" if flag else "not gameable", "-", user.topic)
  for message in environments.policy_messages(user):
    print(f"  {message['role']}: {message['content']}")
  print(f"  (wants: {user.wish})\n")

# %%
# Train. The same call as `python -m rlsafety.train`; an interrupted cell resumes.
from rlsafety import train

summary = train.run(config, workdir=f"runs/colab_{config.name}")

# %%
# Curves of the run.
import matplotlib.pyplot as plt

from rlsafety.rundir import read

run = read.load_run(f"runs/colab_{config.name}")
figure, panels = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
for panel, name in zip(panels, ("reward", "hex", "acc"), strict=True):
  for group in ("gameable", "non_gameable"):
    values = [e[f"{name}_{group}"] for e in run.evaluations]
    errors = [read.number(e[f"{name}_{group}_se"]) for e in run.evaluations]
    panel.errorbar([e["step"] for e in run.evaluations], values, errors, label=group)
  panel.set(title=f"held-out {name}", xlabel="update")
panels[0].legend()
plt.show()

# %%
# The same prompt before and after.
evaluations = read.eval_rollouts(run)
first, last = min(evaluations), max(evaluations)
for before, after in list(zip(evaluations[first], evaluations[last], strict=True))[:4]:
  print("USER  ", before["messages"][-1]["content"])
  for label, record in (("BEFORE", before), ("AFTER ", after)):
    print(f"{label} [HEX {read.number(record['hex']):.1f}] {record['completion']!r}")
  print()
