"""The kept channels of a wide network's variables, for a narrow network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import numpy as np

from pfs_jax import costs


def _indices(size: costs.Size, kept: Sequence[np.ndarray]) -> np.ndarray | None:
  """Channels to take along an axis; None takes all of a fixed one."""
  ((layer, _),) = size  # One group a tensor: our families concatenate nothing.
  return None if layer == costs.FIXED else kept[layer]


def _take(array: Any, indices: np.ndarray | None, axis: int) -> Any:
  return array if indices is None else array.take(indices, axis=axis)


def slice_variables(
  model: costs.CostModel,
  variables: Mapping[str, Any],
  kept: Mapping[str, Any],
) -> dict[str, Any]:
  """Kernels, scales, biases and statistics of the kept channels.

  Args:
    model: Costs of the wide network; its ops say which layer feeds which.
    variables: `params` and, where there are any, `batch_stats` of the wide
      network. Gates are left out: the narrow network has none.
    kept: {layer name: sorted indices of the channels to keep}, for each gated
      layer of the model.

  Returns:
    The collections of the narrow network with these counts.
  """
  if set(kept) != set(model.layers):
    raise ValueError(
      f'kept must name the gated layers {", ".join(model.layers)}; got '
      f'{", ".join(kept)}.'
    )
  by_layer = [np.asarray(kept[layer]) for layer in model.layers]
  for layer, width, indices in zip(
    model.layers, model.widths, by_layer, strict=True
  ):
    if (
      not len(indices)
      or (np.diff(indices, prepend=-1) <= 0).any()
      or (indices[-1] >= width)
    ):
      raise ValueError(
        f'kept[{layer!r}] must be sorted, distinct indices in [0, {width}).'
      )
  sizes = {
    op.path: (
      None if op.kind == 'depthwise' else _indices(op.inputs, by_layer),
      _indices(op.outputs, by_layer),
    )
    for op in model.ops
  }
  found = {}
  for collection in ('params', 'batch_stats'):
    flat = flax.traverse_util.flatten_dict(variables.get(collection, {}))
    for path, array in flat.items():
      inputs, outputs = sizes['/'.join(path[:-1])]
      if path[-1] == 'kernel':
        array = _take(array, inputs, array.ndim - 2)
      found[collection, *path] = _take(array, outputs, array.ndim - 1)
  return flax.traverse_util.unflatten_dict(found)
