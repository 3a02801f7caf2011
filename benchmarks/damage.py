"""Damage to files, and what a mode of main.py answers: for tests and faults.py.

The rule that `check` holds: whatever happens to one file of a finished run, a
mode ends with the same numbers as before, or with an error of one to three
lines; never with other numbers, never with a traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import random
import re
import shutil
from collections.abc import Callable

import ml_collections
import safetensors.numpy

from pfs_jax import errors, report, stages, storage

MODES = ('prune', 'run', 'eval', 'export', 'report', 'train', 'info')


# Damage. Each takes a file's content and returns another one, or None.


def truncate(content: bytes, rng: random.Random) -> bytes:
  """Cuts the end off, possibly everything."""
  return content[: rng.randrange(len(content))] if content else b'x'


def flip(content: bytes, rng: random.Random) -> bytes:
  """Flips one bit."""
  if not content:
    return b'\0'
  changed = bytearray(content)
  changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def zeros(content: bytes, rng: random.Random) -> bytes:
  """Overwrites a stretch with zeros, as a lost disk block does."""
  start = rng.randrange(len(content) + 1)
  length = rng.randrange(1, 64)
  return content[:start] + b'\0' * length + content[start + length :]


def _places(value, found: list) -> list:
  """[(container, key)] of everything in a JSON value."""
  items = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  for key, inner in list(items):
    found.append((value, key))
    _places(inner, found)
  return found


def _json(change: Callable) -> Callable:
  """Damage to one place of a JSON file, or to one line of JSON lines."""

  def damage(content: bytes, rng: random.Random) -> bytes | None:
    try:
      lines = content.decode().splitlines()
      whole = [json.loads(content)]
    except ValueError:
      try:
        whole = [json.loads(line) for line in lines]
      except (ValueError, UnboundLocalError):
        return None
    root = [rng.choice(whole)] if whole else []
    places = _places(root, [])
    if not places:
      return None
    place = rng.randrange(len(whole))
    root = [whole[place]]
    container, key = rng.choice(_places(root, []))
    change(container, key, rng)
    whole[place] = root[0] if root else None
    return '\n'.join(json.dumps(v) for v in whole).encode() + b'\n'

  damage.__doc__ = change.__doc__
  return damage


def _drop(container, key, rng) -> None:
  """Drops a field or an entry."""
  del container[key]


def _retype(container, key, rng) -> None:
  """Gives a value another type."""
  value = container[key]
  other = ['text', 17, -1, 0.5, None, [], {}, True, 10**30, 1e308, 'é\n<b>']
  container[key] = rng.choice([v for v in other if type(v) is not type(value)])


def _nest(container, key, rng) -> None:
  """Wraps a value into a list or an object, up to 2,000 deep."""
  value = container[key]
  for _ in range(rng.choice([1, 2, 500])):
    value = rng.choice([lambda v: [v], lambda v: {'x': v}])(value)
  container[key] = value


def _change(container, key, rng) -> None:
  """Changes a number a little."""
  value = container[key]
  if isinstance(value, bool) or not isinstance(value, int | float):
    container[key] = f'{value}0'
  else:
    container[key] = value + rng.choice([1, -1, 0.5])


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
  'truncated': truncate,
  'a bit flipped': flip,
  'overwritten with zeros': zeros,
  'a field dropped': _json(_drop),
  'a value of another type': _json(_retype),
  'a value nested': _json(_nest),
  'a number changed': _json(_change),
}


def files(workdir: pathlib.Path) -> list[pathlib.Path]:
  """All files of a run, relative to its folder."""
  found = (p.relative_to(workdir) for p in workdir.rglob('*') if p.is_file())
  return sorted(found)


def damage(
  workdir: pathlib.Path, path: pathlib.Path, kind: str, rng: random.Random
) -> str | None:
  """Damages one file; what was done in words, None if this cannot be done."""
  file = workdir / path
  if kind == 'swapped':
    others = [
      p for p in files(workdir) if p.suffix == path.suffix and p != path
    ]
    if not others:
      return None
    other = workdir / rng.choice(others)
    content, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(content)
    return f'{path} swapped with {other.relative_to(workdir)}'
  if kind == 'deleted':
    file.unlink()
    return f'{path} deleted'
  if kind == 'a folder in its place':
    file.unlink()
    file.mkdir()
    return f'{path} replaced by a folder'
  changed = DAMAGES[kind](file.read_bytes(), rng)
  if changed is None or changed == file.read_bytes():
    return None
  file.write_bytes(changed)
  return f'{path}: {kind}'


KINDS = (*DAMAGES, 'swapped', 'deleted', 'a folder in its place')


# Modes.


def answer(
  mode: str, c: ml_collections.ConfigDict, workdir: pathlib.Path
) -> str | errors.UserError:
  """The numbers that a mode prints or writes, as text; or its error."""
  shown = io.StringIO()
  page, out = workdir / 'report.html', workdir / 'out'
  try:
    with contextlib.redirect_stdout(shown):
      if mode == 'report':
        report.write(c, workdir)
      else:
        job = stages.Job(c, workdir)
        stages.execute(mode, job, out if mode == 'export' else None)
  except errors.UserError as e:
    return e
  text = shown.getvalue().replace(str(workdir), 'WORKDIR')
  if mode == 'report':
    text = page.read_text().replace(str(workdir), 'WORKDIR')
  if mode == 'export':
    # Not the bytes: the order of the metadata differs each time.
    arrays = safetensors.numpy.load_file(out / 'model.safetensors')
    text = storage.checksum(arrays)
  return re.sub(r'(written|Written|on) \d{4}-\d\d-\d\d[^<]*', '', text)


def check(
  mode: str,
  finished: pathlib.Path,
  scratch: pathlib.Path,
  c: ml_collections.ConfigDict,
  expected: str,
  path: pathlib.Path,
  kind: str,
  seed: str,
) -> str:
  """Damages a copy of a finished run and runs one mode on it.

  Returns:
    'same', 'refused' or 'not done' (this damage does not fit this file).

  Raises:
    AssertionError: Other numbers, or an error of more than three lines.
  """
  shutil.rmtree(scratch, ignore_errors=True)
  shutil.copytree(finished, scratch)
  done = damage(scratch, path, kind, random.Random(seed))
  if done is None:
    return 'not done'
  found = answer(mode, c, scratch)
  if isinstance(found, errors.UserError):
    lines = str(found).splitlines()
    assert 1 <= len(lines) <= 3, f'{mode}, {done}: {found}'
    return 'refused'
  if kind == 'deleted' and mode == 'report':
    return 'same'  # A report shows how far a run has come.
  assert found == expected, f'{mode}, {done} ({seed}): other numbers'
  return 'same'
