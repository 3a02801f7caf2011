"""The published PyTorch implementation: 20 steps of its search, its weights.

The search runs in float64, a global switch, so in a process of its own:

  python -m tests.test_parity resnet20 tests/golden/search_resnet20_w8.npz
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import interop, models, search
from tests import processes


def batch(golden, step):
  """A step's batch as golden/README.md says: normalised, padded, RGB."""
  n = int(golden['batch'])
  x = golden['images'][step * n : (step + 1) * n].astype(np.float64) / 255
  x = np.pad((x - 0.2860) / 0.3530, ((0, 0), (2, 2), (2, 2)))
  y = golden['labels'][step * n : (step + 1) * n].astype(np.int32)
  return np.repeat(x[..., None], 3, axis=-1), y


def main(name, path):
  golden = np.load(path)
  sizes = models.gate_sizes(name, 8)
  assert list(sizes.values()) == golden['gate_sizes'].tolist()
  ends = np.cumsum(golden['gate_sizes'])[:-1]
  weights = {
    k[2:]: golden[k].astype(np.float64) for k in golden if k.startswith('w/')
  }
  variables = interop.from_torch(name, weights, width=8)
  module = models.build(name, 10, width=8, gated=True, dtype=jnp.float64)
  state = search.init(
    module,
    variables,
    sparsity=float(golden['sparsity']),
    balance=float(golden['balance']),
    learning_rate=float(golden['lr']),
  )
  worst = {}

  def compare(what, ours, theirs):
    error = float(np.abs(np.asarray(ours) - theirs).max())
    worst[what] = max(worst.get(what, 0.0), error)

  def compare_layers(what, gates, theirs):
    by_layer = models.gates_by_layer(name, gates)
    parts = np.split(theirs, ends)
    for (layer, ours), part in zip(by_layer.items(), parts, strict=True):
      compare(f'{what} {layer}', ours, part)

  @jax.jit
  def step_and_more(state, x, y):
    """`search.step`, with the logits and gradients that it computes."""
    logits, _ = module.apply(
      state.variables, x, train=True, mutable=('batch_stats',)
    )
    trained = {'params': state.params, 'gates': state.gates}
    grads, _ = jax.grad(search.loss, has_aux=True)(trained, state, x, y)
    return search.step(state, x, y), logits, grads['gates']

  for step in range(len(golden['gates'])):
    (state, metrics), logits, grads = step_and_more(state, *batch(golden, step))
    if step == 0:
      compare('logits0', logits, golden['logits0'])
      compare_layers('grad0', grads, golden['grad0'])
    compare('ce', metrics['ce'], golden['ce'][step])
    compare('reg', metrics['reg'], golden['reg'][step])
    compare_layers('gates', state.gates, golden['gates'][step])
  evaluated = jax.jit(module.apply)(state.variables, batch(golden, 0)[0])
  scale = np.abs(golden['eval_logits']).max()
  error = np.abs(np.asarray(evaluated) - golden['eval_logits']).max() / scale
  dtypes = sorted({str(a.dtype) for a in jax.tree.leaves(state.variables)})
  found = {'worst': worst, 'eval': float(error), 'dtypes': dtypes}
  print(json.dumps({**found, 'steps': step + 1}))


@pytest.mark.parametrize('name', ['resnet20', 'vgg16'])
def test_twenty_search_steps(name, golden):
  path = golden / f'search_{name}_w8.npz'
  out = processes.output(
    ['-m', 'tests.test_parity', name, str(path)],
    x64=True,
    timeout=400,
    env=processes.OPTIMIZED,
  )
  found = json.loads(out.splitlines()[-1])
  assert found['steps'] == 20
  assert found['dtypes'] == ['float64']
  layers = {'resnet20': 9, 'vgg16': 13}[name]
  assert len(found['worst']) == 3 + 2 * layers  # logits0, ce, reg; two a layer.
  for what, error in found['worst'].items():
    assert error < 1e-9, what
  # PyTorch's running variance is the unbiased one: loosely only.
  assert found['eval'] < 0.02


# Weights under the names of the published PyTorch checkpoints.


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


def test_every_bad_key_is_named(golden, refused):
  arrays = torch_arrays(golden, 'vgg16')
  del arrays['feature.4.bn.bias']
  arrays['feature.0.conv.weight'] = arrays['feature.0.conv.weight'][:7]
  arrays['feature.2.conv.weight'] = np.zeros((1, 1, 3, 3))
  arrays['feature.0.bn.running_mean'] = np.zeros(8)
  missing = 'missing feature.4.bn.bias'
  e = refused(missing, interop.from_torch, 'vgg16', arrays, width=8)
  for part in (
    'feature.0.conv.weight has shape (7, 3, 3, 3)',
    'unknown feature.2.conv.weight',
    'missing feature.0.bn.running_var',
  ):
    assert part in str(e)


def test_what_is_refused(golden, refused):
  arrays = torch_arrays(golden, 'resnet20')
  ranks = {'conv1.weight': np.zeros(3), 'linear.bias': np.zeros(())}
  for name, given, message in (
    ('resnet20', arrays | ranks, r'conv1.weight has shape \(3,\)'),
    ('resnet20', {}, 'missing linear.bias'),
    ('resnet50', arrays, "does not know the names of 'resnet50'"),
  ):
    refused(message, interop.from_torch, name, given, width=8)


if __name__ == '__main__':
  main(*sys.argv[1:])
