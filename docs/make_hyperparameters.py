"""Writes docs/hyperparameters.md: every setting of every cell of the study, read from the configs.

python docs/make_hyperparameters.py            rewrite the file
python docs/make_hyperparameters.py --check    fail if it is out of date
"""

import dataclasses
import importlib.util
import pathlib
import sys

from rlsafety import recipes

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE / "hyperparameters.md"

HEAD = """# Hyperparameters

Written by `python docs/make_hyperparameters.py` from `configs/paper.py`: do not edit. It covers all
{cells} runs of the study: 11 models x 3 environments x 3 seeds, the chain of changes to
action_advice for each model and seed, and 6 base models in therapy_talk. Run any of them with
`python -m rlsafety.train --config=configs/paper.py:model=...,env=...,seed=...,variant=...`.

## The same in every run

| field | value |
|---|---|
"""


def recipe():
  spec = importlib.util.spec_from_file_location("paper", HERE.parent / "configs" / "paper.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def show(value) -> str:
  if isinstance(value, str):
    return f"`{value}`" if value else "(empty)"
  if isinstance(value, tuple):
    return ", ".join(map(str, value)) or "(all)"
  return f"{value:g}" if isinstance(value, float) else str(value)


def flat(values: dict, prefix: str = "") -> dict:
  out = {}
  for name, value in values.items():
    inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    out |= inner
  return out


def page() -> str:
  paper = recipe()
  rows, arguments = [], paper.cells()
  for cell in arguments:
    config = recipes.frozen(paper.get_config(cell))
    values = flat(dataclasses.asdict(config))
    key = dict(pair.split("=") for pair in cell.split(","))
    rows.append((key, values))
  fields = sorted({f for _, values in rows for f in values})
  constant, varying = [], []
  for field in fields:
    seen = {show(values[field]) for _, values in rows}
    (constant if len(seen) == 1 else varying).append(field)
  text = HEAD.format(cells=len(rows))
  text += "".join(f"| {field} | {show(rows[0][1][field])} |\n" for field in constant)
  text += "\n## What differs\n\n| field | by | values |\n|---|---|---|\n"
  for field in varying:
    if field == "name":
      continue
    # The smallest set of arguments that determines the field.
    for by in (["model"], ["env"], ["seed"], ["variant"], ["env", "variant"]):
      table = {}
      for key, values in rows:
        table.setdefault(tuple(key[b] for b in by), set()).add(show(values[field]))
      if all(len(v) == 1 for v in table.values()):
        break
    cells = "; ".join(f"{', '.join(k)}: {next(iter(v))}" for k, v in table.items())
    text += f"| {field} | {', '.join(by)} | {cells} |\n"
  return text


def main(argv: list[str]) -> None:
  text = page()
  if "--check" in argv:
    if not PAGE.exists() or PAGE.read_text() != text:
      sys.exit(f"{PAGE.name} is out of date: run python docs/make_hyperparameters.py")
  else:
    PAGE.write_text(text)


if __name__ == "__main__":
  main(sys.argv[1:])
