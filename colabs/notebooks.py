"""Writes NAME.ipynb from each NAME.py of this folder: run it after changing one.

  python colabs/notebooks.py

The scripts are the source: they read and diff like code, and run as they are from the
repository's root (`python colabs/explore.py`). A line "# %%" begins a cell, "# %% [markdown]" one
of text.
"""

import json
import pathlib
import re

HERE = pathlib.Path(__file__).parent
NAMES = ("explore", "environment", "study", "probe")
METADATA = {
  "colab": {"provenance": []},
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
  "language_info": {"name": "python"},
}


def notebook(name: str, script: str) -> dict:
  """The notebook (nbformat 4.5) of a script in the percent format."""
  cells = []
  for i, part in enumerate(re.split(r"^# %%", script, flags=re.M)[1:]):
    kind, _, body = part.partition("\n")
    text = body.strip("\n")
    cell = {"cell_type": "code", "execution_count": None, "id": f"{name}-{i}", "metadata": {}}
    if kind.strip() == "[markdown]":
      cell = {"cell_type": "markdown", "id": f"{name}-{i}", "metadata": {}}
      text = re.sub(r"^# ?", "", text, flags=re.M)
    else:
      cell["outputs"] = []
    cells.append(cell | {"source": text.splitlines(keepends=True)})
  return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def write() -> None:
  for name in NAMES:
    made = notebook(name, (HERE / f"{name}.py").read_text())
    (HERE / f"{name}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  write()
