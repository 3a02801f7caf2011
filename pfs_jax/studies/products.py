"""What several cells of a study share: searches, probes, trained wide networks.

Each product has a folder, named by the hash of the fields that it depends on.
It is made once, and continues from its checkpoint after an interruption:

    shared/search-<hash>/   a run folder; search/gates.npz
    shared/trained-<hash>/  metrics.jsonl checkpoints/ weights/<epoch>.npz
    shared/probe-<hash>/    probe/probe.json

If another process is making a product, `Busy` is raised.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pfs_jax import config, prune, runs, scores, stages, storage, train
from pfs_jax.studies import plan


class Busy(Exception):
  """Another process is making a product; its name is the argument."""


def folder(
  root: pathlib.Path, kind: str, fields: Mapping[str, Any]
) -> pathlib.Path:
  """The folder of a product that depends on these fields."""
  digest = config.digest({**fields, 'revision': plan.REVISION})
  return root / 'shared' / f'{kind}-{digest}'


def make(
  done: pathlib.Path, where: pathlib.Path, work: Callable[[], object]
) -> None:
  """Makes the file `done` by `work()`, unless it exists.

  Raises:
    Busy: If another process holds the folder `where`.
  """
  if runs.agreed(done.exists()):
    return
  with storage.locked(where) as held:
    if not runs.agreed(held):
      raise Busy(where.name)
    if not runs.agreed(done.exists()):  # Another one may have finished it.
      work()


def forget_programs() -> None:
  """Frees compiled programs, as few trainings have the shapes of another.

  A program that is needed again comes from the compilation cache on disk.
  """
  train.compiled_call.cache_clear()
  jax.clear_caches()


# Wide networks.


@functools.cache
def scale_penalty(penalty: float) -> optax.GradientTransformation:
  """Adds penalty * sign(scale) to the gradients of BatchNorm's scales.

  The subgradient of penalty * sum |scale|: network slimming (Liu et al. 2017).
  """

  def add(path, gradient, parameter):
    if path[-1].key != 'scale':
      return gradient
    return gradient + penalty * jnp.sign(parameter)

  return optax.stateless(functools.partial(jax.tree.map_with_path, add))


def trained(
  cell: plan.Cell, root: pathlib.Path, epochs: float
) -> tuple[dict[str, Any], pathlib.Path]:
  """(variables, folder) of the searched network, trained for so many epochs.

  The ungated network at the searched width starts from the weights that the
  search would freeze and is trained by the recipe on the search's part of the
  training images, so validation images stay unseen. There is one training of
  config.train.epochs with its schedule. Fewer epochs give its weights after so
  many epochs, as in the paper. `epochs` are whole epochs, or all.
  """
  fields = plan.changed(cell.wide, 'train')
  fields['arm.penalty'] = cell.arm.penalty
  where = folder(root, 'trained', fields)
  name = 'all' if epochs >= cell.wide.train.epochs else f'{epochs:g}'
  make(where / 'weights/all.npz', where, lambda: _train(cell, where))
  flat = storage.read_arrays(where / f'weights/{name}.npz')
  return flax.traverse_util.unflatten_dict(flat, sep='/'), where


def _train(cell: plan.Cell, folder: pathlib.Path) -> None:
  job = stages.Job(cell.wide, folder)

  def write(name, state):
    variables = jax.device_get(dict(state.variables))
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    storage.write_arrays(folder / f'weights/{name}.npz', flat, sealed=True)

  def keep(state, epochs):
    if epochs == int(epochs):
      write(int(epochs), state)

  penalty = cell.arm.penalty
  state = stages.fit(
    job,
    job.network.narrow(job.network.cost_model.widths),
    folder,
    'wide',
    job.config.train.epochs,
    job.ungated_weights,
    hold_out=True,
    penalty=scale_penalty(penalty) if penalty else None,
    watch=keep,
  )
  write('all', state)


# Gates and probes.


def searched(
  cell: plan.Cell, root: pathlib.Path
) -> tuple[dict[str, np.ndarray], pathlib.Path]:
  """(gates, folder) of the search of a cell."""
  variables = None
  fields = plan.changed(cell.wide, 'search')
  if cell.wide.train.statistics != 'auto':  # By it, the step is chosen.
    fields['config.train.statistics'] = cell.wide.train.statistics
  if cell.arm.pretrain_epochs:
    variables, where = trained(cell, root, cell.arm.pretrain_epochs)
    fields['trained'] = where.name
    fields['arm.pretrain_epochs'] = cell.arm.pretrain_epochs
  where = folder(root, 'search', fields)
  path = where / 'search/gates.npz'
  make(
    path, where, lambda: stages.search(stages.Job(cell.wide, where), variables)
  )
  return storage.read_arrays(path), where


def probed(cell: plan.Cell, root: pathlib.Path) -> tuple[Any, pathlib.Path]:
  """(content of probe.json, folder) of the probe of a cell's budget."""
  fields = plan.changed(cell.wide, 'train', 'probe', 'budget')
  where = folder(root, 'probe', fields)
  path = where / 'probe/probe.json'
  make(
    path, where, lambda: stages.probe(stages.Job(cell.wide, where), path.parent)
  )
  return storage.read_json(path), where


