"""Does one cell of a study: makes its structure, trains it, and records it."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from pfs_jax import prune, runs, stages, storage
from pfs_jax.studies import plan, products, results, tournament


def run(cell: plan.Cell, root: pathlib.Path) -> dict[str, Any]:
  """Does a cell, or the rest of it, in cells/<hash>, and returns its record.

  Raises:
    products.Busy: If another process is making something that the cell needs.
  """
  folder = root / 'cells' / cell.hash
  with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
    found = _structure(cell, folder, root)
    versions = runs.versions()
    record = {
      'arm': cell.name,
      'variation': dict(cell.variation),
      'seed': cell.seed,
      'config_hash': cell.hash,
      'commit': versions['commit'],
      'hardware': versions['hardware'],
      'test_accuracy': None,
      'seconds': 0.0,
      'fields': cell.identity,
      **found,
    }
    if cell.arm.training != 'none':
      record |= _trained(cell, folder, root, found)
  storage.write_json(folder / 'cell.json', record, sealed=True)
  products.forget_programs()
  return record


def _structure(cell: plan.Cell, folder, root) -> dict[str, Any]:
  """Writes structure.json; returns the record's fields about the structure."""
  job, facts = stages.Job(cell.config, folder), {}
  if cell.arm.scores == 'tournament':
    chosen = tournament.choose(job, root)
    names = ('chosen', 'challenger', 'gain', 'error', 'share', 'seconds')
    facts['tournament'] = {name: chosen[name] for name in names}
    found = tournament.scored(job, chosen['chosen'], root)
  else:
    found = products.scored(cell, job, root)
    facts.update(found.facts)
  network = job.network
  structure = dataclasses.replace(
    job.cut_plain(found.scores),
    model=network.description,
    source={'budget': job.budgets[0].name, 'seed': cell.seed, 'arm': cell.name},
  )
  storage.write_text(folder / 'structure.json', structure.to_json() + '\n')
  if cell.arm.scores != 'full':
    kept = prune.kept(found.scores, structure)
    facts['kept'] = {name: results.bits(kept[name]) for name in kept}
  return {
    'model': network.description['name'],
    'macs': structure.macs,
    'reference_macs': network.reference_macs,
    'macs_share': structure.macs / network.reference_macs,
    'params': structure.params,
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'widths': list(network.cost_model.widths),
    'tie_share': structure.tie_share,
    **facts,
  }


def _trained(cell: plan.Cell, folder, root, found) -> dict[str, Any]:
  """Trains the structure like `--mode=train`; returns the record's fields."""
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


def _weights(
  cell: plan.Cell, root: pathlib.Path, kept: Mapping[str, str]
) -> dict[str, Any]:
  """The kept channels of the wide network's variables.

  'rewind' takes their first random values; 'inherit' takes the values for which
  the channels were scored, with the gates, if there are any, multiplied into
  BatchNorm's scale and bias (the running statistics are those without gates).
  """
  job = stages.Job(cell.wide, root)
  arm, variables = cell.arm, job.ungated_weights
  if arm.training == 'inherit':
    epochs = arm.pretrain_epochs if arm.scores == 'gates' else math.inf
    if epochs:
      variables, _ = products.trained(cell, root, epochs)
    if arm.scores == 'gates':
      gates, _ = products.searched(cell, root)
      norms = {g.name: g.norms[0] for g in job.network.table.groups}
      variables = folded(variables, gates, norms)
  indices = {name: np.array(results.channels(kept[name])) for name in kept}
  return job.network.table.slice_variables(variables, indices)


def folded(
  variables: Mapping[str, Any],
  gates: Mapping[str, Any],
  norms: Mapping[str, str],
) -> dict[str, Any]:
  """Variables with the gates multiplied into BatchNorm's scale and bias.

  The variables are those of the network without gates; `gates` is {layer: [C]},
  `norms` {layer: path of the BatchNorm whose output its gates multiply}.
  """
  flat = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  for layer, gate in gates.items():
    for name in ('scale', 'bias'):
      path = f'params/{norms[layer]}/{name}'
      flat[path] = np.asarray(flat[path]) * np.asarray(gate)
  return flax.traverse_util.unflatten_dict(flat, sep='/')
