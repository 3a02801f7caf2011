"""A user's own Linen model, searched and narrowed without edits.

  table = surgery.discover(model, x)               # the groups of channels
  gated = surgery.gate(model, table)               # with the collection `gates`
  cost_model = surgery.cost_model(model, table, x)
  narrow = surgery.narrow(model, table, counts)    # narrower

`trace` marks the calls of layers, `flow` follows channels through the trace,
`discover` makes groups of them, `check` narrows and compares, `factory` hands
the result to the stages. The other modules are shared with the built-in
families: `groups`, `gating`, `costs`.
"""

from collections.abc import Mapping
from typing import Any

from pfs_jax.described import register_conv, register_norm
from pfs_jax.gating import Wrapped
from pfs_jax.groups import Group, Table
from pfs_jax.surgery.check import check, gate, narrow
from pfs_jax.surgery.discover import cost_model, discover
from pfs_jax.surgery.factory import network, network_from_factory

__all__ = [
  'Group',
  'Table',
  'Wrapped',
  'check',
  'cost_model',
  'discover',
  'gate',
  'narrow',
  'network',
  'network_from_factory',
  'register_conv',
  'register_norm',
  'slice_variables',
]


def slice_variables(
  model: Any, table: Table, variables: Any, kept: Mapping[str, Any]
) -> dict[str, Any]:
  """The narrow model's variables; see `Table.slice_variables`."""
  del model  # The table is enough.
  return table.slice_variables(variables, kept)
