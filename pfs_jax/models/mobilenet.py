"""MobileNetV1 and MobileNetV2.

Both alternate dense convolutions, which mix channels, with depthwise ones,
which do not. A depthwise convolution has the channels of the dense one before
it, so the two are one channel group with one gate a channel. Groups are named
after the dense convolution, the producer; the next dense convolution or the
classifier is the group's consumer:

  V1 group               depthwise convolution  consumer
  stem                   block0/depthwise       block0/pointwise
  block{i}/pointwise     block{i+1}/depthwise   block{i+1}/pointwise
  block12/pointwise      none                   classifier

  V2 group               depthwise convolution  consumer
  stem                   block0/depthwise       block0/project
  block{i}/expand        block{i}/depthwise     block{i}/project
  last                   none                   classifier

with V1's blocks 0..12 and V2's 0..16, of which block 0 has no expansion. V2's
block outputs, on which the residual additions act, are not gated.

Where the gate of a group stands (`gate_site`):

* 'published': at the producer's BatchNorm. What follows up to the next
  BatchNorm, ReLU and depthwise convolution, keeps channels apart and is
  homogeneous, so that BatchNorm divides the gate out: its gradient is zero but
  for epsilon (and, in V2, ReLU6's ceiling). A gate of 0 is not a removed
  channel: that BatchNorm makes a constant of it.
* 'acting': at the BatchNorm of the depthwise convolution, before its ReLU. The
  consumer mixes what comes out, so the gate matters, and a gate of 0 removes
  the channel exactly.

A group without a depthwise convolution has its gate at its own BatchNorm for
both sites. The gradients of both sites: docs/gate_sites.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import layers

DEFAULT_WIDTH = 32

# V1: (width over the base width, stride) of each block.
V1_BLOCKS = (
  (2, 1),
  (4, 2),
  (4, 1),
  (8, 2),
  (8, 1),
  (16, 2),
  *((16, 1),) * 5,
  (32, 2),
  (32, 1),
)

# V2: (expansion, width, blocks, stride of the first block) of each stage.
V2_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
V2_LAST = 1280


# MobileNetV1.


def v1_gate_sizes(width: int) -> dict[str, int]:
  """{channel group: channels} of MobileNetV1, forward order."""
  return {
    'stem': width,
    **{
      f'block{i}/pointwise': width * multiple
      for i, (multiple, _) in enumerate(V1_BLOCKS)
    },
  }


def v1_acting() -> dict[str, str]:
  """{channel group: layer of its acting gate} where that is another layer."""
  groups = tuple(v1_gate_sizes(1))
  return {group: f'block{i}/depthwise' for i, group in enumerate(groups[:-1])}


class Separable(nn.Module):
  """A depthwise 3x3 and a dense 1x1 convolution, both with BatchNorm and ReLU.

  Attributes:
    features: Output channels.
    stride: Stride of the depthwise convolution.
    gated: Which of 'depthwise' and 'pointwise' carry a gate.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  features: int
  stride: int
  gated: tuple[str, ...]
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    channels = x.shape[-1]
    x = layers.ConvBN(
      channels,
      stride=self.stride,
      groups=channels,
      gated='depthwise' in self.gated,
      epsilon=self.epsilon,
      dtype=self.dtype,
      name='depthwise',
    )(x, train)
    x = nn.relu(x)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    x = layers.ConvBN(
      self.features,
      kernel=1,
      gated='pointwise' in self.gated,
      epsilon=self.epsilon,
      dtype=self.dtype,
      name='pointwise',
    )(x, train)
    return nn.relu(x)


