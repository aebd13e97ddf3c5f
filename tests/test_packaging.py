"""What `pip install .` brings is enough to start every program: nothing is there by luck.

An environment of the plain install would take minutes; here a process is told that nothing else
is installed: what no requirement of ours leads to, by the installed packages' own metadata, is
not found by imports.
"""

import ast
import importlib.metadata
import json
import pathlib
import subprocess
import sys

from packaging.requirements import Requirement

REPO = pathlib.Path(__file__).resolve().parents[1]
PLAIN = """\
import importlib.machinery, importlib.metadata, json, pkgutil, sys
hidden = set(json.loads(sys.argv[1]))
class Finder(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import rlsafety, tensorflow_datasets.core
NEED_EXTRAS = ("rlsafety.tools.lm_eval", "rlsafety.tools.inspect_log")
tensorflow_datasets.core.dataset_builder.importlib_resources.abc  # loaded when a data set is made
for module in pkgutil.walk_packages(rlsafety.__path__, "rlsafety."):
  if not module.name.endswith(("__main__", *NEED_EXTRAS)):
    __import__(module.name)
"""


def core_requirements() -> list[str]:
  tree = ast.parse((REPO / "setup.py").read_text())
  (core,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "CORE")
  return ast.literal_eval(core)


def reached(requirements: list[str]) -> set[str]:
  """The distributions that these lead to, extras included where they are asked for."""
  found, waiting = set(), [Requirement(text) for text in requirements]
  while waiting:
    wanted = waiting.pop()
    key = (wanted.name.lower().replace("_", "-"), tuple(sorted(wanted.extras)))
    if key in found:
      continue
    found.add(key)
    try:
      texts = importlib.metadata.requires(wanted.name) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    for needed in map(Requirement, texts):
      extras = ("", *wanted.extras)
      if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
        waiting.append(needed)
  return {name for name, _ in found}


def test_every_program_starts_after_a_plain_install():
  allowed = reached(core_requirements()) | {"rlsafety"}
  hidden = [
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & allowed
  ]
  assert "pytest" in hidden and "numpy" not in hidden
  command = [sys.executable, "-c", PLAIN, json.dumps(hidden)]
  out = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr[-2000:]
