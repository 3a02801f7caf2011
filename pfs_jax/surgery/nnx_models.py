"""Modules of flax.nnx, as Linen modules that surgery understands.

An NNX module holds its arrays. `Adapter` runs a copy of it in which each layer
takes its parameters from Linen variables, which are named by the layer's path
in the NNX module. All else (`discover`, gates, costs, slicing, the stages) then
works as for a Linen model. `narrowed` goes the way back: it gives an ordinary
NNX module with fewer channels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from pfs_jax import described, errors, groups
from pfs_jax.surgery import calling

_JOINT = (nnx.LayerNorm, nnx.RMSNorm)  # Statistics over all channels.
_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, *_JOINT)
_LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, *_NORMS)
_COLLECTIONS = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
  """An NNX module or layer, hidden from Linen; equal if the same object.

  Attributes:
    model: The module.
    transformed: Paths of the layers that it calls inside a transform of NNX
      (jit, remat, scan, vmap), found at the first call. They are not layers to
      surgery: their arrays are variables of the model itself.
    called: Not empty after the first call.
  """

  model: Any
  transformed: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
  called: list[bool] = dataclasses.field(default_factory=list)

  def __hash__(self) -> int:
    return id(self.model)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Held) and self.model is other.model


def as_linen(model: Any) -> Any:
  """An `Adapter` for an instance of `nnx.Module`; anything else as it is."""
  return Adapter(Held(model)) if isinstance(model, nnx.Module) else model


class Adapter(nn.Module):
  """An NNX module as a Linen module.

  `init` draws new weights: matrices and kernels from a normal distribution with
  the spread of the module's own array, for the number of inputs that there are
  now; vectors keep their values.

  Attributes:
    held: The NNX module; its arrays say shapes and spreads.
  """

  held: Held

  def __call__(self, x: Any, *args: Any, train: bool = False, **kwargs: Any):
    """The module's output; it is told by `train()` or `eval()`, too."""
    for name in inspect.signature(type(self.held.model).__call__).parameters:
      if name in calling.NAMES:
        kwargs[name] = calling.NAMES[name] == train
    if not self.held.called:
      jax.eval_shape(lambda: self._find_transformed(x, args, kwargs, train))
      self.held.called.append(True)
    model = self._copy(train)
    if train and self.has_rng('dropout'):
      key = self.make_rng('dropout')
      nnx.reseed(model, dropout=key, default=key)
    own = self._own_variables(model)
    for path, layer in self._layers(model):
      _mark(layer, functools.partial(self._run, path))
    out = model(x, *args, **kwargs)
    _keep(self.scope, own)
    return out

  def _copy(self, train: bool) -> nnx.Module:
    model = nnx.clone(self.held.model)
    (model.train if train else model.eval)()
    return model

  def _layers(self, model: nnx.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, layer) of the layers that are not inside a transform."""
    layers = _layers(model)
    return [(p, v) for p, v in layers if p not in self.held.transformed]

  def _find_transformed(self, x, args, kwargs, train: bool) -> None:
    """Notes the layers whose calls are those of copies, which NNX makes."""
    model = self._copy(train)
    for path, layer in _layers(model):

      def run(layer, x, *args, path=path, original=layer, **kwargs):
        if layer is not original:
          self.held.transformed.add(path)
        return _own_call(layer)(x, *args, **kwargs)

      _mark(layer, run)
    model(x, *args, **kwargs)

  def _own_variables(self, model: nnx.Module) -> list[tuple[Any, Any]]:
    """Variables outside of layers, set: pairs of Linen's and NNX's."""
    layers = self._layers(model)
    inside = {id(v) for _, layer in layers for _, v in _variables(layer)}
    return [
      _lent(_child(self.scope, path[:-1]), path[-1], v, v[...].shape)
      for path, v in nnx.iter_graph(model)
      if _collection(v) and id(v) not in inside
    ]

  def _run(self, path, layer, x, *args, **kwargs):
    """One call of a layer, as a call of a Linen module at its path."""
    module = NnxLayer(
      Held(layer),
      getattr(layer, 'out_features', getattr(layer, 'num_features', 0)),
      getattr(layer, 'feature_group_count', 1),
      getattr(layer, 'axis_name', None),
      parent=_child(self.scope, path),
    )
    return module(x, *args, **kwargs)


class NnxLayer(nn.Module):
  """A call of an NNX layer, with parameters from Linen.

  Attributes:
    held: The layer.
    features: Output channels; surgery changes them.
    feature_group_count: Groups of a convolution; surgery changes them.
    axis_name: The axis that a BatchNorm averages over; surgery drops it.
  """

  held: Held
  features: int
  feature_group_count: int = 1
  axis_name: str | None = None

  @property
  def param_dtype(self) -> Any:
    """Dtype of the parameters."""
    return self.held.model.param_dtype

  def __call__(self, x: Any, *args: Any, **kwargs: Any):
    """The layer's output."""
    layer, feature_groups = self.held.model, self.feature_group_count
    shapes = _resize(layer, x.shape[-1], self.features, feature_groups)
    if hasattr(layer, 'axis_name'):
      layer.axis_name = self.axis_name
    lent = [
      _lent(self.scope, name, variable, shapes.get(name, shapes['']))
      for name, variable in _variables(layer)
    ]
    y = _own_call(layer)(x, *args, **kwargs)
    _keep(self.scope, lent)
    return y


