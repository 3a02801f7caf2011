"""Follows channels through a model: which layer reads which channel of which.

The model is traced to a jaxpr (nothing is computed) in which the calls of its
layers are marked (`trace`). A walk through the jaxpr then carries cells
(`cells`) instead of numbers. Reshapes, concatenations, splits and poolings move
the cells as they move the numbers (`moves`), so index maps come out exact; an
elementwise operation on two channels ties them; whatever mixes channels outside
a known layer fixes them, with the reason.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import costs, jaxprs
from pfs_jax.surgery import moves, trace
from pfs_jax.surgery.cells import Cell, Cells, Channels, State, Value

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
  'copy_p name optimization_barrier sharding_constraint'.split()
)
_REDUCE = frozenset(
  """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
  reduce_sum""".split()
)
_BY_INDEX = frozenset(['dynamic_slice', 'gather'])
_KNOWN_SIZE = 1 << 16


def is_batch_norm(layer: costs.Layer) -> bool:
  """Whether a layer normalises each channel of the last axis alone."""
  return layer.kind == 'norm' and not layer.obstacle and not layer.joint


class Flow:
  """The walk through a marked jaxpr, and what it found.

  Attributes:
    layers: {path: layer}.
    bare: Whether there is no BatchNorm: gates then stand at the outputs of
      convolutions and dense layers.
    channels: The channels that the layers make.
    cells: The cells of the walk.
    inputs: {path: [C_in] channels that the layer reads, 0 where fixed}.
    outputs: {path: [C_out] channels that a convolution or dense layer makes}.
    uses: (channel, state, gates, path) of each channel that a mixing layer
      reads.
    pasts: {path: `past` of each channel that the layer reads, call by call}.
    unseen: {path: reason} of layers that the walk could not look into.
  """

  def __init__(
    self,
    layers: Mapping[str, costs.Layer],
    emitted: Mapping[str, np.ndarray] | None = None,
  ):
    """`emitted`: channels that layers make; by default new ones."""
    self.layers = dict(layers)
    self.bare = not any(is_batch_norm(c) for c in layers.values())
    self.inputs, self.outputs, self.unseen = {}, {}, {}
    self.uses, self.pasts = [], collections.defaultdict(list)
    self._emitted = emitted
    made = [0, *(int(e.max()) for e in (emitted or {}).values() if e.size)]
    self.channels = Channels(max(made))
    self.cells = Cells(self.channels)
    self._jit_depth = 0

  def run(
    self, program: Any, values: Sequence[Value], where: str = ''
  ) -> list[Value]:
    """The values of the outputs of a jaxpr.

    Args:
      program: The jaxpr.
      values: The values of its inputs.
      where: Name of the module that the jaxpr stands in.
    """

    def outputs(equation, values):
      stack = str(equation.source_info.name_stack).removeprefix('Wrapped/')
      here = '/'.join(filter(None, (where, stack)))
      return self._equation(equation, values, here)

    return jaxprs.walk(program, values, outputs, self._of_constant)

  def _of_constant(self, array) -> Value:
    if math.prod(np.shape(array)) <= _KNOWN_SIZE:
      try:
        return self.cells.constant(array)
      except TypeError:  # A random key has no numbers.
        pass
    return self.cells.value(len(np.shape(array)), 0, State.CONST)

  def _equation(self, eqn, values: list[Value], where: str) -> Sequence[Value]:
    name = eqn.primitive.name
    if name in jaxprs.CALLS:
      return self._call(eqn, values, where)
    known = self._known(eqn, values)
    if known is not None:
      return known
    if name == 'iota':
      ndim = len(eqn.params['shape'])
      last = eqn.params['dimension'] == ndim - 1
      channel = self.cells.by_channel() if last else 0
      return [self.cells.value(ndim, channel, State.CONST)]
    if name in _IDENTITY:
      return values
    if name in _ELEMENTWISE:
      return [self._elementwise(eqn, values)]
    if name in _REDUCE:
      return [self._reduce(eqn, values[0], where) for _ in eqn.outvars]
    if name.startswith('reduce_window') and len(eqn.outvars) == 1:
      return [self._window(eqn, values[0], where)]
    if name in _BY_INDEX and all(v.known is not None for v in values[1:]):
      return [_by_index(eqn, values)]
    if name in moves.MOVES:
      out = moves.MOVES[name](eqn, *(v.cells for v in values))
      return [Value(c) for c in (out if isinstance(out, list) else [out])]
    return self._opaque(eqn, values, where)

  def _known(self, eqn, values) -> list[Value] | None:
    """The outputs of an equation whose inputs are all known, if small."""
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
    """An operation that is not understood: it fixes the channels it reads."""
    name = eqn.primitive.name
    reason = f'mixed by {name} in {where or "the model"}'
    seen, live = False, False
    for value in values:
      cells = [self.cells[i] for i in np.unique(value.cells)]
      self.channels.fix((c.channel for c in cells), reason)
      seen |= any(c.channel for c in cells)
      live |= any(c.state == State.LIVE for c in cells)
    channel = self.cells.origin(f'the result of {name}') if seen else 0
    state = State.LIVE if live else State.CONST
    return [
      self.cells.value(len(v.aval.shape), channel, state) for v in eqn.outvars
    ]

  def _call(self, eqn, values, where: str) -> Sequence[Value]:
    name = str(eqn.params.get('name', ''))
    for mark, rule in (
      (trace.ENTER, self._enter),
      (trace.LEAVE, self._leave),
      (trace.PEEK, self._peek),
    ):
      if name.startswith(mark):
        if not eqn.outvars:  # In nested functions JAX may see through it.
          return []
        return [rule(name[len(mark) :], eqn, values)]
    inner = jaxprs.called(eqn)
    if inner is None:
      return self._opaque(eqn, values, where)
    nested = eqn.primitive.name in ('jit', 'pjit')
    self._jit_depth += nested
    outs = self.run(inner, values, where)
    self._jit_depth -= nested
    return outs

  # Layers.

  def _enter(self, path, eqn, values) -> Value:
    """Hides the channels from a layer's own operations: `_leave` knows them."""
    del path, eqn
    return self.cells.value(values[0].cells.ndim, 0, State.LIVE)

  def _peek(self, path, eqn, values) -> Value:
    """Notes what a layer reads whose operations are followed one by one."""
    del eqn
    columns = self.cells.columns(values[0], self.layers[path].inputs)
    self.inputs[path] = self._channels_of(columns)
    return values[0]

  def _channels_of(self, columns: Iterable[int]) -> np.ndarray:
    return np.array([max(0, self.cells[i].channel) for i in columns], np.int64)

  def _leave(self, path, eqn, values) -> Value:
    layer, x = self.layers[path], values[0]
    ndim, out_ndim = (len(v.aval.shape) for v in (eqn.invars[0], *eqn.outvars))
    if self._jit_depth:  # Its cache would not see the surgery.
      self.unseen[path] = NESTED
    elif {ndim, out_ndim} != {layer.ndim}:
      self.unseen[path] = 'inside nn.vmap: one layer here is several'
    elif layer.obstacle:
      self.unseen[path] = layer.obstacle
    if path in self.unseen:
      self.channels.fix(
        self.cells.found(x.cells), f'read by {path}: {self.unseen[path]}'
      )
      origin = self.cells.origin(f'the output of {path}')
      return self.cells.value(out_ndim, origin, State.LIVE)
    columns = self.cells.columns(x, layer.inputs)
    self.pasts[path].append([self.cells[i].past for i in columns])
    self._share(path, columns)
    if layer.kind == 'norm':
      out = self._norm(layer, columns)
    elif layer.kind == 'depthwise':
      out = self._depthwise(layer, columns)
    else:
      out = self._mix(layer, columns)
    return Value(np.array(out).reshape((1,) * (out_ndim - 1) + (-1,)))

  def _share(self, path: str, columns: list[int]) -> None:
    """Ties what a layer reads to what it read in an earlier call."""
    channels = self._channels_of(columns)
    before = self.inputs.setdefault(path, channels)
    for old, new in zip(before.tolist(), channels.tolist(), strict=True):
      if old and new:
        self.channels.tie((old, new), 'shared')
      else:
        reason = f'read by {path}, which also reads a fixed width'
        self.channels.fix((old, new), reason)

  def _norm(self, layer: costs.Layer, columns: list[int]) -> list[int]:
    # A channel with gate 0 still counts in statistics over all channels.
    gated, out = State.CONST if layer.joint else State.ZERO, []
    for i, number in enumerate(columns):
      channel, _, _, past = self.cells[number]
      state = gated if channel > 0 else State.LIVE
      gates = frozenset([(layer.path, i)] if channel > 0 else [])
      past = hash((layer.path, past))
      out.append(self.cells.number(Cell(channel, state, gates, past)))
    return out

  def _depthwise(self, layer: costs.Layer, columns: list[int]) -> list[int]:
    out = []
    for number in columns:
      cell = self.cells[number]
      state = max(cell.state, State.CONST) if layer.vectors else cell.state
      past = hash((layer.path, cell.past))
      cell = cell._replace(state=state, past=past)
      out += [self.cells.number(cell)] * layer.multiplier
    return out

  def _mix(self, layer: costs.Layer, columns: list[int]) -> list[int]:
    for number in columns:
      cell = self.cells[number]
      if cell.channel > 0:
        self.uses.append((cell.channel, cell.state, cell.gates, layer.path))
    if layer.path not in self.outputs:
      self.outputs[layer.path] = (
        self.channels.make(layer.path, layer.outputs)
        if self._emitted is None
        else np.asarray(self._emitted[layer.path], np.int64)
      )
    channels = self.outputs[layer.path].tolist()
    if layer.outputs == 1 and self._emitted is None:
      self.channels.fix(channels, 'a single channel')
      return [self.cells.number(Cell(0, State.LIVE))]
    state, past = State.ZERO if self.bare else State.LIVE, hash(layer.path)
    return [
      self.cells.number(
        Cell(c, state, frozenset([(layer.path, i)] if self.bare else []), past)
      )
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
    past = hash((name, past, *known))
    zeros = [c for c in cells if c.state == State.ZERO]
    if channel < 0:
      state = State.LIVE
    elif name == 'mul' and zeros:
      state = State.ZERO
      gates = next((c.gates for c in zeros if c.gates), zeros[0].gates)
    else:
      operands = tuple([c.state for c in cells])
      if operands not in states:
        states[operands] = _state(eqn, cells, known)
      state = states[operands]
    return self.cells.number(Cell(channel, state, gates, past))

  # Reductions.

  def _fold(self, cells: np.ndarray, axes, name: str, where: str) -> np.ndarray:
    """Cells with the given axes brought to length 1."""
    axes = tuple(a for a in axes if cells.shape[a] > 1)
    if not axes:
      unique, inverse = np.unique(cells, return_inverse=True)
      new = [self._renamed(self.cells[i], name) for i in unique]
      return np.array(new, int)[inverse].reshape(cells.shape)
    rest = [i for i in range(cells.ndim) if i not in axes]
    shape = [1 if i in axes else n for i, n in enumerate(cells.shape)]
    flat = cells.transpose(*rest, *axes).reshape(
      math.prod(cells.shape[i] for i in rest), -1
    )
    folded = [self._folded(np.unique(row), name, where) for row in flat]
    return np.array(folded, int).reshape(shape)

  def _renamed(self, cell: Cell, name: str) -> int:
    """The cell after one more operation."""
    return self.cells.number(cell._replace(past=hash((name, cell.past))))

  def _folded(self, numbers: np.ndarray, name: str, where: str) -> int:
    channels = {self.channels.find(c) for c in self.cells.found(numbers)}
    if len(channels) > 1:
      self.channels.fix(channels, f'mixed by {name} in {where or "the model"}')
      return self.cells.number(Cell(0, State.LIVE))
    return self._renamed(self.cells.merge(numbers.tolist(), 'sum'), name)

  def _reduce(self, eqn, value: Value, where: str) -> Value:
    axes = eqn.params['axes']
    cells = self._fold(value.cells, axes, eqn.primitive.name, where)
    return Value(np.squeeze(cells, tuple(axes)))

  def _window(self, eqn, value: Value, where: str) -> Value:
    p = eqn.params
    sizes = zip(
      p['window_dimensions'], p['window_strides'], p['padding'], strict=True
    )
    moved = [
      i for i, (w, s, pad) in enumerate(sizes) if w > 1 or s > 1 or any(pad)
    ]
    return Value(self._fold(value.cells, moved, eqn.primitive.name, where))


def _by_index(eqn, values: list[Value]) -> Value:
  """Moves cells by known indices."""
  shapes = [v.aval.shape for v in eqn.invars]
  cells = np.broadcast_to(values[0].cells, shapes[0]).astype(np.int32)
  indices = [
    np.broadcast_to(np.asarray(v.known), s)
    for v, s in zip(values[1:], shapes[1:], strict=True)
  ]
  out = eqn.primitive.bind(cells, *indices, **eqn.params)
  return Value(moves.compressed(np.asarray(out)))


def _state(eqn, cells: list[Cell], known) -> State:
  """What an operation leaves of what its operands leave."""
  name = eqn.primitive.name
  if name == 'select_n' and all(c.state == State.ZERO for c in cells[1:]):
    return State.ZERO
  if name == 'div' and cells[0].state == State.ZERO:
    if cells[1].state != State.ZERO:
      return State.ZERO
  numbers = [
    0 if c.state == State.ZERO else k for c, k in zip(cells, known, strict=True)
  ]
  if all(n is not None for n in numbers):
    result = _evaluated(eqn, tuple(numbers))
    if result == 0:
      return State.ZERO
  return max(State.CONST, *(c.state for c in cells))


_RESULTS: dict[Any, float | None] = {}


def _evaluated(eqn, numbers: tuple[float, ...]) -> float | None:
  """The result of an elementwise operation on numbers; None if unknown."""
  params = {k: v for k, v in eqn.params.items() if v is not None}
  dtypes = tuple(v.aval.dtype for v in eqn.invars)
  key = (eqn.primitive.name, str(sorted(params.items(), key=str)), numbers)
  if (key, dtypes) not in _RESULTS:
    try:
      args = map(np.asarray, numbers, dtypes)
      result = float(np.asarray(eqn.primitive.bind(*args, **eqn.params)))
    except (TypeError, ValueError, NotImplementedError):
      result = None
    _RESULTS[key, dtypes] = result
  return _RESULTS[key, dtypes]
