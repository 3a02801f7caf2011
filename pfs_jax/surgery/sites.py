"""Finds the channel groups of a model that can carry gates and be narrowed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pfs_jax import errors
from pfs_jax.surgery import flow as flow_lib
from pfs_jax.surgery import trace, wrap

_SEED = 0  # Of the channels that the trial narrowing keeps.


@dataclasses.dataclass(frozen=True)
class Group:
  """Channels that are kept or removed together, one gate for each.

  Attributes:
    name: Path of the layer that makes them, the first one of several.
    size: Channels.
    producers: Convolutions and dense layers that make them (several where
      outputs are multiplied or, on request, added).
    norms: BatchNorms whose outputs the gates multiply: the last ones before
      the consumers.
    consumers: Convolutions and dense layers that read and mix them.
    depthwise: Depthwise convolutions that they pass through.
    removable: Whether a gate of 0 equals a removed channel. If not (an
      activation with f(0) != 0 makes a constant of it) the counts can be
      trained from new weights, but weights cannot be sliced.
    dtype: Of the gates: the BatchNorm's parameters', at least float32.
  """

  name: str
  size: int
  producers: tuple[str, ...]
  norms: tuple[str, ...]
  consumers: tuple[str, ...]
  depthwise: tuple[str, ...]
  removable: bool
  dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Sites:
  """What `discover` found: where gates can be, and what is left alone.

  A *unit* is one channel of one group; units are numbered through, group by
  group. `units[path]` are those that a layer reads and makes, -1 where the
  width is fixed.

  Attributes:
    groups: The groups, in forward order.
    left_alone: {path: reason} of every other convolution, dense layer and
      BatchNorm.
    layers: {path: layer} as the trace showed it.
    inputs: {path: [C_in] units}.
    outputs: {path: [C_out] units} of convolutions and dense layers.
    gated: {path: [C] units} of the BatchNorms that carry gates.
    uncounted: {path: parameters} of modules that the cost model does not know;
      their parameters and MACs are not counted.
    call: How the model is called: (module, x, *args, train, **kwargs).
  """

  groups: tuple[Group, ...]
  left_alone: Mapping[str, str]
  layers: Mapping[str, trace.Layer]
  inputs: Mapping[str, np.ndarray]
  outputs: Mapping[str, np.ndarray]
  gated: Mapping[str, np.ndarray]
  uncounted: Mapping[str, int]
  call: Callable[..., Any]

  @property
  def sizes(self) -> dict[str, int]:
    """{group name: channels}, forward order."""
    return {g.name: g.size for g in self.groups}

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """First unit of each group, and the number of units at the end."""
    return np.cumsum([0, *(g.size for g in self.groups)])

  def split(self, units: np.ndarray) -> list[np.ndarray]:
    """A vector over all units as one vector for each group."""
    return np.split(units, self.offsets[1:-1])

  def __str__(self) -> str:
    rows = [('group', 'channels', 'gates after', 'read by', '')]
    rows += [
      (
        ' + '.join(g.producers),
        str(g.size),
        _some(g.norms),
        _some(g.consumers),
        '' if g.removable else 'gate 0 is not a removed channel',
      )
      for g in self.groups
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    paths = collections.defaultdict(list)
    for path, reason in self.left_alone.items():
      paths[reason].append(path)
    if paths:
      lines += ['', 'left alone']
      lines += [f'{_some(p)}: {reason}' for reason, p in paths.items()]
    if self.uncounted:
      lines += ['', 'not counted (parameters)']
      lines += [f'{p}  {n:,}' for p, n in self.uncounted.items()]
    return '\n'.join(lines)


def _some(paths: Sequence[str]) -> str:
  shown = ', '.join(paths[:2])
  return shown if len(paths) <= 2 else f'{shown} and {len(paths) - 2} more'


def discover(
  model: nn.Module,
  x: Any,
  *args,
  train_kwarg: str | None = None,
  call: Callable[..., Any] | None = None,
  residual: bool = False,
  leave: Sequence[str] = (),
  **kwargs,
) -> Sites:
  """Finds where a model's channels can carry gates and be removed.

  The model is traced in evaluation mode and its channels are followed through
  the trace; nothing is computed. What was found is then tried: the model is
  traced once more with a random part of every group removed, and a group whose
  channels do not arrive where they should (the model's code splits them at a
  fixed place, say) is left alone.

  Args:
    model: Any Linen module, untouched.
    x: Images [N, H, W, C] or their `jax.ShapeDtypeStruct`; N = 1 will do.
    *args: Further arguments of the model's `__call__`.
    train_kwarg: Name of the argument or field that says whether to train;
      by default one of `wrap.TRAIN` is looked for.
    call: (module, x, train) -> logits, instead, for models that say it in
      another way; further arguments are passed on.
    residual: Whether channels tied by sums or by sharing a module are one
      group, instead of being left alone.
    leave: Paths of layers whose channels are to be left alone.
    **kwargs: Further arguments of `__call__`, by name.

  Raises:
    errors.UserError: Not a Linen module, no BatchNorm, no known way to say
      whether to train, or a collection `gates` of the model's own, or `leave`
      names no layer.
  """
  _check(model)
  how = call or wrap.train_argument(model, train_kwarg)
  plain = wrap.Wrapped(model, how)
  arguments = (x, args, kwargs)
  shapes = _init_shapes(plain, arguments)
  if wrap.GATES in shapes:
    raise errors.UserError(
      f'surgery: the model has a collection {wrap.GATES!r} of its own.'
    )
  flow, layers = _follow(plain, shapes, arguments)
  if not any(layer.kind == 'norm' for layer in layers.values()):
    raise errors.UserError(
      'surgery: the model calls no flax.linen.BatchNorm, and gates multiply '
      "BatchNorm's output. (Modules of flax.nnx, also inside bridge.to_linen, "
      'and other normalisations cannot carry them.)'
    )
  unknown = sorted(set(leave) - set(flow.outputs))
  if unknown:
    raise errors.UserError(
      f'surgery: no layer {unknown[0]!r}; the layers are '
      f'{", ".join(flow.outputs)}.'
    )
  for path in leave:
    flow.fix(flow.outputs[path].tolist(), 'left alone on request')
  found = _Found(flow, residual)
  found = _tried(plain, arguments, found)
  return found.sites(how, _uncounted(shapes, layers))


def _check(model: Any) -> None:
  if isinstance(model, nnx.Module) or (
    isinstance(model, type) and issubclass(model, nnx.Module)
  ):
    raise errors.UserError(
      'surgery: the model is a flax.nnx module, whose layers have their sizes '
      'fixed when they are made; it cannot be narrowed. See docs/own_model.md.'
    )
  if not isinstance(model, nn.Module):
    raise errors.UserError(
      'surgery: the model must be an instance of flax.linen.Module; got '
      f'{model!r}.'
    )


def _array(leaf: Any) -> bool:
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def _split(arguments) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
  """The arrays of a tree, and the way back from others to the tree."""
  leaves, tree = jax.tree.flatten(arguments)
  arrays = [
    leaf
    if isinstance(leaf, jax.Array)
    else jax.eval_shape(lambda a=leaf: a)
    if isinstance(leaf, np.ndarray)
    else leaf
    for leaf in leaves
    if _array(leaf)
  ]
  arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]

  def merge(arrays):
    rest = iter(arrays)
    full = [next(rest) if _array(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, full)

  return arrays, merge


def _init_shapes(plain: wrap.Wrapped, arguments) -> Any:
  arrays, merge = _split(arguments)

  def init(key, arrays):
    x, args, kwargs = merge(arrays)
    return plain.init(key, x, *args, **kwargs)

  return jax.eval_shape(init, jax.random.key(0), arrays)


def _follow(
  plain: wrap.Wrapped, shapes, arguments, emitted=None, kinds=None
) -> tuple[flow_lib.Flow, dict[str, trace.Layer]]:
  """Traces a model and walks through the trace."""
  arrays, merge = _split(arguments)

  def apply(variables, arrays):
    x, args, kwargs = merge(arrays)
    return plain.apply(variables, x, *args, **kwargs)

  jaxpr, layers = trace.trace(apply, shapes, arrays)
  for path, layer in layers.items() if kinds else ():
    # One channel left: a depthwise convolution then looks like a dense one.
    kind = kinds[path].kind
    layers[path] = dataclasses.replace(layer, kind=kind)
  flow = flow_lib.Flow(layers, emitted)
  values = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    if math.prod(leaf.shape) == 1:
      values.append(flow.value(leaf.ndim, 0, flow_lib.State.CONST))
    else:
      names = [str(getattr(p, 'key', p)) for p in path]
      origin = flow.origin(f'the parameter {"/".join(names[1:])}')
      values.append(flow.value(leaf.ndim, origin, flow_lib.State.LIVE))
  origin = flow.origin("the model's input")
  for leaf in arrays:
    fixed = origin if leaf.ndim and leaf.shape[-1] > 1 else 0
    values.append(flow.value(leaf.ndim, fixed, flow_lib.State.LIVE))
  for value in flow.run(jaxpr, values):
    channels = {flow._table[i].channel for i in np.unique(value.cells)}
    flow.fix(channels, 'an output of the model')
  return flow, layers


class _Found:
  """Groups of channels in a flow; `refuse` takes one back."""

  def __init__(self, flow: flow_lib.Flow, residual: bool):
    self.flow, self.residual = flow, residual
    self._uses = collections.defaultdict(list)
    for channel, *use in flow.uses:
      self._uses[flow.find(channel)].append(use)
    self._members = collections.defaultdict(list)
    for channel in range(1, len(flow.owners)):
      self._members[flow.find(channel)].append(channel)
    for root in list(self._members):
      reason = self._obstacle(root)
      if reason:
        flow.fix([root], reason)
    self.regroup()

  def _obstacle(self, root: int) -> str:
    """Why the channels tied to `root` cannot carry a gate, '' if they can."""
    uses = self._uses[root]
    if self.flow.reason(root):
      return self.flow.reason(root)
    if not uses:
      return 'no convolution or dense layer reads it'
    for state, gates, path in uses:
      if not gates:
        return f'no BatchNorm between it and {path}'
      if state == flow_lib.State.LIVE:
        return f'{path} also reads it past the BatchNorm'
    ties = self.flow.ties(root) & {'sum', 'shared'}
    if ties and not self.residual:
      owners = (self.flow.owners[c][0] for c in self._members[root])
      how = 'a sum' if 'sum' in ties else 'a shared layer'
      return (
        f'tied by {how}: {_some(list(dict.fromkeys(owners)))} '
        '(residual=True prunes them together)'
      )
    return ''

  def regroup(self) -> None:
    """Sorts the channels without an obstacle into groups."""
    self.classes = collections.defaultdict(list)
    for root, members in self._members.items():
      if not self.flow.reason(root):
        made = collections.Counter(self.flow.owners[c][0] for c in members)
        self.classes[tuple(made.items())].append(root)
    for made, roots in list(self.classes.items()):
      if len(roots) < 2:
        self.flow.fix(roots, 'a single channel')
        del self.classes[made]
    self.unit_of = np.full(len(self.flow.owners), -1)
    unit = 0
    for roots in self.classes.values():
      for root in roots:
        self.unit_of[self._members[root]] = unit
        unit += 1

  def refuse(self, made, reason: str) -> None:
    """Leaves one group alone; `regroup` must follow."""
    self.flow.fix(self.classes[made], reason)

  def units(self, channels: np.ndarray) -> np.ndarray:
    """Channels, 0 for fixed ones -> units, -1 for fixed ones."""
    return self.unit_of[channels]

  def gated(self) -> dict[str, np.ndarray]:
    """{BatchNorm path: [C] units that its gates stand for}."""
    gated = {}
    for roots in self.classes.values():
      for root in roots:
        for _, gates, _ in self._uses[root]:
          for path, index in gates:
            width = self.flow.layers[path].inputs
            units = gated.setdefault(path, np.full(width, -1))
            units[index] = self.unit_of[root]
    order = list(self.flow.layers)
    return {p: gated[p] for p in sorted(gated, key=order.index)}

  def _group(self, made, roots) -> Group:
    order = list(self.flow.layers)
    uses = [u for root in roots for u in self._uses[root]]
    norms = {path for _, gates, _ in uses for path, _ in gates}
    units = set(self.unit_of[roots].tolist())
    passed = [
      path
      for path, layer in self.flow.layers.items()
      if layer.kind == 'depthwise'
      and units & set(self.units(self.flow.inputs.get(path, np.zeros(0, int))))
    ]
    producers = tuple(path for path, _ in made)
    dtypes = [self.flow.layers[n].dtype for n in norms]
    return Group(
      name=producers[0],
      size=len(roots),
      producers=producers,
      norms=tuple(sorted(norms, key=order.index)),
      consumers=tuple(sorted({path for _, _, path in uses}, key=order.index)),
      depthwise=tuple(passed),
      removable=all(s == flow_lib.State.ZERO for s, _, _ in uses),
      dtype=jnp.promote_types(jnp.result_type(*dtypes), jnp.float32),
    )

  def sites(self, call, uncounted) -> Sites:
    """The result, with unique group names."""
    groups, names = [], collections.Counter()
    for made, roots in self.classes.items():
      group = self._group(made, roots)
      names[group.name] += 1
      if names[group.name] > 1:
        name = f'{group.name}.{names[group.name]}'
        group = dataclasses.replace(group, name=name)
      groups.append(group)
    flow, gated = self.flow, self.gated()
    return Sites(
      groups=tuple(groups),
      left_alone=self._left_alone(gated),
      layers=flow.layers,
      inputs={p: self.units(c) for p, c in flow.inputs.items()},
      outputs={p: self.units(c) for p, c in flow.outputs.items()},
      gated=gated,
      uncounted=uncounted,
      call=call,
    )

  def _left_alone(self, gated) -> dict[str, str]:
    flow, left = self.flow, {}
    for path, layer in flow.layers.items():
      reason = flow.unseen.get(path, '')
      if reason or layer.kind == 'other':
        pass
      elif path not in flow.inputs:
        reason = flow_lib.NESTED
      elif layer.kind == 'norm':
        reason = self._norm_reason(path, gated)
      else:
        channels = flow.outputs.get(path, flow.inputs[path])
        fixed = channels[self.units(channels) < 0]
        if fixed.size:
          reason = flow.reason(int(fixed[0])) if fixed[0] else 'fixed inputs'
      if reason:
        left[path] = reason
    return left

  def _norm_reason(self, path: str, gated) -> str:
    flow, channels = self.flow, self.flow.inputs[path]
    if path in gated and (gated[path] >= 0).all():
      return ''
    alone = [c for c in channels.tolist() if self.unit_of[c] < 0]
    if not alone:
      return 'the gates of its channels stand further on'
    if not any(alone):
      return 'acts on channels of a fixed width'
    return flow.reason(next(filter(None, alone)))


# The trial: does the narrowed model send the right channels to the right place?


def _tried(plain: wrap.Wrapped, arguments, found: _Found) -> _Found:
  """Leaves groups alone that the model's own code does not let narrow."""
  if not _objection(plain, arguments, found, list(found.classes)):
    return found
  for made in list(found.classes):
    reason = _objection(plain, arguments, found, [made])
    if reason:
      found.refuse(made, reason)
  found.regroup()
  reason = _objection(plain, arguments, found, list(found.classes))
  if reason:  # Groups that only fail together.
    for made in list(found.classes):
      found.refuse(made, reason)
    found.regroup()
  return found


