"""Follows channels through a model, from the layers that make them to readers.

The model is traced to a jaxpr (nothing is computed) in which the calls of its
layers are marked (`trace`). A walk through the jaxpr then carries cells
(`cells`) instead of numbers. Reshapes, concatenations, splits and poolings move
the cells as they move the numbers, so index maps are exact. An elementwise
operation on two channels ties them. An operation that mixes channels outside a
known layer marks them as fixed, with the reason.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import costs, jaxprs
from pfs_jax.surgery import cells as cells_lib
from pfs_jax.surgery import trace
from pfs_jax.surgery.cells import Cell, Cells, State, Value

NESTED = 'inside nn.jit or a loop (nn.scan), where it cannot be followed'

_ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
  convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1
  floor ge gt imag integer_pow is_finite le log log1p logistic lt max min mul ne
  neg nextafter not or pow real reduce_precision rem round rsqrt select_n
  shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
  square sub tan tanh xor""".split()
)
_IDENTITY = frozenset(
  'copy_p name optimization_barrier sharding_constraint stop_gradient'.split()
)
_REDUCE = frozenset(
  """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
  reduce_sum""".split()
)
_KNOWN_SIZE = 1 << 16


class Flow:
  """The walk through a marked jaxpr, and what it found.

  Attributes:
    layers: {path: layer}.
    bare: Whether there is no BatchNorm: gates then stand at the outputs of
      convolutions and dense layers.
    cells: The channels that the layers make, and the cells of the walk.
    inputs: {path: [C_in] channels that the layer reads, 0 where fixed}.
    outputs: {path: [C_out] channels that a convolution or dense layer makes}.
    uses: (channel, state, gates, path) of each channel that a mixing layer
      reads.
    pasts: {path: `past` of each channel that the layer reads, call by call}.
    unseen: {path: reason} of layers that the walk could not look into.
    unbatched: {path: `Cell.channel` of all that it reads, without constants} of
      convolutions that were called without a batch axis.
  """

  def __init__(
    self,
    layers: Mapping[str, costs.Layer],
    emitted: Mapping[str, np.ndarray] | None = None,
    owners: Sequence[tuple[str, int]] = (('', 0),),
  ):
    """`emitted`: {path: channels of `owners` that it makes}; else new ones."""
    self.layers = dict(layers)
    self.bare = all(
      c.kind != 'norm' or c.obstacle or c.joint for c in layers.values()
    )
    self.inputs, self.outputs = {}, dict(emitted or {})
    self.unseen, self.unbatched = {}, {}
    self.uses, self.pasts = [], collections.defaultdict(list)
    self._narrowed = emitted is not None
    self.cells = Cells(owners)
    self._jit_depth, self._in_layer = 0, False

  def run(
    self, program: Any, values: Sequence[Value], where: str = ''
  ) -> list[Value]:
    """The values of the outputs of the jaxpr `program`.

    `values` are those of its inputs, and `where` names the module it stands in.
    """

    def outputs(equation, values):
      return self._equation(equation, values, trace.place(equation, where))

    return jaxprs.walk(program, values, outputs, self._constant_value)

  def _constant_value(self, array) -> Value:
    if math.prod(np.shape(array)) <= _KNOWN_SIZE:
      with contextlib.suppress(TypeError):  # Random keys are no numbers.
        return self.cells.constant(array)
    return self.cells.value(len(np.shape(array)), 0, State.CONST)

  def _uniform(self, eqn, channel: int, state: State) -> list[Value]:
    """Outputs of an equation whose elements are all the same cell."""
    return [
      self.cells.value(len(v.aval.shape), channel, state) for v in eqn.outvars
    ]

  def _equation(self, eqn, values: list[Value], where: str) -> Sequence[Value]:
    name, title = eqn.primitive.name, str(eqn.params.get('name', ''))
    if title.startswith(trace.LEAVE):
      self._in_layer = False
      return self._leave(title.removeprefix(trace.LEAVE), eqn, values)
    if self._in_layer:  # `_leave` knows what the layer does.
      return self._uniform(eqn, 0, State.LIVE)
    if title.startswith(trace.ENTER):
      self._in_layer = bool(eqn.outvars)
      return self._uniform(eqn, 0, State.LIVE)
    if title.startswith(trace.PEEK):
      path = title.removeprefix(trace.PEEK)
      columns = self.cells.columns(values[0], self.layers[path].inputs)
      self.inputs[path] = self._channels_of(columns)
      return values[: len(eqn.outvars)]
    if (inner := jaxprs.called(eqn)) is not None:
      nested = name in ('jit', 'pjit')
      self._jit_depth += nested
      outs = self.run(inner, values, where)
      self._jit_depth -= nested
      return outs
    if name == 'cond' and eqn.params.get('branches_platforms'):
      # One computation has forms for several platforms; this is the default.
      return self.run(eqn.params['branches'][-1], values[1:], where)
    if not eqn.outvars:  # Such as jax.debug.print: no layer reads it.
      return []
    if (known := self._known_outputs(eqn, values)) is not None:
      return known
    if name == 'iota':
      last = eqn.params['dimension'] == len(eqn.params['shape']) - 1
      channel = self.cells.by_channel() if last else 0
      return self._uniform(eqn, channel, State.CONST)
    if name in _IDENTITY:
      return values
    if name in _ELEMENTWISE:
      return [self._elementwise(eqn, values)]
    if name in _REDUCE:
      return [self._reduce(eqn, values[0], where) for _ in eqn.outvars]
    if name.startswith('reduce_window') and len(eqn.outvars) == 1:
      return [self._window(eqn, values[0], where)]
    if (moved := cells_lib.moved(eqn, values)) is not None:
      return moved
    return self._opaque(eqn, values, where)

  def _known_outputs(self, eqn, values) -> list[Value] | None:
    """The outputs of an equation if its inputs are known, else None."""
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
    if any(v.known is None for v in values) or max(sizes) > _KNOWN_SIZE:
      return None
    if eqn.primitive.name in ('broadcast_in_dim', 'reshape') and (
      values[0].known.size == 1
    ):
      ndim = len(eqn.outvars[0].aval.shape)
      return [self.cells.constant(values[0].known.reshape((1,) * ndim))]
    args = [
      np.broadcast_to(v.known, a.aval.shape).astype(a.aval.dtype)
      for v, a in zip(values, eqn.invars, strict=True)
    ]
    try:
      out = eqn.primitive.bind(*args, **eqn.params)
      out = out if eqn.primitive.multiple_results else [out]
      return [self.cells.constant(o) for o in out]
    except (TypeError, ValueError, NotImplementedError):
      return None

  def _opaque(self, eqn, values, where: str) -> list[Value]:
    """Outputs of an unknown operation, which fixes the channels it reads."""
    name = eqn.primitive.name
    reason = f'mixed by {name} in {where or "the model"}'
    read = [self.cells[i] for v in values for i in np.unique(v.cells)]
    self.cells.fix((c.channel for c in read), reason)
    seen = any(c.channel for c in read)
    channel = self.cells.origin(f'the result of {name}') if seen else 0
    live = any(c.state == State.LIVE for c in read)
    return self._uniform(eqn, channel, State.LIVE if live else State.CONST)

  # Layers.

  def _channels_of(self, columns: Iterable[int]) -> np.ndarray:
    return np.array([max(0, self.cells[i].channel) for i in columns], np.int64)

  def _leave(self, path: str, eqn, values: list[Value]) -> list[Value]:
    """The output of a layer, which reads the first of the values."""
    if not eqn.outvars:  # In nested functions JAX may remove the output.
      return []
    layer, x = self.layers[path], values[0]
    ndim, out_ndim = (len(v.aval.shape) for v in (eqn.invars[0], *eqn.outvars))
    if layer.kernel and ndim == len(layer.kernel) + 1:
      read = [self.cells[i] for i in np.unique(x.cells)]
      self.unbatched[path] = {c.channel for c in read if c.state == State.LIVE}
    if self._jit_depth:  # The cache of nn.jit would ignore changed widths.
      self.unseen[path] = NESTED
    elif {ndim, out_ndim} != {layer.ndim}:
      self.unseen[path] = 'inside nn.vmap: one layer here is several'
    elif layer.obstacle:
      self.unseen[path] = layer.obstacle
    if path in self.unseen:
      self.cells.fix(
        self.cells.found(x.cells), f'read by {path}: {self.unseen[path]}'
      )
      origin = self.cells.origin(f'the output of {path}')
      return self._uniform(eqn, origin, State.LIVE)
    columns = self.cells.columns(x, layer.inputs)
    self.pasts[path].append([self.cells[i].past for i in columns])
    self._tie_to_earlier_call(path, columns)
    rules = {'norm': self._norm, 'depthwise': self._depthwise}
    out = rules.get(layer.kind, self._mix)(layer, columns)
    numbers = np.array([self.cells.number(cell) for cell in out])
    return [Value(numbers.reshape((1,) * (out_ndim - 1) + (-1,)))]

  def _tie_to_earlier_call(self, path: str, columns: list[int]) -> None:
    """Ties the channels that a layer reads to those of its earlier call."""
    channels = self._channels_of(columns)
    before = self.inputs.setdefault(path, channels)
    for old, new in zip(before.tolist(), channels.tolist(), strict=True):
      if old and new:
        self.cells.tie((old, new), 'shared')
      else:
        reason = f'read by {path}, which also reads a fixed width'
        self.cells.fix((old, new), reason)

  def _norm(self, layer: costs.Layer, columns: list[int]) -> list[Cell]:
    # In statistics over all channels, a channel with gate 0 still counts.
    gated, out = State.CONST if layer.joint else State.ZERO, []
    for i, number in enumerate(columns):
      channel, _, _, past = self.cells[number]
      state = gated if channel > 0 else State.LIVE
      gates = frozenset([(layer.path, i)] if channel > 0 else [])
      out.append(Cell(channel, state, gates, hash((layer.path, past))))
    return out

  def _depthwise(self, layer: costs.Layer, columns: list[int]) -> list[Cell]:
    out = []
    for cell in map(self.cells.__getitem__, columns):
      state = max(cell.state, State.CONST) if layer.vectors else cell.state
      cell = cell._replace(state=state, past=hash((layer.path, cell.past)))
      out += [cell] * layer.multiplier
    return out

  def _mix(self, layer: costs.Layer, columns: list[int]) -> list[Cell]:
    for cell in map(self.cells.__getitem__, columns):
      if cell.channel > 0:
        self.uses.append((cell.channel, cell.state, cell.gates, layer.path))
    if layer.path not in self.outputs:
      self.outputs[layer.path] = self.cells.make(layer.path, layer.outputs)
    channels = self.outputs[layer.path].tolist()
    if layer.outputs == 1 and not self._narrowed:
      self.cells.fix(channels, 'a single channel')
      channels = [0]
    state, past = State.ZERO if self.bare else State.LIVE, hash(layer.path)
    return [
      Cell(c, state, frozenset([(layer.path, i)] if self.bare else []), past)
      if c
      else Cell(c, State.LIVE, past=past)
      for i, c in enumerate(channels)
    ]

  # Elementwise operations.

  def _elementwise(self, eqn, values: list[Value]) -> Value:
    arrays = np.broadcast_arrays(*(v.cells for v in values))
    ndim = len(eqn.outvars[0].aval.shape)
    key = np.zeros(arrays[0].shape, np.int64)
    for array in arrays:
      key = key * len(self.cells) + array
    _, at, inverse = np.unique(key, return_index=True, return_inverse=True)
    operands = np.stack([a.reshape(-1) for a in arrays], -1)[at].tolist()
    known = [
      v.known.item() if v.known is not None and v.known.size == 1 else None
      for v in values
    ]
    states = {}  # By the states of the operands.
    combined = [self._combine(eqn, o, known, states) for o in operands]
    cells = np.array(combined, int)[inverse]
    return Value(cells.reshape((1,) * (ndim - key.ndim) + key.shape))

  def _combine(self, eqn, numbers: list[int], known, states) -> int:
    name = eqn.primitive.name
    how = 'product' if name in ('mul', 'div') else 'sum'
    channel, _, gates, past = self.cells.merge(numbers, how)
    cells = [self.cells[i] for i in numbers]
    past = hash((name, past, *map(repr, known)))  # NaN differs from NaN.
    zeros = [c for c in cells if c.state == State.ZERO]
    if channel < 0:
      state = State.LIVE
    elif name == 'mul' and zeros:
      state = State.ZERO
      gates = next((c.gates for c in zeros if c.gates), zeros[0].gates)
    else:
      operands = tuple([c.state for c in cells])
      if operands not in states:
        states[operands] = _result_state(eqn, operands, known)
      state = states[operands]
    return self.cells.number(Cell(channel, state, gates, past))

  # Reductions.

  def _merged(self, cells, axes, name: str, where: str) -> np.ndarray:
    """Cells of which those along the given axes are merged, to length 1."""
    rest = [i for i in range(cells.ndim) if i not in axes]
    shape = [1 if i in axes else n for i, n in enumerate(cells.shape)]
    flat = cells.transpose(*rest, *axes).reshape(math.prod(shape), -1)
    folded = [self._merged_cell(np.unique(row), name, where) for row in flat]
    return np.array(folded, int).reshape(shape)

  def _merged_cell(self, numbers: np.ndarray, name: str, where: str) -> int:
    channels = {self.cells.find(c) for c in self.cells.found(numbers)}
    layers = {self.cells.owners[c][0] for c in channels}
    if len(channels) > len(layers):  # Else one of each of several branches.
      self.cells.fix(channels, f'mixed by {name} in {where or "the model"}')
      return self.cells.number(Cell(0, State.LIVE))
    cell = self.cells.merge(numbers.tolist(), 'sum')
    return self.cells.number(cell._replace(past=hash((name, cell.past))))

  def _reduce(self, eqn, value: Value, where: str) -> Value:
    axes = tuple(eqn.params['axes'])
    cells = self._merged(value.cells, axes, eqn.primitive.name, where)
    return Value(np.squeeze(cells, axes))

  def _window(self, eqn, value: Value, where: str) -> Value:
    p = eqn.params
    names = 'window_dimensions', 'window_strides', 'padding'
    sizes = zip(*(p[name] for name in names), strict=True)
    over = [i for i, size in enumerate(sizes) if size != (1, 1, (0, 0))]
    return Value(self._merged(value.cells, over, eqn.primitive.name, where))


def _result_state(eqn, states: Sequence[State], known) -> State:
  """The state of an operation's result, from the states of its operands."""
  name, zeros = eqn.primitive.name, [s == State.ZERO for s in states]
  if name == 'select_n' and all(zeros[1:]):
    return State.ZERO
  if name == 'div' and zeros[0] and not zeros[1]:
    return State.ZERO
  numbers = [0 if z else k for z, k in zip(zeros, known, strict=True)]
  if None not in numbers:
    params = tuple(eqn.params.items())
    dtypes = tuple(v.aval.dtype for v in eqn.invars)
    if _result_number(eqn.primitive, params, tuple(numbers), dtypes) == 0:
      return State.ZERO
  return max(State.CONST, *states)


@functools.cache
def _result_number(primitive, params, numbers, dtypes) -> float | None:
  """The result of an elementwise operation on numbers; None if unknown."""
  try:
    args = map(np.asarray, numbers, dtypes)
    return float(np.asarray(primitive.bind(*args, **dict(params))))
  except (TypeError, ValueError, NotImplementedError):
    return None
