"""Writes files whole or not at all, reads them as a type, and locks folders.

Every write goes to a temporary name in the same folder, which is then renamed.
With several processes the first one writes. A file that cannot be read or
written raises a `UserError` of one line.

A finished file can be *sealed*: its SHA-256 is noted in checksums.json beside
it, and a reader refuses the file if it differs. A writer removes the note
before it changes the file, so a crash never leaves a wrong note.
"""

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
_LARGEST = 2**28  # Most bytes of a file of text or JSON.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_first_process() -> bool:
  """Whether this process is the one that writes files."""
  return jax.process_index() == 0


def write_bytes(
  path: pathlib.Path, content: bytes, *, sealed: bool = False
) -> None:
  """Writes a file, unless it already holds the content.

  So a finished run can be used without the permission to write. Makes its
  folder if need be. `sealed`: whether its checksum is noted.

  Raises:
    errors.UserError: It cannot be written; an earlier file is kept.
  """
  if not is_first_process():
    return
  notes = _noted_checksums(path.parent)
  others = {k: v for k, v in notes.items() if k != path.name}
  wanted = {**others, path.name: sha256(content)} if sealed else others
  if notes == wanted and _holds(path, content):
    return
  if notes != others:
    _replace(path.parent / CHECKSUMS, _json(others))
  _replace(path, content)
  if sealed:
    _replace(path.parent / CHECKSUMS, _json(wanted))


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
  """Raises the UserError of a write of `size` bytes that failed.

  A size of 0 means that it is not known.
  """
  reason = e.strerror or str(e)
  if e.errno in _NO_SPACE:
    folder = next(p for p in path.parents if p.exists())
    free = shutil.disk_usage(folder).free
    need = f', and {size:,} bytes of data take more' if size else ''
    reason = f'{reason}: {free:,} bytes are free{need}'
  raise errors.UserError(f'{path} cannot be written: {reason}.') from e


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
  """The path, with the home folder for a leading ~ if that folder is known."""
  return pathlib.Path(os.path.expanduser(path))


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
    notes = _noted_checksums(path.parent)
    notes[path.name] = sha256(path.read_bytes())
    _replace(path.parent / CHECKSUMS, _json(notes))


def read_bytes(path: pathlib.Path, largest: int = _LARGEST) -> bytes:
  """The content of a file of at most `largest` bytes.

  Raises:
    errors.UserError: It cannot be read, or has changed since it was sealed.
  """
  content = read_regular_file(path, largest)
  noted = _noted_checksums(path.parent).get(path.name)
  if noted not in (None, sha256(content)):
    raise errors.UserError(
      f'{path} is damaged or was changed: its SHA-256 is not the one in '
      f'{CHECKSUMS} beside it.\nDelete the file and run its command again; if '
      f'you changed it on purpose, delete its entry in {CHECKSUMS}.'
    )
  return content


def read_regular_file(path: pathlib.Path, largest: int = _LARGEST) -> bytes:
  """The bytes of a regular file, whether or not its checksum is right."""
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      raise errors.UserError(f'{path} cannot be read: it is not a file.')
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


def _noted_checksums(folder: pathlib.Path) -> dict[str, str]:
  """checksums.json of a folder; {} if there is none."""
  path = folder / CHECKSUMS
  if not path.exists():
    return {}
  return decode(read_regular_file(path), dict[str, str], path)


def decode(content: bytes | str, kind: Any, where: object) -> Any:
  """Decodes JSON as a type that msgspec knows, such as `dict[str, int]`.

  Raises:
    errors.UserError: It is not JSON of this type. The message begins with
      `where`, such as the path, and is one line.

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
  """Reads a JSON file as a type; see `decode` and `read_bytes`."""
  return decode(read_bytes(path), kind, path)


def read_text(path: pathlib.Path) -> str:
  """Reads a text file in UTF-8; see `read_bytes`."""
  try:
    return read_bytes(path).decode()
  except UnicodeDecodeError as e:
    raise errors.UserError(f'{path}: it is not UTF-8.') from e


def read_arrays(
  path: pathlib.Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
  """The arrays of a .npz in the order in which they were written.

  Pickles in it are refused. If `shapes` is given, it must hold these names in
  this order, with finite floats of these shapes.

  Raises:
    errors.UserError: It cannot be read, or holds something else.
  """
  content = read_bytes(path, 2**40)
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as f:
      arrays = {name: f[name] for name in f.files}
  except Exception as e:  # numpy and zipfile raise many types of errors.
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise errors.UserError(f'{path} cannot be read: {reason}') from e
  if shapes is None:
    return arrays
  if list(arrays) != list(shapes):
    raise errors.UserError(
      f'{path} must hold {", ".join(shapes)} in this order; got '
      f'{", ".join(arrays)}.'
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
  return arrays


def checksum(arrays: Any) -> str:
  """SHA-256 of the bytes of a tree of arrays, in the tree's order."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()


def sha256(content: bytes) -> str:
  """SHA-256 in hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def locked(
  folder: pathlib.Path, wait: Callable[[], object] | None = None
) -> Iterator[bool]:
  """Locks a folder, by the file .lock in it, during the context.

  The lock ends with the process, however it ends. A folder counts as locked by
  this process if it may not write or make the folder, or if the file system has
  no locks. If a run has several processes, the first one holds it for all.

  Makes the folder if need be. Calls `wait` before it waits for another process
  that holds the folder; without `wait`, it does not wait. Yields whether this
  process holds the lock.

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
    if e.errno not in _READ_ONLY:
      raise errors.UserError(f'{folder} cannot be used: {e.strerror}.') from e
    yield True
    return
  with file:
    held = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      held = wait is not None
      if wait is not None:
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      pass
    yield held
