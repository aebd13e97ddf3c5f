"""The accelerators we plan for and launch on: what they hold, how fast they are, their names.

Sources, read in 2026, are named beside the numbers. DOCS is that version's page in Google Cloud's
TPU documentation (docs.cloud.google.com/tpu/docs/v5e and so on): memory, dense bf16 peak,
bandwidth, chips per VM, topologies; the images are on its page "TPU software versions"
(.../runtimes). SHEET is NVIDIA's data sheet of the product, read in others' copies of it: its
dense bf16 peak is half of what it calls "with sparsity". "Not checked" is a number that we found
nowhere to compare with. Node labels: the machine types of GKE's documentation. `link` is what one
device sends to its neighbours in one direction: of a TPU along each axis, a quarter of what DOCS
calls its bidirectional bandwidth; of a GPU through NVLink where there is one, else PCIe.

Prices are on demand, per device and hour, in US dollars, rounded, without any discount; 0 where we
found none. CATALOGUE is SkyPilot's copy of Google's billing catalogue (v8, gcp; 2026). TPUs: its
prices in us-central1, of v4 in us-central2; other regions ask up to half as much again. GPUs: what
clouds that rent little else ask (August to October 2026; hyperstack.cloud/gpu-pricing unless said
otherwise). The large clouds ask two to four times as much: for an H100 6.88 Amazon, 10.98 Google,
12.29 Microsoft (September to November). `gke_price` is Google's: it bills the node, so this is the
GPU's price and its share of the node's processors and memory. They tell orders of magnitude: look
at your own contract.

Slices are named as Google names them: `v4-16` and `v5p-16` count TensorCores (8 chips), `v5e-16`
and `v6e-16` count chips, `tpu7x-16` counts the halves of chips that JAX sees as devices (8 chips).
"""

import dataclasses
import math
import re
from datetime import datetime

from rlsafety.errors import UserError

GIB = 1024**3

