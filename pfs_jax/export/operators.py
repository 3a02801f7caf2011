"""Operators of JAX as operators of ONNX.

JAX's convolutions take images as [N, H, W, C], ONNX's as [N, C, H, W]. A value
is therefore kept with the order in which the graph holds its axes; a Transpose
is written only where two orders meet: behind the input and, as a rule, nowhere
else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax.export.graph import Graph


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A value that depends on the images.

  Attributes:
    name: Its name in the graph.
    order: Axis i of the graph's value is axis order[i] of JAX's.
  """

  name: str
  order: tuple[int, ...]


class Refused(Exception):
  """An operator, or this use of it, has no counterpart; the message ends so."""


def placed_shape(sizes: Sequence[int], equation: Any) -> list[int]:
  """The operand's shape in broadcast_in_dim, with ones for new axes."""
  placed = [1] * len(equation.outvars[0].aval.shape)
  for axis, size in zip(
    equation.params['broadcast_dimensions'], sizes, strict=True
  ):
    placed[axis] = size
  return placed


# Orders of axes.


def in_order(graph: Graph, value: Any, order: tuple[int, ...]) -> str:
  """The name of a value with its axes in this order."""
  if not isinstance(value, Tensor):
    return graph.constant(np.transpose(value, order))
  if value.order == order:
    return value.name
  moves = [value.order.index(axis) for axis in order]
  return graph.add('Transpose', [value.name], perm=moves)


def _plain(graph, value) -> str:
  """The name of a value with its axes as JAX has them."""
  rank = len(value.order) if isinstance(value, Tensor) else np.ndim(value)
  return in_order(graph, value, tuple(range(rank)))


def elementwise(
  graph: Graph, write: str | Callable[..., Tensor], inputs: Sequence[Any]
) -> Tensor:
  """One operator on values of one rank, or scalars, in a common order."""
  order = max((x.order for x in inputs if isinstance(x, Tensor)), key=len)
  if isinstance(write, str):
    scalar_or_same = [
      graph.constant(x)
      if not isinstance(x, Tensor) and np.ndim(x) == 0
      else in_order(graph, x, order)
      for x in inputs
    ]
    return Tensor(graph.add(write, scalar_or_same), order)
  return write(graph, *inputs)


# Elementwise operators.


def _then(first: str, second: str) -> Callable:
  def write(graph, x):
    return Tensor(graph.add(second, [graph.add(first, [x.name])]), x.order)

  return write


def _maximum(graph, a, b) -> Tensor:
  x, limit = (a, b) if isinstance(a, Tensor) else (b, a)
  if not isinstance(limit, Tensor) and np.ndim(limit) == 0 and limit == 0:
    return Tensor(graph.add('Relu', [x.name]), x.order)
  return elementwise(graph, 'Max', [a, b])


def _minimum(graph, a, b) -> Tensor:
  """Min, or Clip where it limits a Relu (ReLU6)."""
  x, limit = (a, b) if isinstance(a, Tensor) else (b, a)
  relu = graph.maker(x.name)
  if relu and relu.op == 'Relu' and not isinstance(limit, Tensor):
    if np.ndim(limit) == 0 and limit >= 0:
      bounds = [graph.constant(np.zeros_like(limit)), graph.constant(limit)]
      return Tensor(graph.add('Clip', [relu.inputs[0], *bounds]), x.order)
  return elementwise(graph, 'Min', [a, b])


def _exponential_minus_one(graph, x) -> Tensor:
  power = Tensor(graph.add('Exp', [x.name]), x.order)
  return elementwise(graph, 'Sub', [power, np.float32(1)])


def _square(graph, x) -> Tensor:
  return Tensor(graph.add('Mul', [x.name, x.name]), x.order)


# What these do to constants.
NUMPY: dict[str, Callable] = {
  'add': np.add,
  'sub': np.subtract,
  'mul': np.multiply,
  'max': np.maximum,
  'min': np.minimum,
  'sqrt': np.sqrt,
  'rsqrt': lambda x: 1 / np.sqrt(x),
  'convert_element_type': lambda x: x,
}

ELEMENTWISE: dict[str, str | Callable] = {
  'abs': 'Abs',
  'add': 'Add',
  'div': 'Div',
  'erf': 'Erf',
  'exp': 'Exp',
  'expm1': _exponential_minus_one,
  'log': 'Log',
  'logistic': 'Sigmoid',
  'max': _maximum,
  'min': _minimum,
  'mul': 'Mul',
  'neg': 'Neg',
  'pow': 'Pow',
  'rsqrt': _then('Sqrt', 'Reciprocal'),
  'sqrt': 'Sqrt',
  'square': _square,
  'sub': 'Sub',
  'tanh': 'Tanh',
  'eq': 'Equal',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'lt': 'Less',
}

