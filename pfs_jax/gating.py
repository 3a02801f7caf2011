"""Adds gates to a Linen module, or narrows it, while it is called.

One interceptor multiplies the outputs of the layers that carry gates and sets
the widths of the layers that are narrowed. A `groups.Table` says which layers
these are. The module itself is neither edited nor copied.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import costs, errors, groups

# Arguments that tell models whether they train: {name: value in training}.
TRAIN_NAMES = {
  'train': True,
  'training': True,
  'is_training': True,
  'deterministic': False,
  'use_running_average': False,
  'eval': False,
  'inference': False,
}


@dataclasses.dataclass(frozen=True)
class TrainArgument:
  """Calls a model, and tells it by arguments or fields whether it trains.

  Attributes:
    arguments: Those of `TRAIN_NAMES` that are arguments of the call.
    fields: Where there are none: those that are fields of the module.
  """

  arguments: tuple[str, ...]
  fields: tuple[str, ...] = ()

  def __call__(
    self, module: nn.Module, x: Any, *args: Any, train: bool, **kwargs: Any
  ) -> Any:
    """The module's output."""
    for name in self.fields:  # The module is the wrapper's own copy.
      object.__setattr__(module, name, TRAIN_NAMES[name] == train)
    kwargs |= {name: TRAIN_NAMES[name] == train for name in self.arguments}
    return module(x, *args, **kwargs)


