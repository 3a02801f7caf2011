"""Locks that a process holds until it ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def attempt(folder: pathlib.Path) -> Iterator[bool]:
  """Whether this process got the folder; it holds it inside the context.

  The system frees the lock with the process, SIGKILL or not.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    yield True


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder itself, after waiting for it; leaves no file there."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)
