"""The accelerators we plan for and launch on: what they hold, how fast they are, their names.

Speeds are the makers' dense bf16 peaks, memory and bandwidth per chip (data sheets). Prices
are on-demand list prices per chip and hour in US dollars as of 2026, for orders of magnitude:
pass your own where it matters. Slices are named as Google names them: `v4-16` and `v5p-16`
count TensorCores (8 chips), `v5e-16` and `v6e-16` count chips.
"""

import dataclasses
import math
import re

from rlsafety.errors import UserError

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator chip. memory in bytes, flops per second in bf16, bandwidth (its own memory)
  and link (to its neighbours, one direction) in bytes per second, price in $ per hour."""

  memory: float
  flops: float
  bandwidth: float
  link: float
  price: float
  per_host: int
  gke: str = ""  # node label on Google Kubernetes Engine
  gcloud: str = ""  # prefix of the accelerator type
  runtime: str = ""  # TPU VM image
  cores: int = 1  # what the number in the slice's name counts, per chip


CHIPS = {
  "v4": Chip(
    32 * GIB, 275e12, 1228e9, 135e9, 3.22, 4, "tpu-v4-podslice", "v4", "tpu-ubuntu2204-base", 2
  ),
  "v5e": Chip(
    16 * GIB,
    197e12,
    819e9,
    100e9,
    1.20,
    4,
    "tpu-v5-lite-podslice",
    "v5litepod",
    "v2-alpha-tpuv5-lite",
  ),
  "v5p": Chip(
    95 * GIB, 459e12, 2765e9, 300e9, 4.20, 4, "tpu-v5p-slice", "v5p", "v2-alpha-tpuv5", 2
  ),
  "v6e": Chip(32 * GIB, 918e12, 1640e9, 224e9, 2.70, 4, "tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e"),
  "H100": Chip(80e9, 989e12, 3350e9, 450e9, 3.00, 8, "nvidia-h100-80gb"),
  "H200": Chip(141e9, 989e12, 4800e9, 450e9, 3.80, 8, "nvidia-h200-141gb"),
  "cpu": Chip(4 * GIB, 50e9, 10e9, 5e9, 0.0, 8),
}

# Chips -> topology, as GKE spells it. v5e and v6e lie in a plane, v4 and v5p in a cube.
PLANE = {
  1: "1x1",
  4: "2x2",
  8: "2x4",
  16: "4x4",
  32: "4x8",
  64: "8x8",
  128: "8x16",
  256: "16x16",
}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


@dataclasses.dataclass(frozen=True)
class Device:
  """A slice or a box: `chips` equal chips on `hosts` hosts."""

  name: str
  kind: str
  chip: Chip
  chips: int

  @property
  def hosts(self) -> int:
    return math.ceil(self.chips / self.chip.per_host)

  @property
  def is_tpu(self) -> bool:
    return self.kind.startswith("v")

  @property
  def topology(self) -> str:
    return (PLANE if self.chip.cores == 1 else CUBE)[self.chips]

  @property
  def accelerator_type(self) -> str:
    """gcloud's --accelerator-type, such as v5litepod-16."""
    return f"{self.chip.gcloud}-{self.chips * self.chip.cores}"


def device(name: str) -> Device:
  """'v5e-16', 'v4-8', 'H100' or 'H100-8', 'cpu-8' -> Device; raises UserError with what exists."""
  match = re.fullmatch(r"([A-Za-z0-9]+?)(?:-(\d+))?", name)
  kinds = {kind.lower(): kind for kind in CHIPS}
  kind = kinds.get(match[1].lower()) if match else None
  if kind is None:
    raise UserError(
      f"device={name!r} is not known; kinds: {', '.join(CHIPS)}, as in v5e-16, H100-8"
    )
  chip = CHIPS[kind]
  count = int(match[2] or chip.cores)
  sizes = {"v": PLANE if chip.cores == 1 else CUBE}.get(kind[0])
  chips = count // chip.cores
  if count % chip.cores or count == 0 or (sizes and chips not in sizes):
    known = ", ".join(f"{kind}-{n * chip.cores}" for n in sizes or (1, 2, 4, 8))
    raise UserError(f"device={name!r} is no size of {kind}; sizes: {known}")
  return Device(f"{kind}-{count}", kind, chip, chips)
