"""VGG16 and VGG19 with BatchNorm, for small images.

Five stages of 3x3 convolutions; the channels of each convolution are a group.
Layers are named conv0 ... conv12 (VGG16) or conv15 (VGG19), in forward order.

A max pool comes before each stage but the first; it is left out if it would
make a side of the map shorter than 2. So 32x32 and 28x28 images end at 2x2 and
3x3, 8x8 images at 2x2. The head averages the last map (2x2 for 32x32, as
published) and is one linear layer.
"""

import flax.linen as nn
import jax

from pfs_jax import layers

# Convolutions in each of the five stages.
DEPTHS = {'vgg16': (2, 2, 3, 3, 3), 'vgg19': (2, 2, 4, 4, 4)}
WIDTHS = dict.fromkeys(DEPTHS, 64)


def gate_sizes(name: str, width: int) -> dict[str, int]:
  """{layer name: channels} of the gated layers, forward order."""
  widths = [
    width * min(2**stage, 8)
    for stage, n in enumerate(DEPTHS[name])
    for _ in range(n)
  ]
  return {f'conv{i}': w for i, w in enumerate(widths)}


class VGG(layers.Classifier):
  """VGG with BatchNorm, whose scales start at 0.5 as published."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[N, H, W, C] -> logits [N, num_classes]."""
    i = 0
    for stage, depth in enumerate(DEPTHS[self.variant]):
      if stage and min(x.shape[1:3]) >= 4:
        x = layers.max_pool(x)
      for _ in range(depth):
        x = self.conv(self.counts[i], scale_init=0.5, name=f'conv{i}')(x, train)
        x = nn.relu(x)  # Gradient 0 at 0: a gate that reaches 0 stays there.
        i += 1
    return self.linear(x.mean(axis=(1, 2)), layers.normal_001)


CLASSES = dict.fromkeys(DEPTHS, VGG)
