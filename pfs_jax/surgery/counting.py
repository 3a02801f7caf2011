"""Counts what multiplies and accumulates outside of known layers.

A model's own code may hold matrix products and convolutions (`jnp.einsum`,
`nn.MultiHeadDotProductAttention`, `jax.lax.conv`). They are read from the
traced program. Their channels are never narrowed, so their cost is fixed.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from jax.extend import core

from pfs_jax import costs, jaxprs
from pfs_jax.surgery import trace

# Operations of which nobody knows here how much they multiply.
_UNKNOWN = frozenset(
  """cholesky custom_linear_solve eigh ffi_call fft io_callback lu pallas_call
  pure_callback qr ragged_dot ragged_dot_general scaled_matmul svd
  triangular_solve""".split()
)


def other(path: str, macs: int = 0, params: int = 0) -> costs.Layer:
  """The record of something with a fixed cost."""
  return costs.Layer(
    path, 'other', 0, 0, 1, fixed_macs=macs, fixed_params=params
  )


def rest(
  program: Any, layers: Mapping[str, costs.Layer], images: int
) -> tuple[list[costs.Layer], tuple[str, ...]]:
  """What a marked program computes beside one call of each layer call.

  Args:
    program: The jaxpr, from `trace.trace`.
    layers: {path: layer} of the layers that are marked in it.
    images: Images in the batch.

  Returns:
    Records of operations with fixed MACs, by their places, and the names of
    those that cannot be counted.
  """
  macs, unknown = collections.Counter(), {}
  _count(program, layers, images, 1, '', macs, unknown)
  found = [other(where, macs=n // images) for where, n in macs.items() if n]
  return found, tuple(unknown)


def _count(program, layers, images, times, where, macs, unknown) -> None:
  """Adds up the operations of a program that runs `times` times.

  Args:
    program: The jaxpr.
    layers: {path: layer}.
    images: Images in the batch.
    times: How often the program runs.
    where: Name of the module that it stands in.
    macs: {place: MACs of the batch} to add to.
    unknown: What cannot be counted, to add to.
  """
  inside = 0  # Of how many layers: these are counted by `costs`.
  for equation in getattr(program, 'jaxpr', program).eqns:
    name, title = equation.primitive.name, str(equation.params.get('name', ''))
    stack = str(equation.source_info.name_stack).removeprefix('Wrapped/')
    here = '/'.join(filter(None, (where, stack))) or 'the model'
    if title.startswith(trace.ENTER):
      inside += 1
    elif title.startswith(trace.LEAVE):
      inside -= 1
      layer = layers[title.removeprefix(trace.LEAVE)]
      # Several layers in one under nn.vmap, several calls in a loop.
      size = (
        math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
      )
      one = images * math.prod(layer.output_size) * layer.outputs
      copies = times * max(1, size // one) if layer.kind != 'norm' else 1
      macs[f'{layer.path} (repeated)'] += (copies - 1) * layer.macs() * images
    elif inside:
      continue
    elif name == 'dot_general':
      macs[here] += times * _dot(equation)
    elif name == 'conv_general_dilated':
      macs[here] += times * _convolution(equation)
    elif name in _UNKNOWN:
      unknown[f'{name} in {here}'] = None
    else:
      _count_inner(equation, layers, images, times, here, macs, unknown)


def _count_inner(equation, layers, images, times, here, macs, unknown) -> None:
  """Counts the programs that an equation holds."""
  name = equation.primitive.name
  inner = [
    p
    for value in equation.params.values()
    for p in (value if isinstance(value, tuple | list) else [value])
    if isinstance(p, core.Jaxpr | core.ClosedJaxpr)
  ]
  if name in jaxprs.CALLS:
    inner = [part] if (part := jaxprs.called(equation)) else []
  elif name == 'scan':
    times *= equation.params['length']
  for part in inner:
    if part is not None:
      found = collections.Counter()
      _count(part, layers, images, times, here, found, unknown)
      if name == 'while' and found.total():
        unknown[f'a loop (while) in {here}, counted once'] = None
      for place, n in found.items():
        # Of the branches of a `cond`, the dearest counts.
        macs[place] = max(macs[place], n) if name == 'cond' else macs[place] + n


def _dot(equation) -> int:
  """Multiply-accumulates of a dot_general."""
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  summed = math.prod(shape[axis] for axis in contracted)
  return math.prod(equation.outvars[0].aval.shape) * summed


def _convolution(equation) -> int:
  """Multiply-accumulates of a conv_general_dilated, zeros between left out."""
  p = equation.params
  kernel = equation.invars[1].aval.shape
  out_features = kernel[p['dimension_numbers'].rhs_spec[0]]
  each = math.prod(kernel) // out_features
  total = math.prod(equation.outvars[0].aval.shape) * each
  return total // math.prod(p['lhs_dilation'])
