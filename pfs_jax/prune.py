"""From gates to channel counts: the cut to a budget, with exact integers.

Plain NumPy: a cut depends on the gates and the cost model alone, takes
milliseconds, and is the same on every machine and every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import costs, errors, structures

Structure = structures.Structure

# Counts -> milliseconds.
Latency = Callable[[Sequence[int]], float]


class Infeasible(errors.UserError):
  """No structure meets the budget: even the narrowest one costs more.

  Attributes:
    quantity: 'macs', 'params' or 'latency_ms', the first ceiling that cannot
      be met.
    floor: That quantity of the narrowest structure allowed.
    ceiling: What was asked for.
  """

  def __init__(self, quantity: str, floor: float, ceiling: float):
    self.quantity, self.floor, self.ceiling = quantity, floor, ceiling
    name = {'macs': 'MACs', 'params': 'parameters', 'latency_ms': 'ms'}[
      quantity
    ]
    super().__init__(
      f'a budget of {ceiling:,} {name} cannot be met: the narrowest structure '
      f'allowed has {floor:,} (the floor).'
    )


# Ranking.


def _checked(
  gates: Mapping[str, Any], cost_model: costs.CostModel
) -> list[np.ndarray]:
  """The gates as float64 vectors in the order of the cost model."""
  if tuple(gates) != cost_model.layers:
    raise ValueError(
      'gates must be named as the gated layers, in forward order: '
      f'{", ".join(cost_model.layers)}; got {", ".join(gates)}.'
    )
  vectors = [np.asarray(g, np.float64) for g in gates.values()]
  for name, vector, width in zip(
    gates, vectors, cost_model.widths, strict=True
  ):
    if vector.shape != (width,):
      raise ValueError(
        f'gates[{name!r}] must have shape ({width},); got {vector.shape}.'
      )
    if not np.isfinite(vector).all():
      raise ValueError(f'gates[{name!r}] must be finite.')
  return vectors


def _order(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """All units, best first, as (layer, size-sorted position within the layer).

  Each vector of `scores` is sorted, best first. Ties at any value are spread in
  proportion: the i-th of the n tied units of a layer has tie key (i + 0.5) / n,
  then the earlier layer goes first. With "the earlier layer first" alone, the
  many gates that end exactly at 0 or 1 would hand the structure to the early,
  costly layers.
  """
  layer = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
  position = np.concatenate([np.arange(len(s)) for s in scores])
  tie = []
  for s in scores:
    _, inverse, sizes = np.unique(s, return_inverse=True, return_counts=True)
    first = np.searchsorted(-s, -s, side='left')
    tie.append((np.arange(len(s)) - first + 0.5) / sizes[inverse])
  order = np.lexsort(
    (position, layer, np.concatenate(tie), -np.concatenate(scores))
  )
  return layer[order], position[order]


def _sorted_channels(vector: np.ndarray) -> np.ndarray:
  """Channels of one layer, largest gate first, ties by channel order."""
  return np.argsort(-vector, kind='stable')


def over_layer_mean(gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Each gate over its layer's mean: scores that favour no layer.

  A layer's gates have no scale of their own where BatchNorm follows its
  consumer, so the layer's mean says how fast the optimiser let them drift.

  Args:
    gates: {layer name: [C] gates, >= 0}.

  Returns:
    {layer name: [C] float64}; the mean of each layer is 1, or 0 where all its
    gates are 0.
  """
  scores = {}
  for name, gate in gates.items():
    gate = np.asarray(gate, np.float64)
    scores[name] = gate / (gate.mean() or 1.0)
  return scores


def channel_costs(cost_model: costs.CostModel) -> np.ndarray:
  """MACs that the full network saves with one channel less, by layer [L].

  The channel's own and those of what reads it. A layer of one channel cannot
  lose it; its cost is that of the channel all the same.
  """
  full = np.array(cost_model.widths)
  total = cost_model.macs(full)
  one = np.eye(len(full), dtype=np.int64)
  return np.array([total - cost_model.macs(full - row) for row in one])


