"""CPU forms equal the plain operations, and stand in no other program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import cpu, layers

LAYOUT = ('NHWC', 'HWIO', 'NHWC')

# Image, kernel, strides, padding, groups. About 0.1 s each.
WINDOWS = {
  'one pixel': ((1, 1), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  'one row': ((1, 4), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  '2x2': ((2, 2), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  '2x2, stride 2': ((2, 2), (3, 3), (2, 2), [(1, 1)] * 2, 1),
  '2x3, uneven': ((2, 3), (5, 3), (1, 2), [(2, 1), (0, 2)], 1),
  '2x2, far padding': ((2, 2), (3, 3), (1, 1), [(5, 0), (0, 4)], 1),
  '2x2, no padding': ((2, 2), (3, 1), (1, 1), [(1, 0), (0, 0)], 1),
  '7x5': ((7, 5), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  '7x5, stride 2': ((7, 5), (3, 3), (2, 2), [(1, 1)] * 2, 1),
  '7x5, SAME': ((7, 5), (3, 3), (2, 2), 'SAME', 1),
  'VALID': ((7, 5), (3, 2), (1, 1), 'VALID', 1),
  '1x1 kernel': ((4, 3), (1, 1), (1, 1), [(0, 0)] * 2, 1),
  '1x1 kernel, stride 2': ((5, 4), (1, 1), (2, 2), [(0, 0)] * 2, 1),
  '1x1 kernel, padded': ((2, 3), (1, 1), (1, 1), [(1, 1)] * 2, 1),
  'depthwise': ((7, 6), (3, 3), (1, 1), [(1, 1)] * 2, 6),
  'depthwise, stride 2': ((7, 6), (3, 3), (2, 2), [(1, 1)] * 2, 6),
  'depthwise, one pixel': ((1, 1), (3, 3), (2, 2), [(1, 1)] * 2, 6),
  'groups': ((5, 4), (3, 3), (1, 1), [(1, 1)] * 2, 2),
}


def operands(image, kernel, groups, channels=6, features=6, dtype=None):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, *image, channels))
  k = rng.normal(size=(*kernel, channels // groups, features))
  return jnp.asarray(x, dtype), jnp.asarray(k, dtype)


def value_and_pull(function, *given):
  """Output, and the gradients of all operands for a gradient that varies."""
  y, pull = jax.vjp(jax.jit(function), *given)
  g = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
  return [y, *pull(g)]


def assert_equal(ours, theirs, tolerance):
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * abs(b).max())


def compare(window, given, tolerance, **rest):
  _, _, strides, padding, groups = window
  rest = {'dimension_numbers': LAYOUT, 'feature_group_count': groups, **rest}
  assert_equal(
    value_and_pull(
      lambda x, k: cpu.convolution(x, k, strides, padding, **rest), *given
    ),
    value_and_pull(
      lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, **rest),
      *given,
    ),
    tolerance,
  )


@pytest.mark.parametrize('window', WINDOWS.values(), ids=WINDOWS)
def test_a_convolution_is_the_plain_one(window):
  """Values and gradients, to 1e-12 in float64."""
  image, kernel, _, _, groups = window
  with jax.enable_x64(True):
    compare(window, operands(image, kernel, groups), 1e-12)


def test_other_layouts_and_dilations_are_the_plain_ones():
  """What a user's own model may hold has no CPU form, only the barrier."""
  with jax.enable_x64(True):
    x, k = operands((7, 6), (3, 3), 1)
    window = (None, None, (1, 1), 'SAME', 1)
    compare(window, (x, k), 1e-12, rhs_dilation=(2, 1))
    compare(window, (x, k), 1e-12, precision=jax.lax.Precision.HIGHEST)
    given = (x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1))
    compare(window, given, 1e-12, dimension_numbers=('NCHW', 'OIHW', 'NCHW'))
    compare(
      (None, None, (1,), 'SAME', 1),
      (x[:, 0], k[0]),
      1e-12,
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )


