"""Faster forms of convolutions, BatchNorm and pooling for XLA's CPU backend.

XLA runs some operations on CPU many times slower than equal ones. Each function
here holds the plain operation and a CPU form that computes the same numbers up
to rounding; `jax.lax.platform_dependent` chooses when the program is lowered,
so that programs for GPU and TPU hold the plain operation. Only reverse-mode
differentiation works, because `jax.custom_vjp` defines the gradients.
Measurements: docs/speed.md.
"""

import ctypes
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# What `flax.linen.Conv` asks for over two axes: NHWC, HWIO, NHWC.
_CHANNELS_LAST = lax.ConvDimensionNumbers(
  (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
)
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def compiler_options() -> dict[str, str]:
  """Options of `jax.jit` for a program that computes gradients.

  XLA's library of newer CPU kernels (YNN) runs reductions about 20 times faster
  and the gradients of small convolutions about twice as slowly. On CPU it is
  used for reductions alone. XLA removes optimisation barriers before it fuses
  operations. Without that pass, a barrier keeps its consumers from computing
  its input again. On other devices there are no options.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
    'xla_disable_hlo_passes': 'cse_barrier_expander',
  }


def options_to_run_once() -> dict[str, int]:
  """Options of `jax.jit` for a program that computes less than it compiles.

  XLA compiles random draws of small arrays slowly. For six convolutions of at
  most 8 channels, these options save 11.6 of 14 s of CPU time, and the bits are
  the same. There are none on other devices, or if XLA_FLAGS sets a level.
  """
  level = 'xla_backend_optimization_level'
  stated = f'--{level}=' in os.environ.get('XLA_FLAGS', '')
  return {} if stated or jax.default_backend() != 'cpu' else {level: 1}


def keep_freed_memory() -> None:
  """Lets this process keep the memory that it frees (Linux with glibc only).

  XLA allocates the intermediate arrays of a program in each call. glibc would
  return blocks of this size to the system, which then clears every page again.
  That takes 20 to 50 % of a step. Call this before JAX computes anything. Steps
  of small networks get up to twice as slow, as all threads share one arena.
  """
  if sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt'):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # Never trim.
    mallopt(_M_ARENA_MAX, 1)  # A thread's own arena holds no large blocks.


def computed_once(x: jax.Array) -> jax.Array:
  """Returns `x`; on CPU, no consumer of `x` computes it again.

  XLA copies cheap operations into each of their consumers. Along a residual
  stream, each block would therefore compute all earlier blocks again. The
  gradient with respect to `x` is computed once, too.
  """
  return lax.platform_dependent(
    x, cpu=lax.optimization_barrier, default=lambda x: x
  )


# Convolutions.


def convolution(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **rest: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, faster on CPU, especially its gradients.

  It is meant for the field `conv_general_dilated` of `flax.linen.Conv`. The
  arguments are those of `jax.lax.conv_general_dilated`.

  >>> x, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 5))
  >>> layout = ('NHWC', 'HWIO', 'NHWC')
  >>> y = convolution(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)
  >>> y.shape, float(y[0, 0, 0, 0])  # Four pixels of three channels.
  ((1, 2, 2, 5), 12.0)
  """
  pads = padding if isinstance(padding, str) else tuple(map(tuple, padding))
  settings = tuple(
    (name, tuple(value) if isinstance(value, list) else value)
    for name, value in rest.items()
  )
  shapes = lhs.shape, rhs.shape
  call = _convolution(*shapes, tuple(window_strides), pads, settings)
  return call(lhs, rhs)


@functools.lru_cache(maxsize=1024)  # JAX traces the same function once.
def _convolution(image, window, strides, padding, settings) -> Callable:
  """(x, kernel) -> output for operands of these shapes."""
  rest = dict(settings)

  def plain(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, **rest)

  cpu = _cpu_form(image, window, strides, padding, **rest) or plain

  def plain_backward(x, kernel, g):
    return jax.vjp(plain, x, kernel)[1](g)

  def cpu_backward(x, kernel, g):
    # XLA transposes both for the kernel's gradient. The barriers keep it from
    # computing normalisation and activation again for each transpose.
    x, g = lax.optimization_barrier(x), lax.optimization_barrier(g)
    dx, dkernel = jax.vjp(cpu, x, kernel)[1](g)
    return lax.optimization_barrier(dx), dkernel

  @jax.custom_vjp
  def call(x, kernel):
    if cpu is plain:
      return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=plain)

  def backward(operands, g):
    return lax.platform_dependent(
      *operands, g, cpu=cpu_backward, default=plain_backward
    )

  call.defvjp(lambda x, kernel: (call(x, kernel), (x, kernel)), backward)
  return call


