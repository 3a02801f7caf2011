"""The table of channel groups: which layers make, gate and read a channel.

The built-in families state their groups (`models.registry`), and `surgery`
finds those of any other model. Gates and narrowing (`gating`), costs (`costs`)
and the slicing of weights, below, all read this one table.

A *unit* is one channel of one group. Units are numbered group by group. For
each layer the table holds the units that it reads and makes, with -1 where the
width is fixed. With groups `a` (3 channels) and `b` (2 channels), a layer that
reads all of `a` and a fixed channel, and makes `b`, has

  reads [0, 1, 2, -1], makes [3, 4].
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import flax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from pfs_jax import costs, errors

GATES = 'gates'  # The name of the collection.


@dataclasses.dataclass(frozen=True)
class Group:
  """Channels that are kept or removed together, one gate for each.

  Attributes:
    name: Name of the gated layer: the path of the layer that makes the
      channels, the first one of several.
    size: Number of channels.
    producers: Convolutions and dense layers that make them (several where
      outputs are multiplied or, on request, added).
    norms: Layers whose outputs the gates multiply: the last BatchNorms before
      the consumers; the producers where the model has no BatchNorm.
    consumers: Convolutions and dense layers that read and mix them.
    depthwise: Depthwise convolutions that they pass through.
    removable: Whether a gate of 0 equals a removed channel. If not (an
      activation with f(0) != 0 makes a constant of it) the counts can be
      trained from new weights, but weights cannot be sliced.
    dtype: Dtype of the gates: that of the BatchNorm, at least float32.
  """

  name: str
  size: int
  producers: tuple[str, ...]
  norms: tuple[str, ...]
  consumers: tuple[str, ...] = ()
  depthwise: tuple[str, ...] = ()
  removable: bool = True
  dtype: Any = jnp.float32


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Channel groups, and the units that each layer reads and makes.

  Attributes:
    groups: The groups, in forward order.
    calls: The calls of all layers, in forward order.
    inputs: {path: [C_in] units}; a layer that is not named reads fixed widths.
    outputs: {path: [C_out] units} of convolutions and dense layers.
    gated: {path: [C] units} of the layers whose outputs gates multiply.
    left_alone: {path: reason} of every layer with channels outside of groups.
    uncounted: Operations that may multiply and accumulate, but whose MACs
      cannot be counted, each with the place where it stands.
    call: How the model is called: (module, x, *args, train, **kwargs).
  """

  groups: tuple[Group, ...]
  calls: tuple[costs.Layer, ...]
  inputs: Mapping[str, np.ndarray]
  outputs: Mapping[str, np.ndarray]
  gated: Mapping[str, np.ndarray]
  left_alone: Mapping[str, str] = dataclasses.field(default_factory=dict)
  uncounted: tuple[str, ...] = ()
  call: Callable[..., Any] | None = None

  @property
  def sizes(self) -> dict[str, int]:
    """{group name: channels}, forward order."""
    return {g.name: g.size for g in self.groups}

  @functools.cached_property
  def layers(self) -> dict[str, costs.Layer]:
    """{path: first call} of the layers, forward order."""
    return first_calls(c for c in self.calls if c.kind != 'other')

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """The first unit of each group, then the number of all units."""
    return np.cumsum([0, *(g.size for g in self.groups)])

  def reads(self, layer: costs.Layer) -> np.ndarray:
    """The units that a layer reads, [C_in]."""
    return self.inputs.get(layer.path, np.full(layer.inputs, -1))

  def makes(self, layer: costs.Layer) -> np.ndarray:
    """The units of a layer's outputs, made or passed on by it, [C_out]."""
    if layer.path in self.outputs:
      return self.outputs[layer.path]
    units = np.repeat(self.reads(layer), layer.multiplier or 1)
    return units if len(units) == layer.outputs else np.full(layer.outputs, -1)

  def _size_of(self, units: np.ndarray) -> costs.Size:
    """The number of channels with these units as a function of the counts."""
    group = np.searchsorted(self.offsets, units, side='right') - 1  # -1: fixed.
    numbers, channels = np.unique(group, return_counts=True)
    return tuple(
      # A whole number of channels for each unit of the group.
      (i, n if i == costs.FIXED else n // self.groups[i].size)
      for i, n in zip(numbers.tolist(), channels.tolist(), strict=True)
    )

  def features(self, counts: Sequence[int]) -> dict[str, int]:
    """{path: channels that a convolution or dense layer makes} at counts."""
    return {
      path: costs.value(self._size_of(units), counts)
      for path, units in self.outputs.items()
    }

  def cost_model(self) -> costs.CostModel:
    """MACs and parameters as exact functions of the counts."""
    ops = [
      dataclasses.replace(
        layer,
        reads=self._size_of(self.reads(layer)),
        makes=self._size_of(self.makes(layer)),
      )
      for layer in self.calls
    ]
    sizes = self.sizes
    return costs.CostModel(tuple(sizes), tuple(sizes.values()), ops)

  def counts(self, counts: Any) -> tuple[int, ...]:
    """Checks counts, and puts those that are given by name in order.

    Raises:
      errors.UserError: Names or number of counts are wrong, or a count is no
        integer between 1 and the size of its group.
    """
    if isinstance(counts, Mapping):
      self._check_names('counts', counts)
      counts = [counts[name] for name in self.sizes]
    if len(counts) != len(self.groups):
      raise errors.UserError(
        f'counts must have {len(self.groups)} entries, one for each gated '
        f'layer; got {len(counts)}.'
      )
    for count, group in zip(counts, self.groups, strict=True):
      if int(count) != count or not 1 <= count <= group.size:
        raise errors.UserError(
          f'counts must fit: {group.name} must be an integer in '
          f'[1, {group.size}]; got {count!r}.'
        )
    return tuple(map(int, counts))

  def _check_names(self, what: str, given: Mapping[str, Any]) -> None:
    if set(given) != set(self.sizes):
      raise errors.UserError(
        f'{what} must name the gated layers {", ".join(self.sizes)}; got '
        f'{", ".join(given)}.'
      )

  def narrowed(self, counts: Sequence[int]) -> Self:
    """The table of the network with the first channels of each group."""
    kept = dict(zip(self.sizes, map(range, counts), strict=True))
    keeps = np.append(self.mask(kept), True)  # Unit -1 reads the last entry.
    number = np.append(np.cumsum(keeps[:-1]) - 1, -1)

    def renumbered(layers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
      return {p: number[units[keeps[units]]] for p, units in layers.items()}

    ops = self.cost_model().ops
    return dataclasses.replace(
      self,
      groups=tuple(
        dataclasses.replace(g, size=n)
        for g, n in zip(self.groups, counts, strict=True)
      ),
      calls=tuple(op.resized(*op.channels(counts)) for op in ops),
      inputs=renumbered(self.inputs),
      outputs=renumbered(self.outputs),
      gated=renumbered(self.gated),
    )

  def mask(self, kept: Mapping[str, Any]) -> np.ndarray:
    """Whether each unit is kept, bool [units].

    Args:
      kept: {group name: sorted, distinct indices}, as from `prune.kept`.

    Raises:
      errors.UserError: A group is missing or unknown, or its indices are wrong.
    """
    self._check_names('kept', kept)
    mask = np.zeros(self.offsets[-1], bool)
    for group, first in zip(self.groups, self.offsets, strict=False):
      indices = np.asarray(kept[group.name])
      if (
        not len(indices)
        or (np.diff(indices, prepend=-1) <= 0).any()
        or indices[-1] >= group.size
      ):
        raise errors.UserError(
          f'kept[{group.name!r}] must be sorted, distinct indices in '
          f'[0, {group.size}).'
        )
      mask[first + indices] = True
    return mask

  def awake(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """New random variables to search with: scales that are all 0 become 1.

    Many models start the last BatchNorm of a residual block at scale 0. If that
    scale is frozen, the gates of the block have no effect on the loss.
    """

    def changed(path, leaf):
      layer = self.layers.get('/'.join(path[1:-1]))
      asleep = path[-1] == 'scale' and layer and layer.kind == 'norm'
      return jnp.ones_like(leaf) if asleep and not np.any(leaf) else leaf

    return dict(flax.traverse_util.path_aware_map(changed, dict(variables)))

  def slice_variables(
    self, variables: Mapping[str, Any], kept: Mapping[str, Any]
  ) -> dict[str, Any]:
    """The narrow network's variables: those of the channels that are kept.

    The collection `gates` is left out; the gates of kept channels count as 1.

    Args:
      variables: The wide network's variables, gated or not.
      kept: {group name: sorted indices}, as from `prune.kept`.

    Raises:
      errors.UserError: As for `mask`, or a group loses channels although it is
        not `removable`.
    """
    for group in self.groups:
      if not group.removable and len(kept.get(group.name, ())) < group.size:
        raise errors.UserError(
          f'weights of {group.name} cannot be sliced: a layer behind its gates '
          'turns 0 into another constant. Train the counts from new weights.'
        )
    return self.taken(variables, kept)

  def taken(
    self, variables: Mapping[str, Any], kept: Mapping[str, Any]
  ) -> dict[str, Any]:
    """As `slice_variables`, but also for groups that are not `removable`."""
    keeps = np.append(self.mask(kept), True)  # Unit -1 reads the last entry.

    def cut(leaf: Any, units: np.ndarray, axis: int) -> Any:
      stay = keeps[units]
      return leaf if stay.all() else leaf.take(np.flatnonzero(stay), axis=axis)

    def sliced(path, leaf):
      layer = self.layers.get('/'.join(path[1:-1]))
      if layer is None or not leaf.ndim:
        return leaf
      inputs, outputs = (-1, -2) if layer.transposed else (-2, -1)
      if leaf.ndim == 1:
        outputs = -1
      elif layer.kind in costs.MIXING:
        leaf = cut(leaf, self.reads(layer), inputs)
      if leaf.shape[outputs] == layer.outputs:
        leaf = cut(leaf, self.makes(layer), outputs)
      return leaf

    plain = nn.meta.unbox(variables)  # Without names of mesh axes.
    ungated = {k: v for k, v in plain.items() if k != GATES}
    return dict(flax.traverse_util.path_aware_map(sliced, ungated))

  def __str__(self) -> str:
    rows = [('group', 'channels', 'gates after', 'read by', '')]
    for g in self.groups:
      remark = '' if g.removable else 'gate 0 is not a removed channel'
      makers, readers = ' + '.join(g.producers), some(g.consumers)
      rows.append((makers, str(g.size), some(g.norms), readers, remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    fixed = [c for c in self.calls if c.kind == 'other']
    if fixed:
      lines += ['', 'counted, but not narrowed (MACs, parameters)']
    for c in fixed:
      lines.append(f'{c.path}  {c.fixed_macs:,}  {c.fixed_params:,}')
    if self.left_alone:
      lines += ['', 'left alone']
    for reason in dict.fromkeys(self.left_alone.values()):
      paths = [p for p, other in self.left_alone.items() if other == reason]
      lines.append(f'{some(paths)}: {reason}')
    if self.uncounted:
      lines += ['', 'MACs not counted', *self.uncounted]
    return '\n'.join(lines)


def first_calls(calls: Iterable[costs.Layer]) -> dict[str, costs.Layer]:
  """{path: first call} of layers, in forward order."""
  return {call.path: call for call in calls if not call.again}


def by_name(names: Iterable[str], gates: Mapping[str, Any]) -> dict[str, Any]:
  """The collection `gates` as {group name: [C]}, in the order of the names."""
  flat = flax.traverse_util.flatten_dict(gates)
  return {name: flat[*name.split('/'), 'gate'] for name in names}


def tree(gates: Mapping[str, Any]) -> dict[str, Any]:
  """{group name: [C]} as the collection `gates`; the inverse of `by_name`.

  >>> tree({'block0/conv1': 'its gates'})
  {'block0': {'conv1': {'gate': 'its gates'}}}
  """
  return flax.traverse_util.unflatten_dict(
    {(*name.split('/'), 'gate'): gate for name, gate in gates.items()}
  )


def some(paths: Sequence[str]) -> str:
  """The first two paths, and the number of the others."""
  shown = ', '.join(paths[:2])
  return shown if len(paths) <= 2 else f'{shown} and {len(paths) - 2} more'


def from_marks(
  calls: Sequence[costs.Layer],
  sizes: Mapping[str, int],
  carrier: int,
  dtype: Any,
) -> Table:
  """The table of a network that was traced with a mark in each group.

  Args:
    calls: Layer calls of the network with `marks(len(sizes))` as counts: a
      layer with a mark as a width reads or makes exactly that group.
    sizes: {group name: real number of channels}, forward order.
    carrier: Which BatchNorm of a group carries its gates: 0 is the first one,
      -1 the last.
    dtype: Dtype of the gates.
  """
  ends = np.cumsum([*sizes.values()])
  parts = np.split(np.arange(ends[-1]), ends[:-1])
  units_of = dict(zip(marks(len(sizes)), parts, strict=True))

  def units(channels: int) -> np.ndarray:
    marked = channels in units_of
    return units_of[channels] if marked else np.full(channels, -1)

  def group(name: str, size: int, mark: int) -> Group:
    reading = [c for c in calls if c.inputs == mark]
    norms = [c.path for c in reading if c.kind == 'norm']
    return Group(
      name=name,
      size=size,
      producers=tuple(
        c.path for c in calls if c.outputs == mark and c.kind in costs.MIXING
      ),
      norms=(norms[carrier],),
      consumers=tuple(c.path for c in reading if c.kind in costs.MIXING),
      depthwise=tuple(c.path for c in reading if c.kind == 'depthwise'),
      removable=norms[carrier] == norms[-1],
      dtype=dtype,
    )

  found = tuple(
    group(name, size, mark)
    for (name, size), mark in zip(sizes.items(), units_of, strict=True)
  )
  inputs = {c.path: units(c.inputs) for c in calls}
  return Table(
    groups=found,
    calls=tuple(
      dataclasses.replace(
        c.resized(len(units(c.inputs)), len(units(c.outputs))),
        groups=len(units(c.groups)),
      )
      for c in calls
    ),
    inputs=inputs,
    outputs={c.path: units(c.outputs) for c in calls if c.kind in costs.MIXING},
    gated={g.norms[0]: inputs[g.norms[0]] for g in found},
  )


def marks(n: int) -> tuple[int, ...]:
  """`n` distinct widths that no real layer has, to trace a network with."""
  return tuple(range(10**8, 10**8 + n))
