"""Arrays that were costly to make, kept beside their source with a checksum.

A file that is not exactly what was written (cut off, a flipped bit, other
labels) is made again, never used.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from pfs_jax import console, errors, storage

_CHECK = 'sha256'


def digest(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of names, types, shapes and bytes, in this order.

  >>> digest({'x': np.zeros(2)}) == digest({'x': np.zeros(2, np.float32)})
  False
  """
  found = hashlib.sha256()
  for name, array in arrays.items():
    found.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
    found.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
  return found.hexdigest()


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Keeps arrays, whole or not at all.

  Raises:
    errors.UserError: The disk is full, or the folder cannot be written.
  """
  storage.write_arrays(path, {**arrays, _CHECK: np.array(digest(arrays))})


def read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """What `write` kept; None where there is nothing, or not what it kept.

  Says so on stderr where there is a file that cannot be used.
  """
  if not path.exists():
    return None
  try:
    arrays = storage.read_arrays(path)
    if str(arrays.pop(_CHECK, '')) == digest(arrays):
      return arrays
    reason = 'fails its checksum'
  except errors.UserError as e:
    reason = str(e.__cause__ or e)
  console.note(f'{path} is damaged ({reason}); making it again')
  return None
