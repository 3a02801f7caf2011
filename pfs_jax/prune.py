"""From gates to channel counts: the cut to a budget, with exact integers.

Plain NumPy: a cut depends on the gates and the cost model alone, takes
milliseconds, and is the same on every machine and every run.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import budgets, costs, errors, scores, structures

Structure = structures.Structure
Budget = budgets.Budget
Infeasible = budgets.Infeasible
Latency = budgets.Latency
profile_scores = scores.profile_scores


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
  """All units, best first, as (layer, position in the sorted layer).

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


def fit(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  max_macs: int | None = None,
  max_params: int | None = None,
  min_channels: int = 1,
  round_to: int = 1,
  *,
  latency: Latency | None = None,
  **conditions: Any,
) -> Structure:
  """Calls `cut` with a budget of these fields; see `Budget` and `cut`.

  >>> from pfs_jax import models, scores
  >>> model = models.cost_model('resnet20', 10, 32)
  >>> half = model.macs(model.widths) // 2
  >>> fit(scores.equal(model), model, max_macs=half).counts
  (8, 8, 8, 16, 15, 15, 32, 32, 31)
  """
  budget = Budget(
    max_macs=max_macs,
    max_params=max_params,
    min_channels=min_channels,
    round_to=round_to,
    **conditions,
  )
  return cut(gates, cost_model, budget, latency)


def cut(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  budget: Budget,
  latency: Latency | None = None,
) -> Structure:
  """The structure that keeps the best-ranked channels within a budget.

  Channels are ranked over all layers (paper, section 3.3); equal scores are
  taken evenly from all layers, in a fixed order. The minimum width of every
  layer comes first, then the longest prefix of the ranking that fits, then the
  following channels, in rank order, that still fit. No structure is ever over a
  ceiling, and raising one ceiling never lowers the quantity that it bounds.

  With `budget.round_to` = b > 1 a layer's channels, sorted by score, form
  blocks of b, and blocks are ranked by their mean score. A layer narrower than
  b is kept whole; channels beyond the last whole block are not kept.

  Args:
    gates: {layer: [C] finite scores}, ordered as `cost_model.layers`.
    cost_model: Costs of the searched network.
    budget: Ceilings, minimum widths and ranking.
    latency: counts -> milliseconds, such as `latency.LatencyModel`; it never
      falls when a count grows. Needed with `budget.max_latency_ms`.

  Raises:
    Infeasible: If even the minimum widths cost more than a ceiling.
    ValueError: If the gates do not fit the cost model.
  """
  named = dict(zip(gates, _checked(gates, cost_model), strict=True))
  budget = with_tilt(budget, cost_model, latency)
  plain = dataclasses.replace(budget, ranking='global')
  ranked = scores.ranked(
    named,
    cost_model,
    budget.ranking,
    budget.power,
    lambda found: cut(found, cost_model, plain, latency).counts,
  )
  vectors = _checked(ranked, cost_model)
  least = budget.check(cost_model, latency)
  ceilings = budget.ceilings(cost_model, latency)

  def fits(counts) -> bool:
    return all(cost(counts) <= ceiling for cost, ceiling in ceilings.values())

  blocks, steps = _blocks(vectors, budget.round_to)
  counts = _cut(blocks, steps, np.array(least), fits)
  used = {k: cost(counts) / top for k, (cost, top) in ceilings.items()}
  stopped = ceilings and tuple(counts) != budget.most(cost_model)
  floor = {'macs': cost_model.macs(least), 'params': cost_model.params(least)}
  return Structure(
    layers=cost_model.layers,
    counts=tuple(int(c) for c in counts),
    macs=cost_model.macs(counts),
    params=cost_model.params(counts),
    budget=budget.asked(),
    latency_ms=latency(counts) if latency else None,
    floor={**floor, **({'latency_ms': latency(least)} if latency else {})},
    binding=max(used, key=used.__getitem__) if stopped else '',
    tie_share=_tie_share(vectors, counts),
  )


def with_tilt(
  budget: Budget, cost_model: costs.CostModel, latency: Latency | None = None
) -> Budget:
  """The budget, with a number for the ranking `tilt` if it has none.

  It is the weakest tilt that suffices, of -2 to 2 in steps of 0.1: the cut uses
  97 % of a ceiling on MACs or milliseconds, or the parameters do not bind. If
  none suffices, it is the tilt that uses most of such a ceiling.
  """
  if budget.ranking != 'tilt':
    return budget
  ceilings = budget.ceilings(cost_model, latency)
  ceilings.pop('params', None)
  best, most = budget, 0.0
  for slope in sorted((i / 10 for i in range(-20, 21)), key=abs):
    found = dataclasses.replace(budget, ranking=f'tilt{slope:g}')
    made = cut(scores.equal(cost_model), cost_model, found, latency)
    used = [cost(made.counts) / top for cost, top in ceilings.values()] or [1.0]
    if max(used) > most:
      best, most = found, max(used)
    if most >= 0.97 or made.binding != 'params':
      break
  return best


def _blocks(
  vectors: Sequence[np.ndarray], round_to: int
) -> tuple[list[np.ndarray], list[int]]:
  """Scores of the blocks of each layer, best first, and its block size."""
  means, steps = [], []
  for vector in vectors:
    ranked = vector[_sorted_channels(vector)]
    size = min(round_to, len(ranked))
    whole = len(ranked) // size * size
    means.append(ranked[:whole].reshape(-1, size).mean(axis=1))
    steps.append(size)
  return means, steps


def _cut(blocks, steps, least, fits) -> np.ndarray:
  """Counts: the minimum, the longest prefix that fits, the rest that fits."""
  layer, position = _order(blocks)
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
  """The cut of the published implementation, for comparisons.

  Bisects the share q of the K channels to remove, in at most 10 halvings of
  (0, 1). The round(K * (1 - q)) channels with the largest gates are kept (half
  to even), the earlier channel first among ties. It stops if the share of the
  MACs removed is within 0.001 p of p, and keeps what the last step gave, over
  the budget or not.

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