def _cpu_form(
  image,
  window,
  strides,
  padding,
  dimension_numbers=None,
  feature_group_count=1,
  **rest,
) -> Callable | None:
  """The faster (x, kernel) -> output for operands of these shapes, if any."""
  numbers = lax.conv_dimension_numbers(image, window, dimension_numbers)
  special = {
    name
    for name, value in rest.items()
    if value is not None and not (name.endswith('dilation') and {*value} == {1})
  }
  if special or numbers != _CHANNELS_LAST:
    return None
  *taps, _, features = window
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(image[1:3], taps, strides, padding)
  given = {'strides': strides, 'padding': padding}
  if feature_group_count == image[-1] == features > 1:
    return functools.partial(_sum_of_shifts, **given)
  # Small products gain nothing; with many pixels, only large products gain.
  pixels, width = math.prod(image[1:3]), min(window[2:])
  limit = 2 if width >= 256 else int(width >= 32)
  if feature_group_count == 1 and pixels < limit * math.prod(taps):
    return functools.partial(_sum_over_taps, **given)
  return None


def _sum_of_shifts(x, kernel, strides, padding) -> jax.Array:
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
    taken = lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1))
    total += _scaled(taken, kernel[i, j, 0])
  return total


@jax.custom_vjp
def _scaled(x, tap):
  """[N, H, W, C] times [C]."""
  return x * tap[None, None, None]


def _scaled_backward(operands, g):
  x, tap = operands
  # XLA writes the product to memory before it sums it. Here up to eight images
  # are added first, so that only an eighth is written (2 to 4 times faster).
  product = x * g
  for _ in range(3):
    half, odd = divmod(len(product), 2)
    if not odd:
      product = product[:half] + product[half:]
  return _scaled(g, tap), lax.optimization_barrier(product).sum((0, 1, 2))


_scaled.defvjp(lambda x, tap: (_scaled(x, tap), (x, tap)), _scaled_backward)


def _sum_over_taps(x, kernel, strides, padding) -> jax.Array:
  """A convolution on few pixels as a sum of products, one for each tap.

  If the kernel has more taps than the image has pixels, XLA on CPU swaps the
  two and then runs 30 times slower. Each product here uses only the pixels that
  its tap meets inside the image. For a 3x3 kernel this divides the number of
  operations by 1.4 on 4x4 pixels, by 2.25 on 2x2, and by 9 on one pixel.
  """
  taps = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
  total: Any = 0
  for tap in taps:
    pixels, beside = zip(
      *map(_tap_pixels, tap, x.shape[1:3], kernel.shape, strides, padding),
      strict=True,
    )
    product = x[:, *pixels] @ kernel[tap]
    total += jnp.pad(product, ((0, 0), *beside, (0, 0)))
  return total


def _tap_pixels(tap, side, taps, stride, padding) -> tuple[slice, tuple]:
  """Along one axis: (pixels that a tap meets, outputs before and after)."""
  before, after = padding
  outputs = (before + side + after - taps) // stride + 1
  starts = range(tap - before, tap - before + stride * outputs, stride)
  inside = [i for i, pixel in enumerate(starts) if 0 <= pixel < side]
  if not inside:
    return slice(0), (outputs, 0)
  first, last = inside[0], inside[-1]
  pixels = slice(starts[first], starts[last] + 1, stride)
  return pixels, (first, outputs - 1 - last)


