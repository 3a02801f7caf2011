"""Follows channels through a model: which layer reads which channel of which.

The model is traced to a jaxpr (nothing is computed) in which the calls of its
convolutions, dense layers and BatchNorms are marked. A walk over the jaxpr then
carries, instead of numbers, one *cell* per element: the channel it belongs to,
and what would be left of it if that channel's gates were 0. Reshapes,
concatenations, splits, poolings move the cells as they would move the numbers,
so index maps come out exact; an elementwise operation on two channels ties
them; whatever mixes channels outside a known layer fixes them, with the reason.

Cells are kept in arrays whose axes have length 1 where nothing changes along
them (nearly always batch, height and width), so large images cost nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jax_core

from pfs_jax.surgery import trace

NESTED = 'inside nn.jit or a loop (nn.scan), where it cannot be followed'


class State(enum.IntEnum):
  """What is left of an element when the gates of its channel are 0."""

  ZERO = 0  # Zero, exactly: the channel can be removed.
  CONST = 1  # Something that does not depend on the images.
  LIVE = 2  # It still depends on the images: no gate stands before it.


class Cell(NamedTuple):
  """What is known of one element.

  `channel`: > 0 a channel, 0 none (the same for any channel), < 0 something
  whose width the model fixes, by `Flow.origins[-channel - 1]`. `gates`: the
  BatchNorm positions (path, index) whose gates act on it last. `past`: a hash
  of the operations that made it; the same in the narrow model, or its code
  treats other channels in another way.
  """

  channel: int
  state: State
  gates: frozenset[tuple[str, int]] = frozenset()
  past: int = 0


class Value(NamedTuple):
  """Cells of an array, and its numbers where they are known constants."""

  cells: np.ndarray
  known: np.ndarray | None = None


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
_CALLS = frozenset(
  """checkpoint closed_call core_call custom_jvp_call custom_vjp_call
  custom_vjp_call_jaxpr jit pjit remat remat2""".split()
)
_LOOPS = frozenset(['cond', 'scan', 'shard_map', 'while'])
_KNOWN_SIZE = 1 << 16


@functools.cache
def _evaluated(primitive, params: str, dtypes, values, bind) -> float | None:
  """One number of an elementwise primitive, or None. Cached by what decides."""
  del primitive, params
  try:
    args = [np.asarray(v, d) for v, d in zip(values, dtypes, strict=True)]
    return float(bind.call(*args))
  except (TypeError, ValueError, NotImplementedError):
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Bind:
  """A primitive with its parameters; equal to all others, for the cache."""

  primitive: Any
  params: Mapping[str, Any]

  def call(self, *args):
    return np.asarray(self.primitive.bind(*args, **self.params))

  def __eq__(self, other):
    return isinstance(other, _Bind)

  def __hash__(self):
    return 0


class Flow:
  """The walk over a marked jaxpr, and what it found.

  Attributes:
    layers: {path: Layer}.
    inputs: {path: [C_in] channels that the layer reads, 0 where fixed}.
    outputs: {path: [C_out] channels that a convolution or dense layer makes}.
    owners: Of each channel, the (path, index) that makes it; channel 0 unused.
    uses: (channel, state, gates, path) of each channel that a mixing layer
      reads.
    pasts: {path: `past` of each channel that the layer reads, call by call}.
    unseen: {path: reason} of layers that the walk could not look into.
  """

  def __init__(
    self,
    layers: Mapping[str, trace.Layer],
    emitted: Mapping[str, np.ndarray] | None = None,
  ):
    """`emitted`: channels that layers make; by default new ones."""
    self.layers = dict(layers)
    self.inputs, self.outputs, self.unseen = {}, {}, {}
    self.uses, self.pasts = [], collections.defaultdict(list)
    self.origins = []
    self.owners = [('', 0)]
    self._emitted = emitted
    self._parent = [0]
    if emitted is not None:
      last = max((int(e.max()) for e in emitted.values() if e.size), default=0)
      self._parent = list(range(last + 1))
    self._ties = collections.defaultdict(set)
    self._fixed = {}
    self._table, self._index = [], {}
    self._depth = 0

  # Channels.

  def find(self, channel: int) -> int:
    """The channel that stands for all that are tied to this one."""
    while self._parent[channel] != channel:
      self._parent[channel] = self._parent[self._parent[channel]]
      channel = self._parent[channel]
    return channel

  def tie(self, channels: Iterable[int], how: str) -> int:
    """Makes channels one: they can only be removed together."""
    roots = sorted({self.find(c) for c in channels})
    for other in roots[1:]:
      self._parent[other] = roots[0]
      self._ties[roots[0]] |= self._ties.pop(other, set())
      if other in self._fixed:
        self._fixed.setdefault(roots[0], self._fixed.pop(other))
    if len(roots) > 1:
      self._ties[roots[0]].add(how)
    return roots[0]

  def fix(self, channels: Iterable[int], reason: str) -> None:
    """Says that channels cannot be removed, and why."""
    for channel in channels:
      if channel > 0:
        self._fixed.setdefault(self.find(channel), reason)

  def reason(self, channel: int) -> str:
    """Why a channel cannot be removed, '' if it can."""
    return self._fixed.get(self.find(channel), '')

  def ties(self, channel: int) -> set[str]:
    """How the channel is tied to others: 'sum', 'product', 'shared'."""
    return self._ties.get(self.find(channel), set())

  # Cells.

  def cell(self, *fields) -> int:
    """The number of a cell."""
    cell = Cell(*fields)
    if cell not in self._index:
      self._index[cell] = len(self._table)
      self._table.append(cell)
    return self._index[cell]

  def value(self, ndim: int, *fields) -> Value:
    """A value whose elements are all the same cell."""
    return Value(np.full((1,) * ndim, self.cell(*fields)))

  def origin(self, text: str) -> int:
    """A new kind of fixed element; `text` says what it is."""
    if text not in self.origins:
      self.origins.append(text)
    return -self.origins.index(text) - 1

  def constant(self, known) -> Value:
    """A value whose numbers are known."""
    known = np.asarray(known)
    if known.size > 1 and (known == known.flat[0]).all():
      known = known.flat[0].reshape((1,) * known.ndim)
    state = State.CONST if np.any(known) else State.ZERO
    differs = known.size > 1 and (known != known[..., :1]).any()
    channel = self.origin('a constant that differs by channel') * differs
    return Value(np.full((1,) * known.ndim, self.cell(channel, state)), known)

  def _channels(self, cells: np.ndarray) -> list[int]:
    numbers = {self._table[i].channel for i in np.unique(cells)}
    return sorted(c for c in numbers if c > 0)

  def _merge(self, numbers: Sequence[int], how: str) -> Cell:
    """Channel and gates of an element made of the cells `numbers`."""
    cells = [self._table[i] for i in numbers]
    owned = [c for c in cells if c.channel]
    if len(owned) == 1:  # Nearly always: one channel and constants.
      past = hash((how, *[c.past for c in cells]))
      state = max([c.state for c in cells])
      return Cell(owned[0].channel, state, owned[0].gates, past)
    roots = {self.find(c.channel) for c in cells if c.channel > 0}
    fixed = [c.channel for c in cells if c.channel < 0]
    gates = frozenset().union(*(c.gates for c in cells))
    if roots and fixed:
      self.fix(roots, f'combined with {self.origins[-fixed[0] - 1]}')
      return Cell(fixed[0], State.LIVE)
    channel = fixed[0] if fixed else 0
    if roots:
      channel = self.tie(roots, how)
    past = hash((how, *(c.past for c in cells)))
    return Cell(channel, max(c.state for c in cells), gates, past)

  def columns(self, value: Value, width: int) -> list[int]:
    """One cell for each position of the last axis."""
    cells = value.cells.reshape(-1, value.cells.shape[-1])
    if cells.shape[0] == 1:
      cells = np.broadcast_to(cells[0], (width,))
      return cells.tolist()
    cells = np.broadcast_to(cells, (cells.shape[0], width))
    return [
      self.cell(*self._merge(np.unique(column).tolist(), 'shared'))
      for column in cells.T
    ]

  # The walk.

  def run(self, jaxpr, values: Sequence[Value], where: str = '') -> list[Value]:
    """The values of the outputs of a closed jaxpr.

    Args:
      jaxpr: `jax.extend.core.ClosedJaxpr` or an open one without constants.
      values: Of its inputs.
      where: Name of the module that the jaxpr stands in.
    """
    consts = getattr(jaxpr, 'consts', ())
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    environment = dict(zip(jaxpr.invars, values, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      environment[var] = self._of_const(const)

    def read(var):
      if isinstance(var, jax_core.Literal):
        return self.constant(var.val)
      return environment[var]

    for eqn in jaxpr.eqns:
      stack = str(eqn.source_info.name_stack)
      here = '/'.join(filter(None, (where, stack)))
      outs = self._equation(eqn, [read(v) for v in eqn.invars], here)
      environment.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _of_const(self, const) -> Value:
    if math.prod(const.shape) <= _KNOWN_SIZE:
      try:
        return self.constant(const)
      except TypeError:  # A random key has no numbers.
        pass
    return self.value(len(const.shape), 0, State.CONST)

  def _equation(self, eqn, values: list[Value], where: str) -> list[Value]:
    name = eqn.primitive.name
    if name in _CALLS:
      return self._call(eqn, values, where)
    known = self._known(eqn, values)
    if known is not None:
      return known
    if name == 'iota':
      last = eqn.params['dimension'] == len(eqn.params['shape']) - 1
      channel = self.origin('a constant that differs by channel') * last
      return [self.value(len(eqn.params['shape']), channel, State.CONST)]
    if name in _IDENTITY:
      return values
    if name in _ELEMENTWISE:
      return [self._elementwise(eqn, values)]
    if name in _REDUCE:
      return [self._reduce(eqn, values[0], where) for _ in eqn.outvars]
    if name.startswith('reduce_window') and len(eqn.outvars) == 1:
      return [self._window(eqn, values[0], where)]
    if name in _BY_INDEX and all(v.known is not None for v in values[1:]):
      return [self._by_index(eqn, values)]
    if hasattr(self, f'_move_{name}'):
      out = getattr(self, f'_move_{name}')(eqn, values)
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
      return [self.constant(values[0].known.reshape((1,) * ndim))]
    args = [
      np.broadcast_to(v.known, a.aval.shape).astype(a.aval.dtype)
      for v, a in zip(values, eqn.invars, strict=True)
    ]
    try:
      out = eqn.primitive.bind(*args, **eqn.params)
      out = out if eqn.primitive.multiple_results else [out]
      return [self.constant(o) for o in out]
    except (TypeError, ValueError, NotImplementedError):
      return None

  def _opaque(self, eqn, values, where: str, why: str = '') -> list[Value]:
    """An operation that is not understood: what goes in stays as it is."""
    name = eqn.primitive.name
    reason = why or f'mixed by {name} in {where or "the model"}'
    seen, live = False, False
    for value in values:
      cells = [self._table[i] for i in np.unique(value.cells)]
      self.fix((c.channel for c in cells), reason)
      seen |= any(c.channel for c in cells)
      live |= any(c.state == State.LIVE for c in cells)
    channel = self.origin(f'the result of {name}') if seen else 0
    state = State.LIVE if live else State.CONST
    return [self.value(len(v.aval.shape), channel, state) for v in eqn.outvars]

  def _call(self, eqn, values, where: str) -> list[Value]:
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
    inner = [
      p
      for p in eqn.params.values()
      if isinstance(p, jax_core.Jaxpr | jax_core.ClosedJaxpr)
      and len(getattr(p, 'jaxpr', p).invars) == len(values)
    ]
    if not inner:
      return self._opaque(eqn, values, where)
    nested = eqn.primitive.name in ('jit', 'pjit')
    self._depth += nested
    outs = self.run(inner[0], values, where)
    self._depth -= nested
    return outs

  # Layers.

  def _enter(self, path, eqn, values) -> Value:
    del path, eqn  # What happens inside a layer concerns nobody.
    return self.value(values[0].cells.ndim, 0, State.LIVE)

  def _peek(self, path, eqn, values) -> Value:
    layer = self.layers[path]
    self.inputs[path] = self._read(self.columns(values[0], layer.inputs))
    return values[0]

  def _read(self, columns: Iterable[int]) -> np.ndarray:
    return np.array([max(0, self._table[i].channel) for i in columns], np.int64)

  def _leave(self, path, eqn, values) -> Value:
    layer, x = self.layers[path], values[0]
    ndim = len(eqn.invars[0].aval.shape)
    if self._depth:  # Its cache would not see the surgery.
      self.unseen[path] = NESTED
    elif {ndim, len(eqn.outvars[0].aval.shape)} != {layer.ndim}:
      self.unseen[path] = 'inside nn.vmap: one layer here is several'
    elif not layer.usable:
      self.unseen[path] = 'its channels are not on the last axis'
    elif layer.kind == 'grouped':
      self.unseen[path] = 'a grouped convolution'
    if path in self.unseen:
      self.fix(self._channels(x.cells), f'read by {path}: {self.unseen[path]}')
      origin = self.origin(f'the output of {path}')
      return self.value(len(eqn.invars[1].aval.shape), origin, State.LIVE)
    columns = self.columns(x, layer.inputs)
    self.pasts[path].append([self._table[i].past for i in columns])
    self._share(path, columns)
    if layer.kind == 'norm':
      out = self._norm(path, columns)
    elif layer.kind == 'depthwise':
      out = self._depthwise(layer, columns)
    else:
      out = self._mix(layer, columns)
    shape = (1,) * (len(eqn.outvars[0].aval.shape) - 1) + (layer.outputs,)
    return Value(np.array(out).reshape(shape))

  def _share(self, path: str, columns: list[int]) -> None:
    """Ties what a layer reads to what it read in an earlier call."""
    channels = self._read(columns)
    before = self.inputs.setdefault(path, channels)
    for old, new in zip(before.tolist(), channels.tolist(), strict=True):
      if old and new:
        self.tie((old, new), 'shared')
      else:
        self.fix((old, new), f'read by {path}, which also reads a fixed width')

  def _norm(self, path: str, columns: list[int]) -> list[int]:
    out = []
    for i, number in enumerate(columns):
      channel, _, _, past = self._table[number]
      state = State.ZERO if channel > 0 else State.LIVE
      gates = frozenset([(path, i)] if channel > 0 else [])
      out.append(self.cell(channel, state, gates, hash((path, past))))
    return out

  def _depthwise(self, layer: trace.Layer, columns: list[int]) -> list[int]:
    out = []
    for number in columns:
      cell = self._table[number]
      state = max(cell.state, State.CONST) if layer.bias else cell.state
      past = hash((layer.path, cell.past))
      cell = cell._replace(state=state, past=past)
      out += [self.cell(*cell)] * layer.multiplier
    return out

  def _mix(self, layer: trace.Layer, columns) -> list[int]:
    for number in columns:
      cell = self._table[number]
      if cell.channel > 0:
        self.uses.append((cell.channel, cell.state, cell.gates, layer.path))
    if layer.path not in self.outputs:
      self.outputs[layer.path] = self._make(layer)
    channels = self.outputs[layer.path].tolist()
    if layer.outputs == 1 and self._emitted is None:
      self.fix(channels, 'a single channel')
      return [self.cell(0, State.LIVE)]
    past = hash(layer.path)
    return [self.cell(c, State.LIVE, frozenset(), past) for c in channels]

  def _make(self, layer: trace.Layer) -> np.ndarray:
    if self._emitted is not None:
      return np.asarray(self._emitted[layer.path], np.int64)
    first = len(self.owners)
    self.owners += [(layer.path, i) for i in range(layer.outputs)]
    self._parent += range(first, first + layer.outputs)
    return np.arange(first, first + layer.outputs)

  # Elementwise operations.

  def _elementwise(self, eqn, values: list[Value]) -> Value:
    arrays = np.broadcast_arrays(*(v.cells for v in values))
    ndim = len(eqn.outvars[0].aval.shape)
    key = np.zeros(arrays[0].shape, np.int64)
    for array in arrays:
      key = key * len(self._table) + array
    unique, at, inverse = np.unique(key, return_index=True, return_inverse=True)
    operands = np.stack([a.reshape(-1) for a in arrays], -1)[at].tolist()
    known = [
      v.known.item() if v.known is not None and v.known.size == 1 else None
      for v in values
    ]
    states = {}  # By the states of the operands.
    cells = [self._combine(eqn, o, known, states) for o in operands]
    cells = np.array(cells, int)
    cells = cells[inverse].reshape((1,) * (ndim - key.ndim) + key.shape)
    return Value(cells)

  def _combine(self, eqn, numbers: list[int], known, states) -> int:
    name = eqn.primitive.name
    how = 'product' if name in ('mul', 'div') else 'sum'
    channel, _, gates, past = self._merge(numbers, how)
    cells = [self._table[i] for i in numbers]
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
        states[operands] = self._state(eqn, cells, known)
      state = states[operands]
    return self.cell(channel, state, gates, past)

  def _state(self, eqn, cells: list[Cell], known) -> State:
    """What an operation leaves of what its operands leave."""
    name = eqn.primitive.name
    if name == 'select_n' and all(c.state == State.ZERO for c in cells[1:]):
      return State.ZERO
    if name == 'div' and cells[0].state == State.ZERO:
      if cells[1].state != State.ZERO:
        return State.ZERO
    numbers = [
      0 if c.state == State.ZERO else k
      for c, k in zip(cells, known, strict=True)
    ]
    if all(n is not None for n in numbers):
      params = {k: v for k, v in eqn.params.items() if v is not None}
      result = _evaluated(
        name,
        str(sorted(params.items(), key=str)),
        tuple(str(v.aval.dtype) for v in eqn.invars),
        tuple(numbers),
        _Bind(eqn.primitive, eqn.params),
      )
      if result == 0:
        return State.ZERO
    return max(State.CONST, *(c.state for c in cells))

  # Reductions.

  def _fold(self, cells: np.ndarray, axes, name: str, where: str) -> np.ndarray:
    """Cells with the given axes brought to length 1."""
    axes = tuple(a for a in axes if cells.shape[a] > 1)
    if not axes:
      unique, inverse = np.unique(cells, return_inverse=True)
      old = [self._table[i] for i in unique]
      new = [self.cell(*c._replace(past=hash((name, c.past)))) for c in old]
      return np.array(new, int)[inverse].reshape(cells.shape)
    rest = [i for i in range(cells.ndim) if i not in axes]
    shape = [1 if i in axes else n for i, n in enumerate(cells.shape)]
    flat = cells.transpose(*rest, *axes).reshape(
      math.prod(cells.shape[i] for i in rest), -1
    )
    folded = [self._folded(np.unique(row), name, where) for row in flat]
    return np.array(folded, int).reshape(shape)

  def _folded(self, numbers: np.ndarray, name: str, where: str) -> int:
    channels = {self.find(c) for c in self._channels(numbers)}
    if len(channels) > 1:
      self.fix(channels, f'mixed by {name} in {where or "the model"}')
      return self.cell(0, State.LIVE)
    merged = self._merge(numbers.tolist(), 'sum')
    return self.cell(*merged._replace(past=hash((name, merged.past))))

  def _reduce(self, eqn, value: Value, where: str) -> Value:
    axes = eqn.params['axes']
    cells = self._fold(value.cells, axes, eqn.primitive.name, where)
    return Value(np.squeeze(cells, tuple(axes)))

  def _window(self, eqn, value: Value, where: str) -> Value:
    windows = eqn.params['window_dimensions']
    moved = [
      i
      for i, (w, s, p) in enumerate(
        zip(
          windows,
          eqn.params['window_strides'],
          eqn.params['padding'],
          strict=True,
        )
      )
      if w > 1 or s > 1 or any(p)
    ]
    return Value(self._fold(value.cells, moved, eqn.primitive.name, where))

  # Moves.

  def _by_index(self, eqn, values: list[Value]) -> Value:
    shapes = [v.aval.shape for v in eqn.invars]
    cells = np.broadcast_to(values[0].cells, shapes[0]).astype(np.int32)
    indices = [
      np.broadcast_to(v.known, s)
      for v, s in zip(values[1:], shapes[1:], strict=True)
    ]
    out = eqn.primitive.bind(cells, *indices, **eqn.params)
    return Value(_compressed(np.asarray(out)))

  def _move_broadcast_in_dim(self, eqn, values):
    cells = values[0].cells
    shape = [1] * len(eqn.params['shape'])
    for i, axis in enumerate(eqn.params['broadcast_dimensions']):
      shape[axis] = cells.shape[i]
    return cells.reshape(shape)

  def _move_reshape(self, eqn, values):
    shape = eqn.outvars[0].aval.shape
    if values[0].cells.size == 1:
      return values[0].cells.reshape((1,) * len(shape))
    full = np.broadcast_to(values[0].cells, eqn.invars[0].aval.shape)
    return _compressed(full.reshape(shape))

  def _move_transpose(self, eqn, values):
    return values[0].cells.transpose(eqn.params['permutation'])

  def _move_squeeze(self, eqn, values):
    return np.squeeze(values[0].cells, tuple(eqn.params['dimensions']))

  def _move_rev(self, eqn, values):
    return np.flip(values[0].cells, eqn.params['dimensions'])

  def _move_slice(self, eqn, values):
    cells = values[0].cells
    strides = eqn.params['strides'] or (1,) * cells.ndim
    index = tuple(
      slice(None) if n == 1 else slice(a, b, s)
      for n, a, b, s in zip(
        cells.shape,
        eqn.params['start_indices'],
        eqn.params['limit_indices'],
        strides,
        strict=True,
      )
    )
    return cells[index]

  def _move_split(self, eqn, values):
    cells, axis = values[0].cells, eqn.params['axis']
    sizes = eqn.params['sizes']
    if cells.shape[axis] == 1:
      return [cells] * len(sizes)
    return np.split(cells, np.cumsum(sizes)[:-1], axis)

  def _move_concatenate(self, eqn, values):
    axis = eqn.params['dimension']
    shapes = [v.cells.shape for v in values]
    common = np.max(shapes, axis=0)
    parts = []
    for value, var in zip(values, eqn.invars, strict=True):
      shape = [*common]
      shape[axis] = var.aval.shape[axis]
      parts.append(np.broadcast_to(value.cells, shape))
    return _compressed(np.concatenate(parts, axis))

  def _move_pad(self, eqn, values):
    cells, filler = values[0].cells, values[1].cells.item()
    shape = eqn.invars[0].aval.shape
    for axis, (low, high, inner) in enumerate(eqn.params['padding_config']):
      if not (low or high or inner):
        continue
      size = shape[axis]
      cells = np.repeat(cells, size, axis) if cells.shape[axis] == 1 else cells
      out = eqn.outvars[0].aval.shape[axis]
      at = low + np.arange(size) * (inner + 1)
      inside = (at >= 0) & (at < out)
      padded = np.full(
        [*cells.shape[:axis], out, *cells.shape[axis + 1 :]], filler
      )
      padded.swapaxes(0, axis)[at[inside]] = cells.swapaxes(0, axis)[inside]
      cells = padded
    return _compressed(cells)


def _compressed(cells: np.ndarray) -> np.ndarray:
  """Cells with length 1 on each axis along which nothing changes."""
  for axis, size in enumerate(cells.shape):
    if size > 1:
      first = cells.take([0], axis)
      if (cells == first).all():
        cells = first
  return cells
