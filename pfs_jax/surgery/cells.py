"""What a walk knows of the elements of an array: their channels and states.

A walk through a traced model (`flow`) carries, instead of numbers, one *cell*
for each element. Cells are kept in arrays whose axes have length 1 where
nothing changes along them (nearly always batch, height and width), so large
images cost nothing.
"""

import collections
import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class State(enum.IntEnum):
  """What an element is when the gates of its channel are 0."""

  ZERO = 0  # Exactly zero: the channel can be removed.
  CONST = 1  # A value that does not depend on the images.
  LIVE = 2  # A value that still depends on the images: no gate acts on it.


class Cell(NamedTuple):
  """What is known of one element.

  `channel`: > 0 is a channel, 0 is none (the same for any channel), < 0 is
  something of a fixed width, which `Cells.origins[-channel - 1]` describes.
  `gates`: the (path, index) of the layer outputs whose gates act on it last.
  `past`: a hash of the operations that made it. If the narrow model has another
  hash there, the model's code treats channels by their number.
  """

  channel: int
  state: State
  gates: frozenset[tuple[str, int]] = frozenset()
  past: int = 0


class Value(NamedTuple):
  """Cells of an array, and its numbers where they are known constants."""

  cells: np.ndarray
  known: np.ndarray | None = None


class Cells:
  """Channels, the cells of one walk by number, and how they combine.

  Channels can be tied together, and can be fixed, that is, not removable.

  Attributes:
    owners: Of each channel, the (path, index) that makes it; channel 0 unused.
    origins: Texts that say where fixed elements come from.
  """

  def __init__(self, owners: Iterable[tuple[str, int]] = (('', 0),)):
    """`owners`: of the channels that exist already."""
    self.owners, self.origins = list(owners), []
    self._parent = list(range(len(self.owners)))
    self._ties = collections.defaultdict(set)
    self._fixed = {}
    self._table, self._index = [], {}

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, number: int) -> Cell:
    return self._table[number]

  def number(self, cell: Cell) -> int:
    """The number of a cell."""
    if cell not in self._index:
      self._index[cell] = len(self._table)
      self._table.append(cell)
    return self._index[cell]

  def value(self, ndim: int, channel: int, state: State) -> Value:
    """A value whose elements are all the same cell."""
    return Value(np.full((1,) * ndim, self.number(Cell(channel, state))))

  def origin(self, text: str) -> int:
    """The (negative) channel of fixed elements that `text` describes."""
    if text not in self.origins:
      self.origins.append(text)
    return -self.origins.index(text) - 1

  def constant(self, known: Any) -> Value:
    """A value whose numbers are known."""
    known = np.asarray(known)
    if known.size > 1 and (known == known.flat[0]).all():
      known = known.flat[0].reshape((1,) * known.ndim)
    state = State.CONST if np.any(known) else State.ZERO
    differs = known.size > 1 and (known != known[..., :1]).any()
    channel = self.by_channel() if differs else 0
    return self.value(known.ndim, channel, state)._replace(known=known)

  def by_channel(self) -> int:
    """The (negative) channel of constants that differ by channel."""
    return self.origin('a constant that differs by channel')

  def found(self, numbers: np.ndarray) -> list[int]:
    """The channels, > 0, of the cells with these numbers."""
    channels = {self._table[i].channel for i in np.unique(numbers)}
    return sorted(c for c in channels if c > 0)

  def merge(self, numbers: Sequence[int], how: str) -> Cell:
    """The cell of an element that is computed from the cells `numbers`.

    `how` is 'sum', 'product' or 'shared'.
    """
    cells = [self._table[i] for i in numbers]
    past = hash((how, *[c.past for c in cells]))
    state = max([c.state for c in cells])
    owned = [c for c in cells if c.channel]
    if len(owned) == 1:  # Nearly always: one channel and constants.
      return Cell(owned[0].channel, state, owned[0].gates, past)
    roots = {self.find(c.channel) for c in cells if c.channel > 0}
    fixed = [c.channel for c in cells if c.channel < 0]
    if roots and fixed:
      origin = self.origins[-fixed[0] - 1]
      self.fix(roots, f'combined with {origin}')
      return Cell(fixed[0], State.LIVE)
    channel = fixed[0] if fixed else 0
    if roots:
      channel = self.tie(roots, how)
    gates = frozenset().union(*(c.gates for c in cells))
    return Cell(channel, state, gates, past)

  def columns(self, value: Value, width: int) -> list[int]:
    """One cell for each position of the last axis."""
    cells = value.cells.reshape(-1, value.cells.shape[-1])
    if cells.shape[0] == 1:
      return np.broadcast_to(cells[0], (width,)).tolist()
    cells = np.broadcast_to(cells, (cells.shape[0], width))
    return [
      self.number(self.merge(np.unique(column).tolist(), 'shared'))
      for column in cells.T
    ]

  def make(self, path: str, number: int) -> np.ndarray:
    """The numbers of new channels that a layer makes."""
    first = len(self.owners)
    self.owners += [(path, i) for i in range(number)]
    self._parent += range(first, first + number)
    return np.arange(first, first + number)

  def find(self, channel: int) -> int:
    """The one channel that represents all channels tied to this one."""
    while self._parent[channel] != channel:
      self._parent[channel] = self._parent[self._parent[channel]]
      channel = self._parent[channel]
    return channel

  def tie(self, channels: Iterable[int], how: str) -> int:
    """Ties channels, so that they can only be removed together; see `find`."""
    roots = sorted({self.find(c) for c in channels})
    for other in roots[1:]:
      self._parent[other] = roots[0]
      self._ties[roots[0]] |= self._ties.pop(other, set()) | {how}
      if other in self._fixed:
        self._fixed.setdefault(roots[0], self._fixed.pop(other))
    return roots[0]

  def fix(self, channels: Iterable[int], reason: str) -> None:
    """Notes that channels cannot be removed, with the reason."""
    for channel in channels:
      if channel > 0:
        self._fixed.setdefault(self.find(channel), reason)

  def reason(self, channel: int) -> str:
    """Why a channel cannot be removed, '' if it can."""
    return self._fixed.get(self.find(channel), '')

  def ties(self, channel: int) -> set[str]:
    """How the channel is tied to others: 'sum', 'product', 'shared'."""
    return self._ties.get(self.find(channel), set())