def _describe(module: NnxLayer, x: Any, y: Any) -> dict[str, Any]:
  """As `described` describes Linen's layers."""
  layer = module.held.model
  view = types.SimpleNamespace(**{**vars(layer), 'variables': module.variables})
  if isinstance(layer, nnx.Linear):
    return described.dense(view, x, y)
  if isinstance(layer, nnx.ConvTranspose):
    return described.transposed(view, x, y)
  if isinstance(layer, nnx.Conv):
    return described.convolution(view, x, y)
  return {**described.norm(view, x, y), 'joint': isinstance(layer, _JOINT)}


described.register(NnxLayer, _describe)


def _mark(layer: Any, run: Callable[..., Any]) -> None:
  """Lets run(layer, x, ...) stand for a layer's calls."""
  kind: Any = type(layer)
  object.__setattr__(layer, 'surgery', run)
  object.__setattr__(layer, '__class__', _marked(kind))


@functools.cache
def _marked(cls: type) -> type:
  """A class like this one whose instances are called through `surgery`."""

  def call(self, x, *args, **kwargs):
    return self.surgery(self, x, *args, **kwargs)

  return type(cls.__name__, (cls,), {'__call__': call})


def _own_call(layer: Any) -> Callable[..., Any]:
  """What a marked layer does without the mark."""
  return super(type(layer), layer).__call__


