"""Checkpoints of one stage, by Orbax.

Orbax writes a checkpoint completely or not at all, keeps the newest two and
lets several processes agree. The files in a checkpoint have our own format: the
arrays of the state, and a checksum.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from pfs_jax import errors, storage

_STATE, _CHECK = 'state.npz', 'check.json'


class _Check(TypedDict):
  """check.json, whose checksum covers the arrays, the step and the notes.

  So it detects a changed byte, and also a renamed checkpoint.
  """

  step: int
  notes: Any
  sha256: str


class _Handler(ocp.CheckpointHandler):
  """Writes a state as one .npz, in which its leaves are numbered.

  Orbax's own handler writes dozens of files, and its threads print hundreds of
  lines when the disk is full.
  """

  def save(self, directory: Any, args: '_Args') -> None:
    """Writes the files, on the first process."""
    leaves = map(np.asarray, jax.tree.leaves(jax.device_get(args.state)))
    arrays = {str(i): leaf for i, leaf in enumerate(leaves)}
    storage.write_arrays(pathlib.Path(directory) / _STATE, arrays)
    storage.write_json(pathlib.Path(directory) / _CHECK, args.check)

  def restore(self, directory: Any, args: '_Args') -> tuple[Any, Any]:
    """(state, check); `args.state` has the shapes and shardings."""
    leaves, tree = jax.tree.flatten(args.state)
    arrays = storage.read_arrays(pathlib.Path(directory) / _STATE)
    check = storage.read_json(pathlib.Path(directory) / _CHECK, _Check)
    found = [
      _on_devices_of(leaf, array)
      for leaf, array in zip(leaves, arrays.values(), strict=True)
    ]
    return jax.tree.unflatten(tree, found), check


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Args(ocp.args.CheckpointArgs):
  """A state to write and its check, or a state like the one to read."""

  state: Any
  check: _Check | None = None


def _on_devices_of(leaf: Any, array: np.ndarray) -> jax.Array:
  """Puts an array on the devices of a leaf of the same shape and type."""
  if array.dtype.kind == 'V' and array.dtype.itemsize == leaf.dtype.itemsize:
    array = array.view(leaf.dtype)  # NumPy's files do not name bfloat16.
  if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
    raise ValueError('another shape or type')
  return jax.make_array_from_callback(
    array.shape, leaf.sharding, lambda index: array[index]
  )


class Checkpoints(contextlib.AbstractContextManager):
  """The newest two checkpoints of one stage, in checkpoints/ of its folder."""

  def __init__(self, folder: pathlib.Path, *, read_only: bool = False):
    self._folder = folder.absolute() / 'checkpoints'
    try:
      str(self._folder).encode()
    except UnicodeEncodeError as e:  # Orbax could write no checkpoint there.
      raise errors.UserError(f'{folder} must be a path in UTF-8.') from e
    with _quiet():
      options = ocp.CheckpointManagerOptions(
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        preservation_policy=checkpoint_managers.LatestN(2),
        enable_async_checkpointing=False,  # `save` raises its own errors.
      )
      self._manager = ocp.CheckpointManager(
        self._folder, options=options, item_handlers=_Handler()
      )
    self._skipped: list[int] = []

  def __exit__(self, *_: object) -> None:
    with _quiet():
      self._manager.close()

  def save(self, step: int, state: Any, notes: Any = None) -> None:
    """Saves a tree of arrays and JSON notes, unless the step is saved already.

    Raises:
      errors.UserError: The checkpoint cannot be written; no part of it remains.
    """
    digest = _checksum(step, state, notes)
    check: _Check = {'step': step, 'notes': notes, 'sha256': digest}
    try:
      with _quiet():
        while self._skipped:  # Orbax would refuse to write over them.
          self._manager.delete(self._skipped.pop())
        if self._manager.latest_step() != step:
          self._manager.save(step, args=_Args(state, check), force=True)
    except Exception as e:
      if storage.is_first_process():
        for left in self._folder.glob('*.orbax-checkpoint-tmp'):
          shutil.rmtree(left, ignore_errors=True)
      if isinstance(e, OSError):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        storage.refuse_write(self._folder / str(step), e, size)
      raise

  def restore(self, target: Any) -> tuple[int, Any, Any] | None:
    """(step, state, notes) of the newest good checkpoint; None if none exists.

    A checkpoint that cannot be read or does not match its checksum is skipped,
    and the next `save` deletes it.

    Args:
      target: A state with the shapes and shardings wanted.

    Raises:
      errors.UserError: There are checkpoints, but none of them is good.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    wrong: list[str] = []
    for candidate in steps:
      found = self._read(candidate, target)
      if not isinstance(found, str):
        for line in wrong:
          logging.warning('%s; going on from step %d', line, candidate)
        self._skipped = [s for s in steps if s > candidate]
        return candidate, *found
      wrong.append(f'checkpoint {candidate} {found}')
    if not steps:
      return None
    raise errors.UserError(
      f'no checkpoint under {self._folder} can be read (steps '
      f'{", ".join(map(str, steps))}); delete that folder to start over.'
    )

  def restore_step(self, target: Any, step: int) -> Any:
    """The state of one step; UserError if it is missing or damaged."""
    found: Any = 'is missing'
    if step in self._manager.all_steps():
      found = self._read(step, target)
    if isinstance(found, str):
      raise errors.UserError(f'{self._folder}: checkpoint {step} {found}.')
    return found[0]

  def _read(self, step: int, target: Any) -> tuple[Any, Any] | str:
    """(state, notes), or what is wrong with the checkpoint."""
    try:
      with _quiet():
        state, check = self._manager.restore(step, args=_Args(target))
      if check['sha256'] == _checksum(step, state, check['notes']):
        return state, check['notes']
    except Exception as e:  # Damaged files raise many types of errors.
      cause = e.__cause__ or e
      if isinstance(cause, PermissionError):  # It may well be good.
        raise cause from None
      return f'cannot be read ({type(e).__name__})'
    return 'does not match its checksum'

  def preempting_signal(self, step: int) -> int | None:
    """SIGTERM if one of several processes was told to stop, else None."""
    return signal.SIGTERM if self._manager.reached_preemption(step) else None


def _checksum(step: int, state: Any, notes: Any) -> str:
  text = json.dumps([step, notes, storage.checksum(state)])
  return storage.sha256(text.encode())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax from logging errors that it also raises."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)
