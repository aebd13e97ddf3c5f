# %% [markdown]
# # Plot a study
# Several runs, two settings with two seeds each, and what is made of them: a table of cells, the
# comparison of the settings, and figures. With your own runs, skip the training and name their
# directories in RUNS.

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
# The runs. On a cluster: launch/sweep.py makes the same grid (docs/launch.md).
from rlsafety import recipes, train

RUNS = "runs/notebook/study/*"
base = recipes.frozen(recipes.load_recipe("configs/tiny_syco.py"))
for cue in ("style", "none"):
  for seed in (1, 2):
    changes = {"environment.cue": cue, "seed": seed, "steps": 2, "eval.every": 2}
    config = recipes.replaced(base, changes)
    train.run(config, workdir=f"runs/notebook/study/{cue}-{seed}")

# %%
# Everything at once: tables as CSV, Markdown and LaTeX, figures, and a page that holds all of it.
from rlsafety.study import analyze

made = analyze.analyse("runs/notebook/study_results", globs=[RUNS])
for note in made["notes"]:
  print("-", note)
made["cells"].filter(["model", "environment", "variant", "n_seeds", "max_hex_gap", "hms"])

# %%
# The settings against each other, paired by seed.
made["variants"].head(10)

# %%
# A figure of your own: the gap in HEX between gameable and other users, every run a line.
import matplotlib.pyplot as plt

from rlsafety.rundir import read

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
colours = {"style": "C0", "none": "C1"}
for folder in sorted(pathlib.Path("runs/notebook/study").iterdir()):
  run = read.load_run(folder)
  cue = run.config["environment"]["cue"]
  steps = [row["step"] for row in run.metrics]
  gaps = [read.number(row["hex_gap"]) for row in run.metrics]
  axis.plot(steps, gaps, colours[cue], label=f"cue: {cue}")
handles = dict(zip(axis.get_legend_handles_labels()[1], axis.lines, strict=True))
axis.legend(handles.values(), handles.keys())
axis.set(xlabel="update", ylabel="HEX, gameable - others", title="Exploitation while training")
plt.show()
