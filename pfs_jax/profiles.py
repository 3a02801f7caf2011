"""Rankings: scores by which the channels of all layers are compared.

Gates are compared as they are (the paper), or by another rule that a name says.
Many rules are width profiles, one weight for each layer: `profile_scores` makes
scores of it, so that `prune.cut` cuts it to a budget like gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from pfs_jax import costs, rankings, scores

# A width profile of a probe keeps this share of each layer's uniform width.
TRUST = 0.5


def profile_scores(
  weights: Mapping[str, float],
  gates: Mapping[str, Any],
  least: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
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
    least: {layer name: channels that come before those of every other layer}.

  Returns:
    {layer name: [C] float64}.
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


def trusted(
  weights: Mapping[str, float],
  gates: Mapping[str, Any],
  uniform: Sequence[int],
) -> dict[str, np.ndarray]:
  """`profile_scores` that keep half of each layer's uniform width.

  Args:
    weights: As for `profile_scores`.
    gates: As for `profile_scores`.
    uniform: Counts of uniform width at the budget.
  """
  least = (int(np.ceil(TRUST * count)) for count in uniform)
  return profile_scores(weights, gates, dict(zip(gates, least, strict=True)))


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

  In a search that is long enough, the gates of channels that carry nothing
  reach 0; those that are left say how wide the layer needs to be.
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

  Args:
    losses: {layer: rise of the loss for each MAC removed there, > 0}.
    damping: 0 leaves the weights as they are; 1 is in proportion to the losses.
    before: {layer: weight}; all 1 if None.

  Returns:
    {layer: weight}. Layers that hurt most for each MAC get wider.
  """
  logs = np.log(np.array(list(losses.values())))
  factors = np.exp(damping * (logs - logs.mean()))
  return {
    layer: factor * (before[layer] if before else 1.0)
    for layer, factor in zip(losses, factors.tolist(), strict=True)
  }


class Probe(TypedDict):
  """What is read of probe.json; `stages.probing` writes more.

  Attributes:
    mean: {layer: rise of the loss for each million MACs, > 0}.
    before: {layer: weight of the widths that were probed}.
    damping: That of the config.
    sentence: What it comes to.
  """

  mean: dict[str, float]
  before: dict[str, float]
  damping: float
  sentence: str


def probed(found: Probe, damping: float | None = None) -> dict[str, float]:
  """The width profile of a probe.

  Args:
    found: The content of probe.json.
    damping: That of its last step; None: as the config said.
  """
  number = found['damping'] if damping is None else damping
  return damped(found['mean'], number, found['before'])


def ranked(
  gates: Mapping[str, Any],
  cost_model: costs.CostModel,
  ranking: str = 'global',
  power: float = 1.0,
  cut: Callable[[Mapping[str, Any]], Sequence[int]] | None = None,
) -> dict[str, Any]:
  """The scores that a ranking makes of gates.

  Within a layer the order stays that of the gates.

  Args:
    gates: {layer name: [C] gates, >= 0}, in the order of the cost model.
    cost_model: Costs of the searched network.
    ranking: 'global', the gates as they are (paper, section 3.3); 'layer_mean'
      (`scores.over_layer_mean`); 'cost' or 'cost0.5' (`scores.over_cost`);
      'uniform', the same share of every layer; 'tilt-0.4' (`tilt`);
      'survivors' (`survivors`); 'blend0.5', the shares that the gates keep at
      the budget, to the power 0.5: half way to uniform width. 'random' and
      'sensitivity' leave the scores as they are: who calls has made them.
    power: The exponent of the cost, where the name `cost` has no number.
    cut: Scores -> counts at the budget, for 'blend'.
  """
  kind, given = rankings.parse(ranking)
  number = power if given is None else given
  if kind == 'layer_mean':
    return scores.over_layer_mean(gates)
  if kind == 'cost':
    return scores.over_cost(gates, cost_model, number)
  if kind == 'uniform':
    return dict(scores.equal(cost_model))
  if kind == 'tilt':
    return profile_scores(tilt(cost_model.layers, number), gates)
  if kind == 'survivors':
    return profile_scores(survivors(gates), gates)
  if kind == 'blend':
    assert cut is not None
    shares = np.array(cut(gates)) / cost_model.widths
    weights = dict(zip(cost_model.layers, shares**number, strict=True))
    return profile_scores(weights, gates)
  return dict(gates)