def _objection(plain, arguments, found: _Found, chosen) -> str:
  """What goes wrong when the chosen groups are narrowed, '' if nothing."""
  if not chosen:
    return ''
  flow, random = found.flow, np.random.default_rng(_SEED)
  kept = np.ones(len(flow.owners), bool)
  for made in chosen:
    roots = np.array(found.classes[made])
    # The first goes, so that a split at a fixed place shows; half of them stay.
    number = random.integers(1, (len(roots) + 1) // 2, endpoint=True)
    number = min(number, len(roots) - 1)
    dropped = [roots[0], *random.permutation(roots[1:])[: number - 1]]
    kept &= ~np.isin(found.unit_of, found.unit_of[dropped])
  emitted = {p: c[kept[c]] for p, c in flow.outputs.items()}
  narrow = wrap.narrowed(
    plain.model,
    plain.call,
    flow.layers,
    {p: len(c) for p, c in emitted.items()},
  )
  try:
    shapes = _init_shapes(narrow, arguments)
    seen, _ = _follow(narrow, shapes, arguments, emitted, flow.layers)
  except Exception as e:  # Whatever the model's own code raises.
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return f"the model's code fixes this width: {text}"
  for path, channels in flow.inputs.items():
    expected = found.units(channels)[kept[channels]]
    there = found.units(seen.inputs.get(path, np.zeros(0, int)))
    if not np.array_equal(expected, there):
      return f"the model's code sends other channels to {path} when narrowed"
    for before, now in zip(flow.pasts[path], seen.pasts[path], strict=True):
      if list(itertools.compress(before, kept[channels])) != now:
        return f"the model's code treats channels of {path} by their number"
  return ''


def _uncounted(shapes, layers) -> dict[str, int]:
  """{module path: parameters} that no known layer holds."""
  found = collections.Counter()
  flat = flax.traverse_util.flatten_dict(shapes.get('params', {}))
  for path, leaf in flat.items():
    if '/'.join(path[:-1]) not in layers:
      found['/'.join(path[:-1]) or path[-1]] += math.prod(leaf.shape)
  return dict(found)
