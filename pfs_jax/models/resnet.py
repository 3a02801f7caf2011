"""CIFAR ResNets (20, 32, 44, 56, 110 layers) and ResNet-50.

Only layers inside a block are gated; the residual stream keeps its full width.
A CIFAR block gates its first convolution, ResNet-50's bottleneck its first and
second; layers are named `stage1_block0/conv1` and so on, in forward order. What
conv1 gives, conv2 of the same block consumes, and nothing else; what a gated
conv2 gives, conv3.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import layers

# Blocks in each of the three stages.
DEPTHS = {
  'resnet20': 3,
  'resnet32': 5,
  'resnet44': 7,
  'resnet56': 9,
  'resnet110': 18,
}
DEFAULT_WIDTH = 16
STAGES = 3

RESNET50_DEPTHS = (3, 4, 6, 3)  # Blocks in each of the four stages.
RESNET50_WIDTH = 64
RESNET50_STEM = 64
RESNET50_OUTPUT = 256  # Block outputs of the first stage; they double thrice.


def gate_sizes(depth: int, width: int) -> dict[str, int]:
  """{layer name: channels} of the gated layers, forward order."""
  return {
    f'stage{s + 1}_block{b}/conv1': width * 2**s
    for s in range(STAGES)
    for b in range(depth)
  }


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut; the first convolution is gated.

  Attributes:
    features: Width of the residual stream.
    hidden: Channels of the first convolution.
    stride: Stride of the first convolution and the shortcut.
    project: Whether the shortcut is a 1x1 convolution with BatchNorm.
    gated: Whether the first convolution carries a gate.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  features: int
  hidden: int
  stride: int
  project: bool
  gated: bool
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    conv = functools.partial(
      layers.ConvBN, epsilon=self.epsilon, dtype=self.dtype
    )
    y = conv(self.hidden, stride=self.stride, gated=self.gated, name='conv1')(
      x, train
    )
    y = nn.relu(y)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    y = conv(self.features, name='conv2')(y, train)
    if self.project:
      x = conv(self.features, kernel=1, stride=self.stride, name='shortcut')(
        x, train
      )
    return nn.relu(x + y)


class CifarResNet(nn.Module):
  """ResNet for small images: a stem and three stages of blocks.

  Attributes:
    num_classes: Number of classes.
    depth: Blocks in each stage.
    width: Width of the residual stream in the first stage; it doubles twice.
    counts: Channels of the first convolution of each block, forward order.
    gated: Whether those carry gates.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  depth: int
  width: int
  counts: tuple[int, ...]
  gated: bool = False
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    x = layers.ConvBN(
      self.width, epsilon=self.epsilon, dtype=self.dtype, name='stem'
    )(x, train)
    x = nn.relu(x)
    for stage in range(STAGES):
      for block in range(self.depth):
        first = stage > 0 and block == 0
        x = Block(
          features=self.width * 2**stage,
          hidden=self.counts[stage * self.depth + block],
          stride=2 if first else 1,
          project=first,
          gated=self.gated,
          epsilon=self.epsilon,
          dtype=self.dtype,
          name=f'stage{stage + 1}_block{block}',
        )(x, train)
    x = layers.GlobalAvgPool()(x)
    return layers.classifier(
      self.num_classes, layers.uniform_fan_in, self.dtype
    )(x)

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones."""
    return layers.unit_gates(gate_sizes(self.depth, 1), self.counts, self.dtype)


def build(
  name: str,
  num_classes: int,
  width: int,
  counts: tuple[int, ...],
  gated: bool,
  dtype: Any,
) -> CifarResNet:
  """The module; `counts` in the order of `gate_sizes`."""
  return CifarResNet(
    num_classes, DEPTHS[name], width, counts, gated=gated, dtype=dtype
  )


# ResNet-50.


def resnet50_gate_sizes(width: int) -> dict[str, int]:
  """{layer name: channels} of ResNet-50's gated layers, forward order."""
  return {
    f'stage{s + 1}_block{b}/conv{i}': width * 2**s
    for s, depth in enumerate(RESNET50_DEPTHS)
    for b in range(depth)
    for i in (1, 2)
  }


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolution and a shortcut; the first two are gated.

  Attributes:
    features: Width of the residual stream.
    hidden: Channels of the first and of the second convolution.
    stride: Stride of the 3x3 convolution and the shortcut.
    project: Whether the shortcut is a 1x1 convolution with BatchNorm.
    gated: Whether the first two convolutions carry gates.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  features: int
  hidden: tuple[int, int]
  stride: int
  project: bool
  gated: bool
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    conv = functools.partial(
      layers.ConvBN, epsilon=self.epsilon, dtype=self.dtype
    )
    gated = functools.partial(conv, gated=self.gated)
    y = gated(self.hidden[0], kernel=1, name='conv1')(x, train)
    y = nn.relu(y)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    y = gated(self.hidden[1], stride=self.stride, name='conv2')(y, train)
    y = nn.relu(y)
    y = conv(self.features, kernel=1, name='conv3')(y, train)
    if self.project:
      x = conv(self.features, kernel=1, stride=self.stride, name='shortcut')(
        x, train
      )
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """ResNet-50: a 7x7 stem, a max pool and four stages of bottlenecks.

  The stride is on the 3x3 convolution. The base width is that of the
  bottlenecks' inner layers, which the counts hold; block outputs and the stem
  do not follow it.

  Attributes:
    num_classes: Number of classes.
    counts: Channels of the first and second convolution of each block, forward
      order.
    multiplier: Widens the block outputs.
    gated: Whether those carry gates.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  counts: tuple[int, ...]
  multiplier: float = 1.0
  gated: bool = False
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    x = layers.ConvBN(
      RESNET50_STEM,
      kernel=7,
      stride=2,
      epsilon=self.epsilon,
      dtype=self.dtype,
      name='stem',
    )(x, train)
    x = layers.max_pool(nn.relu(x), window=3, stride=2, padding=1)
    hidden = zip(self.counts[::2], self.counts[1::2], strict=True)
    for stage, depth in enumerate(RESNET50_DEPTHS):
      for block in range(depth):
        x = Bottleneck(
          features=layers.widened(RESNET50_OUTPUT * 2**stage, self.multiplier),
          hidden=next(hidden),
          stride=2 if stage > 0 and block == 0 else 1,
          project=block == 0,
          gated=self.gated,
          epsilon=self.epsilon,
          dtype=self.dtype,
          name=f'stage{stage + 1}_block{block}',
        )(x, train)
    x = layers.GlobalAvgPool()(x)
    return layers.classifier(
      self.num_classes, layers.uniform_fan_in, self.dtype
    )(x)

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones."""
    return layers.unit_gates(resnet50_gate_sizes(1), self.counts, self.dtype)


def build_resnet50(
  num_classes: int,
  counts: tuple[int, ...],
  gated: bool,
  multiplier: float,
  dtype: Any,
) -> ResNet50:
  """The module; `counts` in the order of `resnet50_gate_sizes`."""
  return ResNet50(
    num_classes, counts, multiplier=multiplier, gated=gated, dtype=dtype
  )
