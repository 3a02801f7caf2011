"""CIFAR ResNets (20, 32, 44, 56, 110 layers) and ResNet-50.

Only channels inside a block form groups; the residual stream keeps its full
width. In a CIFAR block these are the channels of the first convolution, in
ResNet-50's bottleneck those of the first and of the second one. Gated layers
are named `stage1_block0/conv1` and so on, in forward order. The next
convolution of the same block reads what a gated one makes, and nothing else
does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import cpu, layers

# Blocks in each stage.
DEPTHS = {
  'resnet20': (3, 3, 3),
  'resnet32': (5, 5, 5),
  'resnet44': (7, 7, 7),
  'resnet56': (9, 9, 9),
  'resnet110': (18, 18, 18),
  'resnet8': (1, 1, 1),  # For tests and first tries.
  'resnet50': (3, 4, 6, 3),
}
BOTTLENECKS = ('resnet50',)
NAMES = tuple(DEPTHS)
DEFAULT_WIDTH, BOTTLENECK_WIDTH = 16, 64
# ResNet-50's stem and the block outputs of its first stage, which double from
# stage to stage. They do not follow the base width.
STEM, OUTPUT = 64, 256


def gate_sizes(name: str, width: int) -> dict[str, int]:
  """{layer name: channels} of the gated layers, forward order."""
  return {
    f'stage{stage + 1}_block{block}/conv{i}': width * 2**stage
    for stage, depth in enumerate(DEPTHS[name])
    for block in range(depth)
    for i in ((1, 2) if name in BOTTLENECKS else (1,))
  }


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut.

  Attributes:
    features: Width of the residual stream.
    hidden: Channels of the first convolution, as a tuple of one.
    stride: Stride of the first convolution and the shortcut.
    project: Whether the shortcut is a 1x1 convolution with BatchNorm.
    conv: `layers.ConvBN` with the network's epsilon and dtype.
  """

  features: int
  hidden: tuple[int, ...]
  stride: int
  project: bool
  conv: Callable[..., layers.ConvBN]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    stride = self.stride
    y = self.conv(self.hidden[0], stride=stride, name='conv1')(x, train)
    y = nn.relu(y)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    y = self.conv(self.features, name='conv2')(y, train)
    if self.project:
      x = self.conv(self.features, 1, stride, name='shortcut')(x, train)
    return cpu.computed_once(nn.relu(x + y))


class Bottleneck(Block):
  """1x1, 3x3 and 1x1 convolution and a shortcut.

  Its attributes are those of `Block`, but `hidden` holds the channels of the
  first and of the second convolution, and the stride is that of the second.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features]."""
    stride = self.stride
    y = nn.relu(self.conv(self.hidden[0], 1, name='conv1')(x, train))
    y = self.conv(self.hidden[1], stride=stride, name='conv2')(y, train)
    y = nn.relu(y)  # Gradient 0 at 0: a gate that reaches 0 stays there.
    y = self.conv(self.features, 1, name='conv3')(y, train)
    if self.project:
      x = self.conv(self.features, 1, stride, name='shortcut')(x, train)
    return cpu.computed_once(nn.relu(x + y))


class ResNet(nn.Module):
  """A stem, stages of blocks and a linear layer.

  With basic blocks: a 3x3 stem of the first stage's width, for small images.
  With bottlenecks (ResNet-50): a 7x7 stem and a max pool; the stride is on the
  3x3 convolution.

  Attributes:
    num_classes: Number of classes.
    depths: Blocks in each stage.
    stem: Channels of the stem.
    outputs: Width of the residual stream in each stage.
    counts: Channels of the gated layers, forward order.
    bottleneck: Whether the blocks are bottlenecks.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  depths: tuple[int, ...]
  stem: int
  outputs: tuple[int, ...]
  counts: tuple[int, ...]
  bottleneck: bool = False
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    conv = functools.partial(
      layers.ConvBN, epsilon=self.epsilon, dtype=self.dtype
    )
    if self.bottleneck:
      x = conv(self.stem, kernel=7, stride=2, name='stem')(x, train)
      x = layers.max_pool(nn.relu(x), window=3, stride=2, padding=1)
    else:
      x = nn.relu(conv(self.stem, name='stem')(x, train))
    counts = iter(self.counts)
    for stage, depth in enumerate(self.depths):
      for block in range(depth):
        x = (Bottleneck if self.bottleneck else Block)(
          features=self.outputs[stage],
          hidden=tuple(next(counts) for _ in range(1 + self.bottleneck)),
          stride=2 if stage > 0 and block == 0 else 1,
          project=block == 0 and (stage > 0 or self.bottleneck),
          conv=conv,
          name=f'stage{stage + 1}_block{block}',
        )(x, train)
    x = layers.GlobalAvgPool()(x)
    return layers.classifier(
      self.num_classes, layers.uniform_fan_in, self.dtype
    )(x)


def build(
  name: str,
  num_classes: int,
  width: int,
  counts: tuple[int, ...],
  multiplier: float,
  dtype: Any,
) -> ResNet:
  """The module; `counts` in the order of `gate_sizes`.

  Args:
    name: A name of `DEPTHS`.
    num_classes: Number of classes.
    width: Base width, that of the first stage. ResNet-50's counts say all.
    counts: Channels of the gated layers.
    multiplier: Widens ResNet-50's block outputs; without effect on others.
    dtype: Dtype of the computation.
  """
  depths, bottleneck = DEPTHS[name], name in BOTTLENECKS
  doubled = [2**stage for stage in range(len(depths))]
  if bottleneck:
    stem = STEM
    outputs = [layers.widened(OUTPUT * times, multiplier) for times in doubled]
  else:
    stem, outputs = width, [width * times for times in doubled]
  return ResNet(
    num_classes,
    depths,
    stem,
    tuple(outputs),
    counts,
    bottleneck=bottleneck,
    dtype=dtype,
  )
