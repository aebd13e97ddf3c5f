"""Writes docs/plan.md: what each model of the study needs on a TPU slice and on a GPU.

  python docs/make_plan_table.py [--keep=DIR]

Runs rlsafety.plan once per model and device; --keep leaves the plans in DIR as JSON and takes
those that are there already.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent
LARGE = ("llama-2-13b-chat", "qwen1.5-14b-chat")  # with the judge more than 8 v5e chips hold

HEAD = """# What the study's runs need

Written by `python docs/make_plan_table.py` (see `rlsafety/plan.py` for what is exact and what is
estimated): do not edit. Each row is one run of `configs/paper.py` in political_qa: 300 steps of
2 prompts x 5 replies, 1024 + 256 token slots, bfloat16, and Llama-3.1-8B-Instruct as judge on
the same chips. GiB per chip at the fullest moment; seconds per step at the roofline; hours and
list price of a run at {share:.0%} of it.

| model | device | mesh (data x fsdp x tensor) | GiB per chip | of | s/step | hours | $ |
|---|---|---|---|---|---|---|---|
"""


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
    command = [sys.executable, "-m", "rlsafety.plan", recipe, f"--device={device}", "--mesh=auto"]
    subprocess.run([*command, f"--json={path}"], check=True)
  return json.loads(path.read_text())


def main(argv: list[str]) -> None:
  from rlsafety.plan import EFFICIENCY

  keep = next((a.partition("=")[2] for a in argv if a.startswith("--keep=")), "")
  text = HEAD.format(share=EFFICIENCY)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(keep or scratch)
    folder.mkdir(parents=True, exist_ok=True)
    for model in models():
      for device in ("v5e-16" if model in LARGE else "v5e-8", "H100"):
        p = plan(model, device, folder)
        mesh = " x ".join(str(p["mesh"][k]) for k in ("data", "fsdp", "tensor"))
        fits = "" if p["fits"] else " (does not fit)"
        text += (
          f"| {model} | {p['device']} | {mesh} | {p['bytes'] / 2**30:.1f}{fits} | "
          f"{p['memory'] / 2**30:.0f} | {p['step_seconds']:.2f} | {p['run_hours']:.2f} | "
          f"{p['run_dollars']:.2f} |\n"
        )
  (HERE / "plan.md").write_text(text)


if __name__ == "__main__":
  main(sys.argv[1:])
