"""Scores: the numbers by which the channels of all layers are compared.

`prune.cut` keeps the channels with the highest scores. In the paper the gates
are the scores. This module has all other scores that a cut can start from. They
are {layer name: [C] float}, in the order of the cost model.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from pfs_jax import costs, rankings

Scores = dict[str, np.ndarray]

# From gates.


def over_layer_mean(gates: Mapping[str, Any]) -> Scores:
  """Each gate over its layer's mean: scores that favour no layer.

  If BatchNorm follows their consumer, the scale of a layer's gates has no
  effect, and their mean only says how fast the optimiser let them drift. The
  mean of the scores of a layer is 1, or 0 if all its gates are 0.

  >>> over_layer_mean({'conv': [1.0, 3.0]})
  {'conv': array([0.5, 1.5])}
  """
  arrays = {name: np.asarray(g, np.float64) for name, g in gates.items()}
  return {name: g / (g.mean() or 1.0) for name, g in arrays.items()}


def channel_costs(cost_model: costs.CostModel) -> np.ndarray:
  """MACs that the full network saves with one channel less in a layer, [L].

  They are the channel's own MACs and those of the layers that read it. A layer
  with a single channel is counted in the same way.
  """
  full = np.array(cost_model.widths)
  total = cost_model.macs(full)
  one = np.eye(len(full), dtype=np.int64)
  return np.array([total - cost_model.macs(full - row) for row in one])


def over_cost(
  gates: Mapping[str, Any], cost_model: costs.CostModel, power: float
) -> Scores:
  """Each gate over (the MACs that its channel costs) ** power.

  The power 0 is the paper's ranking; 1 ranks by gate per MAC. Costs are divided
  by their mean, which changes no order.
  """
  spent = channel_costs(cost_model)
  factors = (spent / spent.mean()) ** power
  return {
    name: np.asarray(gate, np.float64) / factor
    for (name, gate), factor in zip(gates.items(), factors, strict=True)
  }


# From the cost model and a seed alone.


def generator(seed: int, purpose: str) -> np.random.Generator:
  """A NumPy generator: its own stream for each purpose of a seed."""
  return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def equal(cost_model: costs.CostModel) -> Scores:
  """Scores that are all 1, from which the cut makes uniform widths."""
  sizes = zip(cost_model.layers, cost_model.widths, strict=True)
  return {name: np.ones(width) for name, width in sizes}


def random(cost_model: costs.CostModel, seed: int) -> Scores:
  """A draw from [0, 1) for each channel: it favours no layer."""
  rng = generator(seed, 'random gates')
  sizes = zip(cost_model.layers, cost_model.widths, strict=True)
  return {name: rng.random(width) for name, width in sizes}


def shuffled(
  cost_model: costs.CostModel, counts: Sequence[int], seed: int
) -> Scores:
  """Scores that lead the cut to counts permuted among layers of equal width.

  The j-th channel of a layer that is to keep t channels gets the score
  t / (j + 0.5). A cut at any threshold then keeps about s * t channels in every
  layer, with one s for all: the permuted counts, scaled as the ceiling asks (s
  is about 1, since a permutation changes the MACs).

  Args:
    cost_model: Costs of the searched network.
    counts: What a search kept in each layer.
    seed: The seed of the permutation.
  """
  rng = generator(seed, 'shuffled counts')
  widths, wanted = np.array(cost_model.widths), np.array(counts)
  for width in dict.fromkeys(cost_model.widths):
    group = np.flatnonzero(widths == width)
    wanted[group] = wanted[rng.permutation(group)]
  return {
    name: t / (np.arange(width) + 0.5)
    for name, width, t in zip(cost_model.layers, widths, wanted, strict=True)
  }


# From trained weights.


def _leaf(params: Mapping[str, Any], path: str) -> np.ndarray:
  for name in path.split('/'):
    params = params[name]
  return np.asarray(params, np.float64)


def filters(params: Mapping[str, Any], layers: Sequence[str]) -> Scores:
  """L1 norm of each filter over its layer's mean (Li et al. 2017).

  The norms of layers with different fan-in have different scales, so they are
  divided by their mean. Kernels are [k, k, C_in, C].
  """
  kernels = {layer: _leaf(params, f'{layer}/conv/kernel') for layer in layers}
  return over_layer_mean(
    {layer: np.abs(k).sum((0, 1, 2)) for layer, k in kernels.items()}
  )


def scales(params: Mapping[str, Any], layers: Sequence[str]) -> Scores:
  """|scale| of each layer's BatchNorm, compared as it is (Liu et al. 2017)."""
  return {layer: np.abs(_leaf(params, f'{layer}/bn/scale')) for layer in layers}


# From width profiles: one weight for each layer.