# Normalisation.


def _norm(x, scale, bias, epsilon: float, keep=lambda centred: centred):
  """(y, mean, variance, x - mean) over all axes but the last."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes, dtype)
  centred = keep(x - jnp.expand_dims(mean, axes))
  var = (centred * centred).mean(axes)
  factor = lax.rsqrt(var + epsilon) * scale
  y = centred * jnp.expand_dims(factor, axes) + jnp.expand_dims(bias, axes)
  return y.astype(x.dtype), mean, var, centred.astype(x.dtype)


def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises [..., C] by the statistics of the batch.

  On CPU the gradient takes two sums over the images instead of four, and reads
  the stored x - mean instead of computing it again.

  Returns:
    (y like x, mean [C], biased variance [C], computed in two passes). The
    statistics are at least float32. Only y has gradients.
  """
  return _batch_norm(epsilon)(x, scale, bias)


@functools.cache  # As for `_convolution`.
def _batch_norm(epsilon: float) -> Callable:
  """`batch_norm` with this epsilon."""

  def plain(x, scale, bias):
    return *_norm(x, scale, bias, epsilon)[:3], x

  def cpu(x, scale, bias):
    return _norm(x, scale, bias, epsilon, lax.optimization_barrier)

  def plain_backward(x, scale, bias, _, g):
    def normalised(x, scale, bias):
      return _norm(x, scale, bias, epsilon)[0]

    return jax.vjp(normalised, x, scale, bias)[1](g)

  def cpu_backward(centred, scale, bias, var, g):
    g = lax.optimization_barrier(g)
    axes = tuple(range(g.ndim - 1))
    n = math.prod(g.shape[:-1])
    deviation = lax.rsqrt(var + epsilon)
    total = g.sum(axes, var.dtype)
    along = (g * centred).sum(axes, var.dtype)
    slope = jnp.expand_dims(along * deviation**2 / n, axes)
    mean = jnp.expand_dims(total / n, axes)
    factor = jnp.expand_dims(scale * deviation, axes)
    dx = (factor * (g - mean - centred * slope)).astype(g.dtype)
    dscale = (along * deviation).astype(scale.dtype)
    return dx, dscale, total.astype(bias.dtype)

  @jax.custom_vjp
  def call(x, scale, bias):
    return _norm(x, scale, bias, epsilon)[:3]

  def forward(x, scale, bias):
    y, mean, var, kept = lax.platform_dependent(
      x, scale, bias, cpu=cpu, default=plain
    )
    return (y, mean, var), (kept, scale, bias, var)

  def backward(residuals, gradients):
    return lax.platform_dependent(
      *residuals, gradients[0], cpu=cpu_backward, default=plain_backward
    )

  call.defvjp(forward, backward)
  return call


# Pooling.


_plain_2x2 = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))


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
  return lax.platform_dependent(
    *residuals, g, cpu=_cpu_backward_2x2, default=_plain_backward_2x2
  )


def _plain_backward_2x2(x, _, g):
  return jax.vjp(_plain_2x2, x)[1](g)


def _cpu_backward_2x2(x, y, g):
  height, width = x.shape[1:3]
  rows, columns = y.shape[1:3]
  inside = x[:, : 2 * rows, : 2 * columns]
  a, b, c = (inside[:, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0)))
  first = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
  place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
  hit = first[:, :, None, :, None] == place
  dx = jnp.where(hit, g[:, :, None, :, None], 0).reshape(inside.shape)
  # Without the barrier, the next operation would compute it again.
  dx = lax.optimization_barrier(dx)
  beside = ((0, 0), (0, height - 2 * rows), (0, width - 2 * columns), (0, 0))
  return (jnp.pad(dx, beside),)


max_pool_2x2.defvjp(_max_pool_2x2_forward, _max_pool_2x2_backward)
