"""Models: the registry of families, and networks as the stages see them.

A room for each family (`vgg`, `resnet`, `mobilenet`); `registry` builds by
name, `networks` joins a module with its costs and its narrower selves,
`slicing` carries weights over.
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
]
