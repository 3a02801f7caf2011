"""CIFAR ResNets (20, 32, 44, 56, 110 layers) and ResNet-50.

Only channels inside a block form groups; the residual stream keeps its full
width. In a CIFAR block these are the channels of the first convolution, in
ResNet-50's bottleneck those of the first and of the second one. Gated layers
are named `stage1_block0/conv1` and so on, in forward order. Only the next
convolution of the same block reads the channels of a gated layer.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

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
WIDTHS = {name: 64 if name in BOTTLENECKS else 16 for name in DEPTHS}
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
  """Two 3x3 convolutions and a shortcut, or a bottleneck of 1x1, 3x3 and 1x1.

  The stride is that of the shortcut and of the first 3x3 convolution.

  Attributes:
    features: Width of the residual stream.
    hidden: Channels of all convolutions but the last: one number, or two in a
      bottleneck.
    stride: The stride.
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
    kernels, strides = [3, 3], [self.stride, 1]
    if len(self.hidden) == 2:
      kernels, strides = [1, 3, 1], [1, self.stride, 1]
    widths = (*self.hidden, self.features)
    y = x
    for i, shape in enumerate(zip(widths, kernels, strides, strict=True)):
      if i:  # Gradient 0 at 0: a gate that reaches 0 stays there.
        y = nn.relu(y)
      y = self.conv(*shape, name=f'conv{i + 1}')(y, train)
    if self.project:
      x = self.conv(self.features, 1, self.stride, name='shortcut')(x, train)
    return cpu.computed_once(nn.relu(x + y))


class ResNet(layers.Classifier):
  """A stem, stages of blocks and a linear layer.

  With basic blocks: a 3x3 stem of the first stage's width, for small images.
  With bottlenecks (ResNet-50): a 7x7 stem and a max pool.

  Attributes:
    depths: Blocks in each stage.
    stem: Channels of the stem.
    outputs: Width of the residual stream in each stage.
    bottleneck: Whether the blocks are bottlenecks.
  """

  depths: tuple[int, ...] = ()
  stem: int = 16
  outputs: tuple[int, ...] = ()
  bottleneck: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    conv = self.conv
    if self.bottleneck:
      x = conv(self.stem, kernel=7, stride=2, name='stem')(x, train)
      x = layers.max_pool(nn.relu(x), window=3, stride=2, padding=1)
    else:
      x = nn.relu(conv(self.stem, name='stem')(x, train))
    counts = iter(self.counts)
    for stage, depth in enumerate(self.depths):
      for block in range(depth):
        x = Block(
          features=self.outputs[stage],
          hidden=tuple(next(counts) for _ in range(1 + self.bottleneck)),
          stride=2 if stage > 0 and block == 0 else 1,
          project=block == 0 and (stage > 0 or self.bottleneck),
          conv=conv,
          name=f'stage{stage + 1}_block{block}',
        )(x, train)
    return self.linear(layers.GlobalAvgPool()(x), layers.uniform_fan_in)


def build(name: str, width: int, multiplier: float, **fields: Any) -> ResNet:
  """The module; `fields` are those of `layers.Classifier`.

  Args:
    name: A name of `DEPTHS`.
    width: Base width, that of the first stage; ResNet-50 uses counts alone.
    multiplier: Widens ResNet-50's block outputs; without effect on others.
    **fields: Number of classes, counts and dtype.
  """
  bottleneck = name in BOTTLENECKS
  stem, output = (STEM, OUTPUT) if bottleneck else (width, width)
  return ResNet(
    depths=DEPTHS[name],
    stem=stem,
    outputs=tuple(
      max(1, round(output * 2**stage * multiplier))
      for stage in range(len(DEPTHS[name]))
    ),
    bottleneck=bottleneck,
    **fields,
  )
