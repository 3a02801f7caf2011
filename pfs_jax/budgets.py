"""Budgets: what a structure may cost, and what it must keep.

A `Budget` is made once, from the config or by hand, and passed whole to the
cut (`prune.cut`), to its check before a search, and to the names of its files.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pfs_jax import costs, errors, fields

# Counts -> milliseconds.
Latency = Callable[[costs.Counts], float]
UNITS = {'macs': 'MACs', 'params': 'parameters', 'latency_ms': 'ms'}


class Infeasible(errors.UserError):
  """No structure meets the budget: even the narrowest one costs more.

  Attributes:
    quantity: The first ceiling not met: 'macs', 'params' or 'latency_ms'.
    floor: That quantity of the narrowest structure allowed.
    ceiling: The ceiling that was asked for.
  """

  def __init__(self, quantity: str, floor: float, ceiling: float):
    self.quantity, self.floor, self.ceiling = quantity, floor, ceiling
    super().__init__(
      f'a budget of {ceiling:,} {UNITS[quantity]} cannot be met: the '
      f'narrowest structure allowed has {floor:,} (the floor).'
    )


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a structure may cost, what it must keep, and how channels compare.

  Attributes:
    name: Such as 'keep0.5', 'macs20000000', 'params100000' or 'latency2.5ms',
      with a suffix such as '-roundto8' for each further condition. The folder
      of the budget and its structure file carry this name.
    max_macs: Ceiling on the MACs of one image, or None.
    max_params: Ceiling on the parameters, or None.
    max_latency_ms: Ceiling on the predicted milliseconds of a batch, or None.
    latency_batch: Images in that batch.
    min_channels: Channels that every layer keeps, >= 1.
    min_share: Share (0..1) of its channels that every layer keeps.
    round_to: Counts are multiples of it, >= 1.
    ranking: How channels of different layers compare; see `scores.ranked`.
    power: The exponent of the cost, for the ranking 'cost'.
  """

  name: str = ''
  max_macs: int | None = None
  max_params: int | None = None
  max_latency_ms: float | None = None
  latency_batch: int = 1
  min_channels: int = 1
  min_share: float = 0.0
  round_to: int = 1
  ranking: str = 'global'
  power: float = 1.0

  def __post_init__(self):
    for name in ('min_channels', 'min_share', 'round_to'):
      value = getattr(self, name)
      rule = fields.BY_NAME[f'budget.{name}'].broken(value)
      if rule:
        raise errors.UserError(
          f'config.budget.{name} must be {rule}; got {value}.'
        )

  def least(self, cost_model: costs.CostModel) -> tuple[int, ...]:
    """The narrowest counts allowed: the floor of every budget.

    The larger of `min_channels` and `min_share` of the layer, rounded up to a
    multiple of `round_to`, but never more than the widest count allowed.
    """
    widths = np.array(cost_model.widths)
    share = np.ceil(self.min_share * widths - 1e-9).astype(int)
    least = np.maximum(self.min_channels, share)
    blocks = -(-least // self.round_to)
    counts = np.minimum(blocks * self.round_to, self.most(cost_model))
    return tuple(counts.tolist())

  def most(self, cost_model: costs.CostModel) -> tuple[int, ...]:
    """The widest counts allowed; a layer below `round_to` stays whole."""
    return tuple(
      w // self.round_to * self.round_to or w for w in cost_model.widths
    )

  def ceilings(
    self, cost_model: costs.CostModel, latency: Latency | None = None
  ) -> dict[str, tuple[Latency, float]]:
    """{quantity: (counts -> cost, ceiling)} of the ceilings that are set."""
    if self.max_latency_ms is not None and latency is None:
      raise ValueError('max_latency_ms needs a latency model.')
    given: dict[str, tuple[Any, Any]] = {
      'macs': (cost_model.macs, self.max_macs),
      'params': (cost_model.params, self.max_params),
      'latency_ms': (latency, self.max_latency_ms),
    }
    return {k: v for k, v in given.items() if v[1] is not None}

  def check(
    self, cost_model: costs.CostModel, latency: Latency | None = None
  ) -> tuple[int, ...]:
    """The narrowest counts allowed; raises Infeasible if they cost too much."""
    least = self.least(cost_model)
    for quantity, (cost, top) in self.ceilings(cost_model, latency).items():
      if cost(least) > top:
        raise Infeasible(quantity, cost(least), top)
    return least

  def asked(self) -> dict[str, Any]:
    """What a structure file says about its budget."""
    names = ['max_macs', 'max_params', 'min_channels', 'min_share', 'round_to']
    if self.max_latency_ms is not None:
      names.append('max_latency_ms')
    if self.ranking != 'global':
      names.append('ranking')
    if self.ranking == 'cost':
      names.append('power')
    return {name: getattr(self, name) for name in names}


def from_section(section: Any, reference_macs: int) -> tuple[Budget, ...]:
  """One budget for each entry of keep, macs, params, latency_ms, in this order.

  A share allows floor(share * reference_macs) MACs.

  Args:
    section: `config.budget`.
    reference_macs: MACs of the reference network.

  Raises:
    errors.UserError: If the same budget is named twice.
  """
  names = [f.name for f in dataclasses.fields(Budget) if f.name in section]
  common: dict[str, Any] = {n: section[n] for n in names}
  common['max_macs'] = section.max_macs or None
  common['max_params'] = section.max_params or None
  suffix, found = _name_suffix(Budget(**common)), []
  asked: list[tuple[str, str, float]] = []
  for share in section.keep:
    # A share such as 0.3 is meant exactly, not as the binary float below it.
    macs = math.floor(fractions.Fraction(str(share)) * reference_macs)
    asked.append((f'keep{share:.12g}', 'max_macs', macs))
  asked += [(f'macs{int(n)}', 'max_macs', int(n)) for n in section.macs]
  asked += [(f'params{int(n)}', 'max_params', int(n)) for n in section.params]
  for ms in section.latency_ms:
    asked.append((f'latency{ms:.12g}ms', 'max_latency_ms', float(ms)))
  for name, quantity, ceiling in asked:
    lowest = min(ceiling, common.get(quantity) or ceiling)
    found.append(Budget(**{**common, 'name': name + suffix, quantity: lowest}))
  if len({b.name for b in found}) < len(found):
    raise errors.UserError('config.budget names the same budget twice.')
  return tuple(found)


def _name_suffix(budget: Budget) -> str:
  """The end of a budget's name, which lists its further conditions."""
  plain, found = Budget(), ''
  names = ['latency_batch', 'max_macs', 'max_params']
  for name in [*names, 'min_channels', 'min_share', 'round_to']:
    value = getattr(budget, name)
    if value != getattr(plain, name):
      found += f'-{name.replace("_", "")}{value:.12g}'
  if budget.ranking != plain.ranking:
    found += f'-{budget.ranking.replace("_", "")}'
    found += f'{budget.power:.12g}' if budget.ranking == 'cost' else ''
  return found
