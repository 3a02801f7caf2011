"""The scores of an arm: from gates, weights, a probe, or nothing at all."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from pfs_jax import profiles, rankings, scores, stages
from pfs_jax.studies import plan, products


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores, and what they are from.

  Attributes:
    scores: {layer: [C]}, for `stages.Job.cut`.
    facts: Fields of the record that say what they are from.
    seconds: {name: seconds} of the searches, probes and trainings behind them.
  """

  scores: Mapping[str, Any]
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def scored(cell: plan.Cell, job: stages.Job, root: pathlib.Path) -> Scored:
  """The scores of a cell.

  Args:
    cell: Its arm and config.
    job: Whose network is cut, to the first budget.
    root: The folder under which searches, probes and trainings are shared.

  Raises:
    products.Busy: If another process is at what they are from.
  """
  arm, model = cell.arm, job.network.cost_model
  if arm.scores in ('full', 'equal'):
    return Scored(scores.equal(model))
  if arm.scores == 'random':
    return Scored(scores.random(model, cell.seed))
  if arm.scores == 'profile':
    return Scored(profiles.ranked(scores.equal(model), model, arm.ranking))
  if arm.scores == 'probe':
    return _probed(cell, job, root)
  if arm.scores in ('filters', 'scales'):
    variables, folder = products.trained(cell, root, math.inf)
    score = scores.filters if arm.scores == 'filters' else scores.scales
    seconds = products.seconds(folder)
    found = score(variables['params'], model.layers)
    return Scored(found, {'wide_seconds': seconds}, {folder.name: seconds})
  return _searched(cell, job, root)


def _probed(cell: plan.Cell, job: stages.Job, root: pathlib.Path) -> Scored:
  found, folder = products.probed(cell, root)
  _, damping = rankings.parse(cell.arm.ranking)
  facts = {
    'probe_seconds': found['seconds'],
    'probe': {'mean': found['mean'], 'slope': found['slope']},
  }
  return Scored(
    job.widened(profiles.probed(found, damping)),
    facts,
    {folder.name: found['seconds']},
  )


def _searched(cell: plan.Cell, job: stages.Job, root: pathlib.Path) -> Scored:
  arm, model = cell.arm, job.network.cost_model
  gates, folder = products.searched(cell, root)
  seconds = products.seconds(folder / 'search')
  facts = {
    'search_seconds': seconds,
    'search_epochs': cell.config.search.epochs,
    'sparsity': cell.config.search.sparsity,
    'pretrain_epochs': arm.pretrain_epochs,
    'gate_means': {k: round(float(g.mean()), 4) for k, g in gates.items()},
  }
  found = profiles.ranked(
    gates, model, arm.ranking, arm.power, lambda s: job.cut_plain(s).counts
  )
  if arm.scores == 'shuffled':
    counts = job.cut_plain(found).counts
    found = scores.shuffled(model, counts, cell.seed)
  return Scored(found, facts, {folder.name: seconds})
