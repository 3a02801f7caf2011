"""Faster forms of convolutions and pooling for XLA's CPU backend.

XLA runs some operations on CPU many times slower than equal ones. Each function
here takes the place of such an operation. It holds the plain operation and a
CPU form of it, and `jax.lax.platform_dependent` chooses when the program is
lowered, so that programs for GPU and TPU hold the plain operation. Both forms
compute the same numbers up to rounding. Only reverse-mode differentiation
works, because the gradients are stated (`jax.custom_vjp`). Measurements:
docs/speed.md.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


def compiler_options() -> dict[str, str]:
  """Options of `jax.jit` for a program that computes gradients.

  XLA's library of newer CPU kernels (YNN) runs reductions about 20 times faster
  and the gradients of small convolutions about twice as slowly. On CPU it is
  kept for reductions alone. XLA removes optimisation barriers before it fuses
  operations; without that pass they keep what stands before them from being
  computed again by each consumer. There are no options elsewhere.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
    'xla_disable_hlo_passes': 'cse_barrier_expander',
  }


@jax.custom_vjp
def computed_once(x: jax.Array) -> jax.Array:
  """`x`; on CPU its consumers read it, and do not compute it again.

  XLA copies cheap operations into each of their consumers. Along a residual
  stream each block would compute all blocks before it again. The gradient with
  respect to `x` is computed once, too.
  """
  return jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )


def _computed_once_forward(x):
  return computed_once(x), None


def _computed_once_backward(_, g):
  return (computed_once(g),)


computed_once.defvjp(_computed_once_forward, _computed_once_backward)


# Convolutions.

# What `flax.linen.Conv` asks for over two axes: NHWC, HWIO, NHWC.
_CHANNELS_LAST = jax.lax.ConvDimensionNumbers(
  (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
)


class _Window(NamedTuple):
  """All of a convolution but its two operands; can be hashed."""

  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  rest: tuple[tuple[str, Any], ...]

  def plain(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      x, kernel, self.strides, self.padding, **dict(self.rest)
    )

  def cpu(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    rest = dict(self.rest)
    groups, numbers = rest['feature_group_count'], rest['dimension_numbers']
    if (
      numbers != _CHANNELS_LAST
      or {*rest['lhs_dilation'], *rest['rhs_dilation']} != {1}
      or rest['precision'] is not None
    ):
      return self.plain(x, kernel)
    if groups == x.shape[-1] == kernel.shape[-1] > 1:
      return _shifted(x, kernel, self.strides, self.padding)
    if groups == 1 and math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3]):
      return _taps(x, kernel, self.strides, self.padding)
    return self.plain(x, kernel)


