"""A float64 or float32 search on all devices of all processes, as numbers.

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


def collective_bytes(text):
  """Bytes of every collective of a compiled program, by its result shapes."""
  sizes = {'f64': 8, 'f32': 4, 's32': 4, 'u32': 4, 'pred': 1, 's64': 8, 'u8': 1}
  found = []
  pattern = (
    r'= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|'
    r'reduce-scatter)(?:-start)?\('
  )
  for shapes, _ in re.findall(pattern, text):
    total = 0
    for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      total += sizes[kind] * int(
        np.prod([int(d) for d in dims.split(',') if d])
      )
    found.append(total)
  return found


def main():
  steps, *others = sys.argv[1:]
  if others:
    peers.start(others[0], int(others[1]), int(others[2]))
  dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
  module = models.build('resnet20', 10, 4, gated=True, dtype=dtype)
  variables = jax.tree.map(
    lambda v: v.astype(dtype),
    models.init(module, jax.random.key(0), (16, 16, 3)),
  )
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (256, 16, 16, 3), dtype=np.uint8)
  source = pipeline.ArraySource(
    images,
    rng.integers(0, 10, 256),
    batch_size=32,
    key=jax.random.key(1),
    augmentation=pipeline.Augmentation(
      (0.5,) * 3, (0.25,) * 3, padding=2, flip=True, dtype=dtype
    ),
  )
  state = devices.replicate(
    search.init(
      module, variables, sparsity=0.3, balance=0.5, learning_rate=0.01
    )
  )
  call = train.compiled_call(search.step, source.draw)
  call = call.lower(state, source.resident, source.chunk(0, 1)).compile()
  losses = []
  for step in range(int(steps)):
    state, metrics = call(state, source.resident, source.chunk(step, 1))
    losses.append(float(metrics['ce'][0]))
  gates = models.gates_by_layer('resnet20', jax.device_get(state.gates))
  model = models.cost_model('resnet20', 10, 16, 3, 4)
  structure = prune.fit(gates, model, model.macs(model.widths) // 2)
  statistics = sum(a.size for a in jax.tree.leaves(state.batch_stats))
  if jax.process_index() == 0:
    print(
      json.dumps(
        {
          'devices': jax.device_count(),
          'losses': losses,
          'gates': np.concatenate(list(gates.values())).tolist(),
          'counts': structure.counts,
          'collectives': collective_bytes(call.as_text()),
          'gates_size': sum(map(len, gates.values())),
          'statistics_size': statistics,
          'weights_size': sum(a.size for a in jax.tree.leaves(state.params)),
          'itemsize': np.dtype(dtype).itemsize,
        }
      )
    )


if __name__ == '__main__':
  main()
