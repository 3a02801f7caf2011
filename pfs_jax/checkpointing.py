"""Checkpoints of one stage: all Orbax is here."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from pfs_jax import errors, storage


class Checkpoints:
  """Orbax checkpoints of one stage, the newest two.

  Beside the arrays lies a checksum of them, of the step and of the notes, since
  Orbax restores a flipped byte, or a checkpoint that was renamed, silently.

  Args:
    folder: The stage's folder; they are in checkpoints/ under it.
    read_only: Whether nothing is to be written there.
  """

  def __init__(self, folder: pathlib.Path, *, read_only: bool = False):
    self._folder = folder.absolute() / 'checkpoints'
    options = ocp.CheckpointManagerOptions(
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      preservation_policy=checkpoint_managers.LatestN(2),
      enable_async_checkpointing=False,  # An error shows where it happens.
    )
    try:
      with _quiet():
        self._manager = ocp.CheckpointManager(self._folder, options=options)
    except OSError as e:
      storage.refuse_write(self._folder, e, 0)
    self._passed_over: list[int] = []

  def __enter__(self) -> Checkpoints:
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Frees what Orbax holds."""
    with _quiet():
      self._manager.close()

  @property
  def latest(self) -> int | None:
    """The newest step there is, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, notes: Any = None) -> None:
    """Saves a tree of arrays, and JSON beside it, unless the step is there.

    Raises:
      errors.UserError: It cannot be written; nothing of it is left behind.
    """
    check = {'step': step, 'notes': notes, 'sha256': _sum(step, state, notes)}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), check=ocp.args.JsonSave(check)
    )
    try:
      with _quiet():
        while self._passed_over:  # Orbax would refuse to write over them.
          self._manager.delete(self._passed_over.pop())
        if self._manager.latest_step() != step:
          self._manager.save(step, args=args, force=True)
    except Exception as e:  # A full disk raises many kinds.
      self._refuse(step, state, e)

  def _refuse(self, step: int, state: Any, e: Exception) -> None:
    if storage.is_first_process():
      for left in self._folder.glob('*.orbax-checkpoint-tmp'):
        shutil.rmtree(left, ignore_errors=True)
    text = str(e)
    no_space = 'RESOURCE_EXHAUSTED' in text or 'No space left' in text
    if not isinstance(e, OSError):
      if not no_space:
        raise e
      e = OSError(storage.errno.ENOSPC, 'No space left on device')
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    storage.refuse_write(self._folder / str(step), e, size)

  def restore(self, target: Any) -> tuple[int, Any, Any] | None:
    """(step, state, notes) of the newest good checkpoint.

    One that cannot be read, or does not match its checksum, is passed over for
    the one before it; the next `save` deletes it.

    Args:
      target: A state with the shapes and shardings wanted.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      errors.UserError: There are checkpoints and none is good.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    wrong: list[str] = []
    for candidate in steps:
      found = self._read(candidate, target)
      if not isinstance(found, str):
        for line in wrong:
          logging.warning('%s; going on from step %d', line, candidate)
        self._passed_over = [s for s in steps if s > candidate]
        return candidate, *found
      wrong.append(f'checkpoint {candidate} {found}')
    if not steps:
      return None
    raise errors.UserError(
      f'no checkpoint under {self._folder} can be read (steps '
      f'{", ".join(map(str, steps))}); delete that folder to start over.'
    )

  def restore_step(self, target: Any, step: int) -> Any:
    """The state of one step; raises UserError unless it is there and good."""
    found: Any = 'is missing'
    if step in self._manager.all_steps():
      found = self._read(step, target)
    if isinstance(found, str):
      raise errors.UserError(f'{self._folder}: checkpoint {step} {found}.')
    return found[0]

  def _read(self, step: int, target: Any) -> tuple[Any, Any] | str:
    """(state, notes), or what is wrong with the checkpoint."""
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(target), check=ocp.args.JsonRestore()
    )
    try:
      with _quiet():
        found = self._manager.restore(step, args=args)
      check = found.check
      expected = _sum(step, found.state, check['notes'])
      if check['sha256'] == expected:
        return found.state, check['notes']
    except Exception as e:  # Damaged files raise many kinds.
      return f'cannot be read ({type(e).__name__})'
    return 'does not match its checksum'

  def reached_preemption(self, step: int) -> bool:
    """Whether some process of several was told to stop."""
    return self._manager.reached_preemption(step)


def _sum(step: int, state: Any, notes: Any) -> str:
  text = json.dumps([step, notes, storage.checksum(state)])
  return storage.sha256(text.encode())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax from logging tracebacks of errors that are raised too."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)
