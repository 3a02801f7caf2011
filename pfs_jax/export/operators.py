"""Operators of JAX as operators of ONNX: one table.

JAX's convolutions take images as [N, H, W, C], ONNX's as [N, C, H, W]. Each
value therefore has the order in which the graph holds its axes. A Transpose is
written only where two orders meet, which as a rule is only behind the input.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export  # Not imported with jax.
import jax.numpy as jnp
import numpy as np

from pfs_jax.export.graph import INPUT, Graph


class Tensor(NamedTuple):
  """A value that depends on the images.

  Attributes:
    name: Its name in the graph.
    order: Axis i of the graph's value is axis order[i] of JAX's.
  """

  name: str
  order: tuple[int, ...]


class Refused(Exception):
  """An operator, or its use, has no counterpart; the text ends the error."""


def refuse(condition: bool, why: str) -> None:
  """Refuses a use of an operator if the condition holds."""
  if condition:
    raise Refused(f' {why}')


def in_order(graph: Graph, value: Any, order: tuple[int, ...]) -> str:
  """The name of a value with its axes in this order."""
  if not isinstance(value, Tensor):
    return graph.constant(np.transpose(value, order))
  if value.order == order:
    return value.name
  moves = [value.order.index(axis) for axis in order]
  return graph.add('Transpose', [value.name], perm=moves)


def _in_jax_order(graph, value) -> str:
  """The name of a value with its axes as JAX has them."""
  rank = len(value.order) if isinstance(value, Tensor) else np.ndim(value)
  return in_order(graph, value, tuple(range(rank)))


# Elementwise operators: on values of one rank, or scalars, in a common order.


def _elementwise(graph, op: str, *inputs: Any) -> Tensor:
  order = max((x.order for x in inputs if isinstance(x, Tensor)), key=len)
  names = [
    in_order(graph, x, order)
    if isinstance(x, Tensor) or np.ndim(x)
    else graph.constant(x)
    for x in inputs
  ]
  return Tensor(graph.add(op, names), order)


def _elementwise_op(first: str, *then: Any) -> Callable[..., Tensor]:
  """An operator on all inputs; then others, or pairs (other, number)."""

  def write(graph, equation, *inputs) -> Tensor:
    x = _elementwise(graph, first, *inputs)
    for step in then:
      op, *number = [step] if isinstance(step, str) else step
      x = _elementwise(graph, op, x, *map(np.float32, number))
    return x

  return write


def _limited(graph, equation, a, b) -> Tensor:
  """Max or Min; Relu for a maximum of 0, Clip for a limit of a Relu (ReLU6)."""
  op = equation.primitive.name.capitalize()
  x, limit = (a, b) if isinstance(a, Tensor) else (b, a)
  if not isinstance(limit, Tensor) and np.ndim(limit) == 0:
    if op == 'Max' and limit == 0:
      return _elementwise(graph, 'Relu', x)
    relu = graph.maker(x.name)
    if op == 'Min' and limit >= 0 and relu and relu.op == 'Relu':
      bounds = [graph.constant(np.zeros_like(limit)), graph.constant(limit)]
      return Tensor(graph.add('Clip', [relu.inputs[0], *bounds]), x.order)
  return _elementwise(graph, op, a, b)


def _power(graph, equation, x) -> Tensor:
  dtype = equation.outvars[0].aval.dtype
  return _elementwise(graph, 'Pow', x, np.asarray(equation.params['y'], dtype))


def _selected(graph, equation, which, *cases) -> Tensor:
  refuse(len(cases) != 2, f'among {len(cases)} cases')
  refuse(equation.invars[0].aval.dtype != bool, 'by an integer')
  return _elementwise(graph, 'Where', which, cases[1], cases[0])


def _converted(graph, equation, x, *_) -> Tensor:
  from onnx import helper

  before, after = equation.invars[0].aval.dtype, equation.params['new_dtype']
  if before == after:
    return x
  refuse(
    jnp.dtype(after) == jnp.bfloat16,
    'to bfloat16: give the same module with dtype=float32, the weights are the '
    'same',
  )
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(after))
  return Tensor(graph.add('Cast', [x.name], to=kind), x.order)


# Convolutions, products, windows and sums.


def _pads(padding) -> list[int]:
  """[(before, after) of each axis] in ONNX's order: all before, all after."""
  pads = [int(v) for side in (0, 1) for v in (pair[side] for pair in padding)]
  refuse(min(pads) < 0, 'with negative padding')
  return pads


def _convolution(graph, equation, x, kernel) -> Tensor:
  p = equation.params
  transposed = any(d != 1 for d in p['lhs_dilation'])
  refuse(transposed, 'where it is transposed (lhs_dilation)')
  refuse(p['batch_group_count'] != 1, 'with groups over the batch')
  numbers = p['dimension_numbers']
  image = in_order(graph, x, tuple(numbers.lhs_spec))
  output = graph.add(
    'Conv',
    [image, in_order(graph, kernel, tuple(numbers.rhs_spec))],
    strides=list(p['window_strides']),
    pads=_pads(p['padding']),
    dilations=list(p['rhs_dilation']),
    group=p['feature_group_count'],
  )
  return Tensor(output, tuple(numbers.out_spec))


