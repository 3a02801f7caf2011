"""The search stage: learns the gates of a network with frozen weights."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pfs_jax import config, console, errors, norms, runs, search, storage, train
from pfs_jax.stages import cutting
from pfs_jax.stages.job import Job

# A network whose lowest cross-entropy is above this share of that of chance has
# learned nothing about the classes.
CHANCE = 0.95
# Where the regulariser starts above this multiple of the cross-entropy of
# chance, Adam's steps follow the regulariser alone.
_DOMINANT = 10.0


def run(job: Job, weights: Mapping[str, Any] | None = None) -> None:
  """Learns the gates of frozen weights and cuts them to the budgets.

  Freezes the variables given, or new random ones.
  """
  for budget in job.budgets:  # Refuses before hours of search.
    cutting.check_budget(job, budget)
    cutting.check_choice(job, budget)
    cutting.scored(job, budget, {})
  folder = job.workdir / 'search'
  runs.claim(folder, config.search_identity(job.config))
  if not (folder / 'gates.npz').exists():
    job.note_config()
    _search(job, folder, weights or job.first_weights)
  found = summary(job)
  for warning in found['warnings']:
    console.say(f'warning: {warning}')
  if found['lowest_ce'] is not None and not found['left_chance']:
    console.say(
      f'The cross-entropy of the search never left chance: lowest '
      f'{found["lowest_ce"]:.3f}, chance {found["chance_ce"]:.3f}. Its '
      'classifier is random; config.search.train_classifier=True trains it.'
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
    classifier=classifier(job),
  )
  own = bool(c.model.factory)
  refreshed = norms.refresher(c.train.statistics, own, state, source)

  def evaluate(state, step):
    gates = network.gated.by_layer(jax.device_get(state.gates))
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
  gates = network.gated.by_layer(jax.device_get(state.gates))
  best = search.select(runs.read_metrics(folder), c.search.sparsity)
  if best is not None:
    gates = storage.read_arrays(folder / 'gates' / f'{best:08d}.npz')
  check(gates, total)
  storage.write_arrays(folder / 'gates.npz', gates, sealed=True)
  runs.barrier('gates')


def classifier(job: Job) -> str | None:
  """Path of the layer that is trained along with the gates, or None."""
  c = job.config.search
  if not c.train_classifier:
    return None
  dense = [x.path for x in job.network.table.calls if x.kind == 'dense']
  if not (c.classifier or dense):
    raise errors.UserError(
      'config.search.train_classifier must be False for a model without a '
      'dense layer, or config.search.classifier must name a layer.'
    )
  return c.classifier or dense[-1]


def check(gates: Mapping[str, np.ndarray], steps: int) -> None:
  """Refuses gates that no cut can rank: all are 0, or all are 1.

  After 0 steps, gates that are all 1 are allowed.

  >>> check({'conv': np.array([0.0, 1.0])}, steps=9)
  """
  values = np.concatenate([np.ravel(g) for g in gates.values()])
  if steps and values[0] in (0, 1) and (values == values[0]).all():
    raise errors.UserError(
      f'the search diverged: all {values.size} gates are {values[0]:g}, so '
      'there is nothing to rank.\nLower config.search.learning_rate or '
      'config.search.balance, and delete the folder search/ of the workdir.'
    )


def summary(job: Job) -> dict[str, Any]:
  """The summary of the workdir's search in a result; {} if there is none."""
  folder, c = job.workdir / 'search', job.config.search
  if not (folder / 'gates.npz').exists():
    return {}
  return summarise(
    [r['ce'] for r in runs.read_metrics(folder) if 'ce' in r],
    storage.read_arrays(folder / 'gates.npz'),
    math.log(job.spec.num_classes),
    c.balance * (1 - c.sparsity) ** 2,
  )


def summarise(
  losses: Sequence[float],
  gates: Mapping[str, np.ndarray],
  chance: float,
  regulariser: float,
) -> dict[str, Any]:
  """The summary of a search, from its numbers.

  Args:
    losses: Mean cross-entropies of its records.
    gates: The gates that were chosen: {layer: [C]}.
    chance: The cross-entropy of chance: ln of the number of classes.
    regulariser: What the regulariser adds to the loss at the start.

  Returns:
    'lowest_ce' (None without records), 'chance_ce', 'left_chance' (whether
    'lowest_ce' is below 0.95 'chance_ce'), and 'warnings': sentences for gates
    that are all equal, gates that are all exactly 0 or 1, and a regulariser
    that starts above 10 times the cross-entropy of chance.
  """
  lowest = min(losses, default=None)
  values = np.concatenate([np.ravel(g) for g in gates.values()])
  warnings = []
  if losses and np.ptp(values) == 0:
    warnings.append(
      f'All gates are {values[0]:g}: the structure is uniform width, and the '
      'search chose nothing.'
    )
  elif losses and np.isin(values, (0, 1)).all():
    warnings.append(
      'All gates are exactly 0 or 1: config.search.learning_rate is too high, '
      'and most channels were chosen among equal gates.'
    )
  still = [
    name
    for name, gate in gates.items()
    if losses and np.size(gate) > 1 and np.ptp(gate) == 0 and 0 < gate[0] < 1
  ]
  if still and not warnings:
    warnings.append(
      f'The loss does not depend on the gates of {", ".join(still)}, so their '
      'width is arbitrary. Does the model start with a factor of 0 there?'
    )
  if losses and regulariser > _DOMINANT * chance:
    warnings.append(
      f'The regulariser starts at {regulariser:.3g}, more than {_DOMINANT:g} '
      f'times the cross-entropy of chance ({chance:.3g}): the search follows '
      'it alone. Lower config.search.balance.'
    )
  return {
    'lowest_ce': lowest,
    'chance_ce': chance,
    'left_chance': lowest is not None and lowest < CHANCE * chance,
    'warnings': warnings,
  }
