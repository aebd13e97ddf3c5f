"""The compilers of accelerators where there is none: which are installed, and devices for them.

TPUs' comes with libtpu (extra compilers-tpu), an H100's with JAX's CUDA plugin (extra cuda).
"""

import importlib.metadata
import importlib.util
import os
import pathlib

from rlsafety.errors import UserError
from rlsafety.tools.devices import Device

DATA = pathlib.Path(__file__).parent / "data"
TOPOLOGY = {"v4": "v4", "v5e": "v5e", "v5p": "v5", "v6e": "v6e"}  # as the TPU compiler says it


def installed(target: Device) -> str:
  """The compiler of `target` where it is installed, with its version, else ""."""
  if target.is_tpu:
    names = ("libtpu",)
  elif target.kind == "H100":
    names = ("jax_cuda13_plugin", "jax_cuda12_plugin")
  else:
    return ""
  found = [name for name in names if importlib.util.find_spec(name)]
  if not found:
    return ""
  return f"{found[0]} {importlib.metadata.version(found[0].replace('_', '-'))}"


def devices(target: Device) -> list:
  """Devices of `target` that compile and do not run. Raises UserError saying what to install."""
  if not installed(target):
    extra = "compilers-tpu" if target.is_tpu else "cuda"
    raise UserError(f"--device={target.name}: no compiler; run: pip install 'rlsafety[{extra}]'")
  from jax.experimental import topologies  # after the caller has set JAX_PLATFORMS

  if not target.is_tpu:
    described = topologies.get_topology_desc(
      platform="cuda",
      topology_name="h100",
      target_config=(DATA / "h100.txtpb").read_text(),
      topology=f"1x1x{target.chips}",
    )
    return described.devices
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # no machine to be asked about
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": target.accelerator_type,
    "TPU_WORKER_HOSTNAMES": "localhost",
  }
  more = {"chip_config_name": "megacore"} if target.kind in ("v4", "v5p") else {}
  name = f"{TOPOLOGY[target.kind]}:{target.topology}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
