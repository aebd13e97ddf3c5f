"""Checkpoints: what is damaged is named and passed over, never restored silently."""

import pathlib

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
  said = []
  manager = checkpoints.open_manager(folder, keep=2)
  result = checkpoints.restore(manager, like or state(0), warn=said.append)
  manager.close()
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
