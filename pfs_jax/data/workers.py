"""Processes that decode ahead: `Loader` here, `serve` in the worker.

A worker is a fresh Python with NumPy and Pillow in it: 0.3 s to start, neither
JAX nor the main program. It gets `images.Batches` once, then answers requests
on its pipes, pixels straight into the batch that is being filled. All workers
share every batch, so the result does not depend on their number.

A worker is in a session of its own, where Ctrl-C does not reach it, and ends
when its standard input does: also when the main process was killed. Why not
Grain's workers: measured in docs/imagenet.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from pfs_jax import errors
from pfs_jax.data import images

_PIECE = 16  # Images asked of a worker at a time.
_AHEAD = 3  # Batches in the making, or made and not yet asked for.


class Loader:
  """Batches in order, decoded ahead; a context manager.

  Args:
    batches: What to decode.
    start: The first step.
    processes: Worker processes; 0: one thread of this process.

  Attributes:
    seconds_waited: How long `next` has waited.
  """

  def __init__(self, batches: images.Batches, start: int, processes: int):
    self.seconds_waited = 0.0
    self._batches = batches
    self._next = start  # The step that `next` gives.
    self._task = (start, 0)  # The next piece to hand out: step, first row.
    self._making: dict[int, _Batch] = {}
    self._failure: Exception | None = None
    self._closed = False
    self._changed = threading.Condition()
    content = _description(batches) if processes else ({}, [])
    pieces = -(-len(batches.rows) // _PIECE) * (len(batches) - start)
    processes = min(processes, pieces)
    self._workers = [_Worker(content) for _ in range(processes)]
    self._threads = [
      threading.Thread(target=self._work, args=(worker,), daemon=True)
      for worker in self._workers or [_Here(batches)]
    ]
    for thread in self._threads:
      thread.start()

  def __enter__(self) -> Loader:
    """Itself."""
    return self

  def __exit__(self, *_) -> None:
    """Ends the workers."""
    self.close()

  def close(self) -> None:
    """Ends the workers at once; again is harmless."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    for worker in self._workers:
      worker.end()
    for thread in self._threads:
      thread.join()
    for worker in self._workers:
      worker.release()

  def next(self) -> dict[str, Any]:
    """The next batch.

    Returns:
      pixels: uint8 [B, size, size, 3], B this process's rows.
      labels: int32 [B].
      weights: float32 [B], 1, or 0 where there is no image.
      corrupt: Places in `batches.images` that could not be decoded.

    Raises:
      UserError: A worker was killed.
    """
    begin = time.perf_counter()
    with self._changed:
      self._changed.wait_for(
        lambda: self._failure or self._is_made(self._next) or self._closed
      )
      assert not self._closed, 'the loader is closed'
      if self._failure:
        raise self._failure
      batch = self._making.pop(self._next)
      self._next += 1
      self._changed.notify_all()
    self.seconds_waited += time.perf_counter() - begin
    return batch.arrays

  def _is_made(self, step: int) -> bool:
    return step in self._making and not self._making[step].left

  def _take(self) -> tuple[int, slice] | None:
    """Waits for room and takes the next piece; None at the end."""
    n = len(self._batches.rows)
    with self._changed:
      self._changed.wait_for(
        lambda: self._closed or self._task[0] < self._next + _AHEAD
      )
      step, row = self._task
      if self._closed or step >= len(self._batches):
        return None
      if step not in self._making:
        self._making[step] = _Batch(n, self._batches.size)
      stop = min(row + _PIECE, n)
      self._task = (step, stop) if stop < n else (step + 1, 0)
      return step, slice(row, stop)

  def _work(self, worker: _Worker | _Here) -> None:
    """A thread: has pieces made by one worker."""
    try:
      while (task := self._take()) is not None:
        step, rows = task
        batch = self._making[step]
        worker.make(step, rows, batch.arrays)
        with self._changed:
          batch.left -= rows.stop - rows.start
          self._changed.notify_all()
    except Exception as e:
      with self._changed:
        if not self._closed:
          self._failure = e
          self._changed.notify_all()


class _Batch:
  """A batch in the making; `left` counts the rows that are not there."""

  def __init__(self, n: int, size: int):
    self.left = n
    self.arrays = {
      'pixels': np.empty((n, size, size, 3), np.uint8),
      'labels': np.empty(n, np.int32),
      'weights': np.empty(n, np.float32),
      'corrupt': [],
    }


# Messages: a line of JSON, then the bytes of the arrays that it announces.


def _send(file, message: dict, arrays=()) -> None:
  arrays = [np.ascontiguousarray(a) for a in arrays]
  shapes = [[a.dtype.str, a.shape] for a in arrays]
  line = json.dumps({'message': message, 'arrays': shapes})
  file.write(line.encode() + b'\n')
  for array in arrays:
    file.write(array.tobytes())


