"""Where a run directory can lie: a folder of a file system that keeps what a run relies on.

A run appends to its logs, replaces files by renaming and makes checkpoints visible by renaming a
folder. Local disks, NFS 4, Lustre, Filestore and a Cloud Storage bucket with hierarchical
namespace mounted by gcsfuse do all of that; an address (gs://, s3://) and a mount without renames
do not, and are refused before anything is computed. docs/launch.md says which mount is what.
"""

import contextlib
import os
import pathlib
import re
import shutil

from rlsafety.errors import UserError


def check(workdir: str, process: int = 0) -> pathlib.Path:
  """Makes the folder and tries in it what a run will do. process: this process's index.

  Raises UserError in one line: for an address, for a folder that cannot be written, and for a
  file system that does not append or rename.
  """
  if address := re.match(r"^([A-Za-z][A-Za-z0-9+.-]+):/", workdir):
    raise UserError(
      f"--workdir={workdir}: a run directory is a folder, not an address; mount the "
      f"{'bucket (gcsfuse BUCKET ~/bucket)' if address[1] == 'gs' else 'storage'} and name the "
      "folder in the mount, as docs/launch.md shows"
    )
  path = pathlib.Path(workdir)
  doing, probe = "write", path / f".probe-{process}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(probe, ignore_errors=True)  # of a killed start
    (probe / "a").mkdir(parents=True)
    (probe / "a/log").write_bytes(b"1")
    doing = "append to a file"
    with open(probe / "a/log", "ab", buffering=0) as log:
      log.write(b"2")
    if (probe / "a/log").read_bytes() != b"12":
      raise OSError("what was there is gone")
    doing = "rename a folder"
    os.replace(probe / "a", probe / "b")
    doing = "replace a file by renaming"
    (probe / "new").write_bytes(b"3")
    os.replace(probe / "new", probe / "b/log")
    doing = "read what was written"
    if (probe / "b/log").read_bytes() != b"3" or (probe / "a").exists():
      raise OSError("it reads as something else")
  except OSError as error:
    why = error.strerror or error
    raise UserError(
      f"workdir {path}: cannot {doing} there ({why}); give another --workdir (docs/launch.md "
      "says which file systems serve)"
    ) from None
  finally:
    with contextlib.suppress(OSError):
      shutil.rmtree(probe)
  return path
