"""A search on all devices of all processes; prints what came of it as JSON.

Run by test_devices.py in processes of their own:

  python -m tests.data_parallel steps [coordinator processes process]
"""

import json
import re
import sys

import jax
import numpy as np

from pfs_jax import devices, models, peers, prune, search, train
from pfs_jax.data import pipeline

COLLECTIVE = re.compile(
  r'= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|'
  r'reduce-scatter)(?:-start)?\('
)


def numbers_sent(text):
  """Numbers that the collectives of a compiled program result in."""
  shapes = ' '.join(COLLECTIVE.findall(text))
  dims = re.findall(r'\w+\[([\d,]*)\]', shapes)
  return int(sum(np.prod([int(d) for d in ds.split(',') if d]) for ds in dims))


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main():
  steps, *others = sys.argv[1:]
  if others:
    peers.start(others[0], int(others[1]), int(others[2]))
  dtype = np.float64
  module = models.build('resnet8', 10, 4, gated=True, dtype=dtype)
  variables = models.init(module, jax.random.key(0), (8, 8, 3))
  variables = jax.tree.map(lambda v: v.astype(dtype), variables)
  rng = np.random.default_rng(0)
  source = pipeline.ArraySource(
    rng.integers(0, 256, (128, 8, 8, 3), dtype=np.uint8),
    rng.integers(0, 10, 128),
    batch_size=32,
    key=jax.random.key(1),
    augmentation=pipeline.Augmentation(
      (0.5,) * 3, (0.25,) * 3, padding=2, flip=True, dtype=dtype
    ),
  )
  settings = {'sparsity': 0.3, 'balance': 0.5, 'learning_rate': 0.01}
  state = devices.replicate(search.init(module, variables, **settings))
  call = train.compiled_call(search.step, source.draw)
  call = call.lower(state, source.resident, source.chunk(0, 1)).compile()
  losses = []
  for step in range(int(steps)):
    state, metrics = call(state, source.resident, source.chunk(step, 1))
    losses.append(float(metrics['ce'][0]))
  gates = models.gates_by_layer('resnet8', jax.device_get(state.gates))
  model = models.cost_model('resnet8', 10, 8, 3, 4)
  structure = prune.fit(gates, model, model.macs(model.widths) // 2)
  found = {
    'devices': jax.device_count(),
    'losses': losses,
    'gates': np.concatenate(list(gates.values())).tolist(),
    'counts': structure.counts,
    'sent': numbers_sent(call.as_text()),
    'sizes': {
      'gates': size(gates),
      'statistics': size(state.batch_stats),
      'weights': size(state.params),
    },
  }
  if jax.process_index() == 0:
    print(json.dumps(found))


if __name__ == '__main__':
  main()