# Operations that move elements: they move cells as they move numbers.


def _compressed(cells: np.ndarray) -> np.ndarray:
  """Cells with length 1 on each axis along which nothing changes."""
  for axis, size in enumerate(cells.shape):
    if size > 1:
      first = cells.take([0], axis)
      if cells.strides[axis] == 0 or (cells == first).all():
        cells = first
  return cells


def _broadcast(p: Any, cells: np.ndarray) -> np.ndarray:
  shape = [1] * len(p['shape'])
  for size, axis in zip(cells.shape, p['broadcast_dimensions'], strict=True):
    shape[axis] = size
  return np.broadcast_to(cells.reshape(shape), p['shape'])


def _slice(p: Any, cells: np.ndarray) -> np.ndarray:
  strides = p['strides'] or (1,) * cells.ndim
  ranges = zip(p['start_indices'], p['limit_indices'], strides, strict=True)
  return cells[tuple(slice(*taken) for taken in ranges)]


_MOVES = {
  'broadcast_in_dim': _broadcast,
  'concatenate': lambda p, *cells: np.concatenate(cells, p['dimension']),
  'reshape': lambda p, cells: cells.reshape(p['new_sizes']),
  'rev': lambda p, cells: np.flip(cells, p['dimensions']),
  'slice': _slice,
  'split': lambda p, cells: np.split(
    cells, np.cumsum(p['sizes'])[:-1], p['axis']
  ),
  'squeeze': lambda p, cells: np.squeeze(cells, tuple(p['dimensions'])),
  'stack': lambda p, *cells: np.stack(cells, p['axis']),
  'tile': lambda p, cells: np.tile(cells, p['reps']),
  'transpose': lambda p, cells: cells.transpose(p['permutation']),
  'unstack': lambda p, cells: list(np.moveaxis(cells, p['axis'], 0)),
}
_BY_INDEX = frozenset(['dynamic_slice', 'gather'])


def moved(equation: Any, values: Sequence[Value]) -> list[Value] | None:
  """The outputs of an operation that moves elements; None for any other."""
  name, moves = equation.primitive.name, _MOVES.get(equation.primitive.name)
  if name in _BY_INDEX and any(v.known is None for v in values[1:]):
    return None
  if not (moves or name == 'pad' or name in _BY_INDEX):
    return None
  first = values[0].cells.flat[0]
  if moves and all(v.cells.size == 1 and v.cells == first for v in values):
    ndims = [len(v.aval.shape) for v in equation.outvars]
    return [Value(np.full((1,) * ndim, first)) for ndim in ndims]
  shapes = [v.aval.shape for v in equation.invars]
  arrays: list[Any] = [v.cells for v in values]
  if name in _BY_INDEX:
    arrays[1:] = [v.known for v in values[1:]]
  arrays = list(map(np.broadcast_to, arrays, shapes))
  if moves:
    out = moves(equation.params, *arrays)
  else:  # These are rare, so JAX moves the numbers of the cells.
    number = 2 if name == 'pad' else 1
    arrays[:number] = [a.astype(np.int32) for a in arrays[:number]]
    params = dict(equation.params)
    if 'fill_value' in params:
      params['fill_value'] = -1
    out = np.asarray(equation.primitive.bind(*arrays, **params))
    if out.min(initial=0) < 0:  # An index lies outside of the array.
      return None
  out = out if isinstance(out, list) else [out]
  return [Value(_compressed(cells)) for cells in out]
