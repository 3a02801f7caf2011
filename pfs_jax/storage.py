"""Files: written whole or not at all, read against a type, locked folders.

Every write goes to a temporary name in the same folder and is then renamed, so
that a reader never sees half of a file. With several processes the first one
writes. What cannot be read or written is a `UserError` of one line.

A file that is finished can be *sealed*: its SHA-256 is noted in checksums.json
beside it, and a reader refuses the file if it no longer fits. A writer takes
the note away before it changes the file, so that a crash leaves a file without
a note, never one with a wrong note.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import msgspec
import numpy as np

from pfs_jax import errors

CHECKSUMS = 'checksums.json'
_LARGEST = 2**28  # Bytes of a file of text or JSON.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_first_process() -> bool:
  """Whether this process is the one that writes files."""
  return jax.process_index() == 0


# Writing.


def write_bytes(
  path: pathlib.Path, content: bytes, *, sealed: bool = False
) -> None:
  """Writes a file whole or not at all; only on the first process.

  Nothing is written where the file already is what it should be, so that the
  same command on a finished run needs no right to write.

  Args:
    path: The file; its folder is made if need be.
    content: All of it.
    sealed: Whether its checksum is noted, for a file that is finished.

  Raises:
    errors.UserError: It cannot be written; what was there before is kept.
  """
  if not is_first_process():
    return
  note = {path.name: sha256(content)} if sealed else {}
  notes = _notes(path.parent)
  if _holds(path, content) and note.get(path.name) == notes.get(path.name):
    return
  others = {k: v for k, v in notes.items() if k != path.name}
  if others != notes:
    _replace(path.parent / CHECKSUMS, _json(others))
  _replace(path, content)
  if sealed:
    _replace(path.parent / CHECKSUMS, _json({**others, **note}))


def _holds(path: pathlib.Path, content: bytes) -> bool:
  with contextlib.suppress(OSError):
    return path.stat().st_size == len(content) and path.read_bytes() == content
  return False


def _replace(path: pathlib.Path, content: bytes) -> None:
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as e:
    with contextlib.suppress(OSError):
      temporary.unlink()
    refuse_write(path, e, len(content))


def refuse_write(path: pathlib.Path, e: OSError, size: int) -> NoReturn:
  """Raises the error of a write that failed: what, where, how much is free.

  Args:
    path: What could not be written.
    e: Why.
    size: Bytes of data to write; 0 if that is not known.
  """
  reason = e.strerror or str(e)
  if e.errno in _NO_SPACE:
    folder = path.parent
    while not folder.exists():
      folder = folder.parent
    free = shutil.disk_usage(folder).free
    need = f', and {size:,} bytes of data take more' if size else ''
    reason = f'{reason}: {free:,} bytes are free{need}'
  raise errors.UserError(f'{path} cannot be written: {reason}.') from e


def write_text(path: pathlib.Path, text: str, *, sealed: bool = False) -> None:
  """Writes a text file; see `write_bytes`."""
  write_bytes(path, text.encode(), sealed=sealed)


def write_json(path: pathlib.Path, value: Any, *, sealed: bool = False) -> None:
  """Writes a JSON file; see `write_bytes`."""
  write_bytes(path, _json(value), sealed=sealed)


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + '\n').encode()


def write_arrays(
  path: pathlib.Path, arrays: Mapping[str, Any], *, sealed: bool = False
) -> None:
  """Writes a .npz, whose names may hold '/'; see `write_bytes`."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    for name, array in arrays.items():
      with archive.open(f'{name}.npy', 'w', force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
  write_bytes(path, buffer.getvalue(), sealed=sealed)


def seal(path: pathlib.Path) -> None:
  """Notes the checksum of a file that was written piece by piece."""
  if is_first_process():
    notes = {**_notes(path.parent), path.name: sha256(path.read_bytes())}
    _replace(path.parent / CHECKSUMS, _json(notes))


# Reading.


def read_bytes(path: pathlib.Path, largest: int = _LARGEST) -> bytes:
  """All of a file, which must be as it was sealed, if it was.

  Args:
    path: The file.
    largest: Refused if it has more bytes.

  Raises:
    errors.UserError: It is not there, cannot be read, or was changed.
  """
  content = _bytes(path, largest)
  noted = _notes(path.parent).get(path.name)
  if noted not in (None, sha256(content)):
    raise errors.UserError(
      f'{path} is damaged or was changed: its SHA-256 is not the one in '
      f'{CHECKSUMS} beside it.\nDelete the file and run the command that wrote '
      'it again; if you changed it on purpose, delete its line there.'
    )
  return content


def _bytes(path: pathlib.Path, largest: int = _LARGEST) -> bytes:
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      raise errors.UserError(f'{path} cannot be read: it is no file.')
    if found.st_size > largest:
      raise errors.UserError(
        f'{path} cannot be read: it has {found.st_size:,} bytes; at most '
        f'{largest:,} are allowed.'
      )
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError) as e:
    raise errors.UserError(f'{path} does not exist.') from e
  except OSError as e:
    raise errors.UserError(f'{path} cannot be read: {e.strerror}.') from e


