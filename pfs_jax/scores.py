"""Scores: the numbers by which the channels of all layers are compared.

`prune.cut` keeps the channels with the highest scores. Gates are scores as they
are (the paper); here is everything else that a cut can start from. All scores
are {layer name: [C] float}, in the order of the cost model.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import costs

# From gates.


def over_layer_mean(gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Each gate over its layer's mean: scores that favour no layer.

  A layer's gates have no scale of their own where BatchNorm follows their
  consumer, so the layer's mean says how fast the optimiser let them drift.

  Args:
    gates: {layer name: [C] gates, >= 0}.

  Returns:
    {layer name: [C] float64}; the mean of each layer is 1, or 0 where all its
    gates are 0.

  >>> over_layer_mean({'conv': [1.0, 3.0]})
  {'conv': array([0.5, 1.5])}
  """
  scores = {}
  for name, gate in gates.items():
    gate = np.asarray(gate, np.float64)
    scores[name] = gate / (gate.mean() or 1.0)
  return scores


def channel_costs(cost_model: costs.CostModel) -> np.ndarray:
  """MACs that the full network saves with one channel less, by layer: [L].

  They are the channel's own MACs and those of the layers that read it. A layer
  of one channel cannot lose it, and counts it all the same.
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
    {layer name: [C] float64}. Costs are divided by their mean, which changes
    no order.
  """
  spent = channel_costs(cost_model)
  factors = (spent / spent.mean()) ** power
  return {
    name: np.asarray(gate, np.float64) / factor
    for (name, gate), factor in zip(gates.items(), factors, strict=True)
  }


# From nothing but the cost model and a seed.


def generator(seed: int, purpose: str) -> np.random.Generator:
  """A generator for one purpose of one seed."""
  return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def equal(cost_model: costs.CostModel) -> dict[str, np.ndarray]:
  """All 1: equal scores are kept evenly in all layers: uniform widths."""
  return {
    name: np.ones(width)
    for name, width in zip(cost_model.layers, cost_model.widths, strict=True)
  }


def random(cost_model: costs.CostModel, seed: int) -> dict[str, np.ndarray]:
  """A draw from [0, 1) for each channel: it favours no layer."""
  rng = generator(seed, 'random gates')
  return {
    name: rng.random(width)
    for name, width in zip(cost_model.layers, cost_model.widths, strict=True)
  }


def shuffled(
  cost_model: costs.CostModel, counts: Sequence[int], seed: int
) -> dict[str, np.ndarray]:
  """Scores that lead the cut to counts permuted among layers of equal width.

  The j-th channel of a layer that is to keep t channels gets the score
  t / (j + 0.5). A cut at any threshold then keeps about s * t channels in every
  layer, with one s for all: the permuted counts, scaled as the ceiling asks (s
  is about 1, since a permutation changes the MACs). Minimum widths and the last
  channels follow the rules of the cut.

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


def _leaf(params: Mapping[str, Any], layer: str, *names: str) -> np.ndarray:
  for name in (*layer.split('/'), *names):
    params = params[name]
  return np.asarray(params, np.float64)


def filters(
  params: Mapping[str, Any], layers: Sequence[str]
) -> dict[str, np.ndarray]:
  """L1 norm of each filter over its layer's mean (Li et al. 2017).

  The norms of layers with different fan-in have different scales, hence the
  mean.

  Args:
    params: Parameters of the trained network; kernels are [k, k, C_in, C].
    layers: The gated layers.
  """
  return over_layer_mean(
    {
      layer: np.abs(_leaf(params, layer, 'conv', 'kernel')).sum((0, 1, 2))
      for layer in layers
    }
  )


def scales(
  params: Mapping[str, Any], layers: Sequence[str]
) -> dict[str, np.ndarray]:
  """|scale| of each layer's BatchNorm, compared as it is (Liu et al. 2017)."""
  return {
    layer: np.abs(_leaf(params, layer, 'bn', 'scale')) for layer in layers
  }