class MobileNetV1(nn.Module):
  """A stem and 13 separable blocks.

  Attributes:
    num_classes: Number of classes.
    counts: Channels of the stem and of each block's output.
    gated: Whether there are gates.
    gate_site: 'acting' or 'published'.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  counts: tuple[int, ...]
  gated: bool = False
  gate_site: str = 'acting'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  def gate_layers(self) -> tuple[str, ...]:
    """The layer of each group's gate, whether or not there are gates."""
    return _gate_layers(v1_gate_sizes(1), v1_acting(), self.gate_site)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    gated = self.gate_layers() if self.gated else ()
    x = layers.ConvBN(
      self.counts[0],
      stride=2,
      gated='stem' in gated,
      epsilon=self.epsilon,
      dtype=self.dtype,
      name='stem',
    )(x, train)
    x = nn.relu(x)
    for i, (_, stride) in enumerate(V1_BLOCKS):
      x = Separable(
        self.counts[i + 1],
        stride=stride,
        gated=_within(f'block{i}', gated),
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=f'block{i}',
      )(x, train)
    x = layers.GlobalAvgPool()(x)
    return layers.classifier(self.num_classes, layers.normal_001, self.dtype)(x)

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones."""
    return layers.unit_gates(self.gate_layers(), self.counts, self.dtype)


# MobileNetV2.


def v2_gate_sizes(width: int) -> dict[str, int]:
  """{channel group: channels} of MobileNetV2, forward order.

  The hidden width of a block is its expansion times the width of its input, in
  proportion to the base width, whatever `multiplier` makes of block outputs. It
  is rounded down where the base width is odd.
  """
  sizes, inputs = {'stem': width}, None
  for i, (expansion, features, _, _) in enumerate(_v2_blocks()):
    if i:
      sizes[f'block{i}/expand'] = expansion * inputs * width // DEFAULT_WIDTH
    inputs = features
  return {**sizes, 'last': V2_LAST * width // DEFAULT_WIDTH}


def v2_acting() -> dict[str, str]:
  """{channel group: layer of its acting gate} where that is another layer."""
  groups = tuple(v2_gate_sizes(1))
  return {group: f'block{i}/depthwise' for i, group in enumerate(groups[:-1])}


def _v2_blocks() -> list[tuple[int, int, int, bool]]:
  """(expansion, width, stride, residual) of each of the 17 blocks."""
  return [
    (expansion, width, stride if i == 0 else 1, i > 0)
    for expansion, width, n, stride in V2_STAGES
    for i in range(n)
  ]


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise 3x3, 1x1 projection; ReLU6 after the first two.

  Whether there is an expansion and a residual addition is told, never guessed
  from the numbers: after a cut a hidden width can equal the input's.

  Attributes:
    features: Output channels.
    hidden: Channels between expansion and projection.
    stride: Stride of the depthwise convolution.
    expand: Whether there is an expansion.
    residual: Whether the input is added to the output.
    gated: Which of 'expand' and 'depthwise' carry a gate.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  features: int
  hidden: int
  stride: int
  expand: bool
  residual: bool
  gated: tuple[str, ...]
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""

    def conv(features, name, **kwargs):
      return layers.ConvBN(
        features,
        gated=name in self.gated,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=name,
        **kwargs,
      )

    y = x
    if self.expand:
      y = nn.relu6(conv(self.hidden, 'expand', kernel=1)(y, train))
    depthwise = conv(
      self.hidden, 'depthwise', stride=self.stride, groups=self.hidden
    )
    y = nn.relu6(depthwise(y, train))
    y = conv(self.features, 'project', kernel=1)(y, train)
    return x + y if self.residual else y


class MobileNetV2(nn.Module):
  """A stem, 17 inverted residual blocks and a last 1x1 convolution.

  Attributes:
    num_classes: Number of classes.
    counts: Channels of the stem, of the hidden layers of blocks 1..16, and of
      the last convolution. Block 0's hidden width is the stem's.
    multiplier: Widens the block outputs.
    gated: Whether there are gates.
    gate_site: 'acting' or 'published'.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  counts: tuple[int, ...]
  multiplier: float = 1.0
  gated: bool = False
  gate_site: str = 'acting'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  def gate_layers(self) -> tuple[str, ...]:
    """The layer of each group's gate, whether or not there are gates."""
    return _gate_layers(v2_gate_sizes(1), v2_acting(), self.gate_site)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    gated = self.gate_layers() if self.gated else ()

    def conv(features, name, **kwargs):
      return layers.ConvBN(
        features,
        gated=name in gated,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=name,
        **kwargs,
      )

    x = nn.relu6(conv(self.counts[0], 'stem', stride=2)(x, train))
    for i, (_, features, stride, residual) in enumerate(_v2_blocks()):
      x = InvertedResidual(
        features=layers.widened(features, self.multiplier),
        hidden=self.counts[i],
        stride=stride,
        expand=i > 0,
        residual=residual,
        gated=_within(f'block{i}', gated),
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=f'block{i}',
      )(x, train)
    x = nn.relu6(conv(self.counts[-1], 'last', kernel=1)(x, train))
    x = layers.GlobalAvgPool()(x)
    return layers.classifier(self.num_classes, layers.normal_001, self.dtype)(x)

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones."""
    return layers.unit_gates(self.gate_layers(), self.counts, self.dtype)


# Both.


def _gate_layers(groups, acting, gate_site: str) -> tuple[str, ...]:
  if gate_site == 'published':
    return tuple(groups)
  return tuple(acting.get(group, group) for group in groups)


def _within(block: str, gate_layers: tuple[str, ...]) -> tuple[str, ...]:
  """The names within a block of those gated layers that lie in it."""
  prefix = f'{block}/'
  return tuple(
    layer.removeprefix(prefix)
    for layer in gate_layers
    if layer.startswith(prefix)
  )


GATE_SIZES: dict[str, Callable[[int], dict[str, int]]] = {
  'mobilenet_v1': v1_gate_sizes,
  'mobilenet_v2': v2_gate_sizes,
}
ACTING: dict[str, dict[str, str]] = {
  'mobilenet_v1': v1_acting(),
  'mobilenet_v2': v2_acting(),
}


def build(
  name: str,
  num_classes: int,
  counts: tuple[int, ...],
  gated: bool,
  multiplier: float,
  dtype: Any,
  gate_site: str,
) -> MobileNetV1 | MobileNetV2:
  """The module; `counts` in the order of the family's gate sizes."""
  if name == 'mobilenet_v1':
    return MobileNetV1(
      num_classes, counts, gated=gated, gate_site=gate_site, dtype=dtype
    )
  return MobileNetV2(
    num_classes,
    counts,
    multiplier=multiplier,
    gated=gated,
    gate_site=gate_site,
    dtype=dtype,
  )
