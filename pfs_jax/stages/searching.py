"""The search stage: gates of frozen weights, and which of them are kept."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pfs_jax import config, console, runs, search, storage, train
from pfs_jax.stages import cutting, diverging
from pfs_jax.stages.job import Job


def run(job: Job, weights: Mapping[str, Any] | None = None) -> None:
  """Learns the gates of frozen weights and cuts them to the budgets.

  Args:
    job: Config, network, data and workdir.
    weights: The variables that the search freezes; None: new random ones.
  """
  for budget in job.budgets:  # Before hours of search, not after.
    cutting.check_budget(job, budget)
  folder = job.workdir / 'search'
  runs.claim(folder, config.identity(job.config, 'search'))
  if not (folder / 'gates.npz').exists():
    job.note_config()
    _search(job, folder, weights or job.first_weights)
  found = summary(job)
  for warning in found['warnings']:
    console.say(f'warning: {warning}')
  if found['lowest_ce'] is not None and not found['left_chance']:
    console.say(
      f'The cross-entropy of the search never left chance: lowest '
      f'{found["lowest_ce"]:.3f}, chance {found["chance_ce"]:.3f}.'
    )
  cutting.cut(job)


def _search(job: Job, folder: pathlib.Path, weights) -> None:
  c, network = job.config, job.network
  source = job.data.train_source('search', hold_out=True)
  validation = job.data.validation()
  state = search.init(
    network.gated,
    weights,
    sparsity=c.search.sparsity,
    balance=c.search.balance,
    learning_rate=c.search.learning_rate,
    key=config.key(c.seed, 'search dropout'),
    classifier=_classifier(job),
  )

  refreshed = job.refresher(state, source)

  def evaluate(state, step):
    gates = network.by_layer(jax.device_get(state.gates))
    path = folder / 'gates' / f'{step:08d}.npz'
    storage.write_arrays(path, gates, sealed=True)
    numbers = {
      'gates_mean': float(search.mean_gate(gates)),
      'gates_density': float(search.density(gates)),
    }
    if validation:
      variables = refreshed(state, step).variables
      found = train.evaluate(network.gated, variables, validation)
      numbers['validation_accuracy'] = found['accuracy']
    return numbers

  total = config.steps(c.search.epochs, source.steps_per_epoch)
  plan = job.plan(total, c.search.evaluate_steps or source.steps_per_epoch)
  if total:
    with source:
      state = train.loop(
        state,
        search.step,
        source,
        plan,
        folder=folder,
        label='search',
        evaluate=evaluate,
      )
  runs.barrier('search')
  gates = _selected(job, folder, network.by_layer(jax.device_get(state.gates)))
  diverging.check(gates, total)
  storage.write_arrays(folder / 'gates.npz', gates, sealed=True)
  runs.barrier('gates')


def _classifier(job: Job) -> str | None:
  """Path of the layer that is trained along with the gates; None: none is."""
  c = job.config.search
  if not c.train_classifier:
    return None
  return c.classifier or search.last_dense(
    job.network.gated, job.first_weights, job.image_shape
  )


def _selected(job: Job, folder: pathlib.Path, last):
  """The gates of the evaluation that the selection rule takes."""
  records = runs.read_metrics(folder)
  step = search.select(records, job.config.search.sparsity)
  if step is None:
    return last
  return storage.read_arrays(folder / 'gates' / f'{step:08d}.npz')


def summary(job: Job) -> dict[str, Any]:
  """What the result says about the workdir's search; {} if there is none."""
  folder, c = job.workdir / 'search', job.config.search
  if not (folder / 'gates.npz').exists():
    return {}
  return diverging.summary(
    runs.read_metrics(folder),
    storage.read_arrays(folder / 'gates.npz'),
    classes=job.spec.num_classes,
    sparsity=c.sparsity,
    balance=c.balance,
  )
