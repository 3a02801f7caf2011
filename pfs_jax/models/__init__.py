"""Models: the registry of families, and networks as the stages see them.

One file for each family (`vgg`, `resnet`, `mobilenet`). `registry` builds by
name and states the channel groups; `networks` joins a module with its groups,
costs and narrower networks.
"""

from pfs_jax.models.networks import (
  Network,
  build_from,
  network,
  structure_from_list,
)
from pfs_jax.models.registry import (
  GATE_SITES,
  REGISTRY,
  Family,
  build,
  cost_model,
  family,
  gate_sizes,
  gates_by_layer,
  init,
  slice_variables,
  table,
)

__all__ = [
  'GATE_SITES',
  'REGISTRY',
  'Family',
  'Network',
  'build',
  'build_from',
  'cost_model',
  'family',
  'gate_sizes',
  'gates_by_layer',
  'init',
  'network',
  'slice_variables',
  'structure_from_list',
  'table',
]
