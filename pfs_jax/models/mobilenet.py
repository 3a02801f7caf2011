"""MobileNetV1 and MobileNetV2.

Both alternate dense convolutions, which mix channels, with depthwise ones,
which do not. A depthwise convolution has the channels of the dense one before
it, so the two share one channel group with one gate for each channel. Groups
are named after the dense convolution that makes the channels; the next dense
convolution or the classifier reads them:

  V1 group               depthwise convolution  read by
  stem                   block0/depthwise       block0/pointwise
  block{i}/pointwise     block{i+1}/depthwise   block{i+1}/pointwise
  block12/pointwise      none                   classifier

  V2 group               depthwise convolution  read by
  stem                   block0/depthwise       block0/project
  block{i}/expand        block{i}/depthwise     block{i}/project
  last                   none                   classifier

V1 has the blocks 0..12. V2 has 0..16, of which block 0 has no expansion. V2's
block outputs, which the residual additions add up, are not gated.

A group has two BatchNorms. The table of groups decides which of them carries
the gates (`registry.GATE_SITES`, docs/gate_sites.md).
"""

import flax.linen as nn
import jax

from pfs_jax import cpu, layers

DEFAULT_WIDTH = 32
WIDTHS = dict.fromkeys(('mobilenet_v1', 'mobilenet_v2'), DEFAULT_WIDTH)

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
# (expansion, width, stride, residual) of each of the 17 blocks.
V2_BLOCKS = tuple(
  (expansion, width, stride if i == 0 else 1, i > 0)
  for expansion, width, blocks, stride in V2_STAGES
  for i in range(blocks)
)
V2_LAST = 1280


def gate_sizes(name: str, width: int) -> dict[str, int]:
  """{group name: channels}, forward order.

  In V2 the hidden width of a block is its expansion times the default width of
  its input, in proportion to the base width and independent of `multiplier`. It
  is rounded down.
  """
  sizes = {'stem': width}
  if name == 'mobilenet_v1':
    for i, (multiple, _) in enumerate(V1_BLOCKS):
      sizes[f'block{i}/pointwise'] = width * multiple
    return sizes
  inputs = 0
  for i, (expansion, features, *_) in enumerate(V2_BLOCKS):
    if i:
      sizes[f'block{i}/expand'] = expansion * inputs * width // DEFAULT_WIDTH
    inputs = features
  return {**sizes, 'last': V2_LAST * width // DEFAULT_WIDTH}


class MobileNetV1(layers.Classifier):
  """A stem and 13 separable blocks."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    conv = self.conv
    x = nn.relu(conv(self.counts[0], stride=2, name='stem')(x, train))
    for i, (_, stride) in enumerate(V1_BLOCKS):
      channels, features = self.counts[i : i + 2]
      convs = (
        ('depthwise', channels, 3, stride, channels),
        ('pointwise', features, 1),
      )
      x = nn.relu(layers.Block(convs, conv, name=f'block{i}')(x, train))
    return self.linear(layers.GlobalAvgPool()(x), layers.normal_001)


class MobileNetV2(layers.Classifier):
  """A stem, 17 inverted residual blocks and a last 1x1 convolution.

  Block 0's hidden width is the stem's. ReLU6 follows all but the projections.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    conv = self.conv
    x = nn.relu6(conv(self.counts[0], stride=2, name='stem')(x, train))
    for i, (_, features, stride, residual) in enumerate(V2_BLOCKS):
      hidden = self.counts[i]
      convs = (
        *[('expand', hidden, 1)] * (i > 0),
        ('depthwise', hidden, 3, stride, hidden),
        ('project', max(1, round(features * self.multiplier)), 1),
      )
      block = layers.Block(convs, conv, nn.relu6, residual, name=f'block{i}')
      x = block(x, train)
      x = cpu.computed_once(x) if residual else x
    x = nn.relu6(conv(self.counts[-1], 1, name='last')(x, train))
    return self.linear(layers.GlobalAvgPool()(x), layers.normal_001)


CLASSES = {'mobilenet_v1': MobileNetV1, 'mobilenet_v2': MobileNetV2}
