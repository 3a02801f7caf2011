"""Finds layers that are too wide or too narrow, by dropping channels.

A narrow network is trained briefly with mild channel dropout. Then channels are
dropped in one layer at a time, about the same MACs in each, and the rise of the
loss on held-out images is divided by the MACs. A high result says that more
channels are worth their MACs; a low one, that some can be removed (Network
Adjustment, arXiv 2004.02767, section 3). Channels without gates, such as the
residual stream of a ResNet, are not probed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pfs_jax import costs, devices, groups, scores, train

# The share of the cheapest layer's channels that one draw drops.
_SHARE = 0.25
# Out of proportion: a loss per MAC further than this factor from the median.
FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class ChannelDropout:
  """A gated module that is trained with some of its channels dropped.

  It is used like the module itself, without the collection `gates`. In training
  each gate is 0 with probability `rate` and 1 / (1 - rate) else, drawn for each
  image; in evaluation all are 1.

  Attributes:
    module: A module with `unit_gates` and the collection `gates`.
    rate: 0..1.
  """

  module: nn.Module
  rate: float

  def gates(self, key: jax.Array, n: int) -> dict[str, Any]:
    """The collection `gates` of n images, [n, C] each."""
    ones, tree = jax.tree.flatten(self.module.unit_gates())
    ends = np.cumsum([len(g) for g in ones])
    kept = jax.random.bernoulli(key, 1 - self.rate, (n, ends[-1]))
    parts = jnp.split(kept, ends[:-1], axis=1)  # One draw compiles faster.
    found = [
      part.astype(one.dtype) / (1 - self.rate)
      for part, one in zip(parts, ones, strict=True)
    ]
    return jax.tree.unflatten(tree, found)

  def apply(
    self,
    variables: Mapping[str, Any],
    x: jax.Array,
    train: bool = False,
    rngs: dict[str, jax.Array] | None = None,
    **kwargs: Any,
  ) -> Any:
    """As `nn.Module.apply`."""
    gates = self.module.unit_gates()
    if train:
      key = jax.random.fold_in((rngs or {})['dropout'], 1)
      gates = self.gates(key, len(x))
    gated = {**variables, 'gates': gates}
    return self.module.apply(gated, x, train=train, rngs=rngs, **kwargs)


def dropped(cost_model: costs.CostModel) -> np.ndarray:
  """The number of channels to drop in each layer of the narrow network, [L].

  It is a quarter of the channels in the layer where these cost the fewest MACs,
  and about as many MACs in the others: at most half, but at least one.
  """
  widths = np.array(cost_model.widths)
  spent = scores.channel_costs(cost_model)
  macs = (np.maximum(1, _SHARE * widths) * spent).min()
  most = np.maximum(1, widths // 2)
  return np.clip(np.rint(macs / spent).astype(int), 1, most)


def drawn(
  width: int, number: int, n: int, rng: np.random.Generator
) -> np.ndarray:
  """Gates float32 [n, width], with `number` random zeros for each image.

  The other gates are scaled so that their sum stays the same.
  """
  ranks = rng.permuted(np.tile(np.arange(width), (n, 1)), axis=1)
  return (ranks >= number).astype(np.float32) * (width / max(1, width - number))


@functools.cache
def _loss_fn(module: nn.Module, augmentation: Any) -> Callable[..., jax.Array]:
  """(variables, images, labels, weights) -> the weighted mean loss."""

  def loss(variables, images, labels, weight):
    x = augmentation.test(images)
    logits = train.as_float32(module.apply(variables, x, train=False))
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return train.weighted_sum(ce, weight) / weight.sum()

  return jax.jit(loss, out_shardings=devices.replicated())


def rises(
  module: nn.Module,
  variables: Mapping[str, Any],
  cost_model: costs.CostModel,
  batches: Any,
  n: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Rise of the loss for each million MACs dropped in a layer, [n, L].

  Args:
    module: The gated narrow module.
    variables: Its trained `params` and `batch_stats`.
    cost_model: Costs of the narrow network: its widths are the module's.
    batches: Held-out images, such as `pipeline.ArrayEvaluation`; each draw
      takes the next batch of them, and other channels for each image.
    n: Draws for each layer.
    rng: The generator of the draws.
  """
  call = _loss_fn(module, batches.augmentation)
  numbers = dropped(cost_model)
  layers = list(zip(cost_model.layers, cost_model.widths, numbers, strict=True))
  found = np.zeros((n, len(layers)))
  again = itertools.chain.from_iterable(itertools.repeat(batches))
  for i, batch in zip(range(n), again, strict=False):
    images = batch[0].shape[0]
    ones = {
      name: np.ones((images, width), np.float32) for name, width, _ in layers
    }

    def loss(gates, batch=batch):
      split = devices.split_batch(groups.tree(gates))
      return float(call({**variables, 'gates': split}, *batch))

    before = loss(ones)
    for j, (name, width, number) in enumerate(layers):
      gates = drawn(width, number, images, rng)
      found[i, j] = loss({**ones, name: gates}) - before
  macs = numbers * scores.channel_costs(cost_model)
  return found / (macs / 1e6)[None]


