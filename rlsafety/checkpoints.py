"""Orbax checkpoints with the four additions that make them safe to lose power on.

1. Deleting an old step is a rename into trash/: a kill in the middle of a deletion can
   no longer leave a listed, half-deleted step.
2. Every leaf's sha256 is stored beside the state and compared on restore: Orbax itself
   restores a flipped byte without a word.
3. Restoring tries the newest step first and falls back to the one before.
4. Tree, shapes and dtypes are compared before Orbax sees them: it would cast silently.
"""

import hashlib
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlsafety.errors import UserError

TRASH = "trash"


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
  return ocp.CheckpointManager(folder, options=options)


def _leaves(tree) -> dict[str, jax.Array]:
  """Flat {path: leaf}; paths name leaves in errors and are Orbax's own keys."""
  return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(x) -> str:
  x = np.ascontiguousarray(_to_host(x))
  return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()


def _digest_json(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _to_host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def save(manager: ocp.CheckpointManager, step: int, state, wait: bool = False) -> None:
  """Writes `state` (any pytree of arrays) as step; `wait` blocks until it is on disk."""
  if step in manager.all_steps():
    return
  leaves = _leaves(state)
  meta = {
    "sha256": {name: _digest(x) for name, x in leaves.items()},
    "shapes": {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()},
  }
  meta["self"] = _digest_json(meta)
  # Copies: an asynchronous save must not read buffers that the next update was given.
  leaves = {name: jnp.copy(x) for name, x in leaves.items()}
  args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))
  manager.save(step, args=args)
  if wait:
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, like, warn=print):
  """Newest readable step as (state, step), or (None, -1) where there is none.

  like: a pytree of arrays or ShapeDtypeStructs with shardings, the wanted layout; it may
  differ from the mesh that wrote the checkpoint. A broken step is named through `warn`.
  Raises UserError if a step is whole but belongs to another model or adapter.
  """
  wanted = _leaves(like)
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      if meta.pop("self", None) != _digest_json(meta):
        raise ValueError("checksum of its description")
    except Exception as error:  # noqa: BLE001  any reader's error means: try the step before
      warn(f"checkpoint {step} is not readable ({_first_line(error)}); trying the one before")
      continue
    shapes = {name: [str(x.dtype), list(x.shape)] for name, x in wanted.items()}
    for name in {*shapes, *meta["shapes"]}:
      if shapes.get(name) != meta["shapes"].get(name):
        raise UserError(
          f"{manager.directory}/{step}: leaf {name} is {meta['shapes'].get(name)} there and "
          f"{shapes.get(name)} here; the run was started with another model or lora config"
        )
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
      leaves = manager.restore(step, args=args).state
      bad = [name for name, x in leaves.items() if _digest(x) != meta["sha256"][name]]
    except Exception as error:  # noqa: BLE001
      warn(f"checkpoint {step} is not readable ({_first_line(error)}); trying the one before")
      continue
    if bad:
      warn(f"checkpoint {step} is damaged (checksum of {bad[0]}); trying the one before")
      continue
    tree = jax.tree.structure(like)
    return jax.tree.unflatten(tree, [leaves[name] for name in wanted]), step
  return None, -1


def _first_line(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200]
