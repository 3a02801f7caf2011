"""A user's own Linen model, searched and narrowed without edits.

  sites = surgery.discover(model, x)
  gated = surgery.gate(model, sites)               # init, apply: with `gates`
  cost_model = surgery.cost_model(model, sites, x)
  narrow = surgery.narrow(model, sites, counts)    # init, apply: narrower

`trace` marks layers, `flow` follows channels through the trace, `sites` makes
groups of them, `wrap` changes a model on the way, `apply` gates, narrows,
slices and checks, `network` hands the result to the stages.
"""

from pfs_jax.surgery.apply import (
  check,
  cost_model,
  gate,
  narrow,
  slice_variables,
)
from pfs_jax.surgery.network import network, network_from_factory
from pfs_jax.surgery.sites import Group, Sites, discover
from pfs_jax.surgery.wrap import Wrapped

__all__ = [
  'Group',
  'Sites',
  'Wrapped',
  'check',
  'cost_model',
  'discover',
  'gate',
  'narrow',
  'network',
  'network_from_factory',
  'slice_variables',
]