def over_cost(
  gates: Mapping[str, Any], cost_model: costs.CostModel, power: float
) -> dict[str, np.ndarray]:
  """Each gate over (the MACs that its channel costs) ** power.

  Args:
    gates: {layer name: [C] gates, >= 0}, in the order of the cost model.
    cost_model: Costs of the searched network.
    power: 0 is the paper's ranking; 1 ranks by gate per MAC.

  Returns:
    {layer name: [C] float64}. Costs are taken over their mean, which changes
    no order.
  """
  spent = channel_costs(cost_model)
  factors = (spent / spent.mean()) ** power
  return {
    name: np.asarray(gate, np.float64) / factor
    for (name, gate), factor in zip(gates.items(), factors, strict=True)
  }


def ranked(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  ranking: str = 'global',
  power: float = 1.0,
) -> dict[str, np.ndarray]:
  """The scores by which channels of all layers are compared.

  Args:
    gates: {layer name: [C] gates, >= 0}, in the order of the cost model.
    cost_model: Costs of the searched network.
    ranking: 'global', the gates as they are (paper, section 3.3); 'layer_mean'
      or 'cost', see `over_layer_mean` and `over_cost`.
    power: Of the cost, with ranking 'cost'.

  Returns:
    {layer name: [C]}, for `fit`. Within a layer the order is that of the gates.
  """
  if ranking == 'layer_mean':
    return over_layer_mean(gates)
  if ranking == 'cost':
    return over_cost(gates, cost_model, power)
  return dict(gates)


