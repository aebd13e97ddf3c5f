"""The frame of a conversation: what a chat template puts around the contents.

Templates of models that ship without one are written here and rendered here. Any other is a
program of unknown origin: it is rendered by `jinja.py` in a process of its own, under limits
of time, memory and size, once for each order of roles.
"""

import functools
import json
import re
import subprocess
import sys

from rlsafety.errors import UserError
from rlsafety.models import jinja

# Templates of models that ship without one (base models, some GGUF files), chosen by
# the control token that their vocabulary has.
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
  "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
  "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{{ m.content | trim }}"
  "{{ '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BY_TOKEN = {"<|im_start|>": CHATML, "<start_of_turn>": GEMMA, "<|start_header_id|>": LLAMA3}
_OWN = (CHATML, GEMMA, LLAMA3, PLAIN)

MAX_TEMPLATE = 1 << 20  # characters; the longest known has 25,000
_WAIT = 60.0  # seconds by the clock: starting Python on a loaded machine takes some
# Around each placeholder: a space that frames never use, to see whether the template trims.
_PROBE = "\u2005"
_SLOT = re.compile(f"({_PROBE}?)\ue000(\\d+)\ue001({_PROBE}?)")
# Rendered together, since starting a process is what costs.
_S, _U, _A = "system", "user", "assistant"
_USUAL = tuple(
  (roles, generation)
  for roles in ((_U,), (_S, _U), (_U, _A), (_S, _U, _A), (_U, _A, _U), (_S, _U, _A, _U))
  for generation in (True, False)
)

Part = str | tuple[int, bool, bool]


class Refusal(UserError):
  """The template itself refuses these roles, as many do with a system message."""


@functools.lru_cache(1024)
def frame(
  template: str, roles: tuple[str, ...], generation: bool, special: tuple[tuple[str, str], ...],
  source: str,
) -> list[Part]:  # fmt: skip
  """The rendered frame: strings, and for each content (message, trims left, trims right).

  special: the named tokens that the template may use. source: the file of the template.
  Raises Refusal, and UserError for a template that breaks a limit or drops a message.
  """
  usual = (roles, generation) in _USUAL
  asked = _USUAL if usual else ((roles, generation),)
  answer = _render(template, asked, special, source)[asked.index((roles, generation))]
  if "broken" in answer:
    raise UserError(f"{source}: the chat template does not compile ({answer['broken']:.300})")
  if "error" in answer:
    raise Refusal(f"{source}: the chat template, for {', '.join(roles)}: {answer['error']:.300}")
  text = answer["text"].encode("utf-8", "replace").decode()  # tokenizers take no lone surrogate
  parts, end = [], 0
  for slot in _SLOT.finditer(text):
    parts += [text[end : slot.start()], (int(slot[2]), not slot[1], not slot[3])]
    end = slot.end()
  missing = set(range(len(roles))) - {part[0] for part in parts if not isinstance(part, str)}
  if missing:
    first = min(missing)
    raise UserError(f"{source}: the chat template leaves out message {first} ({roles[first]})")
  return [part for part in [*parts, text[end:]] if part != ""]


@functools.lru_cache(64)
def _render(
  template: str, asked: tuple[tuple[tuple[str, ...], bool], ...],
  special: tuple[tuple[str, str], ...], source: str,
) -> list[dict[str, str]]:  # fmt: skip
  if len(template) > MAX_TEMPLATE:
    raise UserError(f"{source}: the chat template has {len(template)} characters; the limit is "
                    f"{MAX_TEMPLATE}")  # fmt: skip
  requests = [
    {
      "messages": [
        {"role": role, "content": f"{_PROBE}\ue000{i}\ue001{_PROBE}"}
        for i, role in enumerate(roles)
      ],
      "add_generation_prompt": generation,
    }
    for roles, generation in asked
  ]
  if template in _OWN:
    return jinja.render_all(template, requests, dict(special))
  task = json.dumps({"template": template, "requests": requests, "special": dict(special)})
  command = [sys.executable, "-I", "-S", jinja.__file__, *(p for p in sys.path if p)]
  try:
    done = subprocess.run(command, input=task.encode(), capture_output=True, timeout=_WAIT)
    return json.loads(done.stdout)
  except (subprocess.TimeoutExpired, ValueError):  # no answer: killed at a limit
    raise UserError(
      f"{source}: the chat template needs more than {jinja.MAX_SECONDS} s or "
      f"{jinja.MAX_BYTES >> 30} GiB to render; mend it or remove it"
    ) from None
  except OSError as error:
    raise UserError(f"{source}: no process to render the chat template in ({error})") from None
