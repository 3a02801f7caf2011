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

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pfs_jax import costs
from pfs_jax.described import register_conv, register_norm
from pfs_jax.gating import Wrapped
from pfs_jax.groups import Group, Table
from pfs_jax.surgery.check import check, gate, narrow, narrow_linen
from pfs_jax.surgery.discover import discover, layer_calls
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


def cost_model(
  model: Any,
  table: Table,
  x: Any,
  *args: Any,
  call: Callable[..., Any] | None = None,
  **kwargs: Any,
) -> costs.CostModel:
  """MACs and parameters of the narrow models, exact functions of the counts.

  All operations that multiply and accumulate are counted (`costs`), but for
  those in `table.uncounted`. Sums, such as a model's own mean, cost nothing.

  Args:
    model: The model of `discover`.
    table: What `discover` found.
    x: One image [1, H, W, C] or its `jax.ShapeDtypeStruct`; its size may differ
      from that of the images given to `discover`.
    *args: Further arguments of the model's `__call__`.
    call: As for `discover`; by default, the model is called as there.
    **kwargs: Further arguments of `__call__`, by name.

  Raises:
    errors.UserError: The image has no batch axis.
  """
  table = dataclasses.replace(table, call=call or table.call)
  plain = narrow_linen(model, table, list(table.sizes.values()))
  return table.cost_model(layer_calls(plain, x, *args, **kwargs))


def slice_variables(
  model: Any, table: Table, variables: Any, kept: Mapping[str, Any]
) -> dict[str, Any]:
  """The narrow model's variables; see `Table.slice_variables`."""
  del model  # The table is enough.
  return table.slice_variables(variables, kept)