def _receive(file) -> tuple[dict, list[np.ndarray]]:
  line = file.readline()
  if not line.endswith(b'\n'):
    raise EOFError
  header, arrays = json.loads(line), []
  for kind, shape in header['arrays']:
    dtype = np.dtype(kind)
    size = dtype.itemsize * int(np.prod(shape))
    content = file.read(size)
    if len(content) < size:
      raise EOFError
    arrays.append(np.frombuffer(content, dtype).reshape(shape))
  return header['message'], arrays


def _description(batches: images.Batches) -> tuple[dict, list[np.ndarray]]:
  """What `_rebuilt` makes the same batches of, in a worker."""
  fields = {
    f.name: getattr(batches, f.name)
    for f in dataclasses.fields(batches)
    if f.name not in ('images', 'chosen', 'rows')
  }
  where = {f.name: None for f in dataclasses.fields(batches.images)}
  where = {name: getattr(batches.images, name) for name in where}
  arrays = [np.asarray(batches.chosen), np.asarray(batches.rows)]
  if isinstance(batches.images, images.Folder):
    arrays += [where.pop('labels'), where.pop('names')]
  kind = type(batches.images).__name__
  return {'fields': fields, 'images': where, 'kind': kind}, arrays


def _rebuilt(message: dict, arrays: list[np.ndarray]) -> images.Batches:
  chosen, rows, *listed = arrays
  where = message['images']
  if message['kind'] == 'Folder':
    where['classes'] = tuple(where['classes'])
    found = images.Folder(**where, labels=listed[0], names=listed[1])
  else:
    found = images.Records(**where)
  fields = message['fields']
  if fields['key'] is not None:
    fields['key'] = tuple(fields['key'])
  return images.Batches(images=found, chosen=chosen, rows=rows, **fields)


class _Here:
  """Decodes in this process."""

  def __init__(self, batches: images.Batches):
    self._batches = batches

  def make(self, step: int, rows: slice, arrays: dict[str, Any]) -> None:
    """Fills rows of a batch."""
    pixels, *rest = self._batches.piece(step, rows)
    arrays['pixels'][rows] = pixels
    _fill(arrays, rows, rest)


def _fill(arrays: dict[str, Any], rows: slice, rest) -> None:
  arrays['labels'][rows], arrays['weights'][rows], corrupt = rest
  arrays['corrupt'] += corrupt


class _Worker:
  """A worker process, seen from here."""

  def __init__(self, content: tuple[dict, list[np.ndarray]]):
    root = str(pathlib.Path(__file__).parents[2])
    code = 'from pfs_jax.data import workers; workers.serve()'
    self._process = subprocess.Popen(
      [sys.executable, '-P', '-c', code],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      start_new_session=True,
      env={
        **os.environ,
        'PYTHONPATH': os.pathsep.join([root, *filter(None, sys.path)]),
        'OPENBLAS_NUM_THREADS': '1',
      },
    )
    self._content = content

  def make(self, step: int, rows: slice, arrays: dict[str, Any]) -> None:
    """Has rows of a batch filled.

    Raises:
      UserError: The process has ended.
    """
    try:
      if self._content is not None:
        _send(self._process.stdin, *self._content)
        self._content = None
      _send(
        self._process.stdin, {'step': step, 'rows': [rows.start, rows.stop]}
      )
      self._process.stdin.flush()
      answer, (labels, weights) = _receive(self._process.stdout)
      view = memoryview(arrays['pixels'][rows]).cast('B')
      if self._process.stdout.readinto(view) < len(view):
        raise EOFError
    except (OSError, EOFError, ValueError) as e:
      code = self._process.wait()
      raise errors.UserError(
        f'a process that decodes images ended with code {code}; if it was '
        'killed for want of memory, make config.data.workers smaller.\n'
        'The same command continues.'
      ) from e
    _fill(arrays, rows, (labels, weights, answer['corrupt']))

  def end(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()

  def release(self) -> None:
    """Closes the pipes, when no thread is at them."""
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):  # What it did not take.
        pipe.close()


def serve() -> None:
  """What a worker does: `Batches` from stdin, then requests, until its end."""
  # A job's end may be told to every process; the main one still wants to save.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  requests, answers = sys.stdin.buffer, sys.stdout.buffer
  try:
    batches = _rebuilt(*_receive(requests))
    while True:
      request, _ = _receive(requests)
      rows = slice(*request['rows'])
      pixels, labels, weights, corrupt = batches.piece(request['step'], rows)
      answer = {'corrupt': [int(i) for i in corrupt]}
      _send(answers, answer, [labels, weights])
      answers.write(pixels.data)
      answers.flush()
  except (EOFError, BrokenPipeError):
    os._exit(0)  # The main process is gone, or wants no more.
