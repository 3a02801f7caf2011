"""CIFAR ResNets (20, 32, 44, 56, 110 layers) and ResNet-50.

Only channels inside a block form groups; the residual stream keeps its full
width. In a CIFAR block these are the channels of the first convolution, in
ResNet-50's bottleneck those of the first and of the second one. Gated layers
are named `stage1_block0/conv1` and so on, in forward order. Only the next
convolution of the same block reads the channels of a gated layer.
"""

import itertools

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


class ResNet(layers.Classifier):
  """A stem, stages of blocks and a linear layer.

  With basic blocks: a 3x3 stem of the first stage's width, for small images.
  With bottlenecks (ResNet-50): a 7x7 stem and a max pool. The stride of a block
  is that of its shortcut and of its first 3x3 convolution.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    conv, counts = self.conv, iter(self.counts)
    bottleneck = self.variant in BOTTLENECKS
    output = OUTPUT if bottleneck else self.width
    if bottleneck:
      x = conv(STEM, kernel=7, stride=2, name='stem')(x, train)
      x = layers.max_pool(nn.relu(x), window=3, stride=2, padding=1)
    else:
      x = nn.relu(conv(self.width, name='stem')(x, train))
    for stage, depth in enumerate(DEPTHS[self.variant]):
      features = max(1, round(output * 2**stage * self.multiplier))
      for block in range(depth):
        stride = 2 if stage > 0 and block == 0 else 1
        project = block == 0 and (stage > 0 or bottleneck)
        widths = (*itertools.islice(counts, 1 + bottleneck), features)
        shapes = {'conv1': (3, stride), 'conv2': (3, 1)}  # Kernel and stride.
        if bottleneck:
          shapes = {'conv1': (1, 1), 'conv2': (3, stride), 'conv3': (1, 1)}
        convs = zip(shapes, widths, shapes.values(), strict=True)
        x = layers.Block(
          tuple((name, width, *shape) for name, width, shape in convs),
          conv,
          residual=True,
          shortcut=(features, 1, stride) if project else (),
          name=f'stage{stage + 1}_block{block}',
        )(x, train)
        x = cpu.computed_once(nn.relu(x))
    return self.linear(layers.GlobalAvgPool()(x), layers.uniform_fan_in)


CLASSES = dict.fromkeys(DEPTHS, ResNet)