# The others.


def _convolution(graph, equation, x, kernel) -> Tensor:
  p = equation.params
  if any(d != 1 for d in p['lhs_dilation']):
    raise Refused(' where it is transposed (lhs_dilation)')
  if p['batch_group_count'] != 1:
    raise Refused(' with groups over the batch')
  numbers = p['dimension_numbers']
  output = graph.add(
    'Conv',
    [
      in_order(graph, x, tuple(numbers.lhs_spec)),
      in_order(graph, kernel, tuple(numbers.rhs_spec)),
    ],
    strides=list(p['window_strides']),
    pads=_pads(p['padding']),
    dilations=list(p['rhs_dilation']),
    group=p['feature_group_count'],
  )
  return Tensor(output, tuple(numbers.out_spec))


def _pads(padding) -> list[int]:
  """[(before, after) of each axis] as ONNX has it: all befores, all afters."""
  pads = [int(v) for side in (0, 1) for v in (pair[side] for pair in padding)]
  if min(pads) < 0:
    raise Refused(' with negative padding')
  return pads


def _dense(graph, equation, x, kernel) -> Tensor:
  numbers = jax.tree.map(int, equation.params['dimension_numbers'])
  contracted, batched = (tuple(map(tuple, pair)) for pair in numbers)
  ranks = [v.aval.ndim for v in equation.invars]
  last = ranks[0] - 1
  if isinstance(kernel, Tensor):
    raise Refused(' by a matrix that depends on the image')
  if any(batched) or contracted != ((last,), (0,)) or ranks[1] != 2:
    raise Refused(' but for the last axis by the first one of a matrix')
  op = 'Gemm' if last == 1 else 'MatMul'
  output = graph.add(op, [_plain(graph, x), graph.constant(kernel)])
  return Tensor(output, tuple(range(last + 1)))


def _pool(op: str) -> Callable:
  def write(graph, equation, x) -> Tensor:
    p = equation.params
    window = p['window_dimensions']
    if any(d != 1 for d in p['base_dilation']):
      raise Refused(' with a dilated base')
    dilated = any(d != 1 for d in p['window_dilation'])
    if dilated and op == 'AveragePool':
      raise Refused(' with a dilated window')
    order = _pooled_order(p)
    axes = order[2:]
    more: dict[str, Any] = {}
    if dilated:
      more['dilations'] = [p['window_dilation'][a] for a in axes]
    if op == 'AveragePool':
      more['count_include_pad'] = 1
    output = graph.add(
      op,
      [in_order(graph, x, order)],
      kernel_shape=[window[a] for a in axes],
      strides=[p['window_strides'][a] for a in axes],
      pads=_pads([p['padding'][a] for a in axes]),
      **more,
    )
    if op == 'AveragePool':  # JAX's is a sum.
      dtype = equation.outvars[0].aval.dtype
      size = graph.constant(np.asarray(math.prod(window), dtype))
      output = graph.add('Mul', [output, size])
    return Tensor(output, order)

  return write


def _pooled_order(params) -> tuple[int, ...]:
  """Two axes that are not pooled, batch and channels, then the pooled ones."""
  rank = len(params['window_dimensions'])
  idle = [
    axis
    for axis in range(rank)
    if params['window_dimensions'][axis] == 1
    and params['window_strides'][axis] == 1
    and tuple(params['padding'][axis]) == (0, 0)
  ]
  for channels in (rank - 1, 1):
    if 0 in idle and channels in idle and rank > 2:
      pooled = (a for a in range(1, rank) if a != channels)
      return (0, channels, *pooled)
  raise Refused(' over batch or channels')


def _reduced(op: str) -> Callable:
  def write(graph, equation, x) -> Tensor:
    axes = equation.params['axes']
    places = sorted(x.order.index(axis) for axis in axes)
    if op == 'ReduceSum':  # Axes became an input in opset 13; others later.
      inputs, more = [x.name, graph.integers(places)], {}
    else:
      inputs, more = [x.name], {'axes': places}
    left = [axis for axis in x.order if axis not in axes]
    order = tuple(sorted(left).index(axis) for axis in left)
    return Tensor(graph.add(op, inputs, keepdims=0, **more), order)

  return write


def _reshaped(graph, equation, x) -> Tensor:
  if equation.params['dimensions'] is not None:
    raise Refused(' with an order of axes')
  return _with_shape(graph, x, equation.outvars[0].aval.shape)


def _squeezed(graph, equation, x) -> Tensor:
  return _with_shape(graph, x, equation.outvars[0].aval.shape)


