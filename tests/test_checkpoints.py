"""Checkpoints: what is damaged is named and passed over, never restored silently."""

import pathlib
import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsafety import checkpoints
from rlsafety.errors import UserError


def state(seed):
  rng = np.random.default_rng(seed)
  return {"a": jnp.asarray(rng.normal(size=(40, 7)), jnp.float32), "n": jnp.int32(seed)}


@pytest.fixture()
def folder(tmp_path):
  manager = checkpoints.open_manager(tmp_path / "ckpt", keep=2)
  for step in (1, 2, 3):
    checkpoints.save(manager, step, state(step), wait=True)
  manager.close()
  return tmp_path / "ckpt"


def restore(folder, like=None):
  """(state, step, what was said), and every damaged step back in its place."""
  said = []
  manager = checkpoints.open_manager(folder, keep=2)
  result = checkpoints.restore(manager, like or state(0), warn=said.append)
  manager.close()
  for step in (folder / checkpoints.DAMAGED).glob("*"):
    step.rename(folder / step.name)
  return *result, said


def test_newest_step_comes_back_to_the_bit(folder):
  got, step, said = restore(folder)
  assert step == 3 and not said
  np.testing.assert_array_equal(got["a"], state(3)["a"])
  assert int(got["n"]) == 3
  assert sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == [2, 3]


def array_files(step_folder):
  return [p for p in step_folder.rglob("*") if p.is_file() and "/d/" in str(p)]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_step_is_named_and_the_one_before_is_used(folder, damage):
  files = array_files(folder / "3")
  assert files
  for file in files:
    data = bytearray(file.read_bytes())
    if damage == "flip":
      data[len(data) // 2] ^= 1
      file.write_bytes(data)
    elif damage == "truncate":
      file.write_bytes(data[: len(data) // 2])
    else:
      file.unlink()
  got, step, said = restore(folder)
  assert step == 2 and "checkpoint 3" in said[0]
  np.testing.assert_array_equal(got["a"], state(2)["a"])


def damage_arrays(step_folder):
  for file in array_files(step_folder):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_after_a_damaged_checkpoint_is_on_disk(tmp_path, keep):
  """The damaged steps are moved aside, and the ones up to them are written again."""
  manager = checkpoints.open_manager(tmp_path / "ckpt", keep)
  for step in (2, 4):
    checkpoints.save(manager, step, state(step), wait=True)
  manager.close()
  damage_arrays(tmp_path / "ckpt" / "4")

  for again in range(2):  # a second damage of the same step has a name of its own
    manager = checkpoints.open_manager(tmp_path / "ckpt", keep)
    got, step = checkpoints.restore(manager, state(0), warn=lambda _: None)
    assert step == (-1 if keep == 1 else 2) and (got is None) == (keep == 1)
    for step in (3, 4):
      checkpoints.save(manager, step, state(step), wait=step == 4)
    manager.close()
    manager = checkpoints.open_manager(tmp_path / "ckpt", keep)
    got, step = checkpoints.restore(manager, state(0))
    manager.close()
    assert step == 4
    np.testing.assert_array_equal(got["a"], state(4)["a"])
    assert len(list((tmp_path / "ckpt" / checkpoints.DAMAGED).glob("4*"))) == 1 + again
    if keep == 2 and not again:
      break  # 2 has been deleted by now
    damage_arrays(tmp_path / "ckpt" / "4")


def test_a_save_that_did_not_happen_is_an_error(folder, monkeypatch):
  manager = checkpoints.open_manager(folder, keep=2)
  with pytest.raises(UserError, match="/3: not written, the newest there is 3|/3: cannot be writ"):
    checkpoints.save(manager, 3, state(3), wait=True)
  with pytest.raises(UserError, match="/2: "):
    checkpoints.save(manager, 2, state(2), wait=True)
  checkpoints.save(manager, 5, state(5), wait=True)
  shutil.rmtree(folder / "5")
  with pytest.raises(UserError, match="/5: was saved and is not on disk"):
    checkpoints.finish(manager)
  manager.close()


def test_a_disk_that_refuses_is_one_line(tmp_path):
  manager = checkpoints.open_manager(tmp_path / "ckpt", keep=2)
  checkpoints.save(manager, 1, state(1), wait=True)
  folder, block = tmp_path / "ckpt", tmp_path / "ckpt" / "2"
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # as a full disk: writes are refused
  try:
    with pytest.raises(UserError, match=f"{folder}/2: cannot be written"):
      checkpoints.save(manager, 2, state(2), wait=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
  assert not block.exists()
  got, step, said = restore(folder)
  assert step == 1 and not said


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_flipped_byte_is_ever_restored_silently(folder, data):
  """Any byte of any file of the newest step: the result is one of the two true states."""
  files = sorted(p for p in (folder / "3").rglob("*") if p.is_file() and p.stat().st_size)
  file = data.draw(st.sampled_from(files), label="file")
  original = file.read_bytes()
  at = data.draw(st.integers(0, len(original) - 1), label="byte")
  changed = bytearray(original)
  changed[at] ^= data.draw(st.integers(1, 255), label="flip")
  file.write_bytes(changed)
  try:
    got, step, _ = restore(folder)
  finally:
    file.write_bytes(original)
  assert step in (2, 3)
  np.testing.assert_array_equal(got["a"], state(step)["a"])


def test_half_deleted_and_half_written_steps_are_not_listed(folder):
  trash = folder / checkpoints.TRASH / "1"
  trash.mkdir(parents=True, exist_ok=True)
  (folder / "4.orbax-checkpoint-tmp").mkdir()
  got, step, _ = restore(folder)
  assert step == 3 and not (folder / checkpoints.TRASH / "1").exists()


def test_another_model_is_refused_by_leaf(folder):
  other = {"a": jnp.zeros((40, 8)), "n": jnp.int32(0)}
  with pytest.raises(UserError, match=r"leaf \['a'\]"):
    restore(folder, other)


def test_nothing_saved_is_a_fresh_start(tmp_path):
  got, step, said = restore(pathlib.Path(tmp_path / "none"))
  assert got is None and step == -1 and not said
