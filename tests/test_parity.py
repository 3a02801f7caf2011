"""A 20-step search against the published PyTorch implementation, in float64.

Float64 is a global switch, so the search runs in a process of its own:

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


if __name__ == '__main__':
  main(*sys.argv[1:])