def _with_shape(graph, x, sizes) -> Tensor:
  shape = [size if isinstance(size, int) else -1 for size in sizes]
  if shape.count(-1) > 1:
    raise Refused(' with two axes that depend on the batch size')
  name = graph.add('Reshape', [_plain(graph, x), graph.integers(shape)])
  return Tensor(name, tuple(range(len(shape))))


def _broadcast(graph, equation, x, *_) -> Tensor:
  sizes = equation.outvars[0].aval.shape
  before = equation.invars[0].aval.shape
  placed = placed_shape(before, equation)
  if not isinstance(x, Tensor):
    name = graph.constant(np.reshape(x, placed))
    x = Tensor(name, tuple(range(len(sizes))))
  elif len(placed) != len(before):
    x = _with_shape(graph, x, placed)
  if list(sizes) == placed:
    return x
  parts = []
  for size in sizes:
    if isinstance(size, int):
      parts.append(graph.integers([size]))
    elif str(size) == 'b':
      parts.append(graph.batch())
    else:
      raise Refused(f' to an axis of {size}')
  shape = graph.add('Concat', parts, axis=0)
  name = graph.add('Expand', [_plain(graph, x), shape])
  return Tensor(name, tuple(range(len(sizes))))


def _transposed(graph, equation, x) -> Tensor:
  moves = equation.params['permutation']
  return Tensor(x.name, tuple(moves.index(axis) for axis in x.order))


def _padded(graph, equation, x, value) -> Tensor:
  config = equation.params['padding_config']
  if any(interior for _, _, interior in config):
    raise Refused(' between elements')
  pads = _pads([config[axis][:2] for axis in x.order])
  inputs = [x.name, graph.integers(pads), _plain(graph, value)]
  return Tensor(graph.add('Pad', inputs), x.order)


def _sliced(graph, equation, x) -> Tensor:
  p, sizes = equation.params, equation.invars[0].aval.shape
  strides = p['strides'] or (1,) * len(sizes)
  taken = [
    (start, stop, x.order.index(axis), stride)
    for axis, (start, stop, stride, size) in enumerate(
      zip(p['start_indices'], p['limit_indices'], strides, sizes, strict=True)
    )
    if (start, stride) != (0, 1) or stop != size
  ]
  if not taken:
    return x
  if not all(isinstance(stop, int) for _, stop, _, _ in taken):
    raise Refused(' along the batch')
  inputs = [graph.integers(column) for column in zip(*taken, strict=True)]
  return Tensor(graph.add('Slice', [x.name, *inputs]), x.order)


def _joined(graph, equation, *parts) -> Tensor:
  order = next(x.order for x in parts if isinstance(x, Tensor))
  names = [in_order(graph, x, order) for x in parts]
  axis = order.index(equation.params['dimension'])
  return Tensor(graph.add('Concat', names, axis=axis), order)


def _power(graph, equation, x) -> Tensor:
  exponent = np.asarray(equation.params['y'], equation.outvars[0].aval.dtype)
  return elementwise(graph, 'Pow', [x, exponent])


def _converted(graph, equation, x, *_) -> Tensor:
  from onnx import helper

  before, after = equation.invars[0].aval.dtype, equation.params['new_dtype']
  if before == after:
    return x
  if jnp.dtype(after) == jnp.bfloat16:
    raise Refused(
      ' to bfloat16: give the same module with dtype=float32, the weights are '
      'the same'
    )
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(after))
  return Tensor(graph.add('Cast', [x.name], to=kind), x.order)


def _selected(graph, equation, which, *cases) -> Tensor:
  if len(cases) != 2:
    raise Refused(f' among {len(cases)} cases')
  if equation.invars[0].aval.dtype != bool:
    raise Refused(' by an integer')
  return elementwise(graph, 'Where', [which, cases[1], cases[0]])


def _same(graph, equation, x) -> Tensor:
  return x


HANDLERS: dict[str, Callable] = {
  'broadcast_in_dim': _broadcast,
  'concatenate': _joined,
  'conv_general_dilated': _convolution,
  'convert_element_type': _converted,
  'copy': _same,
  'copy_p': _same,
  'dot_general': _dense,
  'integer_pow': _power,
  'pad': _padded,
  'reduce_max': _reduced('ReduceMax'),
  'reduce_min': _reduced('ReduceMin'),
  'reduce_sum': _reduced('ReduceSum'),
  'reduce_window_max': _pool('MaxPool'),
  'reduce_window_sum': _pool('AveragePool'),
  'reshape': _reshaped,
  'select_n': _selected,
  'slice': _sliced,
  'squeeze': _squeezed,
  'stop_gradient': _same,
  'transpose': _transposed,
}