@pytest.mark.parametrize('name', ['2x2', '1x1 kernel', 'depthwise', '7x5'])
def test_bfloat16_stays_bfloat16(name):
  image, kernel, _, _, groups = WINDOWS[name]
  given = operands(image, kernel, groups, dtype=jnp.bfloat16)
  compare(WINDOWS[name], given, 0.03)


@pytest.mark.parametrize('name', ['2x2', 'depthwise', '7x5, SAME'])
def test_an_export_may_leave_the_batch_open(name):
  image, kernel, strides, padding, groups = WINDOWS[name]
  x, k = operands(image, kernel, groups)
  rest = {'dimension_numbers': LAYOUT, 'feature_group_count': groups}

  def call(x):
    return cpu.convolution(x, k, strides, padding, **rest)

  shape = jax.export.symbolic_shape(f'n, {image[0]}, {image[1]}, 6')
  x_of_any_batch = jax.ShapeDtypeStruct(shape, x.dtype)
  exported = jax.export.export(jax.jit(call), platforms=('cpu', 'tpu'))
  found = exported(x_of_any_batch).call(x)
  np.testing.assert_allclose(found, call(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_serves_linen():
  """Batches of batches, biases and masks are the module's own business."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
  plain = nn.Conv(5, (3, 3))
  ours = nn.Conv(5, (3, 3), conv_general_dilated=cpu.convolution)
  variables = plain.init(jax.random.key(1), x)
  np.testing.assert_allclose(
    ours.apply(variables, x), plain.apply(variables, x), atol=1e-6
  )


@pytest.mark.parametrize('shape', [(4, 3, 5, 6), (7, 2), (2, 1, 1, 3)])
def test_normalisation_is_that_of_linen(shape):
  """Outputs, running statistics and gradients, to 1e-12 in float64."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, scale, bias = (
      jnp.asarray(rng.normal(2, 1, s)) for s in (shape, shape[-1:], shape[-1:])
    )
    given = {'use_running_average': False, 'dtype': x.dtype}
    given |= {'param_dtype': x.dtype, 'use_fast_variance': False}

    def call(norm):
      def outputs(x, scale, bias):
        variables = {'params': {'scale': scale, 'bias': bias}}
        return norm.apply(variables, x, mutable='batch_stats')

      y, pull, updates = jax.vjp(jax.jit(outputs), x, scale, bias, has_aux=True)
      g = jnp.cos(jnp.arange(y.size)).reshape(shape)
      return [y, *pull(g), *jax.tree.leaves(updates)]

    ours = call(layers.BatchNorm(**given))
    assert_equal(ours, call(nn.BatchNorm(**given)), 1e-12)


@pytest.mark.parametrize('shape', [(2, 6, 6, 3), (2, 7, 5, 3), (1, 3, 8, 1)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_pooling_is_that_of_xla_ties_included(shape, dtype):
  for seed in range(5):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-1, 2, shape), dtype)  # Most windows tie.
    assert_equal(
      value_and_pull(cpu.max_pool_2x2, x),
      value_and_pull(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x),
      0,
    )


def step_text(platform):
  """The lowered gradients of a layer of each kind."""

  def loss(x, kernels):
    small, depthwise, large = kernels
    for kernel, groups in ((small, 1), (depthwise, 6), (large, 1)):
      x = cpu.convolution(
        x,
        kernel,
        (1, 1),
        [(1, 1)] * 2,
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
      )
    x, *_ = cpu.batch_norm(x, jnp.ones(6), jnp.ones(6), 1e-5)
    return (cpu.max_pool_2x2(cpu.computed_once(x)) ** 2).sum()

  kernels = [jnp.ones((3, 3, c, 6)) for c in (6, 1, 6)]
  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
    jnp.ones((2, 2, 2, 6)), kernels
  )
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_accelerators_get_the_plain_operations(platform):
  text = step_text(platform)
  found = [
    text.count(op)
    for op in ('stablehlo.convolution', 'optimization_barrier', 'select_and_sc')
  ]
  plain = [9, 0, 1]  # Three convolutions, each with two gradients.
  assert found == plain if platform != 'cpu' else found[0] == found[2] == 0
