"""CPU forms equal the plain operations, and stand in no other program."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import config, cpu, layers, stages
from tests import processes

LAYOUT = ('NHWC', 'HWIO', 'NHWC')

# Image, kernel, strides, padding, groups; 32 channels in and out, 256 if wide,
# 6 in several groups.
WINDOWS = {
  'one pixel': ((1, 1), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  'one row': ((1, 4), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  '2x2': ((2, 2), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  '2x2, stride 2': ((2, 2), (3, 3), (2, 2), [(1, 1)] * 2, 1),
  '2x3, uneven': ((2, 3), (5, 3), (1, 2), [(2, 1), (0, 2)], 1),
  '2x2, far padding': ((2, 2), (3, 3), (1, 1), [(5, 0), (0, 4)], 1),
  '7x5': ((7, 5), (3, 3), (2, 1), [(1, 1)] * 2, 1),
  '7x5, SAME': ((7, 5), (3, 3), (2, 2), 'SAME', 1),
  '4x4, wide': ((4, 4), (3, 3), (1, 1), [(1, 1)] * 2, 1),
  'VALID': ((2, 2), (3, 2), (1, 1), [(1, 0), (0, 0)], 1),
  '1x1 kernel': ((5, 4), (1, 1), (2, 2), 'VALID', 1),
  'depthwise': ((7, 6), (3, 3), (1, 1), [(1, 1)] * 2, 6),
  'depthwise, stride 2': ((7, 6), (3, 3), (2, 2), 'SAME', 6),
  'depthwise, one pixel': ((1, 1), (3, 3), (2, 2), [(1, 1)] * 2, 6),
  'groups': ((5, 4), (3, 3), (1, 1), [(1, 1)] * 2, 2),
}


def operands(name, dtype=None, images=4):
  image, kernel, *_, groups = WINDOWS[name]
  rng = np.random.default_rng(0)
  channels = 256 if 'wide' in name else 32 if groups == 1 else 6
  x = rng.normal(size=(images, *image, channels))
  kernel = rng.normal(size=(*kernel, channels // groups, channels))
  return [jnp.asarray(a, dtype) for a in (x, kernel)]


def value_and_pull(function, *given):
  """Output, and the gradients of all operands for a gradient that varies."""

  @jax.jit
  def both(*given):
    y, pull = jax.vjp(function, *given)
    g = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
    return [y, *pull(g)]

  return both(*given)


def assert_equal(ours, theirs, tolerance):
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * abs(b).max())


def compare(name, given, tolerance, **rest):
  *_, strides, padding, groups = WINDOWS[name]
  rest = {'dimension_numbers': LAYOUT, 'feature_group_count': groups, **rest}
  rest |= {'window_strides': strides, 'padding': padding}
  ours, theirs = (
    value_and_pull(functools.partial(f, **rest), *given)
    for f in (cpu.convolution, jax.lax.conv_general_dilated)
  )
  assert_equal(ours, theirs, tolerance)


@pytest.mark.parametrize('name', WINDOWS)
def test_a_convolution_is_the_plain_one(name):
  """Values and gradients, to 1e-12 in float64; odd numbers of images, too."""
  with jax.enable_x64(True):
    compare(name, operands(name, images=3 if '7x5' in name else 12), 1e-12)


def test_other_layouts_and_dilations_are_the_plain_ones():
  """What a user's own model may hold has no CPU form, only the barrier."""
  with jax.enable_x64(True):
    x, k = operands('1x1 kernel')
    compare('7x5', operands('7x5'), 1e-12, rhs_dilation=(2, 1))
    highest = jax.lax.Precision.HIGHEST
    compare('1x1 kernel', (x, k), 1e-12, precision=highest)
    given = x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1)
    layout = ('NCHW', 'OIHW', 'NCHW')
    compare('1x1 kernel', given, 1e-12, dimension_numbers=layout)


@pytest.mark.parametrize('name', ['2x2', '7x5, SAME', 'depthwise'])
def test_bfloat16_stays_bfloat16(name):
  compare(name, operands(name, jnp.bfloat16), 0.03)


