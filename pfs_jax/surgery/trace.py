"""Traces a model with marked layers, and counts the MACs between the layers.

A model's own code may hold matrix products and convolutions (`jnp.einsum`,
`nn.MultiHeadDotProductAttention`, `jax.lax.conv`). They are read from the
traced program. Their channels are never narrowed, so their cost is fixed.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core

from pfs_jax import costs, described, groups

# Names of equations: a layer begins, a layer ends, a layer that is walked into.
ENTER, LEAVE, PEEK = 'pfs_enter:', 'pfs_leave:', 'pfs_peek:'

# Operations whose MACs cannot be counted here.
_UNKNOWN = frozenset(
  """cholesky custom_linear_solve eigh ffi_call fft io_callback lu pallas_call
  pure_callback qr ragged_dot ragged_dot_general scaled_matmul svd
  triangular_solve""".split()
)


def _mark(name: str, function: Callable[..., Any], *args) -> jax.Array:
  """`function(*args)` as one jaxpr equation called `name`."""

  def marked(*args):
    return function(*args)

  marked.__name__ = marked.__qualname__ = name
  return jax.jit(marked)(*args)


def trace(
  function: Callable[..., Any], images: int, *args: Any
) -> tuple[Any, list[costs.Layer]]:
  """The marked jaxpr of `function(*args)` and its layer calls in forward order.

  Args:
    function: Applies the model to `args`.
    images: Images in the batch.
    *args: Trees of arrays or shapes; the first is the model's variables.
  """
  calls = []

  def around(module, path, x, call):
    looked_into = described.rule(module) is described.pool
    mark = PEEK if looked_into else ENTER
    axis = getattr(module, 'axis_name', None) or ''  # `gating` removes it.
    y = call(_mark(mark + path, lambda x: x, x))
    layer = costs.describe(module, path, x, y, calls, images)
    calls.append(dataclasses.replace(layer, axis_name=axis))
    if looked_into:
      return y
    return _mark(LEAVE + path, lambda x, y: y, x, y)

  def traced(*args):
    with nn.intercept_methods(costs.intercept(around)):
      return function(*args)

  return jax.make_jaxpr(traced)(*args), calls


def place(equation: Any, where: str) -> str:
  """Name of the module that an equation of the program at `where` stands in."""
  stack = str(equation.source_info.name_stack).removeprefix('Wrapped/')
  return '/'.join(filter(None, (where, stack)))


def fixed_cost(path: str, macs: int = 0, params: int = 0) -> costs.Layer:
  """The record of something with a fixed cost."""
  return costs.Layer(
    path, 'other', 0, 0, 1, fixed_macs=macs, fixed_params=params
  )


def rest(
  program: Any, calls: Sequence[costs.Layer], images: int
) -> tuple[list[costs.Layer], tuple[str, ...]]:
  """What a marked program computes besides one run of each layer call.

  `program` and `calls` come from `trace`; `images` is the batch size.

  Returns:
    Records of operations with fixed MACs, by their places, and the names of
    those that cannot be counted.
  """
  layers = groups.first_calls(calls)
  unknown: dict[str, None] = {}
  macs = _macs_by_place(program, layers, images, 1, '', unknown)
  for call in calls:
    macs[f'{call.path} (repeated)'] -= call.macs() * images
  found = [fixed_cost(path, n // images) for path, n in macs.items() if n > 0]
  return found, tuple(unknown)


def _macs_by_place(
  program, layers, images, times, where, unknown
) -> collections.Counter:
  """{place: MACs of the batch} of a program that runs `times` times."""
  macs, inside = collections.Counter(), 0
  for equation in getattr(program, 'jaxpr', program).eqns:
    name, title = equation.primitive.name, str(equation.params.get('name', ''))
    here = place(equation, where) or 'the model'
    if title.startswith(ENTER):
      inside += 1
    elif title.startswith(LEAVE):
      inside -= 1
      layer = layers[title.removeprefix(LEAVE)]
      # Under nn.vmap several layers are one call, with more outputs.
      size = sum(math.prod(v.aval.shape) for v in equation.outvars)
      one = math.prod(layer.output_size) * layer.outputs * layer.folded
      macs[f'{layer.path} (repeated)'] += times * layer.macs() * size // one
    elif inside:
      continue  # `costs` counts the layer.
    elif name == 'dot_general':
      macs[here] += times * _dot_macs(equation)
    elif name == 'conv_general_dilated':
      macs[here] += times * _convolution_macs(equation)
    elif name in _UNKNOWN:
      unknown[f'{name} in {here}'] = None
    else:
      length = equation.params['length'] if name == 'scan' else 1
      parts = [
        _macs_by_place(part, layers, images, times * length, here, unknown)
        for part in core.jaxprs_in_params(equation.params)
      ]
      if name == 'while' and any(part.total() for part in parts):
        unknown[f'a loop (while) in {here}, counted once'] = None
      if name == 'cond':  # The branch that costs most.
        parts = [functools.reduce(collections.Counter.__or__, parts)]
      for part in parts:
        macs.update(part)
  return macs


def _dot_macs(equation) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  summed = math.prod(shape[axis] for axis in contracted)
  return math.prod(equation.outvars[0].aval.shape) * summed


def _convolution_macs(equation) -> int:
  """Multiply-accumulates of a conv_general_dilated, without inserted zeros."""
  p = equation.params
  kernel = equation.invars[1].aval.shape
  out_features = kernel[p['dimension_numbers'].rhs_spec[0]]
  each = math.prod(kernel) // out_features
  total = math.prod(equation.outvars[0].aval.shape) * each
  return total // math.prod(p['lhs_dilation'])
