"""What is known of the elements of an array: which channel, and what is left.

A walk through a traced model (`flow`) carries, instead of numbers, one *cell*
for each element. Cells are kept in arrays whose axes have length 1 where
nothing changes along them (nearly always batch, height and width), so large
images cost nothing.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class State(enum.IntEnum):
  """What is left of an element when the gates of its channel are 0."""

  ZERO = 0  # Zero, exactly: the channel can be removed.
  CONST = 1  # Something that does not depend on the images.
  LIVE = 2  # It still depends on the images: no gate stands before it.


class Cell(NamedTuple):
  """What is known of one element.

  `channel`: > 0 a channel, 0 none (the same for any channel), < 0 something
  whose width the model fixes, by `Cells.origins[-channel - 1]`. `gates`: the
  (path, index) of the layer outputs whose gates act on it last. `past`: a hash
  of the operations that made it. If the narrow model has another hash there,
  the model's code treats other channels in another way.
  """

  channel: int
  state: State
  gates: frozenset[tuple[str, int]] = frozenset()
  past: int = 0


class Value(NamedTuple):
  """Cells of an array, and its numbers where they are known constants."""

  cells: np.ndarray
  known: np.ndarray | None = None


class Channels:
  """Channels, which of them are tied together, and which are fixed.

  Attributes:
    owners: Of each channel, the (path, index) that makes it; channel 0 unused.
  """

  def __init__(self, number: int = 0):
    """`number`: channels that there are already, made elsewhere."""
    self.owners = [('', 0)]
    self._parent = list(range(number + 1))
    self._ties = collections.defaultdict(set)
    self._fixed = {}

  def make(self, path: str, number: int) -> np.ndarray:
    """The numbers of new channels that a layer makes."""
    first = len(self.owners)
    self.owners += [(path, i) for i in range(number)]
    self._parent += range(first, first + number)
    return np.arange(first, first + number)

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


class Cells:
  """The cells of one walk by number, and how they combine.

  Attributes:
    channels: The channels that they belong to.
    origins: Texts that say where fixed elements come from.
  """

  def __init__(self, channels: Channels):
    self.channels = channels
    self.origins = []
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
    """The channel of a kind of fixed element; `text` says what it is."""
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
    cell = self.number(Cell(channel, state))
    return Value(np.full((1,) * known.ndim, cell), known)

  def by_channel(self) -> int:
    """The channel of constants that differ by channel."""
    return self.origin('a constant that differs by channel')

  def found(self, numbers: np.ndarray) -> list[int]:
    """The channels among cells."""
    channels = {self._table[i].channel for i in np.unique(numbers)}
    return sorted(c for c in channels if c > 0)

  def merge(self, numbers: Sequence[int], how: str) -> Cell:
    """The cell of an element that is made of the cells `numbers`.

    Args:
      numbers: The cells.
      how: 'sum', 'product' or 'shared'.
    """
    cells = [self._table[i] for i in numbers]
    owned = [c for c in cells if c.channel]
    if len(owned) == 1:  # Nearly always: one channel and constants.
      past = hash((how, *[c.past for c in cells]))
      state = max([c.state for c in cells])
      return Cell(owned[0].channel, state, owned[0].gates, past)
    roots = {self.channels.find(c.channel) for c in cells if c.channel > 0}
    fixed = [c.channel for c in cells if c.channel < 0]
    gates = frozenset().union(*(c.gates for c in cells))
    if roots and fixed:
      origin = self.origins[-fixed[0] - 1]
      self.channels.fix(roots, f'combined with {origin}')
      return Cell(fixed[0], State.LIVE)
    channel = fixed[0] if fixed else 0
    if roots:
      channel = self.channels.tie(roots, how)
    past = hash((how, *(c.past for c in cells)))
    return Cell(channel, max(c.state for c in cells), gates, past)

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
