"""Renders chat templates with what transformers gives them; also a program, for strange ones.

A template is a program out of a model's file. `templates` runs this file in a process of its
own, so that one that never ends or fills the memory ends only that. It therefore imports
nothing of the package:

  python -I -S jinja.py [FOLDER to import from ...] < {"template", "requests", "special"}
"""

import datetime
import json
import sys
from typing import Any

if __name__ == "__main__":  # -I -S: only what is needed is started, and found by these
  sys.path += sys.argv[1:]

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 100_000  # of a conversation without its contents: that of the longest has 4,000
MAX_SECONDS, MAX_BYTES = 3, 1 << 30
TODAY = datetime.date(2024, 7, 26)  # Llama 3.1's default; a run must not depend on its date


class _Generation(Extension):
  """{% generation %} marks what transformers masks for training; here it is only a scope."""

  tags = {"generation"}

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
    return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

  def _body(self, caller: Any) -> str:
    return caller()


class _Dict:
  """`dict` for templates: no type, so nothing can be reached from it."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


class SafeNamespace(Namespace):
  """A namespace whose names begin with no underscore."""

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    values = dict(*args, **kwargs)
    for name in values:
      _refuse_private(name)
    super().__init__(values)

  def __setitem__(self, name: str, value: Any) -> None:
    _refuse_private(name)
    super().__setitem__(name, value)


def _refuse_private(name: str) -> None:  # no method: those of a namespace are its values
  if str(name).startswith("_"):
    raise jinja2.exceptions.SecurityError(f"unsafe name {name!r} in a namespace")


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
  return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)  # fmt: skip


def render_all(template: str, requests: list[dict], special: dict[str, str]) -> list[dict]:
  """[{"text"}, {"error"} or (it does not compile) {"broken"}, ...], one for each request.

  requests: [{"messages": [{"role", "content"}, ...], "add_generation_prompt": bool}, ...].
  special: the named tokens, as "bos_token". As in transformers, tools and documents are
  defined and None. enable_thinking is False: policies answer at once.
  """
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = _tojson
  environment.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
  environment.globals |= {"dict": _Dict(), "namespace": SafeNamespace}
  try:
    compiled = environment.from_string(template)
  except Exception as error:
    return [{"broken": f"{type(error).__name__}: {error}"[:MAX_CHARACTERS]}] * len(requests)
  answers = []
  for request in requests:
    try:
      text = compiled.render(
        **{"tools": None, "documents": None, "enable_thinking": False} | special | request
      )
      if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, the limit is {MAX_CHARACTERS}")
      answers.append({"text": text})
    except jinja2.TemplateError as error:
      answers.append({"error": str(error)})
    except Exception as error:
      answers.append({"error": f"{type(error).__name__}: {error}"})
  return [{k: v[:MAX_CHARACTERS] for k, v in answer.items()} for answer in answers]


def main() -> None:
  try:
    import resource  # not on every system

    for limit, value in (("AS", MAX_BYTES), ("CPU", MAX_SECONDS), ("CORE", 0), ("FSIZE", 0)):
      resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
  except (ImportError, ValueError, OSError):
    pass  # the caller's clock is left
  print(json.dumps(render_all(**json.load(sys.stdin))))


if __name__ == "__main__":
  main()
