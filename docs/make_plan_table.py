"""Writes the README's table of what each model of the study needs on a TPU slice and on a GPU.

  python docs/make_plan_table.py [--keep=DIR]

Runs rlsafety.tools.plan once per model and device; --keep leaves the plans in DIR as JSON and takes
those that are there already.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent
LARGE = ("llama-2-13b-chat", "qwen1.5-14b-chat")  # with the judge more than 8 v5e chips hold
BEGIN, END = "<!-- written by docs/make_plan_table.py -->\n", "<!-- end -->\n"

HEAD = (
  "| model | TPU | mesh | GiB of {tpu:.1f} | s/step | run "
  "| GPU | GiB of {gpu:.1f} | s/step | run |\n" + "|---" * 10 + "|\n"
)


def models() -> list[str]:
  path = REPO / "configs" / "paper.py"
  spec = importlib.util.spec_from_file_location("paper", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return list(module.MODELS)


def plan(model: str, device: str, folder: pathlib.Path) -> dict:
  path = folder / f"{model}_{device}.json"
  if not path.exists():
    recipe = f"--config={REPO}/configs/paper.py:model={model}"
    flags = [recipe, f"--device={device}", "--mesh=auto", "--compiler=cpu"]
    command = [sys.executable, "-m", "rlsafety.tools.plan", *flags]
    subprocess.run([*command, f"--json={path}"], check=True, cwd=REPO)
  return json.loads(path.read_text())


def cells(p: dict) -> list[str]:
  """Memory per chip, seconds per step, hours and price of one plan."""
  memory = f"{p['bytes'] / 2**30:.1f}" + ("" if p["fits"] else " (does not fit)")
  return [memory, f"{p['step_seconds']:.2f}", f"{p['run_hours']:.1f} h, ${p['run_dollars']:.1f}"]


def table(folder: pathlib.Path) -> str:
  text, longest = "", 0
  for model in models():
    tpu = plan(model, "v5e-16" if model in LARGE else "v5e-8", folder)
    gpu = plan(model, "H100", folder)
    mesh = " x ".join(str(tpu["mesh"][k]) for k in ("data", "fsdp", "tensor"))
    row = [model, tpu["device"], mesh, *cells(tpu), gpu["device"], *cells(gpu)]
    text += "| " + " | ".join(row) + " |\n"
    longest = max(longest, tpu["planning_seconds"], gpu["planning_seconds"])
  head = HEAD.format(tpu=tpu["memory"] / 2**30, gpu=gpu["memory"] / 2**30)
  cores = len(os.sched_getaffinity(0))
  return head + text + f"\nOn {cores} CPU cores the longest of these plans took {longest:.0f} s.\n"


def main(argv: list[str]) -> None:
  keep = next((a.partition("=")[2] for a in argv if a.startswith("--keep=")), "")
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(keep or scratch)
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(folder)
  readme = REPO / "README.md"
  before, _, rest = readme.read_text().partition(BEGIN)
  _, _, after = rest.partition(END)
  if not after:
    raise SystemExit(f"{readme}: the marks {BEGIN.strip()} and {END.strip()} are gone")
  readme.write_text(before + BEGIN + rows + END + after)


if __name__ == "__main__":
  main(sys.argv[1:])