@dataclasses.dataclass(frozen=True)
class Finding:
  """What the rises of the loss say about the widths.

  Attributes:
    losses: {layer: rise of the loss for each million MACs, > 0}.
    errors: {layer: its standard error over draws}.
    slope: The slope of the logarithm of the losses over depth, 0..1.
    wide: Layers that are too wide: fewer channels would cost little.
    narrow: Layers that are too narrow.
  """

  losses: dict[str, float]
  errors: dict[str, float]
  slope: float
  wide: tuple[str, ...]
  narrow: tuple[str, ...]

  @property
  def sentence(self) -> str:
    """One sentence for the user."""
    clear = [v > 2 * self.errors[k] for k, v in self.losses.items()]
    if 2 * sum(clear) < len(clear):
      return (
        'The probe cannot tell: in most layers the loss rises by less than two '
        'standard errors. Raise config.probe.epochs.'
      )
    ratio = max(self.losses.values()) / min(self.losses.values())
    spread = (
      f'the highest loss per MAC is {ratio:.3g} times the lowest, and the '
      f'slope of its logarithm over depth is {self.slope:+.1f}'
    )
    parts = [
      f'{", ".join(layers)} {"is" if len(layers) == 1 else "are"} too {word}'
      for word, layers in (('wide', self.wide), ('narrow', self.narrow))
      if layers
    ]
    if not parts:
      return (
        'No layer is clearly too wide or too narrow: every loss per MAC is '
        f'within a factor of {FACTOR:g} of the median, allowing for two '
        f'standard errors ({spread}).'
      )
    return f'Out of proportion: {" and ".join(parts)} ({spread}).'


def finding(layers: Sequence[str], values: np.ndarray) -> Finding:
  """Finds the layers that are out of proportion, from rises of the loss.

  In such a layer, the loss per MAC differs from the median layer's by more than
  a factor of `FACTOR`, even after a change of two standard errors. A rise that
  is smaller than its standard error counts as that error.

  Args:
    layers: Their names, forward order.
    values: [trainings, draws, L], as from `rises`. The standard error is the
      larger one of that over all draws and that over trainings.
  """
  flat = values.reshape(-1, len(layers))
  error = np.maximum(
    _standard_error(flat), _standard_error(values.mean(axis=1))
  )
  tiny = 1e-9 * max(float(np.abs(flat).max()), 1e-30)
  mean = np.maximum(np.maximum(flat.mean(axis=0), error), tiny)
  middle = float(np.median(mean))
  depth = np.linspace(0, 1, len(layers))
  slope = np.polyfit(depth, np.log(mean), 1)[0] if len(layers) > 1 else 0.0
  wide = mean + 2 * error < middle / FACTOR
  narrow = mean - 2 * error > middle * FACTOR
  return Finding(
    losses=dict(zip(layers, mean.tolist(), strict=True)),
    errors=dict(zip(layers, error.tolist(), strict=True)),
    slope=float(slope),
    wide=tuple(itertools.compress(layers, wide)),
    narrow=tuple(itertools.compress(layers, narrow)),
  )


def _standard_error(values: np.ndarray) -> np.ndarray:
  """[n, L] -> [L]; 0 for n = 1."""
  n = len(values)
  return values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else 0 * values[0]