def minimum(
  cost_model: costs.CostModel,
  min_channels: int = 1,
  min_share: float = 0.0,
  round_to: int = 1,
) -> tuple[int, ...]:
  """The narrowest counts allowed: the floor of every budget.

  The larger of `min_channels` and `min_share` of the layer, rounded up to a
  multiple of `round_to`, but never more than the widest count allowed in that
  layer: the largest multiple that it holds, or all of a layer that holds none.
  """
  for name, value in (('min_channels', min_channels), ('round_to', round_to)):
    if value < 1 or value != int(value):
      raise errors.UserError(
        f'config.budget.{name} must be an integer >= 1; got {value}.'
      )
  if not 0 <= min_share <= 1:
    raise errors.UserError(
      f'config.budget.min_share must be in [0, 1]; got {min_share}.'
    )
  counts = []
  for width, most in zip(
    cost_model.widths, maximum(cost_model, round_to), strict=True
  ):
    least = max(min_channels, int(np.ceil(min_share * width - 1e-9)))
    counts.append(min(-(-least // round_to) * round_to, most))
  return tuple(counts)


def maximum(cost_model: costs.CostModel, round_to: int = 1) -> tuple[int, ...]:
  """The widest counts allowed: whole multiples, or all of a narrower layer."""
  return tuple(w // round_to * round_to or w for w in cost_model.widths)


def check_budget(
  cost_model: costs.CostModel,
  max_macs: int | None = None,
  max_params: int | None = None,
  *,
  min_channels: int = 1,
  min_share: float = 0.0,
  round_to: int = 1,
  max_latency_ms: float | None = None,
  latency: Latency | None = None,
) -> tuple[int, ...]:
  """The narrowest counts allowed; raises Infeasible if they cost too much."""
  least = minimum(cost_model, min_channels, min_share, round_to)
  for quantity, (cost, ceiling) in _ceilings(
    cost_model, max_macs, max_params, max_latency_ms, latency
  ).items():
    if cost(least) > ceiling:
      raise Infeasible(quantity, cost(least), ceiling)
  return least


def _ceilings(cost_model, max_macs, max_params, max_latency_ms, latency):
  """{quantity: (cost of counts, ceiling)} of the ceilings that are given."""
  if max_latency_ms is not None and latency is None:
    raise ValueError('max_latency_ms needs a latency model.')
  given = {
    'macs': (cost_model.macs, max_macs),
    'params': (cost_model.params, max_params),
    'latency_ms': (latency, max_latency_ms),
  }
  return {k: v for k, v in given.items() if v[1] is not None}


def fit(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  max_macs: int | None = None,
  max_params: int | None = None,
  min_channels: int = 1,
  round_to: int = 1,
  min_share: float = 0.0,
  max_latency_ms: float | None = None,
  latency: Latency | None = None,
) -> Structure:
  """The structure that keeps the best-ranked channels under the ceilings.

  Channels are ranked by gate over all layers (paper, section 3.3), ties at any
  value spread in proportion. The minimum width of every layer comes first, then
  the longest prefix of the ranking that fits, then the following channels, in
  rank order, that still fit. No structure is ever over a ceiling, and raising
  one ceiling never lowers the quantity that it bounds.

  With `round_to` = b > 1 a layer's channels, sorted by gate, form blocks of b,
  and blocks are ranked by their mean gate; counts are multiples of b (a layer
  narrower than b is kept whole; channels beyond its last whole block are not).

  Args:
    gates: {layer name: [C] gates or any other scores, finite}, named and
      ordered as `cost_model.layers`.
    cost_model: Costs of the searched network.
    max_macs: Ceiling on the MACs of one image, or None.
    max_params: Ceiling on the parameters, or None.
    min_channels: Channels that each layer keeps at least, >= 1.
    round_to: Multiple that counts are rounded to, inside the solver, >= 1.
    min_share: Share (0..1) of its channels that each layer keeps at least.
    max_latency_ms: Ceiling on the predicted milliseconds of one batch, or None.
    latency: counts -> milliseconds, such as `latency.LatencyModel`; must never
      fall when a count grows.

  Returns:
    The `Structure`; its `tie_share` says which share of the kept channels the
    tie rule chose.

  Raises:
    Infeasible: If even the minimum widths cost more than a ceiling.
  """
  vectors = _checked(gates, cost_model)
  ceilings = _ceilings(
    cost_model, max_macs, max_params, max_latency_ms, latency
  )
  least = check_budget(
    cost_model,
    max_macs,
    max_params,
    min_channels=min_channels,
    min_share=min_share,
    round_to=round_to,
    max_latency_ms=max_latency_ms,
    latency=latency,
  )

  def fits(counts) -> bool:
    return all(cost(counts) <= ceiling for cost, ceiling in ceilings.values())

  scores, steps = _blocks(vectors, round_to)
  counts = _cut(scores, steps, np.array(least), fits)
  binding = ''
  if ceilings and tuple(counts) != maximum(cost_model, round_to):
    used = {k: cost(counts) / top for k, (cost, top) in ceilings.items()}
    binding = max(used, key=used.get)
  budget = {
    'max_macs': max_macs,
    'max_params': max_params,
    'min_channels': min_channels,
    'min_share': min_share,
    'round_to': round_to,
    **({'max_latency_ms': max_latency_ms} if latency else {}),
  }
  return Structure(
    layers=cost_model.layers,
    counts=tuple(int(c) for c in counts),
    macs=cost_model.macs(counts),
    params=cost_model.params(counts),
    budget=budget,
    latency_ms=latency(counts) if latency else None,
    floor={
      'macs': cost_model.macs(least),
      'params': cost_model.params(least),
      **({'latency_ms': latency(least)} if latency else {}),
    },
    binding=binding,
    tie_share=_tie_share(vectors, counts),
  )


def _blocks(
  vectors: Sequence[np.ndarray], round_to: int
) -> tuple[list[np.ndarray], list[int]]:
  """Scores of the blocks of each layer, best first, and its block size."""
  scores, steps = [], []
  for vector in vectors:
    ranked = vector[_sorted_channels(vector)]
    size = min(round_to, len(ranked))
    whole = len(ranked) // size * size
    scores.append(ranked[:whole].reshape(-1, size).mean(axis=1))
    steps.append(size)
  return scores, steps


def _cut(scores, steps, least, fits) -> np.ndarray:
  """Minimum, longest prefix that fits, then the rest that still fits."""
  layer, position = _order(scores)
  steps = np.array(steps)

  def counts_of(prefix: int) -> np.ndarray:
    taken = np.bincount(layer[:prefix], minlength=len(steps))
    return np.maximum(least, taken * steps)

  low, high = 0, len(layer)
  while low < high:  # Invariant: prefix `low` fits, prefix `high + 1` does not.
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(counts_of(middle)) else (low, middle - 1)
  counts = counts_of(low)
  full = set()  # Costs only grow: a layer that did not fit never will.
  for i, k in zip(layer[low:], position[low:], strict=True):
    if i in full or (k + 1) * steps[i] <= counts[i]:
      continue
    wider = counts.copy()
    wider[i] += steps[i]
    if fits(wider):
      counts = wider
    else:
      full.add(i)
  return counts


def _tie_share(vectors: Sequence[np.ndarray], counts: np.ndarray) -> float:
  """Share of the kept channels whose gate some dropped channel has too."""
  ranked = [v[_sorted_channels(v)] for v in vectors]
  pairs = list(zip(ranked, counts, strict=True))
  kept = np.concatenate([v[:c] for v, c in pairs])
  dropped = np.concatenate([v[c:] for v, c in pairs])
  return float(np.isin(kept, dropped).mean())


def published(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  reduction: float,
  reference_macs: int,
) -> Structure:
  """The cut of the published implementation, to compare with.

  Bisects the share q of channels removed, from (0, 1), in at most 10 halvings:
  k = round(K * (1 - q)) channels (Python's half-to-even) with the largest gates
  over all layers are kept, the earlier channel first among ties; it stops when
  |reached - p| <= 0.001 p and keeps whatever the last step gave, over the
  budget or not.

  Args:
    gates: As for `fit`.
    cost_model: Costs of the searched network.
    reduction: p, the share (0..1) of `reference_macs` to remove.
    reference_macs: MACs of the default-width network.

  Raises:
    errors.UserError: If a step leaves a layer without channels, where the
      published implementation crashes.
  """
  vectors = _checked(gates, cost_model)
  layer = np.repeat(np.arange(len(vectors)), [len(v) for v in vectors])
  ranking = layer[np.argsort(-np.concatenate(vectors), kind='stable')]
  low, high = 0.0, 1.0
  for iteration in range(10):
    removed = (low + high) / 2
    k = round(len(layer) * (1 - removed))
    counts = np.bincount(ranking[:k], minlength=len(vectors))
    if not counts.all():
      empty = cost_model.layers[int(np.argmin(counts))]
      raise errors.UserError(
        f'the published cut leaves layer {empty!r} with 0 channels at '
        f'iteration {iteration}; prune.fit keeps a minimum width.'
      )
    macs = cost_model.macs(counts)
    reached = 1 - macs / reference_macs
    if abs(reached - reduction) <= 0.001 * reduction:
      break
    low, high = (low, removed) if reached > reduction else (removed, high)
  return Structure(
    layers=cost_model.layers,
    counts=tuple(int(c) for c in counts),
    macs=macs,
    params=cost_model.params(counts),
    budget={'published_reduction': reduction, 'iterations': iteration + 1},
    tie_share=_tie_share(vectors, counts),
  )


def kept(
  gates: Mapping[str, Any], structure: Structure
) -> dict[str, np.ndarray]:
  """{layer: sorted indices of the channels that the structure keeps}.

  The largest gates of each layer are kept, the earlier channel among ties:
  the channels behind the counts of `fit`, also with `round_to`.
  """
  if tuple(gates) != structure.layers:
    raise ValueError('gates and structure must name the same layers.')
  return {
    name: np.sort(_sorted_channels(np.asarray(g, np.float64))[:n])
    for (name, g), n in zip(gates.items(), structure.counts, strict=True)
  }
