"""Whether a search learned anything: what its losses and its gates say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import errors

# A search whose lowest cross-entropy is above this share of that of chance has
# learned nothing about the classes.
_CHANCE = 0.95
# Where the regulariser starts above this multiple of the cross-entropy of
# chance, Adam's steps follow the regulariser alone.
_DOMINANT = 10.0


def check(gates: Mapping[str, np.ndarray], steps: int) -> None:
  """Refuses gates that no cut can rank, after a search of some steps.

  Args:
    gates: {layer: [C]}.
    steps: Steps of the search; 0 leaves all gates at 1, which is no divergence.

  Raises:
    errors.UserError: If all gates are 0, or all are 1.

  >>> check({'conv': np.array([0.0, 1.0])}, steps=9)
  """
  values = np.concatenate([np.ravel(g) for g in gates.values()])
  if steps and values[0] in (0, 1) and (values == values[0]).all():
    raise errors.UserError(
      f'the search diverged: all {values.size} gates are {values[0]:g}, so '
      'there is nothing to rank.\nLower config.search.learning_rate or '
      'config.search.balance, and delete the folder search/ of the workdir.'
    )


def summary(
  records: Sequence[Mapping[str, Any]],
  gates: Mapping[str, np.ndarray],
  *,
  classes: int,
  sparsity: float,
  balance: float,
) -> dict[str, Any]:
  """What a result says about its search.

  Args:
    records: The metrics of the search, with the mean cross-entropy 'ce'.
    gates: The gates that were chosen: {layer: [C]}.
    classes: Number of classes.
    sparsity: `config.search.sparsity`.
    balance: `config.search.balance`.

  Returns:
    'lowest_ce' (None without records), 'chance_ce' (ln of the classes),
    'left_chance' (whether the lowest is below 0.95 of it), and 'warnings': a
    sentence where all gates are equal, all gates are exactly 0 or 1, or the
    regulariser starts above 10 times the cross-entropy of chance.
  """
  chance = math.log(classes)
  losses = [r['ce'] for r in records if 'ce' in r]
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
  start = balance * (1 - sparsity) ** 2
  if losses and start > _DOMINANT * chance:
    warnings.append(
      f'The regulariser starts at {start:.3g}, more than {_DOMINANT:g} times '
      f'the cross-entropy of chance ({chance:.3g}): the search follows it '
      'alone. Lower config.search.balance.'
    )
  return {
    'lowest_ce': lowest,
    'chance_ce': chance,
    'left_chance': lowest is not None and lowest < _CHANCE * chance,
    'warnings': warnings,
  }
