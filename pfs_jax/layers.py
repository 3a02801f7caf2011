"""Building blocks: convolution + BatchNorm, pooling, initialisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import cpu


def conv_init(
  key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
  """N(0, sqrt(2 / (k * k * C_out))) for [k, k, C_in / groups, C_out].

  Drawn in vectors whose lengths are powers of two (at least 2**16) and cut to
  size: each distinct random shape costs about a second of compilation, and a
  narrow network has a shape of its own in every layer.
  """
  size = math.prod(shape)
  drawn = jax.random.normal(
    key, (1 << max(16, (size - 1).bit_length()),), dtype
  )
  fan_out = math.prod(shape[:-2]) * shape[-1]
  return (drawn[:size] * math.sqrt(2 / fan_out)).reshape(shape)


def param_dtype(dtype: Any) -> Any:
  """Parameters, gates and statistics: float32, or float64 if computing so."""
  return jnp.promote_types(dtype, jnp.float32)


def conv(
  features: int,
  kernel: int,
  stride: int = 1,
  groups: int = 1,
  dtype: Any = jnp.float32,
  name: str | None = None,
) -> nn.Conv:
  """A square convolution without bias, padded by kernel // 2 on each side.

  Never 'SAME', which pads differently at stride 2.
  """
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=[(kernel // 2, kernel // 2)] * 2,
    feature_group_count=groups,
    conv_general_dilated=cpu.convolution,
    use_bias=False,
    kernel_init=conv_init,
    dtype=dtype,
    param_dtype=param_dtype(dtype),
    name=name,
  )


class BatchNorm(nn.BatchNorm):
  """`nn.BatchNorm` over all axes but the last, by `cpu.batch_norm`."""

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """[..., C] -> [..., C]; with a mask as `nn.BatchNorm` does it."""
    running = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    if running or mask is not None:
      return super().__call__(x, use_running_average, mask=mask)
    size, dtype = x.shape[-1:], self.param_dtype
    averages = [
      self.variable('batch_stats', name, start, size, jnp.float32)
      for name, start in (('mean', jnp.zeros), ('var', jnp.ones))
    ]
    scale = self.param('scale', self.scale_init, size, dtype)
    bias = self.param('bias', self.bias_init, size, dtype)
    y, *statistics = cpu.batch_norm(
      x.astype(self.dtype), scale, bias, self.epsilon
    )
    if not self.is_initializing():
      for kept, new in zip(averages, statistics, strict=True):
        kept.value = self.momentum * kept.value + (1 - self.momentum) * new
    return y


class ConvBN(nn.Module):
  """Convolution and BatchNorm.

  Collections and their shapes, C = features:

    params       conv/kernel [k, k, C_in / groups, C], bn/scale [C], bn/bias [C]
    batch_stats  bn/mean [C], bn/var [C]

  A gate multiplies BatchNorm's output in the searched network, so the scale
  that acts is gate * scale (paper, section 3.1). Gates are no part of this
  module: `gating` puts them on, for our families as for any other model.

  BatchNorm: eps 1e-5, running statistics keep 0.9 a step (PyTorch's momentum
  0.1), biased variance, computed in two passes (the fast formula is badly wrong
  where the mean is far larger than the deviation).

  Attributes:
    features: Output channels C.
    kernel: Side of the kernel, odd.
    stride: Stride.
    groups: Feature groups; C_in for a depthwise convolution.
    scale_init: Start of BatchNorm's scale (VGG: 0.5).
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation; parameters are at least float32.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  groups: int = 1
  scale_init: float = 1.0
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C_in] -> [N, H', W', C], no activation."""
    x = conv(
      self.features, self.kernel, self.stride, self.groups, self.dtype, 'conv'
    )(x)
    return BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=self.epsilon,
      use_fast_variance=False,
      scale_init=nn.initializers.constant(self.scale_init),
      dtype=self.dtype,
      param_dtype=param_dtype(self.dtype),
      name='bn',
    )(x)


def widened(features: int, multiplier: float) -> int:
  """`features * multiplier`, rounded half to even, at least 1."""
  return max(1, round(features * multiplier))


class GlobalAvgPool(nn.Module):
  """Mean over all positions, [N, H, W, C] -> [N, C].

  Counted as its input elements, as in the published implementation.
  """

  macs_per_input = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, C]."""
    return x.mean(axis=(1, 2))


def max_pool(
  x: jax.Array, window: int = 2, stride: int = 2, padding: int = 0
) -> jax.Array:
  """Max pooling, [N, H, W, C] -> [N, H', W', C]; the padding never wins.

  The gradient goes to the first of equal values, row by row.
  """
  if (window, stride, padding) == (2, 2, 0):
    return cpu.max_pool_2x2(x)
  return nn.max_pool(
    x, (window, window), (stride, stride), [(padding, padding)] * 2
  )


def classifier(
  num_classes: int, kernel_init: nn.initializers.Initializer, dtype: Any
) -> nn.Dense:
  """The last linear layer; logits are at least float32."""
  return nn.Dense(
    num_classes,
    kernel_init=kernel_init,
    bias_init=nn.initializers.zeros,
    dtype=param_dtype(dtype),
    param_dtype=param_dtype(dtype),
    name='classifier',
  )


# PyTorch's default for the weights of a linear layer: +-1 / sqrt(fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
normal_001 = nn.initializers.normal(0.01)
