"""One cell: a structure by some arm, trained in some way, one record."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pfs_jax import prune, runs, stages, storage
from pfs_jax.studies import (
  arms,
  plan,
  products,
  results,
  scoring,
  tournament,
)


def run(cell: plan.Cell, root: pathlib.Path) -> dict[str, Any]:
  """Does a cell, or what is left of it, and gives its record.

  Args:
    cell: What is to be done.
    root: The study's workdir; the cell's folder is cells/<hash> in it.

  Raises:
    products.Busy: If another process is making something that it needs.
  """
  folder = root / 'cells' / cell.hash
  with (
    (folder / 'log.txt').open('a') as log,
    contextlib.redirect_stdout(log),
  ):
    found = _structure(cell, folder, root)
    record = {**_record(cell, folder), **found}
    if cell.arm.training != 'none':
      record |= _trained(cell, folder, root, found)
  storage.write_json(folder / 'cell.json', record, sealed=True)
  products.forget_programs()
  return record


# Structure.


def _structure(cell: plan.Cell, folder, root) -> dict[str, Any]:
  """Writes structure.json; the record's fields about it."""
  job = stages.Job(cell.config, folder)
  facts: dict[str, Any] = {}
  if cell.arm.scores == 'tournament':
    chosen = tournament.choose(job, root)
    names = ('chosen', 'challenger', 'gain', 'error', 'share', 'seconds')
    facts['tournament'] = {name: chosen[name] for name in names}
    found = tournament.scored(job, chosen['chosen'], root)
  else:
    found = scoring.scored(cell, job, root)
    facts |= found.facts
  structure = dataclasses.replace(
    job.cut_plain(found.scores),
    model=job.network.description,
    source={
      'budget': job.budgets[0].name,
      'seed': cell.seed,
      'arm': cell.name,
    },
  )
  storage.write_text(folder / 'structure.json', structure.to_json() + '\n')
  if cell.arm.scores != 'full':
    kept = prune.kept(found.scores, structure)
    facts['kept'] = {name: results.bits(kept[name]) for name in kept}
  return {**_costs(job, structure), **facts}


def _costs(job: stages.Job, structure: prune.Structure) -> dict[str, Any]:
  network = job.network
  return {
    'model': network.description['name'],
    'macs': structure.macs,
    'reference_macs': network.reference_macs,
    'macs_share': structure.macs / network.reference_macs,
    'params': structure.params,
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'widths': list(network.cost_model.widths),
    'tie_share': structure.tie_share,
  }


# Training and record.


def _weights(
  cell: plan.Cell, root: pathlib.Path, kept: Mapping[str, str]
) -> dict[str, Any]:
  """The kept channels of the wide network's variables.

  'rewind' takes its first random values; 'inherit' those at which the channels
  were scored, with the gates, where there are any, multiplied into BatchNorm's
  scale and bias (the running statistics are those without gates).
  """
  job = stages.Job(cell.wide, root)
  arm, variables = cell.arm, products.first_weights(job)
  if arm.training == 'inherit':
    if arm.scores in ('filters', 'scales'):
      variables, _ = products.trained(cell, root, math.inf)
    elif arm.pretrain_epochs:
      variables, _ = products.trained(cell, root, arm.pretrain_epochs)
    if arm.scores == 'gates':
      gates, _ = products.searched(cell, root)
      norms = {g.name: g.norms[0] for g in job.network.table.groups}
      variables = arms.folded(variables, gates, norms)
  indices = {name: np.array(results.channels(kept[name])) for name in kept}
  return job.network.slice_variables(variables, indices)


def _trained(cell: plan.Cell, folder, root, found) -> dict[str, Any]:
  """Trains the structure as `--mode=train` does; the record's fields of it."""
  c = cell.config.copy_and_resolve_references()
  c.train.structure = str(folder / 'structure.json')
  job = stages.Job(c, folder)
  weights = None
  if cell.arm.training != 'scratch' and not (folder / 'result.json').exists():
    weights = _weights(cell, root, found['kept'])
  stages.train(job, weights)
  result: Mapping[str, Any] = storage.read_json(folder / 'result.json')
  epochs = c.train.epochs
  if c.train.scratch == 'B':
    epochs *= result['reference_macs'] / result['macs']
  return {
    'test_accuracy': result['test_accuracy'],
    'test_loss': result.get('test_loss'),
    'seconds': result['seconds'],
    'commit': result['versions']['commit'],
    'hardware': result['versions']['hardware'],
    'train_epochs': epochs,
  }


def _record(cell: plan.Cell, folder: pathlib.Path) -> dict[str, Any]:
  versions = runs.versions()
  return {
    'arm': cell.name,
    'variation': dict(cell.variation),
    'seed': cell.seed,
    'config_hash': cell.hash,
    'commit': versions['commit'],
    'hardware': versions['hardware'],
    'test_accuracy': None,
    'seconds': 0.0,
    'fields': cell.identity,
  }
