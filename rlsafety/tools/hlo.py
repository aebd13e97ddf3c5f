"""Counts the work in the text of a compiled program, with the trip counts of its loops: what
`rlsafety.tools.plan` turns into seconds."""

import dataclasses
import functools
import math
import re

ENTRY = "ENTRY"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_NAME = re.compile(r"%([\w.-]+)")
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
  """{computation: its instructions (name, shape, operation, rest), the root last}, the program's
  own as ENTRY."""
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


# --- What a decode step moves ---------------------------------------------------------------

_STILL = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "reshape", "iota",
          "after-all", "partition-id", "replica-id", "opt-barrier")  # fmt: skip
_PART = ("slice", "dynamic-slice", "gather")  # read what they return and no more
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Move:
  """An array that one turn of a loop reads or writes.

  shape: dtype and sizes. size: bytes of the array. moved: bytes through the device's memory, none
  where it lies on the chip. used: bytes of it that are read, wherever it lies. carried: its place
  among what the loop carries from turn to turn, None for what a turn makes.
  """

  shape: tuple[str, tuple[int, ...]]
  size: int
  moved: int
  used: int
  carried: int | None = None


def decode_moves(hlo: str) -> list[Move]:
  """What a turn of the decode loop moves: the last loop of unknown length in the program.

  Every operand of an instruction is read once and its results are written once, but for what is
  updated in place, and for rows that are looked up or cut out; inside a fusion nothing is moved.
  Arrays are as large as compiled: a slot counts though nothing is in it yet.
  """
  bodies = _bodies(hlo)
  loops = [x for x in bodies[ENTRY] if x[2] == "while" and not _TRIPS.search(x[3])]
  body = bodies[re.search(r"body=%?([\w.-]+)", loops[-1][3])[1]]
  return list(_moves(bodies, body))


def _moves(bodies: dict[str, list[tuple]], body: list[tuple]):
  by_name = {x[0]: x for x in body}

  def source(name: str) -> tuple[str, int | None]:
    """What an operand is a view of: its shape as text, and its place if the loop carries it."""
    _, shape, operation, rest = by_name[name]
    operands = _operands(rest)
    if operation in ("bitcast", "reshape"):
      return source(operands[0])
    if operation == "get-tuple-element" and by_name[operands[0]][2] == "parameter":
      return shape, int(re.search(r"index=(\d+)", rest)[1])
    return shape, None

  for _, shape, operation, rest in body:
    if operation in _STILL or operation.endswith("-done"):
      continue
    operands = [name for name in _operands(rest) if name in by_name]
    shapes, reads, written = _arrays(shape), {}, None
    if operation == "while":
      inner = bodies[re.search(r"body=%?([\w.-]+)", rest)[1]]
      times = int(_TRIPS.search(rest)[1])
      yield from (m for m in _moves(bodies, inner) for _ in range(times))
      continue
    if operation == "fusion":
      reads, written = _fused(bodies[re.search(r"calls=%?([\w.-]+)", rest)[1]])
    elif operation in _PART:
      operands, reads = operands[:1], {0: sum(a[1] for a in shapes)}
    elif operation == "dynamic-update-slice":
      operands, written = operands[1:2], _arrays(by_name[operands[1]][1])[0][1]
    elif operation.endswith("-start"):  # (source, destination, flags), copy-start's other way
      shapes = [a for a in shapes if a[0][1]]
      shapes = shapes[:1] if operation == "copy-start" else shapes[1:2]
      operands, reads = operands[:1], {0: shapes[0][1] if shapes else 0}
    for i, name in enumerate(operands):
      shape_of_all, place = source(name)
      for array, size, here in _arrays(shape_of_all):
        used = min(size, reads[i]) if reads.get(i) is not None else size
        yield Move(array, size, used * here, used, place)
    for array, size, here in shapes:
      part = size if written is None else min(size, written)
      yield Move(array, size, part * here, 0)


def _fused(body: list[tuple]) -> tuple[dict[int, int | None], int | None]:
  """({number of a parameter: bytes read of it, None for all}, bytes written of each result, None
  for all) of a fusion: rows that are looked up, and what is updated in place, are not all."""
  by_name, users = {x[0]: x for x in body}, {}
  for x in body:
    for operand in _operands(x[3]):
      users.setdefault(operand, []).append(x)
  updates = {}  # of results in place: name -> bytes

  def results(name: str):
    _, _, operation, rest = by_name[name]
    if operation in ("tuple", "bitcast", "copy"):
      for operand in _operands(rest):
        yield from results(operand)
    elif operation == "dynamic-update-slice":
      updates[name] = _arrays(by_name[_operands(rest)[1]][1])[0][1]
      yield updates[name]
    else:
      yield None

  written = list(results(body[-1][0]))

  def read(name: str) -> int | None:
    total = 0
    for user, shape, operation, rest in users.get(name, ()):
      first = _operands(rest)[0] == name
      if operation == "bitcast":
        part = read(user)
      elif operation in _PART and first:
        part = sum(a[1] for a in _arrays(shape))
      elif user in updates and first:
        part = 0
      else:
        part = None
      if part is None:
        return None
      total += part
    return total

  parameters = (x for x in body if x[2] == "parameter")
  reads = {int(re.match(r"(\d+)", x[3])[1]): read(x[0]) for x in parameters}
  return reads, None if None in written else max(written, default=None)


def _operands(rest: str) -> list[str]:
  """Names inside the parentheses that `rest` begins in."""
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return _NAME.findall(rest[:i])
  return _NAME.findall(rest)


def _arrays(text: str) -> list[tuple[tuple[str, tuple[int, ...]], int, bool]]:
  """((dtype, sizes), bytes, whether it lies in the device's memory) of each array of a shape."""
  out = []
  for kind, sizes, layout in _ARRAY.findall(text):
    shape = tuple(map(int, sizes.split(","))) if sizes else ()
    width = max(1, int(re.sub(r"\D", "", kind) or 8) // 8)
    out.append(((kind, shape), math.prod(shape) * width, "S(" not in layout))
  return out
