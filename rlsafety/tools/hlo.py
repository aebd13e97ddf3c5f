"""Counts the work in the text of a compiled program, with the trip counts of its loops: what
`rlsafety.tools.plan` turns into seconds."""

import dataclasses
import functools
import math
import re

ENTRY = "ENTRY"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Work:
  """What one device does in one call: sums over all trips of all loops.

  flops of matrix products; moved: their operands and results in bytes; seconds: their roofline.
  sent: bytes through links; collectives: how many; largest: name and bytes of the largest.
  """

  flops: float = 0.0
  moved: float = 0.0
  seconds: float = 0.0
  sent: float = 0.0
  collectives: float = 0.0
  largest: tuple[str, float] = ("", 0.0)


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [(d, tuple(map(int, s.split(",") if s else ()))) for d, s in _SHAPE.findall(text)]


def read_program(hlo: str, unknown_trips: int, width: float, chip) -> Work:
  """Counts the work in the text of a compiled (per-device) HLO module.

  unknown_trips: passes of a loop whose length the compiler does not know (the sampler's).
  width: bytes that a float of the program takes on the device (the program is float32).
  """
  bodies = _bodies(hlo)

  def size(kind, shape):
    return math.prod(shape) * (width if kind == "f32" else int(re.sub(r"\D", "", kind) or 8) // 8)

  @functools.cache
  def work_of(name: str) -> Work:
    total, known = Work(), {}
    for result, shape_text, operation, rest in bodies.get(name, ()):
      shapes = known[result] = _shapes(shape_text)
      operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
      if operation == "dot":
        (kind, out), (_, lhs) = shapes[0], known[operands[0]][0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
        depth = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        flops = 2.0 * math.prod(out) * depth
        moved = size(kind, out) + sum(size(*known[o][0]) for o in operands[:2])
        total.flops += flops
        total.moved += moved
        total.seconds += max(flops / chip.flops, moved / chip.bandwidth)
      kind = operation.removesuffix("-start")
      if kind in COLLECTIVES:
        amount = sum(size(*s) for s in shapes)
        total.sent += amount * (2 if kind == "all-reduce" else 1)
        total.collectives += 1
        total.largest = max(total.largest, (f"{kind} {shape_text}", amount), key=lambda x: x[1])
      trips = 1
      if operation == "while":
        found = _TRIPS.search(rest)
        trips = int(found[1]) if found else unknown_trips
      for called in _CALLED.findall(rest):
        inner = work_of(called)
        for field in ("flops", "moved", "seconds", "sent", "collectives"):
          setattr(total, field, getattr(total, field) + trips * getattr(inner, field))
        total.largest = max(total.largest, inner.largest, key=lambda x: x[1])
    return total

  return work_of(ENTRY)


def _bodies(hlo: str) -> dict[str, list[tuple]]:
  """{computation: its instructions (name, shape, operation, rest)}, the program's own as ENTRY."""
  bodies, current = {}, []
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      current = bodies.setdefault(ENTRY if line.startswith("ENTRY") else match[1], [])
    elif match := _INSTRUCTION.match(line):
      current.append(match.groups())
  return bodies


# --- What is moved that should not be -------------------------------------------------------

_COPIES = ("copy", "slice", "transpose", "concatenate", "dynamic-slice")
_FAST = "S(1)"  # a TPU's on-chip memory: an array that arrives there has been read once
NOTHING = ("nothing", 0)


def _largest(shape: str) -> int:
  return max((math.prod(size) for _, size in _shapes(shape)), default=0)


def largest_copy_in_decode(hlo: str) -> tuple[str, int]:
  """(operation and shape, elements) of the largest array that one turn of a loop of unknown
  length writes by copying, slicing, transposing or joining others: the decode loop's, which ends
  when every reply has. What is read in place, or inside a fusion that computes, does not count.
  """
  bodies, found, seen = _bodies(hlo), NOTHING, set()
  loops = [x for body in bodies.values() for x in body if x[2] == "while"]
  todo = [re.search(r"body=%?([\w.-]+)", x[3])[1] for x in loops if not _TRIPS.search(x[3])]
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    for result, shape, operation, rest in bodies.get(name, ()):
      named = any(word in result for word in _COPIES) and "update" not in result
      moves = operation in _COPIES or (operation == "fusion" and named)
      if moves and _FAST not in shape:
        found = max(found, (f"{operation} {shape[:60]}", _largest(shape)), key=lambda x: x[1])
      if operation != "fusion":
        todo += _CALLED.findall(rest)
  return found


def largest_gather(hlo: str) -> tuple[str, int]:
  """(shape, elements) of the largest array that an all-gather makes."""
  gathers = (
    (shape[:60], _largest(shape))
    for body in _bodies(hlo).values()
    for _, shape, operation, _ in body
    if operation.removesuffix("-start") == "all-gather"
  )
  return max(gathers, key=lambda x: x[1], default=NOTHING)