def _seconds(folder: pathlib.Path) -> float:
  """Seconds that a product took, compilation included."""
  records = runs.read_metrics(folder)
  return records[-1]['seconds'] if records else 0.0


# Scores.


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores, and where they come from.

  Attributes:
    scores: {layer: [C]}, ranked, for `stages.Job.cut_plain`.
    facts: Fields of the record that say where they come from.
    seconds: {name: seconds} of the searches, probes and trainings behind them.
  """

  scores: Mapping[str, Any]
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def scored(cell: plan.Cell, job: stages.Job, root: pathlib.Path) -> Scored:
  """The scores of a cell, to cut the network of `job` to its first budget.

  Searches, probes and trainings are shared under the folder `root`.
  """
  arm, model = cell.arm, job.network.cost_model
  ranking = cell.config.budget.ranking
  if arm.scores in ('full', 'equal'):
    return Scored(scores.equal(model))
  if arm.scores == 'random':
    return Scored(scores.random(model, cell.seed))
  if arm.scores == 'profile':
    budget = dataclasses.replace(job.budgets[0], ranking=ranking)
    ranking = prune.with_tilt(budget, model, job.latency_of(budget)).ranking
    return Scored(scores.ranked(scores.equal(model), model, ranking))
  if arm.scores == 'probe':
    found, where = probed(cell, root)
    seconds = found['seconds']
    facts = {'mean': found['mean'], 'slope': found['slope']}
    return Scored(
      job.widened(scores.probed(found, ranking)),
      {'probe_seconds': seconds, 'probe': facts},
      {where.name: seconds},
    )
  if arm.scores in ('filters', 'scales'):
    variables, where = trained(cell, root, math.inf)
    score = scores.filters if arm.scores == 'filters' else scores.scales
    seconds = _seconds(where)
    weighed = score(variables['params'], model.layers)
    return Scored(weighed, {'wide_seconds': seconds}, {where.name: seconds})
  return _searched(cell, job, root)


def _searched(cell: plan.Cell, job: stages.Job, root: pathlib.Path) -> Scored:
  c, model = cell.config, job.network.cost_model
  gates, where = searched(cell, root)
  seconds = _seconds(where / 'search')
  facts = {
    'search_seconds': seconds,
    'search_epochs': c.search.epochs,
    'sparsity': c.search.sparsity,
    'pretrain_epochs': cell.arm.pretrain_epochs,
    'gate_means': {k: round(float(g.mean()), 4) for k, g in gates.items()},
  }

  def counts(ranked):
    return job.cut_plain(ranked).counts

  found = scores.ranked(gates, model, c.budget.ranking, cut=counts)
  if cell.arm.scores == 'shuffled':
    found = scores.shuffled(model, counts(found), cell.seed)
  return Scored(found, facts, {where.name: seconds})