def convolution(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, faster on CPU, above all its gradients.

  Made for the field `conv_general_dilated` of `flax.linen.Conv`. The arguments
  are those of `jax.lax.conv_general_dilated`.

  >>> x, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 5))
  >>> layout = ('NHWC', 'HWIO', 'NHWC')
  >>> y = convolution(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)
  >>> y.shape, float(y[0, 0, 0, 0])  # Four pixels of three channels.
  ((1, 2, 2, 5), 12.0)
  """
  numbers = jax.lax.conv_dimension_numbers(
    lhs.shape, rhs.shape, dimension_numbers
  )
  ones = (1,) * (lhs.ndim - 2)
  lhs_dilation = tuple(lhs_dilation or ones)
  rhs_dilation = tuple(rhs_dilation or ones)
  if isinstance(padding, str):
    sides = [lhs.shape[i] for i in numbers.lhs_spec[2:]]
    kernel = [
      (rhs.shape[i] - 1) * d + 1
      for i, d in zip(numbers.rhs_spec[2:], rhs_dilation, strict=True)
    ]
    padding = jax.lax.padtype_to_pads(sides, kernel, window_strides, padding)
  rest = {
    'lhs_dilation': lhs_dilation,
    'rhs_dilation': rhs_dilation,
    'dimension_numbers': numbers,
    'feature_group_count': feature_group_count,
    'precision': precision,
  }
  pads = tuple((int(low), int(high)) for low, high in padding)
  window = _Window(tuple(window_strides), pads, tuple(rest.items()))
  return _convolution(lhs, rhs, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x, kernel, window: _Window) -> jax.Array:
  return jax.lax.platform_dependent(
    x, kernel, cpu=window.cpu, default=window.plain
  )


def _convolution_forward(x, kernel, window: _Window):
  return _convolution(x, kernel, window), (x, kernel)


def _convolution_backward(window: _Window, operands, g):
  def plain(x, kernel, g):
    return jax.vjp(window.plain, x, kernel)[1](g)

  def cpu(x, kernel, g):
    # XLA transposes both for the kernel's gradient, and would compute what
    # comes before, normalisation and activation, again for each transpose.
    x, g = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(g)
    return jax.vjp(window.cpu, x, kernel)[1](g)

  return jax.lax.platform_dependent(*operands, g, cpu=cpu, default=plain)


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _shifted(x, kernel, strides, padding) -> jax.Array:
  """A depthwise convolution as a sum of shifted products.

  XLA's grouped convolution on CPU was seen to be 10 to 30 times slower, forward
  and backward (2 cores, 32x16x16x32: 9 against 0.4 ms).
  """
  rows, columns, _, channels = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  n, height, width, _ = x.shape
  total: Any = 0
  for i, j in itertools.product(range(rows), range(columns)):
    stop = (n, height - rows + 1 + i, width - columns + 1 + j, channels)
    taken = jax.lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1))
    total += taken * kernel[i : i + 1, j : j + 1]
  return total


def _taps(x, kernel, strides, padding) -> jax.Array:
  """A convolution whose kernel has more taps than its image has pixels.

  XLA on CPU exchanges image and kernel and then takes a path that is 30 times
  slower. Here each output pixel is one product of the pixels that it sees with
  the taps that see them: also 2.25 times fewer operations for a 3x3 kernel on
  2x2 pixels, and 9 times fewer on one pixel.
  """
  n, features = x.shape[0], kernel.shape[-1]  # n may be symbolic (export).
  rows, columns = (
    _seen(*sizes)
    for sizes in zip(x.shape[1:3], kernel.shape, strides, padding, strict=False)
  )
  pixels = []
  for (r, a), (s, b) in itertools.product(rows, columns):
    taps = kernel[a, b].reshape(-1, features)
    pixels.append(x[:, r, s].reshape(n, len(taps)) @ taps)
  shape = (n, len(rows), len(columns), features)
  return jnp.stack(pixels, 1).reshape(shape)


def _seen(side, taps, stride, padding) -> list[tuple[slice, slice]]:
  """(pixels seen, taps that see them) of each output along one axis."""
  found = []
  for first in range(-padding[0], side + padding[1] - taps + 1, stride):
    low = min(max(first, 0), side)
    high = max(low, min(first + taps, side))
    found.append((slice(low, high), slice(low - first, high - first)))
  return found


# Normalisation.


def _plain_norm(x, scale, bias, epsilon: float):
  """(normalised x, mean, variance) over all axes but the last."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes, dtype)
  centred = x - jnp.expand_dims(mean, axes)
  var = (centred * centred).mean(axes)
  factor = jax.lax.rsqrt(var + epsilon) * scale
  y = centred * jnp.expand_dims(factor, axes) + jnp.expand_dims(bias, axes)
  return y.astype(x.dtype), mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises by the statistics of the batch.

  On CPU the gradient takes two sums over the images instead of four, and reads
  x - mean, which is kept, instead of computing it again.

  Args:
    x: [..., C]; the statistics are at least float32.
    scale: [C].
    bias: [C].
    epsilon: Is added to the variance.

  Returns:
    (y like x, mean [C], biased variance [C], computed in two passes). Only y
    has gradients.
  """
  return _plain_norm(x, scale, bias, epsilon)


def _batch_norm_forward(x, scale, bias, epsilon: float):
  def plain(x, scale, bias):
    return *_plain_norm(x, scale, bias, epsilon), x

  def cpu(x, scale, bias):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, dtype)
    centred = jax.lax.optimization_barrier(x - jnp.expand_dims(mean, axes))
    var = (centred * centred).mean(axes)
    factor = jax.lax.rsqrt(var + epsilon) * scale
    y = centred * jnp.expand_dims(factor, axes) + jnp.expand_dims(bias, axes)
    return y.astype(x.dtype), mean, var, centred.astype(x.dtype)

  y, mean, var, kept = jax.lax.platform_dependent(
    x, scale, bias, cpu=cpu, default=plain
  )
  return (y, mean, var), (kept, scale, bias, var)


def _batch_norm_backward(epsilon: float, residuals, gradients):
  def plain(x, scale, bias, var, g):
    del var

    def normalised(x, scale, bias):
      return _plain_norm(x, scale, bias, epsilon)[0]

    return jax.vjp(normalised, x, scale, bias)[1](g)

  def cpu(centred, scale, bias, var, g):
    g = jax.lax.optimization_barrier(g)
    axes = tuple(range(g.ndim - 1))
    n = math.prod(g.shape[:-1])
    deviation = jax.lax.rsqrt(var + epsilon)
    total = g.sum(axes, var.dtype)
    along = (g * centred).sum(axes, var.dtype)
    slope = jnp.expand_dims(along * deviation**2 / n, axes)
    mean = jnp.expand_dims(total / n, axes)
    factor = jnp.expand_dims(scale * deviation, axes)
    dx = (factor * (g - mean - centred * slope)).astype(g.dtype)
    dscale = (along * deviation).astype(scale.dtype)
    return dx, dscale, total.astype(bias.dtype)

  return jax.lax.platform_dependent(
    *residuals, gradients[0], cpu=cpu, default=plain
  )


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


# Pooling.


def _plain_2x2(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (2, 2), (2, 2))


@jax.custom_vjp
def max_pool_2x2(x: jax.Array) -> jax.Array:
  """Max pooling over 2x2 windows that do not overlap, [N, H, W, C].

  A last odd row or column is left out. On CPU the gradient is a selection:
  XLA's gradient of pooling was seen to be 10 to 20 times slower (1 core,
  128x28x28x15: 18.7 against 1.0 ms, the same bits).
  """
  return _plain_2x2(x)


def _max_pool_2x2_forward(x):
  y = _plain_2x2(x)
  return y, (x, y)


def _max_pool_2x2_backward(residuals, g):
  def transposed(x, y, g):
    del y
    return jax.vjp(_plain_2x2, x)[1](g)[0]

  def selected(x, y, g):
    n, height, width, channels = x.shape
    rows, columns = y.shape[1:3]
    inside = x[:, : 2 * rows, : 2 * columns]
    a, b, c = (inside[:, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0)))
    first = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    hit = first[:, :, None, :, None] == place
    dx = jnp.where(hit, g[:, :, None, :, None], 0).reshape(
      n, 2 * rows, 2 * columns, channels
    )
    # Kept apart from what comes next, which would compute it again.
    dx = jax.lax.optimization_barrier(dx)
    beside = ((0, 0), (0, height - 2 * rows), (0, width - 2 * columns), (0, 0))
    return jnp.pad(dx, beside)

  return (
    jax.lax.platform_dependent(*residuals, g, cpu=selected, default=transposed),
  )


max_pool_2x2.defvjp(_max_pool_2x2_forward, _max_pool_2x2_backward)