def profile_scores(
  weights: Mapping[str, float],
  gates: Mapping[str, Any],
  least: Mapping[str, int] | None = None,
) -> Scores:
  """Scores that lead the cut to a width profile, scaled to any budget.

  The k-th channel (k = 1 .. C) of a layer of weight w has the score
  w * C / (k - 0.5), so a cut at any score theta keeps about w * C / theta
  channels in every layer. With all weights 1 that is uniform width.

  >>> profile_scores({'conv': 1.0}, {'conv': [0.2, 0.9]})
  {'conv': array([1.33333333, 4.        ])}

  Args:
    weights: {layer name: weight > 0}; only their ratios matter.
    gates: {layer name: [C]}: the size of each layer, and the order within it,
      the largest gate first, the earlier channel among equal ones.
    least: {layer name: number of channels to rank before all other channels}.
  """
  found, ahead = {}, {}
  for name, gate in gates.items():
    order = np.argsort(-np.asarray(gate, np.float64), kind='stable')
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    found[name] = weights[name] * len(order) / (ranks + 0.5)
    ahead[name] = ranks < (least or {}).get(name, 0)
  top = max(s.max() for s in found.values())
  return {name: s + top * ahead[name] for name, s in found.items()}


def tilt(layers: Sequence[str], slope: float) -> dict[str, float]:
  """Weights exp(slope * x), with depth x from -1/2 (first layer) to 1/2.

  >>> {k: round(w, 2) for k, w in tilt(['a', 'b', 'c'], 2.0).items()}
  {'a': 0.37, 'b': 1.0, 'c': 2.72}
  """
  depth = np.linspace(-0.5, 0.5, len(layers)) if len(layers) > 1 else [0.0]
  weights = np.exp(slope * np.asarray(depth))
  return dict(zip(layers, weights.tolist(), strict=True))


def survivors(gates: Mapping[str, Any]) -> dict[str, float]:
  """The share of each layer's gates above 0, one gate at least.

  In a search that is long enough, the gates of useless channels reach 0; the
  number of the other gates says how wide the layer needs to be.
  """
  return {
    layer: max(1, int((np.asarray(g) > 0).sum())) / len(g)
    for layer, g in gates.items()
  }


def damped(
  losses: Mapping[str, float],
  damping: float,
  before: Mapping[str, float] | None = None,
) -> dict[str, float]:
  """Weights times (loss per MAC over its geometric mean) ** damping.

  Layers whose MACs change the loss most get wider.

  Args:
    losses: {layer: rise of the loss for each MAC removed there, > 0}.
    damping: 0 leaves the weights as they are; 1 is in proportion to the losses.
    before: {layer: weight}; all 1 if None.
  """
  logs = np.log(np.array(list(losses.values())))
  factors = np.exp(damping * (logs - logs.mean()))
  return {
    layer: factor * (before[layer] if before else 1.0)
    for layer, factor in zip(losses, factors.tolist(), strict=True)
  }


class Probe(TypedDict):
  """The fields of probe.json that a cut reads; `stages.probing` writes more.

  Attributes:
    mean: {layer: rise of the loss for each million MACs, > 0}.
    before: {layer: weight of the widths that were probed}.
    damping: The damping of the config.
    sentence: The result in words.
  """

  mean: dict[str, float]
  before: dict[str, float]
  damping: float
  sentence: str


def probed(found: Probe, ranking: str = 'sensitivity') -> dict[str, float]:
  """The width profile of a probe; without a number, its file's damping."""
  _, given = rankings.parse(ranking)
  number = found['damping'] if given is None else given
  return damped(found['mean'], number, found['before'])


# By name.


def ranked(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  ranking: str = 'global',
  power: float = 1.0,
  cut: Callable[[Mapping[str, Any]], Sequence[int]] | None = None,
) -> dict[str, Any]:
  """The scores that a ranking makes of gates; see docs/tournament.md.

  Within a layer the order stays that of the gates. 'global' leaves the gates as
  they are (paper, section 3.3). So do 'random' and 'sensitivity', for which the
  caller has computed the scores already.

  Args:
    gates: {layer name: [C] gates, >= 0}, in the order of the cost model.
    cost_model: Costs of the searched network.
    ranking: A name of `rankings`.
    power: The exponent of the cost, where the name `cost` has no number.
    cut: Scores -> counts at the budget, for 'blend'.
  """
  kind, given = rankings.parse(ranking)
  number = power if given is None else given
  if kind == 'layer_mean':
    return over_layer_mean(gates)
  if kind == 'cost':
    return over_cost(gates, cost_model, number)
  if kind == 'uniform':
    return equal(cost_model)
  if kind == 'tilt':
    assert given is not None  # `prune.with_tilt` chooses it.
    return profile_scores(tilt(cost_model.layers, given), gates)
  if kind == 'survivors':
    return profile_scores(survivors(gates), gates)
  if kind == 'blend':
    assert cut is not None
    shares = np.array(cut(gates)) / cost_model.widths
    weights = dict(zip(cost_model.layers, shares**number, strict=True))
    return profile_scores(weights, gates)
  return dict(gates)
