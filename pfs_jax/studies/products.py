"""What several cells of a study share: searches and trained wide networks.

Each lies in a folder named by the hash of what it depends on, is made once, and
goes on from its checkpoint if it was cut off:

    shared/search-<hash>/   a run folder; search/gates.npz
    shared/trained-<hash>/  metrics.jsonl checkpoints/ weights/<epoch>.npz
    shared/probe-<hash>/    probe/probe.json
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pfs_jax import config, runs, stages, storage, train
from pfs_jax.studies import plan


class Busy(Exception):
  """Another process is making what is needed; come back later."""


def folder(
  root: pathlib.Path, kind: str, fields: Mapping[str, Any]
) -> pathlib.Path:
  """The folder of a product that depends on these fields."""
  digest = config.digest({**fields, 'revision': plan.REVISION})
  return root / 'shared' / f'{kind}-{digest}'


def make(done: pathlib.Path, where: pathlib.Path, make_: Callable) -> None:
  """Makes the file `done` by `make_()`, unless it is there.

  Raises:
    Busy: If another process holds the folder `where`.
  """
  if done.exists():
    return
  with storage.locked(where) as held:
    if not held:
      raise Busy(where.name)
    if not done.exists():  # Another process may have finished it.
      make_()


def forget_programs() -> None:
  """Frees compiled programs: hardly a training has the shapes of another.

  What is needed again comes from the compilation cache on disk.
  """
  train.compiled_call.cache_clear()
  jax.clear_caches()


# Weights.


@functools.cache
def scale_penalty(penalty: float) -> optax.GradientTransformation:
  """Adds penalty * sign(scale) to the gradients of BatchNorm's scales.

  The subgradient of penalty * sum |scale|: network slimming (Liu et al. 2017).
  """

  def add(path, gradient, parameter):
    if path[-1].key != 'scale':
      return gradient
    return gradient + penalty * jnp.sign(parameter)

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(
      add, updates, params
    )
  )


def first_weights(job: stages.Job) -> dict[str, Any]:
  """The random variables that a search starts from, gates left out."""
  return {k: v for k, v in job.first_weights.items() if k != 'gates'}


def _flatten(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  flat = flax.traverse_util.flatten_dict(jax.device_get(dict(variables)))
  return {'/'.join(path): value for path, value in flat.items()}


def _read_weights(path: pathlib.Path) -> dict[str, Any]:
  flat = storage.read_arrays(path)
  return flax.traverse_util.unflatten_dict(
    {tuple(name.split('/')): value for name, value in flat.items()}
  )


def trained(
  cell: plan.Cell, root: pathlib.Path, epochs: float
) -> tuple[dict[str, Any], pathlib.Path]:
  """(variables, folder) of the searched network, trained for so many epochs.

  The ungated network at the searched width starts from the weights that the
  search would freeze and is trained by the recipe on the search's part of the
  training images, so validation images stay unseen. There is one training of
  config.train.epochs with its schedule; fewer epochs are a look at it on its
  way, as in the paper.

  Args:
    cell: Whose config and penalty it is.
    root: The study's workdir.
    epochs: Whole epochs, or all.

  Raises:
    Busy: If another process is at it.
  """
  fields = plan.changed(cell.wide, 'train')
  fields['arm.penalty'] = cell.arm.penalty
  where = folder(root, 'trained', fields)
  name = 'all' if epochs >= cell.wide.train.epochs else f'{epochs:g}'
  make(where / 'weights' / 'all.npz', where, lambda: _train(cell, where))
  return _read_weights(where / 'weights' / f'{name}.npz'), where


def _train(cell: plan.Cell, folder: pathlib.Path) -> None:
  job = stages.Job(cell.wide, folder)

  def keep(state, epochs):
    if epochs == int(epochs):
      path = folder / 'weights' / f'{int(epochs)}.npz'
      storage.write_arrays(path, _flatten(state.variables), sealed=True)

  penalty = cell.arm.penalty
  state = stages.fit(
    job,
    job.network.narrow(job.network.cost_model.widths),
    folder,
    'wide',
    job.config.train.epochs,
    first_weights(job),
    hold_out=True,
    penalty=scale_penalty(penalty) if penalty else None,
    watch=keep,
  )
  storage.write_arrays(
    folder / 'weights' / 'all.npz', _flatten(state.variables), sealed=True
  )


# Gates.


def searched(
  cell: plan.Cell, root: pathlib.Path
) -> tuple[dict[str, np.ndarray], pathlib.Path]:
  """(gates, folder) of the search of a cell.

  Raises:
    Busy: If another process is at it, or at its weights.
  """
  variables = None
  fields = plan.changed(cell.wide, 'search')
  if cell.arm.pretrain_epochs:
    variables, where = trained(cell, root, cell.arm.pretrain_epochs)
    fields['trained'] = where.name
    fields['arm.pretrain_epochs'] = cell.arm.pretrain_epochs
  where = folder(root, 'search', fields)
  path = where / 'search' / 'gates.npz'

  def search() -> None:
    stages.search(stages.Job(cell.wide, where), variables)

  make(path, where, search)
  return storage.read_arrays(path), where


def probed(cell: plan.Cell, root: pathlib.Path) -> tuple[Any, pathlib.Path]:
  """(content of probe.json, folder) of the probe of a cell's budget.

  Raises:
    Busy: If another process is at it.
  """
  fields = plan.changed(cell.wide, 'train', 'probe')
  fields |= plan.differing(cell.wide, 'budget')
  where = folder(root, 'probe', fields)
  path = where / 'probe' / 'probe.json'

  def probe() -> None:
    stages.probe(stages.Job(cell.wide, where), path.parent)

  make(path, where, probe)
  return storage.read_json(path), where


def seconds(folder: pathlib.Path) -> float:
  """Seconds that a product took, compilation included."""
  records = runs.read_metrics(folder)
  return records[-1]['seconds'] if records else 0.0
