"""Writes families.npz: what transformers and peft compute for the models of family_cases.

PYTHONPATH=tests python tests/goldens/make_families.py
"""

import pathlib
import tempfile

import family_cases as cases
import numpy as np

if __name__ == "__main__":
  goldens = {}
  for name in cases.CASES:
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      result = cases.digest(cases.theirs(cases.model_of(name, folder), folder))
    goldens |= {f"{name}/{key}": value for key, value in result.items()}
  np.savez_compressed(pathlib.Path(__file__).with_name("families.npz"), **goldens)
