"""Weights under the names of the published PyTorch checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import errors, interop, models


def torch_arrays(golden, name):
  arrays = np.load(golden / f'search_{name}_w8.npz')
  return {k[2:]: arrays[k] for k in arrays if k.startswith('w/')}


def test_weights_alone(golden):
  arrays = torch_arrays(golden, 'vgg16')
  arrays['feature.0.bn.num_batches_tracked'] = np.int64(3)
  variables = interop.from_torch('vgg16', arrays, width=8)
  assert set(variables) == {'params', 'batch_stats'}
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)}
  assert dtypes == {jnp.dtype('float16')}


def test_running_statistics_and_gates(golden):
  arrays = torch_arrays(golden, 'resnet20')
  rng = np.random.default_rng(0)
  for key in [k for k in arrays if k.endswith('.bias') and k != 'linear.bias']:
    prefix, n = key.removesuffix('.bias'), len(arrays[key])
    arrays[f'{prefix}.running_mean'] = rng.random(n).astype(np.float32)
    arrays[f'{prefix}.running_var'] = rng.random(n).astype(np.float32)
    if prefix.startswith('layer') and prefix.endswith('bn1'):
      arrays[f'{prefix}.gates'] = rng.random(n).astype(np.float32)
  variables = interop.from_torch('resnet20', arrays, width=8)
  stats = variables['batch_stats']['stage2_block0']['shortcut']['bn']
  assert (stats['var'] == arrays['layer2.0.shortcut.1.running_var']).all()
  gates = models.gates_by_layer('resnet20', variables['gates'])
  assert (gates['stage3_block1/conv1'] == arrays['layer3.1.bn1.gates']).all()


def test_narrow_weights(golden):
  arrays = torch_arrays(golden, 'resnet20')
  counts = [8, 8, 8, 16, 16, 16, 32, 5, 32]
  arrays['layer3.1.conv1.weight'] = arrays['layer3.1.conv1.weight'][:5]
  arrays['layer3.1.conv2.weight'] = arrays['layer3.1.conv2.weight'][:, :5]
  for leaf in ('weight', 'bias'):
    arrays[f'layer3.1.bn1.{leaf}'] = arrays[f'layer3.1.bn1.{leaf}'][:5]
  variables = interop.from_torch('resnet20', arrays, width=8, counts=counts)
  module = models.build('resnet20', 10, width=8, counts=counts)
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  assert jax.eval_shape(module.apply, variables, x).shape == (1, 10)


def test_every_bad_key_is_named(golden):
  arrays = torch_arrays(golden, 'vgg16')
  del arrays['feature.4.bn.bias']
  arrays['feature.0.conv.weight'] = arrays['feature.0.conv.weight'][:7]
  arrays['feature.2.conv.weight'] = np.zeros((1, 1, 3, 3))
  arrays['feature.0.bn.running_mean'] = np.zeros(8)
  with pytest.raises(errors.UserError) as e:
    interop.from_torch('vgg16', arrays, width=8)
  for part in (
    'missing feature.4.bn.bias',
    'feature.0.conv.weight has shape (7, 3, 3, 3)',
    'unknown feature.2.conv.weight',
    'missing feature.0.bn.running_var',
  ):
    assert part in str(e.value)


def test_what_is_refused(golden):
  arrays = torch_arrays(golden, 'resnet20')
  ranks = {'conv1.weight': np.zeros(3), 'linear.bias': np.zeros(())}
  for name, given, message in (
    ('resnet20', arrays | ranks, r'conv1.weight has shape \(3,\)'),
    ('resnet20', {}, 'missing linear.bias'),
    ('resnet50', arrays, "does not know the names of 'resnet50'"),
  ):
    with pytest.raises(errors.UserError, match=message):
      interop.from_torch(name, given, width=8)
