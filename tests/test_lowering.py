"""The compiled steps of every family lower for accelerators we do not have."""

import jax
import jax.numpy as jnp
import optax
import pytest

from pfs_jax import models, search, train

# name -> (base width, multiplier of block outputs, side of the images).
FAMILIES = {
  'resnet8': (4, 1.0, 8),
  'vgg16': (4, 1.0, 8),
  'mobilenet_v1': (4, 1.0, 32),
  'mobilenet_v2': (8, 0.25, 32),
  'resnet50': (4, 1 / 16, 32),
}
PLATFORMS = ('tpu', 'cuda')
F32, BF16 = jnp.float32, jnp.bfloat16


def dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def traced(name, step, dtype):
  """A step of search or training, or the evaluation, before its lowering."""
  width, multiplier, size = FAMILIES[name]
  options = {'multiplier': multiplier, 'dtype': dtype}
  module = models.build(name, 10, width, gated=step == 'search', **options)
  x = jax.ShapeDtypeStruct((4, size, size, 3), dtype)
  y = jax.ShapeDtypeStruct((4,), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(module.init, key, x)
  if step == 'eval':
    return jax.jit(module.apply).trace(variables, x)

  def init(v):
    if step == 'train':
      return train.init(module, v, optax.sgd(0.1, 0.9, nesterov=True), 0.1)
    rates = {'sparsity': 0.5, 'balance': 0.5, 'learning_rate': 0.01}
    return search.init(module, v, **rates)

  function = {'search': search.step, 'train': train.step}[step]
  return function.trace(jax.eval_shape(init, variables), x, y)


def convolutions(program, platform):
  text = program.lower(lowering_platforms=(platform,)).as_text()
  return [t for t in text.splitlines() if 'stablehlo.convolution' in t]


@pytest.mark.parametrize(
  'name, step, dtype, count',
  [
    # Each family in one step, each step in both dtypes. The convolutions, and
    # their gradients: of the kernels, and of inputs that depend on what learns.
    ('resnet8', 'search', F32, 9 + 7),
    ('vgg16', 'train', BF16, 13 + 13 + 12),
    ('vgg16', 'search', BF16, 13 + 12),
    ('mobilenet_v1', 'eval', BF16, 9),
    ('mobilenet_v2', 'train', F32, 13 + 13 + 12),
    ('resnet50', 'eval', F32, 53),
  ],
)
def test_steps_lower_for_accelerators(
  name, step, dtype, count, shallow_mobilenets
):
  program = traced(name, step, dtype)
  element = {'float32': 'xf32>', 'bfloat16': 'xbf16>'}[jnp.dtype(dtype).name]
  for platform in PLATFORMS:
    lines = convolutions(program, platform)
    assert len(lines) == count, 'a convolution is not lowered as one'
    assert all(element in line.rpartition('->')[2] for line in lines)
    if name == 'mobilenet_v1':  # Depthwise is grouped.
      assert sum('feature_group_count = 1 :' not in s for s in lines) == 4
  out = program.out_info
  # Parameters, gates, statistics, moments, metrics and logits are float32.
  assert dtypes(out) - {'int32', 'uint32'} == {'float32'}  # Steps and keys.
  if step == 'search':
    assert dtypes(out[0].gates) == dtypes(out[0].params) == {'float32'}
  if step != 'eval':
    assert dtypes(out[0].batch_stats) == {'float32'}
