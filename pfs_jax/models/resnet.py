"""CIFAR ResNets (20, 32, 44, 56, 110 layers) and ResNet-50.

Only layers inside a block are gated; the residual stream keeps its full width.
A CIFAR block gates its first convolution; layers are named
`stage1_block0/conv1` and so on, in forward order.
"""

from __future__ import annotations

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
    dtype: Dtype of the computation.
  """

  features: int
  hidden: int
  stride: int
  project: bool
  gated: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    y = layers.ConvBN(
      self.hidden,
      stride=self.stride,
      gated=self.gated,
      dtype=self.dtype,
      name='conv1',
    )(x, train)
    y = nn.relu(y)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    y = layers.ConvBN(self.features, dtype=self.dtype, name='conv2')(y, train)
    if self.project:
      x = layers.ConvBN(
        self.features,
        kernel=1,
        stride=self.stride,
        dtype=self.dtype,
        name='shortcut',
      )(x, train)
    return nn.relu(x + y)


class CifarResNet(nn.Module):
  """ResNet for small images: a stem and three stages of blocks.

  Attributes:
    num_classes: Number of classes.
    depth: Blocks in each stage.
    width: Width of the residual stream in the first stage; it doubles twice.
    counts: Channels of the first convolution of each block, forward order.
    gated: Whether those carry gates.
    dtype: Dtype of the computation.
  """

  num_classes: int
  depth: int
  width: int
  counts: tuple[int, ...]
  gated: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    x = layers.ConvBN(self.width, dtype=self.dtype, name='stem')(x, train)
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
  return CifarResNet(num_classes, DEPTHS[name], width, counts, gated, dtype)