def _dense(graph, equation, x, kernel) -> Tensor:
  numbers = jax.tree.map(int, equation.params['dimension_numbers'])
  contracted, batched = (tuple(map(tuple, pair)) for pair in numbers)
  ranks = [v.aval.ndim for v in equation.invars]
  last = ranks[0] - 1
  refuse(isinstance(kernel, Tensor), 'by a matrix that depends on the image')
  other = any(batched) or contracted != ((last,), (0,)) or ranks[1] != 2
  refuse(other, 'but for the last axis by the first one of a matrix')
  op = 'Gemm' if last == 1 else 'MatMul'
  output = graph.add(op, [_in_jax_order(graph, x), graph.constant(kernel)])
  return Tensor(output, tuple(range(last + 1)))


def _pooled(graph, equation, x) -> Tensor:
  """Max pooling, or the sum over a window: its average times its size."""
  p = equation.params
  window, strides = p['window_dimensions'], p['window_strides']
  padding, dilation = p['padding'], p['window_dilation']
  refuse(any(d != 1 for d in p['base_dilation']), 'with a dilated base')
  rank = len(window)
  untouched = (1, 1, (0, 0))
  places = zip(window, strides, map(tuple, padding), strict=True)
  idle = [axis for axis, of in enumerate(places) if of == untouched]
  channels = [axis for axis in (rank - 1, 1) if axis in idle]
  refuse(0 not in idle or not channels or rank < 3, 'over batch or channels')
  axes = [axis for axis in range(1, rank) if axis != channels[0]]
  order = (0, channels[0], *axes)
  average = equation.primitive.name == 'reduce_window_sum'
  more: dict[str, Any] = {'count_include_pad': 1} if average else {}
  if any(d != 1 for d in dilation):
    refuse(average, 'with a dilated window')
    more['dilations'] = [dilation[a] for a in axes]
  output = graph.add(
    'AveragePool' if average else 'MaxPool',
    [in_order(graph, x, order)],
    kernel_shape=[window[a] for a in axes],
    strides=[strides[a] for a in axes],
    pads=_pads([padding[a] for a in axes]),
    **more,
  )
  if average:
    dtype = equation.outvars[0].aval.dtype
    size = graph.constant(np.asarray(math.prod(window), dtype))
    output = graph.add('Mul', [output, size])
  return Tensor(output, order)


def _reduced(graph, equation, x) -> Tensor:
  op = 'Reduce' + equation.primitive.name.removeprefix('reduce_').capitalize()
  axes = equation.params['axes']
  places = sorted(x.order.index(axis) for axis in axes)
  if op == 'ReduceSum':  # Axes became an input in opset 13; others later.
    inputs, more = [x.name, graph.integers(places)], {}
  else:
    inputs, more = [x.name], {'axes': places}
  left = [axis for axis in x.order if axis not in axes]
  order = tuple(sorted(left).index(axis) for axis in left)
  return Tensor(graph.add(op, inputs, keepdims=0, **more), order)


# Shapes.


def _with_shape(graph, x, sizes) -> Tensor:
  shape = [size if isinstance(size, int) else -1 for size in sizes]
  several = shape.count(-1) > 1
  refuse(several, 'with two axes that depend on the batch size')
  name = graph.add('Reshape', [_in_jax_order(graph, x), graph.integers(shape)])
  return Tensor(name, tuple(range(len(shape))))


def _reshaped(graph, equation, x) -> Tensor:
  if equation.primitive.name == 'reshape':
    refuse(equation.params['dimensions'] is not None, 'with an order of axes')
  return _with_shape(graph, x, equation.outvars[0].aval.shape)


def placed_shape(sizes: Sequence[int], equation: Any) -> list[int]:
  """The operand's shape in broadcast_in_dim, with ones for new axes."""
  placed = [1] * len(equation.outvars[0].aval.shape)
  axes = equation.params['broadcast_dimensions']
  for axis, size in zip(axes, sizes, strict=True):
    placed[axis] = size
  return placed


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
    else:
      refuse(str(size) != 'b', f'to an axis of {size}')
      shape = graph.add('Shape', [INPUT])
      parts.append(graph.add('Gather', [shape, graph.integers([0])], axis=0))
  shape = graph.add('Concat', parts, axis=0)
  name = graph.add('Expand', [_in_jax_order(graph, x), shape])
  return Tensor(name, tuple(range(len(sizes))))


def _transposed(graph, equation, x) -> Tensor:
  moves = equation.params['permutation']
  return Tensor(x.name, tuple(moves.index(axis) for axis in x.order))


def _padded(graph, equation, x, value) -> Tensor:
  config = equation.params['padding_config']
  refuse(any(interior for _, _, interior in config), 'between elements')
  pads = _pads([config[axis][:2] for axis in x.order])
  inputs = [x.name, graph.integers(pads), _in_jax_order(graph, value)]
  return Tensor(graph.add('Pad', inputs), x.order)


