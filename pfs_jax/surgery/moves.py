"""Operations that move elements: they move cells as they move numbers.

Each function takes an equation and the cells of its inputs, arrays with length
1 on axes along which nothing changes, and returns the cells of its output (a
list where it has several).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def compressed(cells: np.ndarray) -> np.ndarray:
  """Cells with length 1 on each axis along which nothing changes."""
  for axis, size in enumerate(cells.shape):
    if size > 1:
      first = cells.take([0], axis)
      if (cells == first).all():
        cells = first
  return cells


def _broadcast_in_dim(equation: Any, cells: np.ndarray, *_) -> np.ndarray:
  shape = [1] * len(equation.params['shape'])
  for i, axis in enumerate(equation.params['broadcast_dimensions']):
    shape[axis] = cells.shape[i]
  return cells.reshape(shape)


def _reshape(equation: Any, cells: np.ndarray, *_) -> np.ndarray:
  shape = equation.outvars[0].aval.shape
  if cells.size == 1:
    return cells.reshape((1,) * len(shape))
  full = np.broadcast_to(cells, equation.invars[0].aval.shape)
  return compressed(full.reshape(shape))


def _transpose(equation: Any, cells: np.ndarray) -> np.ndarray:
  return cells.transpose(equation.params['permutation'])


def _squeeze(equation: Any, cells: np.ndarray) -> np.ndarray:
  return np.squeeze(cells, tuple(equation.params['dimensions']))


def _rev(equation: Any, cells: np.ndarray) -> np.ndarray:
  return np.flip(cells, equation.params['dimensions'])


def _slice(equation: Any, cells: np.ndarray) -> np.ndarray:
  p = equation.params
  strides = p['strides'] or (1,) * cells.ndim
  ranges = zip(p['start_indices'], p['limit_indices'], strides, strict=True)
  return cells[
    tuple(
      slice(None) if n == 1 else slice(*taken)
      for n, taken in zip(cells.shape, ranges, strict=True)
    )
  ]


def _split(equation: Any, cells: np.ndarray) -> list[np.ndarray]:
  axis, sizes = equation.params['axis'], equation.params['sizes']
  if cells.shape[axis] == 1:
    return [cells] * len(sizes)
  return np.split(cells, np.cumsum(sizes)[:-1], axis)


def _concatenate(equation: Any, *inputs: np.ndarray) -> np.ndarray:
  axis = equation.params['dimension']
  common = np.max([cells.shape for cells in inputs], axis=0)
  parts = []
  for cells, var in zip(inputs, equation.invars, strict=True):
    shape = [*common]
    shape[axis] = var.aval.shape[axis]
    parts.append(np.broadcast_to(cells, shape))
  return compressed(np.concatenate(parts, axis))


def _pad(equation: Any, cells: np.ndarray, filler: np.ndarray) -> np.ndarray:
  shape = equation.invars[0].aval.shape
  configuration = equation.params['padding_config']
  for axis, (low, high, inner) in enumerate(configuration):
    if not (low or high or inner):
      continue
    size = shape[axis]
    cells = np.repeat(cells, size, axis) if cells.shape[axis] == 1 else cells
    out = equation.outvars[0].aval.shape[axis]
    at = low + np.arange(size) * (inner + 1)
    inside = (at >= 0) & (at < out)
    padded = np.full(
      [*cells.shape[:axis], out, *cells.shape[axis + 1 :]], filler.item()
    )
    padded.swapaxes(0, axis)[at[inside]] = cells.swapaxes(0, axis)[inside]
    cells = padded
  return compressed(cells)


MOVES: dict[str, Callable[..., Any]] = {
  'broadcast_in_dim': _broadcast_in_dim,
  'concatenate': _concatenate,
  'pad': _pad,
  'reshape': _reshape,
  'rev': _rev,
  'slice': _slice,
  'split': _split,
  'squeeze': _squeeze,
  'transpose': _transpose,
}
