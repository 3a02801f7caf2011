"""Runs the cells of a study, each once, in as many processes as are started.

    workdir/  cells/<hash>/   a run folder, with cell.json when it is finished
              shared/         searches and wide trainings (`products`)
              compiled/       JAX's compilation cache
              <study>.json    the results, unless config.results_dir says where

The process that holds a cell's lock does the cell; others skip it and try again
later. An interrupted cell continues from its checkpoints. A cell whose hash is
already in the results, from any machine, is not done again.
"""

import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from pfs_jax import console, data, errors, runs, storage
from pfs_jax.data import own
from pfs_jax.studies import cells, plan, products, results, tables

_POLL_SECONDS = 1.0


def asked(mode: str, c: ml_collections.ConfigDict) -> bool:
  """Whether the mode is 'study'; UserError if the config is of another kind."""
  if ('study' in c) != (mode == 'study'):
    kind = 'a study' if 'study' in c else 'one run'
    wanted = 'study' if 'study' in c else 'run, search, ...'
    raise errors.UserError(
      f'--mode={mode} does not fit the config of {kind} (--mode={wanted}).'
    )
  return mode == 'study'


def run(study: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Does the cells that are not done yet and prints the tables.

  Raises:
    errors.UserError: If some cells failed; the others are done before.
  """
  planned = plan.cells(study)
  if not study.report_only:
    if jax.process_count() > 1:
      raise errors.UserError(
        '--mode=study takes no --coordinator: start the command several times; '
        'each process does other cells.'
      )
    runs.commit()  # Caches the commit of the imported code.
    # Compiled programs are kept on disk: each structure has its own.
    if jax.config.values['jax_compilation_cache_dir'] is None:
      folder = str((workdir / 'compiled').absolute())
      jax.config.update('jax_compilation_cache_dir', folder)
    _Work(study, workdir, planned).run()
  tables.show(study, workdir)


def _check_data(
  study: ml_collections.ConfigDict, workdir: pathlib.Path, needed: bool
) -> None:
  """Refuses files of the user's that are not those of the finished cells.

  If the data are not `needed`, they may be gone.
  """
  fields, path = study.base.data, workdir / 'data' / 'identity.json'
  try:
    if not data.is_own(fields) and data.configured(fields).in_memory:
      return
    data.open_set(study.base, workdir)  # It notes or checks the identity.
  except errors.UserError as e:
    if needed or isinstance(e, own.OtherData):
      raise
  if path.exists():
    noted = results.path(study, workdir).with_name(f'{study.study}-data.json')
    what = f'the data of {study.study}'
    own.check_identity(noted, what, storage.read_json(path))


class _Work:
  """The state of one process that works through a study."""

  def __init__(self, study, workdir: pathlib.Path, planned: list[plan.Cell]):
    self.study, self.workdir = study, workdir
    self.order = [cell.hash for cell in planned]
    self.file = results.path(study, workdir)
    self.known = results.known(study, workdir)
    self.pending = list(planned)
    self.failed: list[str] = []
    self.done = 0  # Cells done by this process.
    self.start = time.perf_counter()

  def run(self) -> None:
    for cell in list(self.pending):
      record = self.record(cell)
      if record is not None:
        self.finish(cell, record)
    total = len(self.order)
    console.say(
      f'{self.study.study}: {total - len(self.pending)} of {total} cells are '
      f'done; results in {self.file}'
    )
    _check_data(self.study, self.workdir, bool(self.pending))
    for folder in (self.workdir, self.file.parent) if self.pending else ():
      folder.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=folder).close()  # Fails now, not after a cell.
    while self.pending:
      # After each cell, start from the first again: its lock may be free now.
      if not any(self.attempt(cell) for cell in list(self.pending)):
        time.sleep(_POLL_SECONDS)  # Other processes do the rest.
    if self.failed:
      lines = (text.partition('\n')[0] for text in self.failed[:3])
      raise errors.UserError('\n'.join(lines))

  def record(self, cell: plan.Cell) -> Mapping[str, Any] | None:
    """The record of a finished cell, from its folder or a results file."""
    path = self.workdir / 'cells' / cell.hash / 'cell.json'
    if path.exists():
      return storage.read_json(path)
    return self.known.get(cell.hash)

  def finish(self, cell: plan.Cell, record: Mapping[str, Any]) -> None:
    """Puts a cell's record into the study's results."""
    self.pending.remove(cell)
    names = {'arm': cell.name, 'variation': dict(cell.variation)}
    record = {'study': '', **record, **names}
    record['study'] = self.study.study
    there = {r['config_hash']: r for r in results.read(self.file)}
    if there.get(cell.hash) != record:
      results.merge(self.file, record, self.order)

  def attempt(self, cell: plan.Cell) -> bool:
    """Does a cell unless another process does it; False if one does."""
    with storage.locked(self.workdir / 'cells' / cell.hash) as held:
      if not held:
        return False
      # Another process may have finished it, here or in another workdir.
      self.known = results.known(self.study, self.workdir)
      record = self.record(cell)
      try:
        if record is None:
          record = cells.run(cell, self.workdir)
          self.done += 1
      except products.Busy:
        return False
      except Exception as e:
        if not isinstance(e, errors.UserError | OSError):
          if not errors.out_of_memory(e):
            raise
          products.forget_programs()
        self.pending.remove(cell)
        self.failed.append(f'{cell.label}, seed {cell.seed}: {e}')
        console.say(f'failed: {self.failed[-1]}')
        return True
      self.finish(cell, record)
      self.say(cell, record)
      return True

  def say(self, cell: plan.Cell, record: Mapping[str, Any]) -> None:
    """Prints the result of a cell, the progress, and the time left."""
    left, total = len(self.pending), len(self.order)
    seconds = (time.perf_counter() - self.start) / max(self.done, 1)
    accuracy = record['test_accuracy']
    outcome = '' if accuracy is None else f'{accuracy:.2%} at '
    console.say(
      f'{self.study.study} {total - left}/{total}  {cell.label}, seed '
      f'{cell.seed}: {outcome}{record["macs_share"]:.1%} of the MACs  '
      f'{console.duration(seconds * left)} left'
    )