def _sliced(graph, equation, x) -> Tensor:
  p, sizes = equation.params, equation.invars[0].aval.shape
  strides = p['strides'] or (1,) * len(sizes)
  ends = zip(
    p['start_indices'], p['limit_indices'], strides, sizes, strict=True
  )
  taken = [
    (start, stop, axis, stride)
    for axis, (start, stop, stride, size) in enumerate(ends)
    if (start, stride) != (0, 1) or stop != size
  ]
  return _part(graph, x, taken)


def _split(graph, equation, x) -> list[Tensor]:
  axis, sizes = equation.params['axis'], equation.params['sizes']
  ends = zip(itertools.accumulate(sizes), sizes, strict=True)
  return [_part(graph, x, [(end - size, end, axis, 1)]) for end, size in ends]


def _reversed(graph, equation, x) -> Tensor:
  beyond = np.iinfo(np.int64).min  # Before the first element of any axis.
  axes = equation.params['dimensions']
  return _part(graph, x, [(-1, beyond, axis, -1) for axis in axes])


def _part(graph, x, taken) -> Tensor:
  """A slice; `taken` has (start, stop, axis, step) of the axes that it cuts."""
  if not taken:
    return x
  starts, stops, axes, steps = zip(*taken, strict=True)
  refuse(any(map(jax.export.is_symbolic_dim, stops)), 'along the batch')
  places = [x.order.index(axis) for axis in axes]
  columns = map(graph.integers, (starts, stops, places, steps))
  return Tensor(graph.add('Slice', [x.name, *columns]), x.order)


def _joined(graph, equation, *parts) -> Tensor:
  order = next(x.order for x in parts if isinstance(x, Tensor))
  names = [in_order(graph, x, order) for x in parts]
  axis = order.index(equation.params['dimension'])
  return Tensor(graph.add('Concat', names, axis=axis), order)


def _stacked(graph, equation, *parts) -> Tensor:
  axis = equation.params['axis']
  sizes = list(equation.outvars[0].aval.shape)
  sizes[axis] = 1
  names = [_with_shape(graph, x, sizes).name for x in parts]
  return Tensor(graph.add('Concat', names, axis=axis), tuple(range(len(sizes))))


def _unstacked(graph, equation, x) -> list[Tensor]:
  axis = equation.params['axis']
  return [
    _with_shape(graph, _part(graph, x, [(i, i + 1, axis, 1)]), v.aval.shape)
    for i, v in enumerate(equation.outvars)
  ]


def _tiled(graph, equation, x) -> Tensor:
  times = [equation.params['reps'][axis] for axis in x.order]
  refuse(any(map(jax.export.is_symbolic_dim, times)), 'by the batch size')
  name = graph.add('Tile', [x.name, graph.integers(times)])
  return Tensor(name, x.order)


_SAME_NAME = 'abs add div erf exp log mul neg pow sign sqrt sub tanh'
# {operator of JAX: (graph, equation, *inputs) -> Tensor, or a list of them}.
TABLE: dict[str, Callable[..., Any]] = {
  **{name: _elementwise_op(name.capitalize()) for name in _SAME_NAME.split()},
  'broadcast_in_dim': _broadcast,
  'concatenate': _joined,
  'conv_general_dilated': _convolution,
  'convert_element_type': _converted,
  **dict.fromkeys(['copy', 'copy_p', 'stop_gradient'], lambda _, __, x: x),
  'dot_general': _dense,
  'eq': _elementwise_op('Equal'),
  'erfc': _elementwise_op('Erf', 'Neg', ('Add', 1)),
  'expm1': _elementwise_op('Exp', ('Sub', 1)),
  'ge': _elementwise_op('GreaterOrEqual'),
  'gt': _elementwise_op('Greater'),
  'integer_pow': _power,
  'is_finite': _elementwise_op('Abs', ('Less', np.inf)),
  'le': _elementwise_op('LessOrEqual'),
  'log1p': _elementwise_op('Identity', ('Add', 1), 'Log'),
  'logistic': _elementwise_op('Sigmoid'),
  'lt': _elementwise_op('Less'),
  **dict.fromkeys(['max', 'min'], _limited),
  'ne': _elementwise_op('Equal', 'Not'),
  'pad': _padded,
  **dict.fromkeys(['reduce_max', 'reduce_min', 'reduce_sum'], _reduced),
  **dict.fromkeys(['reduce_window_max', 'reduce_window_sum'], _pooled),
  **dict.fromkeys(['reshape', 'squeeze'], _reshaped),
  'rev': _reversed,
  'rsqrt': _elementwise_op('Sqrt', 'Reciprocal'),
  'select_n': _selected,
  'slice': _sliced,
  'split': _split,
  'square': lambda graph, _, x: _elementwise(graph, 'Mul', x, x),
  'stack': _stacked,
  'tile': _tiled,
  'transpose': _transposed,
  'unstack': _unstacked,
}
