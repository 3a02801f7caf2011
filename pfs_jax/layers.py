"""What the built-in families share: layers, pooling, and a base class."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import cpu

# PyTorch's default for the weights of a linear layer: +-1 / sqrt(fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
normal_001 = nn.initializers.normal(0.01)


def conv_init(
  key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
  """N(0, sqrt(2 / (k * k * C_out))) for [k, k, C_in / groups, C_out].

  Drawn in vectors whose lengths are powers of two (at least 2**16) and cut to
  size: each distinct random shape costs about a second of compilation, and a
  narrow network has a shape of its own in every layer.
  """
  size = math.prod(shape)
  length = 1 << max(16, (size - 1).bit_length())
  drawn = jax.random.normal(key, (length,), dtype)
  fan_out = math.prod(shape[:-2]) * shape[-1]
  return (drawn[:size] * math.sqrt(2 / fan_out)).reshape(shape)


def param_dtype(dtype: Any) -> Any:
  """Dtype of parameters, gates and statistics: `dtype`, at least float32."""
  return jnp.promote_types(dtype, jnp.float32)


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
    """[..., C] -> [..., C]; with a mask, `nn.BatchNorm` computes it."""
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
  """Square convolution without bias, and BatchNorm; no activation.

  Collections and their shapes, C = features:

    params       conv/kernel [k, k, C_in / groups, C], bn/scale [C], bn/bias [C]
    batch_stats  bn/mean [C], bn/var [C]

  Padding is k // 2 on each side ('SAME' pads differently at stride 2). A step
  keeps 0.9 of the running statistics (PyTorch's momentum 0.1). The variance is
  biased, and computed in two passes: the fast formula is badly wrong where the
  mean is far larger than the deviation. `gating` adds the gates.

  Attributes:
    features: Output channels C.
    kernel: Side k of the kernel, odd.
    stride: Stride.
    groups: Feature groups; C_in for a depthwise convolution.
    scale_init: Start of BatchNorm's scale.
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
    """[N, H, W, C_in] -> [N, H', W', C]."""
    x = nn.Conv(
      self.features,
      (self.kernel, self.kernel),
      strides=(self.stride, self.stride),
      padding=[(self.kernel // 2, self.kernel // 2)] * 2,
      feature_group_count=self.groups,
      conv_general_dilated=cpu.convolution,
      use_bias=False,
      kernel_init=conv_init,
      dtype=self.dtype,
      param_dtype=param_dtype(self.dtype),
      name='conv',
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


class Block(nn.Module):
  """`ConvBN`s in a row, with activations between them, and a sum around them.

  All widths are given, and none is derived from another one: after a cut, a
  hidden width can equal the input's.

  Attributes:
    convs: (name, features, kernel, stride, groups) of each, or the first of it.
    conv: `ConvBN` with the network's epsilon and dtype.
    activation: Has gradient 0 at 0: a gate that reaches 0 stays there.
    residual: Whether the input is added to the output.
    shortcut: (features, kernel, stride) of a convolution of the input; () for
      none.
  """

  convs: tuple[tuple[Any, ...], ...]
  conv: Callable[..., ConvBN]
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  residual: bool = False
  shortcut: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', features of the last one]."""
    y = x
    for i, (name, *fields) in enumerate(self.convs):
      y = self.activation(y) if i else y
      y = self.conv(*fields, name=name)(y, train)
    if self.shortcut:
      x = self.conv(*self.shortcut, name='shortcut')(x, train)
    return x + y if self.residual else y


class GlobalAvgPool(nn.Module):
  """Mean over all positions, [N, H, W, C] -> [N, C].

  Its input elements count as MACs, as in the published implementation.
  """

  macs_per_input = 1

  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, C]."""
    return x.mean(axis=(1, 2))


def max_pool(
  x: jax.Array, window: int = 2, stride: int = 2, padding: int = 0
) -> jax.Array:
  """Max pooling, [N, H, W, C] -> [N, H', W', C]; padding counts as -infinity.

  The gradient goes to the first of equal values, row by row.
  """
  if (window, stride, padding) == (2, 2, 0):
    return cpu.max_pool_2x2(x)
  return nn.max_pool(
    x, (window, window), (stride, stride), [(padding, padding)] * 2
  )


class Classifier(nn.Module):
  """The base class of the networks of all families.

  Attributes:
    num_classes: Number of classes.
    counts: Channels of the groups, in the order of the family's `gate_sizes`.
    variant: The name in the registry.
    width: Base width, where the counts do not say all.
    multiplier: Widens block outputs, in the families that allow it.
    epsilon: BatchNorm's epsilon.
    dtype: Dtype of the computation.
  """

  num_classes: int
  counts: tuple[int, ...]
  variant: str = ''
  width: int = 0
  multiplier: float = 1.0
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @property
  def conv(self) -> Callable[..., ConvBN]:
    """`ConvBN` with the network's epsilon and dtype."""
    return functools.partial(ConvBN, epsilon=self.epsilon, dtype=self.dtype)

  def linear(
    self, x: jax.Array, kernel_init: nn.initializers.Initializer
  ) -> jax.Array:
    """The last layer, [N, C] -> logits [N, num_classes], at least float32."""
    return nn.Dense(
      self.num_classes,
      kernel_init=kernel_init,
      dtype=param_dtype(self.dtype),
      param_dtype=param_dtype(self.dtype),
      name='classifier',
    )(x)