def train_argument(model: nn.Module) -> TrainArgument:
  """The way to tell a model whether it trains; arguments before fields."""
  arguments = inspect.signature(type(model).__call__).parameters
  fields = [f.name for f in dataclasses.fields(model)]
  told = tuple(name for name in TRAIN_NAMES if name in arguments)
  by_field = tuple(name for name in TRAIN_NAMES if name in fields)
  return TrainArgument(told, () if told else by_field)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A module and how to call it, hidden from Flax, which would make it a child.

  Attributes:
    model: A Linen module.
    call: (module, x, *args, train, **kwargs) -> output; None: the module.
  """

  model: nn.Module
  call: Callable[..., Any] | None

  def __hash__(self) -> int:
    return hash(type(self.model))

  def __eq__(self, other: Any) -> bool:
    if not isinstance(other, Source) or self.call != other.call:
      return False
    try:
      return self.model is other.model or bool(self.model == other.model)
    except (TypeError, ValueError):  # Fields that cannot be compared.
      return False


class Wrapped(nn.Module):
  """A module that calls another one with some of its layers changed.

  Its variables are those of the model, under the same names, and the collection
  `gates` where it is gated: one [C] vector for each group, starting at 1. Two
  wrappers of equal models, calls and changes are equal, so that programs that
  take them as static arguments compile once.

  Attributes:
    source: The model and how it is called.
    features: (path, output channels) of convolutions and dense layers.
    multipliers: (path, output channels per input channel) of depthwise ones
      and of normalisations with a group for each channel.
    carriers: (path, units of its channels, -1 for none) of gated layers.
    gated: The groups that have gates.
  """

  source: Source
  features: tuple[tuple[str, int], ...] = ()
  multipliers: tuple[tuple[str, int], ...] = ()
  carriers: tuple[tuple[str, tuple[int, ...]], ...] = ()
  gated: tuple[groups.Group, ...] = ()

  @property
  def model(self) -> nn.Module:
    """The model, unchanged."""
    return self.source.model

  def __repr__(self) -> str:
    sizes = {g.name: g.size for g in self.gated}
    what = 'gated' if sizes else 'channels made'
    shown = (sizes or dict(self.features)).items()
    listed = ', '.join(f'{path}: {size}' for path, size in shown)
    return f'<{type(self.model).__name__}, {what}: {listed}>'

  def __call__(self, x: Any, *args: Any, train: bool = False, **kwargs: Any):
    """The model's output; further arguments are passed on.

    Raises:
      errors.UserError: The gates are missing; or, in `init`, the model's code
        does not call a layer at these widths.
    """
    call: Any = self.source.call or type(self.model).__call__
    # The model lives in the wrapper's own scope: no name is added to its tree.
    model = self.model.clone(parent=self.scope, _deep_clone=True)
    called = set()
    with nn.intercept_methods(self._interceptor(self._gates(), called)):
      y = call(model, x, *args, train=train, **kwargs)
    skipped = [path for path, _ in self.features if path not in called]
    if skipped and self.is_initializing():
      raise errors.UserError(
        f"with these widths the model's code does not call "
        f'{groups.some(skipped)} (does it compare them?): choose other counts.'
      )
    return y

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones; its tree follows the groups' names."""
    return groups.tree(
      {g.name: jnp.ones((g.size,), g.dtype) for g in self.gated}
    )

  def by_layer(self, gates: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `gates` as {group name: [C]}, forward order."""
    return groups.by_name((g.name for g in self.gated), gates)

  def _gates(self) -> list[jax.Array]:
    """The gates of each group, in forward order; `init` creates them."""
    found = []
    for group in self.gated:
      assert self.scope is not None
      scope = self.scope.rewound()  # The model may use the same names.
      scope = child_scope(scope, group.name.split('/'))
      there = scope.has_variable(groups.GATES, 'gate')
      if not there and not self.is_initializing():
        raise errors.UserError(
          f'variables must hold the collection {groups.GATES!r}; init or '
          'unit_gates makes one.'
        )
      gate = scope.variable(
        groups.GATES, 'gate', jnp.ones, (group.size,), group.dtype
      )
      found.append(gate.value)
    return found

  def _interceptor(self, gates: Sequence[jax.Array], called: set[str]):
    features, multipliers = dict(self.features), dict(self.multipliers)
    carriers = dict(self.carriers)

    def around(module, path, x, call):
      called.add(path)

      # Flax makes a new module for each call, so the user's is not changed.
      def change(name, value):
        object.__setattr__(module, name, value)

      if path in multipliers and isinstance(module, nn.GroupNorm):
        change('num_groups', x.shape[-1])
      elif path in multipliers:
        change('feature_group_count', x.shape[-1])
        change('features', x.shape[-1] * multipliers[path])
      elif path in features:
        change('features', features[path])
      if not _axis_exists(getattr(module, 'axis_name', None)):
        change('axis_name', None)  # The statistics cover all images anyway.
      y = call(x)
      if path in carriers:
        gate = _gates_of(gates, carriers[path])  # [C] or [N, C].
        if gate.ndim > 1 and len(gate) < len(y):  # Several rows an image.
          gate = jnp.repeat(gate, len(y) // len(gate), axis=0)
        between = (1,) * (y.ndim - gate.ndim)
        gate = gate.reshape(*gate.shape[:-1], *between, gate.shape[-1])
        # In the type of the gates, so that their gradient is summed in it.
        y = (y * gate).astype(y.dtype)
      return y

    return costs.intercept(around, len(self.path))


def child_scope(scope: Any, path: Sequence[Any]) -> Any:
  """The scope of Flax at a path below another one."""
  for part in path:
    scope = scope.push(str(part), reuse=True)
  return scope


def _axis_exists(axis: str | None) -> bool:
  """Whether an axis that a layer averages over exists here; true for None."""
  try:
    return axis is None or bool(jax.lax.axis_size(axis))
  except NameError:
    return False


def _gates_of(gates: Sequence[jax.Array], units: tuple[int, ...]) -> jax.Array:
  """The gates of these units, [..., C]; 1 for unit -1."""
  first = 0
  for gate in gates:  # Nearly always the units are one whole group.
    if units == tuple(range(first, first + gate.shape[-1])):
      return gate
    first += gate.shape[-1]
  one = jnp.ones_like(gates[0][..., :1])
  return jnp.concatenate([*gates, one], axis=-1)[..., np.array(units)]


def gate(model: nn.Module, table: groups.Table) -> Wrapped:
  """The model with a gate on each channel of each group.

  `init` adds the collection `gates`, one [C] vector for each group, starting at
  1; they multiply the outputs of the layers that `table.gated` names. With all
  gates at 1, the output equals that of the model, bit for bit. A gate may also
  be applied as [N, C], with one vector for each image.

  Args:
    model: A Linen module, or a narrowed one with its narrowed table.
    table: Its channel groups.

  Raises:
    errors.UserError: If there is no group.
  """
  if not table.groups:
    reasons = '; '.join(dict.fromkeys(table.left_alone.values()))
    raise errors.UserError(
      f'surgery: no channel of the model can carry a gate: {reasons}.'
    )
  if not isinstance(model, Wrapped):
    model = Wrapped(Source(model, table.call))
  carriers = tuple((p, tuple(u.tolist())) for p, u in table.gated.items())
  return model.clone(carriers=carriers, gated=table.groups)


def narrowed(
  source: Source, layers: Mapping[str, costs.Layer], features: Mapping[str, int]
) -> Wrapped:
  """A model whose layers have the given numbers of output channels.

  Every width is set, even if it stays the same: the model's own code may derive
  it from a width that changes.

  Args:
    source: The model.
    layers: {path: layer} of the wide model.
    features: {path: output channels} of convolutions and dense layers.
  """
  multipliers = {
    path: layer.multiplier or 1
    for path, layer in layers.items()
    if layer.multiplier or (layer.kind == 'norm' and layer.groups > 1)
  }
  return Wrapped(source, tuple(features.items()), tuple(multipliers.items()))
