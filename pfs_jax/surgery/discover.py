"""Finds the channel groups of a model that can carry gates and be narrowed."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import costs, errors, gating, groups
from pfs_jax.surgery import nnx_models, trace
from pfs_jax.surgery.cells import State
from pfs_jax.surgery.flow import NESTED, Flow


def discover(
  model: Any,
  x: Any,
  *args: Any,
  call: Callable[..., Any] | None = None,
  residual: bool = False,
  leave: Sequence[str] = (),
  **kwargs: Any,
) -> groups.Table:
  """Finds where a model's channels can carry gates and be removed.

  The model is traced in evaluation mode and its channels are followed through
  the trace; nothing is computed. Then the groups are tried out: the model is
  traced once more with a random part of every group removed. A group whose
  channels do not arrive where they should is left alone, for example because
  the model's code splits them at a fixed place.

  Args:
    model: Any Linen module, or an instance of an NNX module, untouched.
    x: Images [N, H, W, C] or their `jax.ShapeDtypeStruct`; N = 1 is enough. The
      MACs of operations that do not depend on the images are divided by N.
    *args: Further arguments of the model's `__call__`.
    call: (module, x, train) -> logits, for models that have no argument or
      field in `gating.TRAIN_NAMES`; further arguments are passed on.
    residual: Whether channels tied by sums or by sharing a module are one
      group, instead of being left alone.
    leave: Paths of layers whose channels are to be left alone.
    **kwargs: Further arguments of `__call__`, by name.

  Returns:
    The table of channel groups. Its printed form says what was found and why
    the rest was left alone.

  Raises:
    errors.UserError: The model is no module of Flax, has no layer, has no known
      way to say whether it trains, or has a collection `gates` of its own;
      `leave` names no layer; or the images have no batch axis.
  """
  model = nnx_models.as_linen(model)
  if not isinstance(model, nn.Module):
    raise errors.UserError(
      'surgery: the model must be an instance of flax.linen.Module or of '
      f'flax.nnx.Module; got {model!r}.'
    )
  told = call or gating.train_argument(model)
  source = gating.Source(model, told)
  arguments = (x, args, kwargs)
  shapes, *_ = traced = _traced(gating.Wrapped(source), arguments)
  if groups.GATES in shapes:
    raise errors.UserError(
      f'surgery: the model has a collection {groups.GATES!r} of its own.'
    )
  flow, calls, uncounted = _follow(traced)
  if not flow.layers:
    raise errors.UserError(
      'surgery: the model calls no layer of flax.linen that makes channels. '
      '(Layers of flax.nnx inside bridge.to_linen are not seen.)'
    )
  if told == gating.TrainArgument(()) and shapes.get('batch_stats'):
    raise errors.UserError(
      f'surgery: {type(model).__name__} has no argument or field '
      f'{", ".join(gating.TRAIN_NAMES)}; say how to call it with '
      'call=lambda module, x, train: ... (config.model.call)'
    )
  for path in leave:
    if path not in flow.outputs:
      raise errors.UserError(
        f'surgery: no layer {path!r}; the layers are {", ".join(flow.outputs)}.'
      )
    flow.cells.fix(flow.outputs[path].tolist(), 'left alone on request')
  found = _FoundGroups(flow, residual, shapes)
  _try_out(source, arguments, found)
  return dataclasses.replace(
    found.table(calls), uncounted=uncounted, call=source.call
  )


def cost_model(
  model: Any,
  table: groups.Table,
  x: Any,
  *args: Any,
  call: Callable[..., Any] | None = None,
  **kwargs: Any,
) -> costs.CostModel:
  """MACs and parameters of the narrow models, exact functions of the counts.

  All operations that multiply and accumulate are counted (`costs`), but for
  those in `table.uncounted`. Sums, such as a model's own mean, cost nothing.

  Args:
    model: The model of `discover`.
    table: What `discover` found.
    x: One image [1, H, W, C] or its `jax.ShapeDtypeStruct`; its size may differ
      from that of the images given to `discover`.
    *args: Further arguments of the model's `__call__`.
    call: As for `discover`; by default, the model is called as there.
    **kwargs: Further arguments of `__call__`, by name.

  Raises:
    errors.UserError: The image has no batch axis.
  """
  source = gating.Source(nnx_models.as_linen(model), call or table.call)
  traced = _traced(gating.Wrapped(source), (x, args, kwargs))
  flow, calls, _ = _follow(traced)
  units = np.full(len(flow.cells.owners), -1)
  for path, channels in flow.outputs.items():
    made = table.outputs.get(path, ())
    if len(made) == len(channels):  # Else it depends on the images' size.
      units[channels] = made
  return dataclasses.replace(
    table,
    calls=tuple(calls),
    inputs={path: units[channels] for path, channels in flow.inputs.items()},
    outputs={path: units[channels] for path, channels in flow.outputs.items()},
  ).cost_model()


def _traced(plain: gating.Wrapped, arguments) -> tuple[Any, ...]:
  """The shapes of the variables and of a call's arrays, and the trace.

  It runs the model's own code, which may raise anything. What is no array in
  `arguments`, (x, args, kwargs), stays as it is.
  """
  leaves, tree = jax.tree.flatten(arguments)
  arrays = {
    i: jax.ShapeDtypeStruct(
      leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, True)
    )
    for i, leaf in enumerate(leaves)
    if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')
  }

  def call(method, first, arrays):
    merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
    x, args, kwargs = jax.tree.unflatten(tree, merged)
    return method(first, x, *args, **kwargs)

  init, apply = (functools.partial(call, m) for m in (plain.init, plain.apply))
  shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), arrays))
  images = next(iter(arrays.values())).shape[0]
  return shapes, arrays, *trace.trace(apply, images, shapes, arrays)


def _follow(
  traced: tuple[Any, ...], emitted=None, wide=None
) -> tuple[Flow, list[costs.Layer], tuple[str, ...]]:
  """(the walk through a trace, the calls that cost something, the uncounted).

  For the trace of a narrowed model, `emitted` are the channels that its layers
  make, and `wide` is the walk through the wide model.
  """
  shapes, arrays, program, calls = traced
  layers = groups.first_calls(calls)
  if wide:  # With one channel left, a depthwise convolution looks dense.
    for path, layer in layers.items():
      kind, obstacle = wide.layers[path].kind, wide.layers[path].obstacle
      layers[path] = dataclasses.replace(layer, kind=kind, obstacle=obstacle)
  flow = Flow(layers, emitted, *([wide.cells.owners] if wide else []))
  values, weights = [], set()
  for place, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    origin, state = 0, State.CONST
    if math.prod(leaf.shape) > 1:
      names = [str(getattr(p, 'key', p)) for p in place]
      origin = flow.cells.origin(f'the parameter {"/".join(names[1:])}')
      state = State.LIVE
      weights.add(origin)
    values.append(flow.cells.value(leaf.ndim, origin, state))
  origin = flow.cells.origin("the model's input")
  for leaf in arrays.values():
    fixed = origin if leaf.ndim and leaf.shape[-1] > 1 else 0
    values.append(flow.cells.value(leaf.ndim, fixed, State.LIVE))
  for value in flow.run(program, values):
    flow.cells.fix(flow.cells.found(value.cells), 'an output of the model')
  shape = next(iter(arrays.values())).shape
  for path, read in flow.unbatched.items():
    if layers[path].ndim == len(shape) and not read <= weights:
      raise errors.UserError(
        f'surgery: {path} is a convolution of an input without a batch axis; '
        f'x must be images [N, H, W, C]; got shape {shape}.'
      )
  more, uncounted = trace.rest(program, calls, shape[0])
  leaves = jax.tree.leaves(shapes.get('params'))
  unknown = sum(a.size for a in leaves) - sum(c.params() for c in calls)
  if unknown:
    more.append(trace.fixed_cost('other parameters', params=unknown))
  return flow, [*calls, *more], uncounted


class _FoundGroups:
  """Groups of channels in a flow; `refuse` removes some of them."""

  def __init__(self, flow: Flow, residual: bool, shapes: Any):
    self.flow, self.residual, self.shapes = flow, residual, shapes
    self._uses = collections.defaultdict(list)
    for channel, *use in flow.uses:
      self._uses[flow.cells.find(channel)].append(use)
    self._members = collections.defaultdict(list)
    for channel in range(1, len(flow.cells.owners)):
      self._members[flow.cells.find(channel)].append(channel)
    for root in list(self._members):
      if reason := self._obstacle(root):
        flow.cells.fix([root], reason)
    self._regroup()

  def _makers(self, root: int) -> dict[str, int]:
    """{path: number of channels tied to `root` that this layer makes}."""
    owners = self.flow.cells.owners
    return collections.Counter(owners[c][0] for c in self._members[root])

  def _obstacle(self, root: int) -> str:
    """Why the channels tied to `root` cannot carry a gate; '' if they can."""
    uses, channels = self._uses[root], self.flow.cells
    if channels.reason(root):
      return channels.reason(root)
    if not uses:
      return 'no convolution or dense layer reads it'
    for state, gates, path in uses:
      if not gates:
        return f'no BatchNorm between it and {path}'
      if state == State.LIVE:
        return f'{path} also reads it past the BatchNorm'
    ties = channels.ties(root) & {'sum', 'shared'}
    if ties and not self.residual:
      how = 'a sum' if 'sum' in ties else 'a shared layer'
      return (
        f'tied by {how}: {groups.some(list(self._makers(root)))} '
        '(residual=True prunes them together)'
      )
    return ''

  def _regroup(self) -> None:
    """Makes groups of the channels without an obstacle."""
    channels = self.flow.cells
    self.classes = collections.defaultdict(list)
    for root in self._members:
      if not channels.reason(root):
        self.classes[tuple(self._makers(root).items())].append(root)
    inputs = self.flow.inputs.items()
    reads = {
      path: collections.Counter(map(channels.find, c.tolist()))
      for path, c in inputs
    }
    for made, roots in list(self.classes.items()):
      in_part = (p for p, n in reads.items() if len({n[r] for r in roots}) > 1)
      if len(roots) < 2:
        tied = sum(number for _, number in made) > len(made)
        channels.fix(roots, 'all tied together' if tied else 'a single channel')
        del self.classes[made]
      elif path := next(in_part, ''):
        channels.fix(
          roots, f'{path} does not read all of its channels equally often'
        )
        del self.classes[made]
    self.unit_of = np.full(len(channels.owners), -1)
    for unit, root in enumerate(itertools.chain(*self.classes.values())):
      self.unit_of[self._members[root]] = unit

  def refuse(self, reasons: Mapping[Any, str]) -> None:
    """Leaves groups alone, for the given reasons."""
    for made, reason in reasons.items():
      self.flow.cells.fix(self.classes[made], reason)
    self._regroup()

  def _gated(self) -> dict[str, np.ndarray]:
    """{path: [C] units whose gates multiply the layer's output}."""
    gated = {}
    for root in itertools.chain(*self.classes.values()):
      for _, gates, _ in self._uses[root]:
        for path, index in gates:
          width = self.flow.layers[path].outputs
          units = gated.setdefault(path, np.full(width, -1))
          units[index] = self.unit_of[root]
    return {path: gated[path] for path in self._in_order(gated)}

  def _in_order(self, paths) -> tuple[str, ...]:
    paths = set(paths)
    return tuple(path for path in self.flow.layers if path in paths)

  def _group(self, made, roots, name: str) -> groups.Group:
    layers, units = self.flow.layers, self.unit_of[roots]
    uses = [u for root in roots for u in self._uses[root]]
    norms = self._in_order(path for _, gates, _ in uses for path, _ in gates)
    passed = self._in_order(
      path
      for path, channels in self.flow.inputs.items()
      if layers[path].kind == 'depthwise'
      and np.isin(units, self.unit_of[channels]).any()
    )
    dtype = jnp.result_type(*(layers[n].dtype for n in norms), jnp.float32)
    return groups.Group(
      name=name,
      size=len(roots),
      producers=tuple(path for path, _ in made),
      norms=norms,
      consumers=self._in_order(path for _, _, path in uses),
      depthwise=passed,
      removable=all(s == State.ZERO for s, _, _ in uses),
      dtype=jnp.dtype(dtype),
    )

  def table(self, calls: Sequence[costs.Layer]) -> groups.Table:
    """The table of groups, with unique names."""
    found, names = [], collections.Counter()
    for made, roots in self.classes.items():
      name = made[0][0]
      names[name] += 1
      number = f'.{names[name]}' if names[name] > 1 else ''
      found.append(self._group(made, roots, name + number))
    flow, gated = self.flow, self._gated()
    reasons = {p: self._reason(p, gated.get(p)) for p in flow.layers}
    return groups.Table(
      groups=tuple(found),
      calls=tuple(calls),
      inputs={p: self.unit_of[c] for p, c in flow.inputs.items()},
      outputs={p: self.unit_of[c] for p, c in flow.outputs.items()},
      gated=gated,
      left_alone={path: why for path, why in reasons.items() if why},
    )

  def _reason(self, path: str, gates: np.ndarray | None) -> str:
    """Why a layer has channels outside of groups; '' if it has none."""
    flow, kind = self.flow, self.flow.layers[path].kind
    if path in flow.unseen or path not in flow.inputs:
      return flow.unseen.get(path, NESTED)
    channels = flow.outputs.get(path, flow.inputs[path])
    alone = channels[self.unit_of[channels] < 0]
    if not alone.size:
      gated = gates is not None and (gates >= 0).all()
      further_on = kind == 'norm' and not gated
      return 'the gates of its channels stand further on' if further_on else ''
    if not alone.any():
      return 'acts on channels of a fixed width'
    return flow.cells.reason(alone[alone > 0][0])


# The trial: do the right channels of the narrowed model reach the right layers?


def _try_out(source: gating.Source, arguments, found: _FoundGroups) -> None:
  """Leaves groups alone if the model's own code cannot be narrowed there."""
  if not _failure(source, arguments, found, list(found.classes)):
    return
  reasons = {
    made: _failure(source, arguments, found, [made]) for made in found.classes
  }
  found.refuse({made: reason for made, reason in reasons.items() if reason})
  reason = _failure(source, arguments, found, list(found.classes))
  if reason:  # Groups that only fail together.
    found.refuse(dict.fromkeys(found.classes, reason))


def _failure(source, arguments, found: _FoundGroups, chosen) -> str:
  """What goes wrong when the chosen groups are narrowed; '' if nothing does."""
  reason = ''
  for seed in (0, 1):  # Two widths may be equal by chance, but not twice.
    reason = _failure_of_draw(source, arguments, found, chosen, seed)
    if not reason:
      break
  return reason


def _failure_of_draw(source, arguments, found, chosen, seed: int) -> str:
  if not chosen:
    return ''
  flow, random = found.flow, np.random.default_rng(seed)
  kept = np.ones(len(flow.cells.owners), bool)
  for made in chosen:
    roots = np.array(found.classes[made])
    # The first and the last channel are removed, so that a split at a fixed
    # place, and a rotation, are noticed. Of large groups the first half is, so
    # that a split at a share of the channels is noticed. A quarter stays.
    n = len(roots)
    half = n // 2 if n > 6 else max(1, n // 3)
    more = int(random.integers(max(1, min(max(n // 4, 2), n - half - 2))))
    dropped = [*roots[:half], *roots[n - 1 :][: n > 2]]
    dropped += random.permutation(roots[half : n - 1])[:more].tolist()
    kept &= ~np.isin(found.unit_of, found.unit_of[dropped])
  # A layer with one output makes channel 0, which is no channel (`Flow._mix`).
  emitted = {p: c[kept[c]] * (len(c) > 1) for p, c in flow.outputs.items()}
  features = {p: len(c) for p, c in emitted.items()}
  narrow = gating.narrowed(source, flow.layers, features)
  try:
    traced = _traced(narrow, arguments)
  except Exception as e:  # The model's own code may raise anything.
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return f"the model's code fixes this width: {text}"
  compared = 'when narrowed (does it compare widths?)'
  shapes, *_, calls = traced
  called = groups.first_calls(calls)
  if changed := sorted(flow.layers.keys() ^ called.keys()):
    verb = 'calls' if changed[0] in called else 'does not call'
    return f"the model's code {verb} {groups.some(changed)} {compared}"
  try:
    seen, *_ = _follow(traced, emitted, flow)
  except (IndexError, ValueError):  # A slice that has become empty.
    return "the model's code leaves none of some channels when narrowed"
  for path, channels in flow.inputs.items():
    left = kept[channels]
    there = found.unit_of[seen.inputs.get(path, np.zeros(0, int))]
    if not np.array_equal(found.unit_of[channels[left]], there):
      return f"the model's code sends other channels to {path} when narrowed"
    pasts = [list(itertools.compress(p, left)) for p in flow.pasts[path]]
    if pasts != seen.pasts[path]:
      return f"the model's code treats inputs of {path} otherwise {compared}"
  table = found.table(tuple(flow.layers.values()))
  stay = ~np.isin(np.arange(table.offsets[-1]), found.unit_of[~kept])
  parts = map(np.flatnonzero, np.split(stay, table.offsets[1:-1]))
  units = dict(zip(table.sizes, parts, strict=True))
  sliced = jax.eval_shape(lambda v: table.taken(v, units), found.shapes)
  for name in ('params', 'batch_stats'):
    old, new = (jax.tree.map(np.shape, v.get(name)) for v in (sliced, shapes))
    if old != new:
      return "a variable outside of the layers' own depends on this width"
  return ''