@pytest.mark.parametrize('name', ['2x2', '7x5, SAME', 'depthwise'])
def test_an_export_may_leave_the_batch_open(name):
  image, _, strides, padding, groups = WINDOWS[name]
  x, k = operands(name)
  rest = {'dimension_numbers': LAYOUT, 'feature_group_count': groups}

  def call(x):
    return cpu.convolution(x, k, strides, padding, **rest)

  shape = jax.export.symbolic_shape(f'n, {image[0]}, {image[1]}, {x.shape[-1]}')
  x_of_any_batch = jax.ShapeDtypeStruct(shape, x.dtype)
  exported = jax.export.export(jax.jit(call), platforms=('cpu', 'tpu'))
  found = exported(x_of_any_batch).call(x)
  np.testing.assert_allclose(found, call(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(4, 3, 5, 6), (7, 2)])
def test_normalisation_is_that_of_linen(shape):
  """Outputs, running statistics and gradients, to 1e-12 in float64."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, scale, bias = (
      jnp.asarray(rng.normal(2, 1, s)) for s in (shape, shape[-1:], shape[-1:])
    )

    def call(norm):
      norm = norm(
        use_running_average=False,
        dtype=x.dtype,
        param_dtype=x.dtype,
        use_fast_variance=False,
      )

      def outputs(x, scale, bias):
        variables = {'params': {'scale': scale, 'bias': bias}}
        return norm.apply(variables, x, mutable='batch_stats')

      y, pull, updates = jax.vjp(jax.jit(outputs), x, scale, bias, has_aux=True)
      g = jnp.cos(jnp.arange(y.size)).reshape(shape)
      return [y, *pull(g), *jax.tree.leaves(updates)]

    assert_equal(call(layers.BatchNorm), call(nn.BatchNorm), 1e-12)


@pytest.mark.parametrize('shape', [(2, 7, 5, 3), (1, 3, 8, 1)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_pooling_is_that_of_xla_ties_included(shape, dtype):
  plain = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
  for seed in range(3):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-1, 2, shape), dtype)  # Most windows tie.
    ours, theirs = (value_and_pull(f, x) for f in (cpu.max_pool_2x2, plain))
    assert_equal(ours, theirs, 0)


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_accelerators_get_the_plain_operations(platform):
  """A large and a depthwise kernel, a plain one, BatchNorm and pooling."""

  def loss(x, kernels):
    for kernel, groups in zip(kernels, (1, 32, 1), strict=True):
      rest = {'dimension_numbers': LAYOUT, 'feature_group_count': groups}
      x = cpu.convolution(x, kernel, (1, 1), 'SAME', **rest)
    x, *_ = cpu.batch_norm(x, jnp.ones(32), jnp.ones(32), 1e-5)
    return (cpu.max_pool_2x2(cpu.computed_once(x)) ** 2).sum()

  kernels = [jnp.ones((k, k, c, 32)) for k, c in ((3, 32), (3, 1), (3, 32))]
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(
    jnp.ones((2, 2, 2, 32)), kernels
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  operations = 'convolution', 'optimization_barrier', 'select_and_scatter"'
  found = [text.count(f'stablehlo.{name}') for name in operations]
  # Three convolutions, each with two gradients.
  assert found == [9, 0, 1] if platform != 'cpu' else found[::2] == [0, 0]


def test_options_to_run_once_keep_the_bits(monkeypatch):
  assert cpu.options_to_run_once() == {}  # conftest.py states a level.
  monkeypatch.setenv('XLA_FLAGS', '')
  once = cpu.options_to_run_once()
  assert once
  found, usual = (
    jax.jit(lambda key: jax.random.normal(key, (1001,)), compiler_options=o)(
      jax.random.key(1)
    )
    for o in (once, dict.fromkeys(once, 3))
  )
  np.testing.assert_array_equal(found, usual)


def test_freed_memory_is_kept():
  """Pages of a freed block are cleared once, and not for each new block."""
  code = """
    import resource
    import numpy as np
    from pfs_jax import cpu
    cpu.keep_freed_memory()
    for _ in range(3):
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      np.ones(10**7)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
  assert int(processes.output(code)) < 2000  # Of 80 MB in 19,500 pages.


@pytest.mark.parametrize(('batch_size', 'kept'), [(63, False), (64, True)])
def test_memory_is_kept_for_large_batches_alone(batch_size, kept, monkeypatch):
  """64 images of 32x32 pixels are large; small networks lose by it."""
  calls = []
  monkeypatch.setattr(cpu, 'keep_freed_memory', lambda: calls.append(1))
  c = config.default()
  c.search.batch_size, c.train.batch_size = batch_size, 1
  stages.Job(c, pathlib.Path('none'))
  assert bool(calls) == kept
