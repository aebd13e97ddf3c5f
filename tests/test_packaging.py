"""What `pip install .` alone brings is enough to start every program and to record data.

The packages of extras and of tests are hidden from the import system of a child process.
"""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from launchers import core
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]


def extras() -> dict[str, list[str]]:
  """The extras of setup.py, without running it."""
  for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
    if isinstance(node, ast.keyword) and node.arg == "extras_require":
      return ast.literal_eval(node.value)
  raise AssertionError("setup.py has no extras_require")


def locked() -> list[Requirement]:
  lines = (ROOT / "requirements.lock").read_text().splitlines()
  return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_lock_names_versions_alone_and_no_registry():
  text = (ROOT / "requirements.lock").read_text()
  assert "://" not in text and not re.search(r"^-", text, re.M)
  for found in locked():
    assert not found.url and re.fullmatch(r"==[\w.+!]+", str(found.specifier)), found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_covers_every_dependency(python):
  """All that setup.py asks for but `parity`, and what those ask for where they are installed."""
  world = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
  world |= {"platform_machine": "x86_64", "extra": "", "implementation_name": "cpython"}
  pins = {
    canonicalize_name(r.name): str(r.specifier).removeprefix("==")
    for r in locked()
    if not r.marker or r.marker.evaluate(world)
  }
  wanted = [*core(), *(r for name, rs in extras().items() if name != "parity" for r in rs)]
  for requirement in map(Requirement, wanted):
    name = canonicalize_name(requirement.name)
    assert name in pins and requirement.specifier.contains(pins[name]), requirement
  if sys.version_info[:2] == tuple(map(int, python.split("."))):
    assert closure(core()) <= set(pins)


def closure(requirements: list[str]) -> set[str]:
  """Names of all distributions that pip would install for these requirements."""
  todo, seen = [Requirement(text) for text in requirements], set()
  while todo:
    wanted = todo.pop()
    extras = {"", *wanted.extras}
    key = canonicalize_name(wanted.name), tuple(sorted(extras))
    if key in seen:
      continue
    seen.add(key)
    for text in importlib.metadata.requires(wanted.name) or []:
      needed = Requirement(text)
      if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
        todo.append(needed)
  return {name for name, _ in seen}


CHILD = """
import contextlib, importlib.machinery, io, json, runpy, sys, traceback
hidden = set(json.loads(sys.argv[1]))

class Finder(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.partition(".")[0] in hidden:
      return None
    return super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
programs, arguments = map(json.loads, sys.argv[2:])
for name in programs:
  said, code, sys.argv = io.StringIO(), 0, [name, *arguments]
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      runpy.run_module(name, run_name="__main__")
  except SystemExit as stop:
    code = stop.code or 0
  except Exception:
    code = traceback.format_exc()
  print("RESULT", json.dumps([name, code, said.getvalue()]))
"""


def start(programs: list[str], *arguments: str) -> dict[str, tuple]:
  """{program: (exit code or error, what it said)} with everything but CORE hidden."""
  brought = closure(core())
  hidden = [
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not {canonicalize_name(o) for o in owners} & brought
    and module not in ("rlsafety", *sys.stdlib_module_names)
  ]
  assert "pytest" in hidden and "hypothesis" in hidden and "jax" not in hidden
  texts = [json.dumps(x) for x in (hidden, programs, arguments)]
  env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", XLA_FLAGS="")
  done = subprocess.run(
    [sys.executable, "-c", CHILD, *texts], env=env, capture_output=True, text=True, timeout=300
  )
  found = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("RESULT ")]
  assert len(found) == len(programs), done.stdout + done.stderr
  return {name: (code, said) for name, code, said in found}


def programs() -> list[str]:
  """Every module that can be started, as python -m names it."""
  found = []
  for path in sorted((ROOT / "rlsafety").rglob("*.py")):
    if "run_main(main" in path.read_text() and path.name != "errors.py":
      found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
  return found


def test_every_program_starts():
  """With its help, or with one line that says what to give or which extra to install."""
  found = start(programs(), "--help")
  assert len(found) > 12
  for name, (code, said) in found.items():
    one_line = "usage: " in said or "pip install 'rlsafety[" in f"{code}{said}"
    assert (code == 0 and said) or (one_line and "Traceback" not in str(code)), (name, code)


def test_data_can_be_recorded(tmp_path):
  line = {"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}
  (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
  flags = ["--jsonl", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "set")]
  code, said = start(["rlsafety.tools.record"], *flags)["rlsafety.tools.record"]
  assert code == 0, code
  assert "1 prompts" in said and (tmp_path / "set" / "dataset_info.json").exists()
