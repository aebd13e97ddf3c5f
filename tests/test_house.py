"""Rules of the house that no reader sees at a glance: imports, private names, types, lint."""

import ast
import graphlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "rlsafety").rglob("*.py"))
NAMES = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES]
TEXTS = {n.removesuffix(".__init__"): f.read_text() for n, f in zip(NAMES, FILES, strict=True)}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
WINGS = {"rlsafety.study", "rlsafety.tools"}


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str, str]]:
  """(statement, dotted name of what it imports, name it is known by) of all imports in a tree."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      assert not getattr(node, "level", 0), f"line {node.lineno}: a relative import"
      start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
      found += [(node, start + a.name, a.asname or a.name) for a in node.names]
  return found


def arrows(parts: int | None = None) -> dict[str, set[str]]:
  """{module: modules that it imports}; parts=2: of folders and of what lies beside them."""
  cut = lambda name: ".".join(name.split(".")[:parts])  # noqa: E731
  graph = {cut(name): set() for name in TREES}
  for name, tree in TREES.items():
    targets = {t if t in TREES else t.rpartition(".")[0] for _, t, _ in imports(tree)}
    graph[cut(name)] |= {cut(t) for t in targets if t in TREES} - ({cut(name)} if parts else set())
  return graph


def test_the_spine_knows_no_wing_and_the_study_stands_on_the_spine_alone():
  graph = arrows(2)
  assert {n: to & WINGS for n, to in graph.items() if n not in WINGS and to & WINGS} == {}
  assert graph["rlsafety.study"] & {f"rlsafety.{n}" for n in ("tools", "models", "judges")} == set()


def test_the_spine_reaches_the_server_only_where_a_config_asks_for_it():
  for name, tree in TREES.items():
    if name.startswith("rlsafety.serve") or ".".join(name.split(".")[:2]) in WINGS:
      continue
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = [t for node in top for _, t, _ in imports(node) if t.startswith("rlsafety.serve")]
    assert found == [], name


def test_no_circle_of_modules_nor_of_folders():
  for graph in (arrows(), arrows(2)):
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_private_names_stay_in_their_module():
  for name, tree in TREES.items():
    found = [t for _, t, _ in imports(tree) if t.startswith("rlsafety.") and "._" in t]
    modules = {known for _, t, known in imports(tree) if t in TREES}
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in modules and node.attr.startswith("_"):
          found.append(f"{node.value.id}.{node.attr}")
    assert [t for t in found if not t.endswith("__")] == [], name


def test_an_import_inside_a_function_has_its_reason_beside_it():
  for name, tree in TREES.items():
    lines = TEXTS[name].splitlines()
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n, *_ in imports(f)}
    bare = [n.lineno for n in inside if "#" not in "".join(lines[n.lineno - 2 : n.end_lineno])]
    assert bare == [], f"{name}: imports inside functions at lines {bare}"


def test_no_module_is_longer_than_450_lines():
  assert {name: n for name, t in TEXTS.items() if (n := len(t.splitlines())) > 450} == {}


def test_public_functions_of_the_spine_are_annotated():
  for name, tree in TREES.items():
    if ".".join(name.split(".")[:2]) in WINGS:
      continue
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for f in (f for owner in (tree, *classes) for f in owner.body):
      if not isinstance(f, ast.FunctionDef) or re.match(r"_(?!_)", f.name):
        continue
      a = f.args
      given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
      bare = [x.arg for x in given if not x.annotation and x.arg not in ("self", "cls")]
      assert not bare and f.returns, f"{name}.{f.name}: {bare or 'returns'}"


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="pip install -e '.[test]'")
def test_ruff_finds_nothing():
  done = subprocess.run(
    [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("basedpyright"), reason="pip install -e '.[test]'")
def test_the_type_checker_finds_nothing():
  done = subprocess.run(
    [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
