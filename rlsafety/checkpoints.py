"""Orbax checkpoints with the five additions that make them safe to lose power on.

1. Deleting an old step is a rename into trash/: a kill in the middle of a deletion can
   no longer leave a listed, half-deleted step.
2. Every leaf's sha256 is stored beside the state and compared on restore: Orbax itself
   restores a flipped byte without a word.
3. Restoring tries the newest step first and falls back to the one before.
4. Tree, shapes and dtypes are compared before Orbax sees them: it would cast silently.
5. A step that cannot be read is moved into damaged/: Orbax saves nothing up to the newest step
   that it lists, without an error. A save that did not happen is an error here.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rlsafety import sharding
from rlsafety.errors import UserError, first_line

TRASH, DAMAGED = "trash", "damaged"
METADATA = "_CHECKPOINT_METADATA"  # what Orbax notes on a step


def open_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """A manager over folder; what an interrupted save or deletion left is removed."""
  logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
  folder = pathlib.Path(folder).absolute()
  shutil.rmtree(folder / TRASH, ignore_errors=True)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    todelete_subdir=TRASH,
    cleanup_tmp_directories=True,
    enable_async_checkpointing=jax.process_count() == 1,
  )
  try:
    return ocp.CheckpointManager(folder, options=options)
  except (ValueError, TypeError, RecursionError, AttributeError):
    # Times and the like, which no restore needs; damaged, they keep Orbax from opening any step.
    for file in folder.glob(f"[0-9]*/{METADATA}"):
      with contextlib.suppress(FileNotFoundError):  # another process did it
        file.rename(file.with_name(f"{METADATA}.{DAMAGED}"))
    return ocp.CheckpointManager(folder, options=options)


def _leaves(tree: Any) -> dict[str, jax.Array]:
  """Flat {path: leaf}; paths name leaves in errors and are Orbax's own keys."""
  return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(leaf: jax.Array) -> str:
  x = np.ascontiguousarray(sharding.fetch(leaf))
  return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()


def _digest_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  logs: Mapping[str, Any] | None = None,
  wait: bool = False,
) -> None:
  """Writes `state` (any pytree of arrays) as step; `wait` blocks until it is on disk.

  logs: kept with it, in JSON types; see `logs_of`.
  Raises UserError naming the folder if it, or the save before it, was not written.
  """
  leaves = _leaves(state)
  meta = {
    "sha256": {name: _digest(x) for name, x in leaves.items()},
    "shapes": {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()},
    "logs": logs or {},
  }
  meta["self"] = _digest_json(meta)
  # Copies: an asynchronous save must not read buffers that the next update was given.
  leaves = {name: jnp.copy(x) for name, x in leaves.items()}
  args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))
  with _named(manager, step):
    if not manager.save(step, args=args):
      newest = manager.latest_step()
      raise UserError(f"{manager.directory}/{step}: not written, the newest there is {newest}")
  if wait:
    finish(manager)


def finish(manager: ocp.CheckpointManager) -> None:
  """Blocks until the newest save is on disk. Raises UserError naming it if it is not."""
  newest = manager.latest_step()
  with _named(manager, newest):
    manager.wait_until_finished()
  if newest is not None and newest not in manager.all_steps(read=True):
    raise UserError(f"{manager.directory}/{newest}: was saved and is not on disk")