def _layers(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """(path, layer) of each layer of a module."""
  for path, layer in nnx.iter_modules(model):
    if isinstance(layer, _LAYERS):
      yield path, layer


def _collection(node: Any) -> str:
  """The Linen collection of an NNX variable, '' for anything else."""
  return next((c for t, c in _COLLECTIONS.items() if isinstance(node, t)), '')


def _variables(layer: Any) -> list[tuple[str, Any]]:
  """(name, variable) of the parameters and statistics of a layer."""
  return [(name, v) for name, v in vars(layer).items() if _collection(v)]


def _child(scope: Any, path: Sequence[Any]) -> Any:
  for part in path:
    scope = scope.push(str(part), reuse=True)
  return scope


def _lent(scope: Any, name: Any, variable: Any, shape) -> tuple[Any, Any]:
  """A Linen variable and the NNX variable that it lends its value.

  It is drawn anew with this shape where it does not exist.
  """
  collection, like = _collection(variable), variable[...]

  def draw():
    if like.ndim < 2 or collection != 'params':
      return like[tuple(slice(n) for n in shape)]
    fans = math.prod(like.shape[:-1]) / math.prod(shape[:-1])
    drawn = jax.random.normal(scope.make_rng('params'), shape, like.dtype)
    return drawn * jnp.std(like) * math.sqrt(fans)

  linen = scope.variable(collection, str(name), draw)
  variable.set_value(linen.value)
  return linen, variable


def _keep(scope: Any, lent: Iterable[tuple[Any, Any]]) -> None:
  """Takes statistics that the NNX module has updated over to Linen."""
  for linen, variable in lent:
    kind = linen.collection
    if kind != 'params' and scope.is_mutable_collection(kind):
      linen.value = variable[...]


def _resize(
  layer: Any, inputs: int, outputs: int, feature_groups: int
) -> dict[str, tuple[int, ...]]:
  """Sets the sizes of a layer; the shapes of its variables, '' of vectors."""
  if isinstance(layer, _NORMS):
    if isinstance(layer, nnx.GroupNorm):
      layer.num_groups = inputs // layer.group_size
    else:
      layer.num_features = inputs
    return {'': (inputs,)}
  layer.in_features, layer.out_features = inputs, outputs
  kernel: tuple[int, ...] = (inputs // feature_groups, outputs)
  if getattr(layer, 'transpose_kernel', False):
    kernel = kernel[::-1]
  if not isinstance(layer, nnx.Linear):
    size = layer.kernel_size
    size = (size,) if isinstance(size, int) else tuple(size)
    kernel = layer.kernel_shape = (*size, *kernel)
  if isinstance(layer, nnx.Conv):
    layer.feature_group_count = feature_groups
  return {'kernel': kernel, '': (outputs,)}


def variables_of(model: nnx.Module) -> dict[str, Any]:
  """The parameters and statistics of an NNX module, as Linen names them."""
  return flax.traverse_util.unflatten_dict(
    {
      (_collection(variable), *map(str, path)): variable[...]
      for path, variable in nnx.iter_graph(model)
      if _collection(variable)
    }
  )


def narrowed(
  model: nnx.Module,
  table: groups.Table,
  counts: Sequence[int],
  variables: Mapping[str, Any] | None = None,
) -> nnx.Module:
  """An ordinary NNX module with `counts` channels in each group.

  Args:
    model: The module of `discover`; it is not changed.
    table: What `discover` found.
    counts: Channels of each group, forward order.
    variables: The arrays of the narrow module, as Linen names them (from a
      training, or `table.slice_variables`); None: those of the first channels
      of each group, for shapes. Train them anew, or say which are kept.

  Raises:
    errors.UserError: The variables do not fit.
  """
  if variables is None:
    kept = {g.name: range(n) for g, n in zip(table.groups, counts, strict=True)}
    variables = table.taken(variables_of(model), kept)
  flat = flax.traverse_util.flatten_dict(dict(variables))
  narrow, small = nnx.clone(model), table.narrowed(counts)
  shapes = {}
  for path, layer in _layers(narrow):
    name = '/'.join(map(str, path))
    call = small.layers.get(name)
    if call is not None:
      feature_groups = call.inputs if call.kind == 'depthwise' else call.groups
      sizes = _resize(layer, call.inputs, call.outputs, feature_groups)
      shapes.update(
        {id(v): sizes.get(n, sizes['']) for n, v in _variables(layer)}
      )
  for path, variable in nnx.iter_graph(narrow):
    collection = _collection(variable)
    if not collection:
      continue
    leaf = flat.get((collection, *map(str, path)))
    shape = shapes.get(id(variable), variable[...].shape)
    if leaf is None or leaf.shape != shape:
      found = 'nothing' if leaf is None else f'shape {leaf.shape}'
      raise errors.UserError(
        f'variables must hold {"/".join(map(str, path))} with shape {shape}; '
        f'got {found}.'
      )
    variable.set_value(jnp.asarray(leaf))
  return narrow