def _notes(folder: pathlib.Path) -> dict[str, str]:
  """checksums.json of a folder; {} if there is none."""
  path = folder / CHECKSUMS
  if not path.exists():
    return {}
  return decode(_bytes(path), dict[str, str], path)


def decode(content: bytes | str, kind: Any, where: object) -> Any:
  """JSON as a type.

  Args:
    content: The JSON text.
    kind: The type that it must have, such as `dict[str, int]` or a `TypedDict`:
      anything that msgspec knows.
    where: What the error calls it, such as the path.

  Raises:
    errors.UserError: It is not JSON, or not of this type; one line that says
      where in the text.

  >>> decode('{"stem": 3}', dict[str, int], 'counts.json')
  {'stem': 3}
  >>> decode('{"stem": "3"}', dict[str, int], 'x.json')
  Traceback (most recent call last):
  ...
  pfs_jax.errors.UserError: x.json: Expected `int`, got `str` - at `$[...]`.
  """
  try:
    return msgspec.json.decode(content, type=kind)
  except RecursionError as e:
    raise errors.UserError(f'{where}: it is nested too deeply.') from e
  except UnicodeDecodeError as e:
    raise errors.UserError(f'{where}: it is not UTF-8.') from e
  except msgspec.MsgspecError as e:
    raise errors.UserError(f'{where}: {e}.') from e


def read_json(path: pathlib.Path, kind: Any = Any) -> Any:
  """A JSON file as a type; see `decode` and `read_bytes`."""
  return decode(read_bytes(path), kind, path)


def read_text(path: pathlib.Path) -> str:
  """A text file in UTF-8; see `read_bytes`."""
  try:
    return read_bytes(path).decode()
  except UnicodeDecodeError as e:
    raise errors.UserError(f'{path}: it is not UTF-8.') from e


def read_arrays(
  path: pathlib.Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
  """A .npz in the order in which it was written; pickles are refused.

  Args:
    path: The file.
    shapes: If given: the names that it must hold, in this order, with the
      shape of each; all must be floats and finite.

  Raises:
    errors.UserError: See `read_bytes`; or it holds something else.
  """
  content = read_bytes(path, 2**40)
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as f:
      arrays = {name: f[name] for name in f.files}
  except Exception as e:  # numpy and zipfile raise many kinds.
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise errors.UserError(f'{path} cannot be read: {reason}') from e
  if shapes is not None:
    _check_arrays(path, arrays, shapes)
  return arrays


def _check_arrays(path, arrays, shapes) -> None:
  if list(arrays) != list(shapes):
    differ = set(arrays) ^ set(shapes)
    raise errors.UserError(
      f'{path} must hold {", ".join(shapes)} in this order; '
      + (f'{", ".join(sorted(differ))} differ.' if differ else 'it is another.')
    )
  for name, shape in shapes.items():
    found = arrays[name]
    good = np.issubdtype(found.dtype, np.floating)
    if not good or found.shape != tuple(shape) or not np.isfinite(found).all():
      raise errors.UserError(
        f'{path}: {name} must be finite floats of shape {list(shape)}; got '
        f'{found.dtype} {list(found.shape)}'
        f'{" that are not all finite" if good else ""}.'
      )


def checksum(arrays: Any) -> str:
  """SHA-256 of the bytes of a tree of arrays, in the tree's order."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()


def sha256(content: bytes) -> str:
  """SHA-256 in hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()


# Locks.


@contextlib.contextmanager
def locked(
  folder: pathlib.Path, wait: Callable[[], object] | None = None
) -> Iterator[bool]:
  """Holds a folder inside the context, by a lock on the file .lock in it.

  The system frees it when the process ends, however it ends. A folder in which
  nothing can be written, and a file system without locks, count as held: there
  is nothing to protect, or no way to. Of several processes of one run the first
  holds it for all.

  Args:
    folder: Is made if need be.
    wait: None: do not wait for another process that holds the folder. Else what
      to call before waiting.

  Yields:
    Whether this process holds the folder; False only without `wait`.

  Raises:
    errors.UserError: The folder cannot be made.
  """
  if not is_first_process():
    yield True
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / '.lock').open('a+')
  except OSError as e:
    if e.errno not in _READ_ONLY or not folder.is_dir():
      raise errors.UserError(f'{folder} cannot be used: {e.strerror}.') from e
    yield True
    return
  with file:
    yield _flock(file, wait)


def _flock(file, wait: Callable[[], object] | None) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    if wait is None:
      return False
    wait()
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError:
    pass
  return True
