"""Light wrappers that gate or narrow a model without touching it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors
from pfs_jax.surgery import trace

GATES = 'gates'

# Names under which models are told whether to train: {name: value in training}.
TRAIN = {
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
  """Calls a model that is told by an argument whether to train.

  Attributes:
    name: Of the argument.
    when_training: Its value in training; the other one in evaluation.
    field: Whether it is a field of the module, not an argument of the call.
  """

  name: str
  when_training: bool
  field: bool = False

  def value(self, train: bool) -> bool:
    """What the argument is set to."""
    return self.when_training if train else not self.when_training

  def __call__(self, module, x, *args, train: bool, **kwargs):
    """The module's output."""
    if not self.field:
      kwargs[self.name] = self.value(train)
    return module(x, *args, **kwargs)


def train_argument(model: nn.Module, name: str | None = None) -> TrainArgument:
  """How a model is told whether to train.

  Args:
    model: A Linen module.
    name: Name of the argument of `__call__` or of the field; None looks for
      one of `TRAIN`, arguments first.

  Raises:
    errors.UserError: If there is none.
  """
  arguments = inspect.signature(type(model).__call__).parameters
  fields = [f.name for f in dataclasses.fields(model)]
  for known in TRAIN if name is None else [name]:
    if known in arguments:
      return TrainArgument(known, TRAIN.get(known, True))
  for known in TRAIN if name is None else [name]:
    if known in fields:
      return TrainArgument(known, TRAIN.get(known, True), field=True)
  known = ', '.join(TRAIN) if name is None else repr(name)
  raise errors.UserError(
    f'surgery: {type(model).__name__} has no argument or field {known}; say '
    'how to call it with call=lambda module, x, train: ...'
  )


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is changed: values, so that plans can be compared and hashed.

  Attributes:
    features: (path, output channels) of convolutions and dense layers.
    multipliers: (path, output channels per input channel) of depthwise ones.
    gates: (path, units of its channels, -1 for none) of gated BatchNorms.
    groups: (name, channels, dtype of the gates).
  """

  features: tuple[tuple[str, int], ...] = ()
  multipliers: tuple[tuple[str, int], ...] = ()
  gates: tuple[tuple[str, tuple[int, ...]], ...] = ()
  groups: tuple[tuple[str, int, str], ...] = ()


class Wrapped:
  """A model with some of its layers changed on the way, used like a module.

  Works under jit, grad, vmap and eval_shape and on several devices, and can be
  a static argument: two wrappers of equal models, calls and plans are equal.
  The model itself is not changed.

  Attributes:
    model: The user's Linen module.
    call: How it is called.
    plan: What is changed.
  """

  def __init__(
    self, model: nn.Module, call: Callable[..., Any], plan: Plan | None = None
  ):
    self.model, self.call, self.plan = model, call, plan or Plan()
    self._hash = hash((type(model), self.plan))

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: Any) -> bool:
    if not isinstance(other, Wrapped):
      return NotImplemented
    if self is other:
      return True
    same = self.plan == other.plan and self.call == other.call
    return same and _same(self.model, other.model)

  def __repr__(self) -> str:
    changed = 'gated' if self.plan.groups else 'narrowed'
    return f'<{type(self.model).__name__}, {changed}>'

  def unit_gates(self) -> dict[str, Any]:
    """The collection `gates`, all ones; its tree follows the groups' names."""
    return flax.traverse_util.unflatten_dict(
      {
        (*name.split('/'), 'gate'): jnp.ones((size,), dtype)
        for name, size, dtype in self.plan.groups
      }
    )

  def init(self, rngs, x, *args, train: bool = False, **kwargs):
    """The model's new variables, and unit gates where it is gated."""
    with nn.intercept_methods(self._interceptor(None)):
      variables = self._model(train).init(
        rngs, x, *args, method=self._method(train), **kwargs
      )
    if self.plan.groups:
      variables = {**variables, GATES: self.unit_gates()}
    return variables

  def init_with_output(self, rngs, x, *args, method=None, **kwargs):
    """(output, new variables), as `flax.nnx.bridge.ToNNX` asks for them."""
    variables = self.init(rngs, x, *args, **kwargs)
    out = self.apply(variables, x, *args, method=method, **kwargs)
    return out, variables

  def apply(
    self,
    variables: Mapping[str, Any],
    x,
    *args,
    train: bool = False,
    rngs=None,
    mutable=False,
    method=None,
    **kwargs,
  ):
    """The model's output; (output, updates) where `mutable` is not False.

    `method` is for `flax.nnx.bridge.ToNNX` and must be None.
    """
    assert method is None, 'only __call__ can be gated or narrowed'
    vector = None
    if self.plan.groups:
      variables = dict(variables)
      if GATES not in variables:
        raise errors.UserError(
          f'surgery: variables must hold the collection {GATES!r}; init or '
          'unit_gates makes one.'
        )
      vector = self._vector(variables.pop(GATES))
    with nn.intercept_methods(self._interceptor(vector)):
      return self._model(train).apply(
        variables,
        x,
        *args,
        method=self._method(train),
        rngs=rngs,
        mutable=mutable,
        **kwargs,
      )

  def by_layer(self, gates: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `gates` as {group name: [C]}, forward order."""
    flat = flax.traverse_util.flatten_dict(gates)
    return {
      name: flat[*name.split('/'), 'gate'] for name, _, _ in self.plan.groups
    }

  def _vector(self, gates) -> jax.Array:
    """The gates of all units, and a 1 that index -1 reads."""
    parts = list(self.by_layer(gates).values())
    return jnp.concatenate([*parts, jnp.ones((1,), parts[0].dtype)])

  def _model(self, train: bool) -> nn.Module:
    if getattr(self.call, 'field', False):
      return self.model.clone(**{self.call.name: self.call.value(train)})
    return self.model

  def _method(self, train: bool):
    def method(module, x, *args, **kwargs):
      return self.call(module, x, *args, train=train, **kwargs)

    return method

  def _interceptor(self, vector: jax.Array | None):
    features = dict(self.plan.features)
    multipliers = dict(self.plan.multipliers)
    gates = dict(self.plan.gates)

    def around(module, path, x, call):
      # A module is made anew at each call: nothing of the user's is changed.
      if path in multipliers:
        object.__setattr__(module, 'feature_group_count', x.shape[-1])
        width = x.shape[-1] * multipliers[path]
        object.__setattr__(module, 'features', width)
      elif path in features:
        object.__setattr__(module, 'features', features[path])
      y = call(x)
      if vector is not None and path in gates:
        y = y * _last(vector[np.array(gates[path])], y)
      return y

    return trace.intercept(around)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
  """[C] -> [1, ..., 1, C] in the dtype of `like`."""
  return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def _same(a: nn.Module, b: nn.Module) -> bool:
  try:
    return a is b or bool(a == b)
  except (TypeError, ValueError):  # Fields that cannot be compared.
    return False


def narrowed(
  model: nn.Module,
  call: Callable[..., Any],
  layers: Mapping[str, trace.Layer],
  features: Mapping[str, int],
) -> Wrapped:
  """A model whose layers have the given numbers of output channels.

  Every width is set, also those that stay: the model's own code may derive
  them from a width that does not.
  """
  multipliers = {
    path: layer.multiplier
    for path, layer in layers.items()
    if layer.kind == 'depthwise'
  }
  plan = Plan(tuple(features.items()), tuple(multipliers.items()))
  return Wrapped(model, call, plan)