@contextlib.contextmanager
def _named(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
  """Errors of the disk, also of a save in the background, as a UserError."""
  try:
    yield
  except UserError:
    raise
  except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
    raise UserError(
      f"{manager.directory}/{step}: cannot be written ({first_line(error)}); "
      "the steps before it are whole"
    ) from error


def logs_of(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The `logs` that a readable step was saved with, {} of one that was saved without."""
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  return manager.restore(step, args=args)["meta"].get("logs", {})


def forget_after(manager: ocp.CheckpointManager, step: int) -> None:
  """Deletes the steps after `step`: they are made again."""
  for later in [s for s in manager.all_steps() if s > step]:
    manager.delete(later)


def restore(
  manager: ocp.CheckpointManager,
  like: Any,
  warn: Callable[[str], None] = print,
  upto: int | None = None,
) -> tuple[Any, int]:
  """Newest readable step, of those up to `upto`, as (state, step), or (None, -1) where there is
  none.

  like: a pytree of arrays or ShapeDtypeStructs with shardings, the wanted layout; it may
  differ from the mesh that wrote the checkpoint. Newer steps that cannot be read are named
  through `warn` and moved into damaged/.
  Raises UserError if a step is whole but belongs to another model or adapter.
  """
  wanted, found, broken = _leaves(like), (None, -1), []
  steps = [s for s in manager.all_steps() if upto is None or s <= upto]
  for step in sorted(steps, reverse=True):
    try:
      leaves = _read(manager, step, wanted)
    except UserError:
      raise
    except Exception as error:  # noqa: BLE001  any reader's error means: try the step before
      warn(f"checkpoint {step} is not readable ({first_line(error)}); trying the one before")
      broken.append(step)
      continue
    tree = jax.tree.structure(like)
    found = jax.tree.unflatten(tree, [leaves[name] for name in wanted]), step
    break
  if broken:
    _move_aside(manager, broken, warn)
  return found


def _read(
  manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
) -> dict:
  """The leaves of a step. Raises UserError for another model's, any other error for damage."""
  meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
  if meta.pop("self", None) != _digest_json(meta):
    raise ValueError("checksum of its description")
  shapes = {name: [str(x.dtype), list(x.shape)] for name, x in wanted.items()}
  for name in {*shapes, *meta["shapes"]}:
    if shapes.get(name) != meta["shapes"].get(name):
      raise UserError(
        f"{manager.directory}/{step}: leaf {name} is {meta['shapes'].get(name)} there and "
        f"{shapes.get(name)} here; the run was started with another model or lora config"
      )
  args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
  leaves = manager.restore(step, args=args)["state"]
  bad = [name for name, x in leaves.items() if _digest(x) != meta["sha256"][name]]
  if bad:
    raise ValueError(f"checksum of {bad[0]}")
  return leaves


def _move_aside(
  manager: ocp.CheckpointManager, steps: list[int], warn: Callable[[str], None]
) -> None:
  """Renames the folders of `steps` to damaged/STEP, or STEP.1 ... where that is taken."""
  folder = pathlib.Path(manager.directory)
  if jax.process_index() == 0:
    (folder / DAMAGED).mkdir(exist_ok=True)
    for step in steps:
      taken = len(list((folder / DAMAGED).glob(f"{step}*")))
      aside = folder / DAMAGED / (f"{step}.{taken}" if taken else str(step))
      (folder / str(step)).rename(aside)
      warn(f"checkpoint {step} was moved to {aside}")
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("damaged checkpoints")
  manager.reload()


def read_part(folder: pathlib.Path, step: int, prefix: str) -> dict[str, np.ndarray]:
  """{path without prefix: leaf} of the leaves of a step that begin with `prefix`, on the host.

  Only reads: a run may be writing to the folder. Raises UserError naming a step that is not there
  or damaged.
  """
  logging.getLogger("absl").setLevel(logging.ERROR)
  where, folder = f"{folder}/{step}", pathlib.Path(folder).absolute()
  try:
    with ocp.CheckpointManager(
      folder, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
      meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
      place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shapes = {name: (tuple(shape), dtype) for name, (dtype, shape) in meta["shapes"].items()}
      like = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
        for name, (shape, dtype) in shapes.items()
      }
      leaves = _read(manager, step, like)
  except UserError:
    raise
  except Exception as error:  # noqa: BLE001  any reader's error: the step cannot be read
    raise UserError(f"{where}: cannot be read ({first_line(error)})") from error
  return {n.removeprefix(prefix): np.asarray(x) for n, x in leaves.items() if n.startswith(prefix)}
