"""The compiled steps of every family lower for accelerators we do not have."""

import jax
import jax.numpy as jnp
import optax
import pytest

from pfs_jax import models, search, train

# name -> (base width, multiplier of block outputs, side of the images).
FAMILIES = {
  'resnet20': (4, 1.0, 8),
  'vgg16': (4, 1.0, 8),
  'mobilenet_v1': (4, 1.0, 32),
  'mobilenet_v2': (8, 0.25, 32),
  'resnet50': (4, 1 / 16, 32),
}
PLATFORMS = ('tpu', 'cuda')


def dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def module_and_inputs(name, dtype, gated):
  width, multiplier, size = FAMILIES[name]
  module = models.build(
    name, 10, width, gated=gated, multiplier=multiplier, dtype=dtype
  )
  x = jax.ShapeDtypeStruct((4, size, size, 3), dtype)
  y = jax.ShapeDtypeStruct((4,), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return module, jax.eval_shape(module.init, key, x), x, y


def search_step(name, dtype):
  module, variables, x, y = module_and_inputs(name, dtype, True)
  state = jax.eval_shape(
    lambda v: search.init(
      module, v, sparsity=0.5, balance=0.5, learning_rate=0.01
    ),
    variables,
  )
  return search.step.trace(state, x, y)


def train_step(name, dtype):
  module, variables, x, y = module_and_inputs(name, dtype, False)
  tx = optax.sgd(0.1, 0.9, nesterov=True)
  state = jax.eval_shape(lambda v: train.init(module, v, tx, 0.1), variables)
  return train.step.trace(state, x, y)


def evaluation(name, dtype):
  module, variables, x, _ = module_and_inputs(name, dtype, False)
  return jax.jit(module.apply).trace(variables, x)


STEPS = {'search': search_step, 'train': train_step, 'eval': evaluation}


F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize(
  'name, step, dtype',
  [
    # Each family in one step, each step in both dtypes.
    ('resnet20', 'search', F32),
    ('vgg16', 'train', BF16),
    ('vgg16', 'search', BF16),
    ('mobilenet_v1', 'eval', BF16),
    ('mobilenet_v2', 'train', F32),
    ('resnet50', 'eval', F32),
  ],
)
def test_steps_lower_for_accelerators(name, step, dtype):
  traced = STEPS[step](name, dtype)
  texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in PLATFORMS]
  element = {'float32': 'xf32>', 'bfloat16': 'xbf16>'}[jnp.dtype(dtype).name]
  for text in texts:
    results = [
      line.rpartition('->')[2]
      for line in text.splitlines()
      if 'stablehlo.convolution' in line
    ]
    assert len(results) >= 13, 'a convolution is not lowered as one'
    assert all(element in result for result in results)
  out = traced.out_info
  # Parameters, gates, statistics, moments, metrics and logits are float32.
  assert dtypes(out) - {'int32', 'uint32'} == {'float32'}  # Steps and keys.
  if step == 'search':
    assert dtypes(out[0].gates) == dtypes(out[0].params) == {'float32'}
  if step != 'eval':
    assert dtypes(out[0].batch_stats) == {'float32'}


def test_depthwise_is_a_grouped_convolution_on_accelerators():
  traced = evaluation('mobilenet_v1', jnp.float32)
  blocks = 13

  def grouped(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [t for t in text.splitlines() if 'stablehlo.convolution' in t]
    return sum('feature_group_count = 1 :' not in line for line in lines)

  assert [grouped(p) for p in (*PLATFORMS, 'cpu')] == [blocks, blocks, 0]