# Chips -> topology, as GKE spells it. v5e and v6e lie in a plane, the others in a cube.
PLANE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX counts them. memory in bytes, flops per second in bf16, bandwidth (its own
  memory) and link (to its neighbours, one direction) in bytes per second, prices in $ per hour."""

  memory: float
  flops: float
  bandwidth: float
  link: float
  price: float
  per_host: int
  gke: str = ""  # node label on Google Kubernetes Engine; "" = the launcher has no pool for it
  gcloud: str = ""  # prefix of the Cloud TPU API's accelerator type; "" = not in that API
  runtime: str = ""  # TPU VM image
  topologies: dict[int, str] = dataclasses.field(default_factory=dict)  # of a TPU
  cores: int = 1  # what the number in the slice's name counts, per device
  halves: int = 1  # devices on one chip as Google counts and sells them
  gke_price: float = 0.0  # of a GPU on Google Kubernetes Engine, with its share of the node


TB = 1e12
CHIPS = {
  # DOCS; link: 3 of 6 of 45 GB/s, which its all-reduce bandwidth of a pod (1.1 PB/s for 4,096
  # chips) comes to. Price: CATALOGUE.
  "v4": Chip(
    *(32 * GIB, 275e12, 1200e9, 135e9, 3.22, 4),
    *("tpu-v4-podslice", "v4", "tpu-ubuntu2204-base", CUBE, 2),
  ),
  # DOCS. Price: CATALOGUE.
  "v5e": Chip(
    *(16 * GIB, 197e12, 819e9, 100e9, 1.20, 4),
    *("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite", PLANE),
  ),
  # DOCS. Price: CATALOGUE.
  "v5p": Chip(
    *(95 * GIB, 459e12, 2765e9, 300e9, 4.20, 4),
    *("tpu-v5p-slice", "v5p", "v2-alpha-tpuv5", CUBE, 2),
  ),
  # DOCS. Price: CATALOGUE.
  "v6e": Chip(
    *(32 * GIB, 918e12, 1638e9, 200e9, 2.70, 4),
    *("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e", PLANE),
  ),
  # DOCS. A chip has 192 GiB, 2307 TFLOP/s, 7380 GB/s and links of 1200 GB/s, in two halves. Not in
  # the Cloud TPU API: GKE.
  "tpu7x": Chip(
    *(96 * GIB, 2307e12 / 2, 7.38 * TB / 2, 150e9, 0.0, 8, "tpu7x"),
    topologies=CUBE,
    halves=2,
  ),
  # SHEET, the SXM boards. Price of an A100: 1.60, runpod.io 1.79; of an H100: runpod.io 2.69 to
  # 3.49, hyperstack.cloud 3.20. On GKE, CATALOGUE: A100 4.42 + 1.10 (us-east5), H100 9.80 + 1.18
  # (us-east4); of H200 not found, of B200 8.06 to 11.28 by region, without the node.
  "A100": Chip(
    *(80e9, 312e12, 2039e9, 300e9, 1.80, 8, "nvidia-a100-80gb"),
    gke_price=5.52,
  ),
  "H100": Chip(
    *(80e9, 989e12, 3350e9, 450e9, 3.00, 8, "nvidia-h100-80gb"),
    gke_price=10.98,
  ),
  "H200": Chip(141e9, 989e12, 4800e9, 450e9, 4.00, 8, "nvidia-h200-141gb"),  # 3.99
  # SHEET of HGX; memory as DGX B200's has it (1,440 GB for 8) and clouds sell it, 180 GB.
  "B200": Chip(180e9, 2250e12, 8 * TB, 900e9, 6.00, 8, "nvidia-b200"),  # 6.00; lambda.ai 6.69
  # SHEET; memory as systems report it in MLPerf submissions. Hosts of 4 with Arm CPUs: our image is
  # for x86, so it is planned for and not launched on.
  "GB200": Chip(186e9, 2500e12, 8 * TB, 900e9, 0.0, 4),
  # SHEET (PCIe 4, 16 lanes: 32 GB/s). Price of L4: Google's, CATALOGUE has 0.56 for the GPU, and
  # others' code has 0.70 for the smallest node with one (g2-standard-4, us-central1); of L40S: its
  # sister L40's.
  "L4": Chip(24e9, 121e12, 300e9, 32e9, 0.70, 8, "nvidia-l4", gke_price=0.70),
  "L40S": Chip(48e9, 362e12, 864e9, 32e9, 1.00, 8),
  # PCIe 5, 16 lanes: 64 GB/s. Server Edition, whose bandwidth is not checked (the workstation's is
  # 1792). The peak is an eighth of the 4000 sparse FP4 TFLOP/s of NVIDIA's announcement, within 1 %
  # (457 were measured on a card: github.com/xzwgit/gpu-flops-bench).
  "RTXPRO6000": Chip(96e9, 504e12, 1597e9, 64e9, 1.85, 8, "nvidia-rtx-pro-6000"),  # 1.85
  # A quarter of the sparse FP16 rate, 838 (spheron.network): dense, and half as fast with float32
  # sums on this line of cards (254 were measured, as above, with what sums is not said). Price:
  # runpod.io 0.69, in others' copy of its list (March 2026).
  "RTX5090": Chip(32e9, 210e12, 1792e9, 64e9, 0.70, 8),
  # hmc-tech.com: 165.2 with float32 sums, 330 without. Price: openrelay.inc 0.29, runpod.io 0.74.
  "RTX4090": Chip(24e9, 165e12, 1008e9, 32e9, 0.40, 8),
  "cpu": Chip(4 * GIB, 50e9, 10e9, 5e9, 0.0, 8),  # a guess, for trying the planner out
}
GUESSED_INTENSITY = 250  # flops per byte of bandwidth: the GPUs above have 100 to 420
GUESSED_LINK = 32e9  # PCIe 4, 16 lanes


@dataclasses.dataclass(frozen=True)
class Device:
  """A slice or a box: `chips` equal devices, as JAX counts them, on `hosts` hosts."""

  name: str
  kind: str
  chip: Chip
  chips: int

  @property
  def hosts(self) -> int:
    return math.ceil(self.chips / self.chip.per_host)

  @property
  def per_host(self) -> int:
    """How many of the cloud's resource (google.com/tpu, nvidia.com/gpu) one host has."""
    return min(self.chips, self.chip.per_host) // self.chip.halves

  @property
  def is_tpu(self) -> bool:
    return bool(self.chip.topologies)

  @property
  def platform(self) -> str:
    """What JAX calls its backend: tpu, gpu or cpu."""
    return "tpu" if self.is_tpu else "cpu" if self.kind == "cpu" else "gpu"

  @property
  def topology(self) -> str:
    return self.chip.topologies[self.chips // self.chip.halves]

  @property
  def accelerator_type(self) -> str:
    """gcloud's --accelerator-type, such as v5litepod-16."""
    return f"{self.chip.gcloud}-{self.chips * self.chip.cores}"


def device(name: str, memory: float = 0.0, flops: float = 0.0) -> Device:
  """'v5e-16', 'v4-8', 'H100' or 'H100-8', 'cpu-8' -> Device.

  memory (GB) and flops (bf16 TFLOP/s, dense), both of one device: they describe a GPU that is
  not in the list, under any name, and its bandwidth is then a guess (GUESSED_INTENSITY); for a
  known one they take the place of its own. Raises UserError with what exists.
  """
  if not name:
    raise UserError("--device is missing; name the machine: --device=v5e-16, --device=H100-8 ...")
  if memory < 0 or flops < 0 or not math.isfinite(memory + flops):
    raise UserError(f"--memory={memory} (GB) and --flops={flops} (TFLOP/s) must be positive")
  match = re.fullmatch(r"([A-Za-z0-9]+?)(?:-(\d+))?", name)
  kinds = {kind.lower(): kind for kind in CHIPS}
  prefix, number = (match[1], match[2]) if match else ("", None)
  kind = kinds.get(prefix.lower())
  if prefix and kind is None and memory and flops:
    rate = flops * 1e12
    chip = Chip(memory * 1e9, rate, rate / GUESSED_INTENSITY, GUESSED_LINK, 0.0, 8)
    return _sized(prefix, chip, number)
  if kind is None:
    raise UserError(
      f"device={name!r} is not known; kinds: {', '.join(CHIPS)}, as in v5e-16, H100-8; for "
      "another GPU also give --memory=GB and --flops=TFLOPS of one"
    )
  chip = CHIPS[kind]
  chip = dataclasses.replace(
    chip, memory=memory * 1e9 or chip.memory, flops=flops * 1e12 or chip.flops
  )
  return _sized(kind, chip, number)


def _sized(kind: str, chip: Chip, number: str | None) -> Device:
  """number: what follows the kind in a device's name; None = one device."""
  count = int(number or chip.cores * chip.halves * min(chip.topologies, default=1))
  chips, sizes = count // chip.cores, [n * chip.halves for n in chip.topologies]
  if count % chip.cores or count == 0 or (sizes and chips not in sizes):
    known = ", ".join(f"{kind}-{n * chip.cores}" for n in sizes or (1, 2, 4, 8))
    raise UserError(f"device={kind}-{count} is no size of {kind}; sizes: {known}")
  return Device(f"{kind}-{count}", kind, chip, chips)


def bill(target: Device, hours: float, gke: bool = False) -> str:
  """What these hours of all its devices cost, at which price, and whose: no discount is in it.

  gke: on Google Kubernetes Engine alone, for its launcher.
  """
  chip = target.chip
  cost = lambda price: f"${hours * target.chips * price:.2f} at ${price:.2f} a device and hour"  # noqa: E731
  if not chip.price:
    return "price not known"
  if target.is_tpu:
    return f"{cost(chip.price)} (Google's list price of 2026, on demand, in its cheapest regions)"
  node = f"{cost(chip.gke_price)} on GKE (on demand in 2026, its share of the node included)"
  if gke:
    return node if chip.gke_price else "price on GKE not known"
  cheap = f"{cost(chip.price)} (clouds that rent little else, on demand, autumn 2026)"
  if chip.gke_price:
    return f"{cheap}, {node}"
  return f"{cheap}; the large clouds ask two to four times as much" if chip.gke else cheap


def cost_line(accelerator_type: str, created: str, now: datetime) -> str:
  """What a slice of the Cloud TPU API has cost since it was made, at list price.

  accelerator_type: as gcloud prints it, v5litepod-16. created: RFC 3339, as gcloud prints it.
  """
  prefix, _, number = accelerator_type.rpartition("/")[2].partition("-")
  kind = next((k for k, chip in CHIPS.items() if chip.gcloud == prefix and prefix), None)
  if kind is None:
    raise UserError(f"accelerator type {accelerator_type!r} is not known")
  slice_ = device(f"{kind}-{number}")
  hours = (now - datetime.fromisoformat(created)).total_seconds() / 3600
  rate = slice_.chips * slice_.chip.price
  return (
    f"{hours:.1f} h x {slice_.chips} chips x ${slice_.chip.price:.2f} = ${hours * rate:.2f} at "
    f"list price (2026, on demand, no discount), since this slice was made; ${rate:.2f} an hour "
    "until `delete`"
  )
