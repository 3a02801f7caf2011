"""The forward functions of the ImageNet families, written again by hand."""

import flax
import jax
import numpy as np
import pytest

from pfs_jax import models
from tests import own_models


class ByHand:
  """Layers in evaluation mode, by the paths of their variables."""

  def __init__(self, variables):
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    self.leaves = {path.partition('/')[2]: leaf for path, leaf in flat.items()}

  def conv(self, x, path, stride=1):
    """Convolution, padded by half of the kernel, and BatchNorm."""
    kernel = self.leaves[f'{path}/conv/kernel']
    scale, bias, mean, var = (
      self.leaves[f'{path}/bn/{name}']
      for name in ('scale', 'bias', 'mean', 'var')
    )
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(kernel.shape[0] // 2,) * 2] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1] // kernel.shape[2],
    )
    return (np.asarray(x) - mean) / np.sqrt(var + 1e-5) * scale + bias

  def logits(self, x):
    kernel, bias = (self.leaves[f'classifier/{n}'] for n in ('kernel', 'bias'))
    return x.mean((1, 2)) @ kernel + bias


def mobilenet_v1(net, x):
  x = np.maximum(net.conv(x, 'stem', 2), 0)
  for i in range(13):
    x = net.conv(x, f'block{i}/depthwise', 2 if i in (1, 3, 5, 11) else 1)
    x = np.maximum(net.conv(np.maximum(x, 0), f'block{i}/pointwise'), 0)
  return net.logits(x)


def mobilenet_v2(net, x):
  x = np.clip(net.conv(x, 'stem', 2), 0, 6)
  for i in range(17):
    y = np.clip(net.conv(x, f'block{i}/expand'), 0, 6) if i else x
    y = net.conv(y, f'block{i}/depthwise', 2 if i in (1, 3, 6, 13) else 1)
    y = net.conv(np.clip(y, 0, 6), f'block{i}/project')
    x = y if i in (0, 1, 3, 6, 10, 13, 16) else x + y
  return net.logits(np.clip(net.conv(x, 'last'), 0, 6))


def resnet50(net, x):
  x = np.pad(
    np.maximum(net.conv(x, 'stem', 2), 0), [(0, 0), (1, 1), (1, 1), (0, 0)]
  )
  side = (x.shape[1] - 1) // 2
  x = np.max(
    [
      x[:, i:, j:][:, ::2, ::2][:, :side, :side]
      for i in range(3)
      for j in range(3)
    ],
    axis=0,
  )
  for stage, depth in enumerate((3, 4, 6, 3), 1):
    for i in range(depth):
      path, stride = f'stage{stage}_block{i}', 2 if stage > 1 and i == 0 else 1
      y = np.maximum(net.conv(x, f'{path}/conv1'), 0)
      y = np.maximum(net.conv(y, f'{path}/conv2', stride), 0)
      y = net.conv(y, f'{path}/conv3')
      x = net.conv(x, f'{path}/shortcut', stride) if i == 0 else x
      x = np.maximum(x + y, 0)
  return net.logits(x)


@pytest.mark.parametrize('by_hand', [mobilenet_v1, mobilenet_v2, resnet50])
def test_logits_are_those_of_layers_written_by_hand(by_hand):
  """In float64, as 50 layers make 1e-7 of one layer 1e-3."""
  with jax.enable_x64(True):
    module = models.build(by_hand.__name__, 7, 8, dtype=np.float64)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    drawn = own_models.drawn(module, x)
    variables = jax.tree.map(np.float64, drawn)
    found = jax.jit(module.apply)(variables, x)
    wanted = by_hand(ByHand(variables), x)
  assert wanted.std() > 0.01
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
