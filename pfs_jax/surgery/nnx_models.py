"""Modules of flax.nnx, as Linen modules that surgery understands.

An NNX module holds its arrays. `Adapter` runs a copy of it in which each layer
takes its parameters from Linen variables, which are named by the layer's path
in the NNX module. Everything else (`discover`, gates, costs, slicing, the
stages) then works as for a Linen model. `narrowed` does the reverse: it returns
an ordinary NNX module with fewer channels.
"""

import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from pfs_jax import described, errors, gating, groups

_JOINT = (nnx.LayerNorm, nnx.RMSNorm)  # Statistics over all channels.
_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, *_JOINT)
_LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, *_NORMS)
# Variables whose values no later call needs.
_STATELESS = (nnx.RngKey, nnx.RngCount, nnx.Intermediate)
_COLLECTIONS = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}


class Held:
  """An NNX module or layer, hidden from Linen and compared by identity.

  Attributes:
    model: The module.
    transformed: Paths of the layers that it calls inside a transform of NNX
      (jit, remat, scan, vmap), None before the first call. Surgery does not
      treat them as layers: their arrays are variables of the model itself.
  """

  def __init__(self, model: Any):
    self.model = model
    self.transformed: set[tuple[Any, ...]] | None = None

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
  the deviation of the module's own array, scaled to the present number of
  inputs; vectors and constants keep their values.

  Attributes:
    held: The NNX module; its arrays have the shapes and deviations.
  """

  held: Held

  def __call__(self, x: Any, *args: Any, train: bool = False, **kwargs: Any):
    """The module's output; calls the module's `train()` or `eval()` first."""
    for name in inspect.signature(type(self.held.model).__call__).parameters:
      if name in gating.TRAIN_NAMES:
        kwargs[name] = gating.TRAIN_NAMES[name] == train
    if self.held.transformed is None:
      found = set()
      jax.eval_shape(
        lambda: self._find_transformed(found, x, args, kwargs, train)
      )
      self.held.transformed = found
    model = self._copy(train)
    if train and (self.has_rng('dropout') or self.has_rng('params')):
      streams = {
        stream.tag
        for _, stream in nnx.iter_graph(model)
        if isinstance(stream, nnx.RngStream)
      }
      keys: Any = {tag: self.make_rng('dropout') for tag in sorted(streams)}
      nnx.reseed(model, policy='match_shape', **keys)
    own = self._own_variables(model)
    for path, layer in _layers(model, self.held.transformed):
      _replace_calls(layer, functools.partial(self._run, path))
    others = [
      (path, v, v.get_value())
      for path, v in nnx.iter_graph(model)
      if isinstance(v, nnx.Variable)
      and not (_collection(v) or isinstance(v, _STATELESS))
    ]
    out = model(x, *args, **kwargs)
    for path, variable, before in others:
      if variable.get_value() is not before:
        raise errors.UserError(
          f'surgery: the model changes {"/".join(map(str, path))}, a '
          f'{type(variable).__name__}: make it an nnx.BatchStat.'
        )
    _copy_statistics(self.scope, own)
    return out

  def _copy(self, train: bool) -> nnx.Module:
    model = nnx.clone(self.held.model)
    (model.train if train else model.eval)()
    return model

  def _find_transformed(self, found, x, args, kwargs, train: bool) -> None:
    """Adds the layers that NNX copies or changes before it calls them."""
    model = self._copy(train)
    for path, layer in _layers(model):
      arrays = _parameters(layer)

      def run(
        layer, x, *args, path=path, original=layer, arrays=arrays, **kwargs
      ):
        there = _parameters(layer)
        # WeightNorm and the like put other parameters into the layer.
        if layer is not original or any(map(operator.is_not, there, arrays)):
          found.add(path)
        return _original_call(layer)(x, *args, **kwargs)

      _replace_calls(layer, run)
    model(x, *args, **kwargs)

  def _own_variables(self, model: nnx.Module) -> list[tuple[Any, Any]]:
    """Sets variables outside of layers; returns pairs (Linen's, NNX's)."""
    layers = _layers(model, self.held.transformed)
    inside = {id(v) for _, layer in layers for _, v in _variables(layer)}
    return [
      _linked(
        gating.child_scope(self.scope, path[:-1]), path[-1], v, v[...].shape
      )
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
      parent=gating.child_scope(self.scope, path),
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
    linked = [
      _linked(self.scope, name, variable, shapes.get(name, shapes['']))
      for name, variable in _variables(layer)
    ]
    y = _original_call(layer)(x, *args, **kwargs)
    _copy_statistics(self.scope, linked)
    return y


def _describe(module: NnxLayer, x: Any, y: Any) -> dict[str, Any]:
  """The fields of the call's record, as `described` gives them for Linen."""
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


def _replace_calls(layer: Any, run: Callable[..., Any]) -> None:
  """Replaces the calls of a layer by run(layer, x, ...)."""
  kind: Any = type(layer)
  object.__setattr__(layer, 'surgery', run)
  object.__setattr__(layer, '__class__', _class_with_replaced_call(kind))


@functools.cache
def _class_with_replaced_call(cls: type) -> type:
  """A subclass whose instances are called through their field `surgery`."""

  def call(self, x, *args, **kwargs):
    return self.surgery(self, x, *args, **kwargs)

  return type(cls.__name__, (cls,), {'__call__': call})


def _original_call(layer: Any) -> Callable[..., Any]:
  """The call of a layer as it was before `_replace_calls`."""
  return super(type(layer), layer).__call__


def _layers(
  model: nnx.Module, transformed: Iterable[Any] | None = None
) -> list[tuple[tuple[Any, ...], Any]]:
  """(path, layer) of each layer, but for those at paths in `transformed`."""
  return [
    (path, layer)
    for path, layer in nnx.iter_modules(model)
    if isinstance(layer, _LAYERS) and path not in (transformed or ())
  ]


def _collection(node: Any) -> str:
  """The Linen collection of an NNX variable; '' for anything else."""
  return next((c for t, c in _COLLECTIONS.items() if isinstance(node, t)), '')


def _variables(layer: Any) -> list[tuple[str, Any]]:
  """(name, variable) of the parameters and statistics of a layer."""
  return [(name, v) for name, v in vars(layer).items() if _collection(v)]


def _parameters(layer: Any) -> list[Any]:
  variables = [v for _, v in _variables(layer)]
  return [v.get_value() for v in variables if _collection(v) == 'params']


def _linked(scope: Any, name: Any, variable: Any, shape) -> tuple[Any, Any]:
  """(Linen variable, NNX variable), the second set to the value of the first.

  If the Linen variable does not exist, it is drawn with this shape.
  """
  collection, like = _collection(variable), variable[...]

  def draw():
    kept = like[tuple(slice(n) for n in shape)]
    if like.ndim < 2 or collection != 'params':
      return kept
    fans = math.prod(like.shape[:-1]) / math.prod(shape[:-1])
    drawn = jax.random.normal(scope.make_rng('params'), shape, like.dtype)
    drawn = drawn * jnp.std(like) * math.sqrt(fans)
    return jnp.where(jnp.ptp(like) > 0, drawn, kept)

  linen = scope.variable(collection, str(name), draw)
  variable.set_value(jnp.asarray(linen.value))  # Or it is changed in place.
  return linen, variable


def _copy_statistics(scope: Any, linked: Iterable[tuple[Any, Any]]) -> None:
  """Copies statistics that the NNX module has updated to Linen."""
  for linen, variable in linked:
    kind = linen.collection
    if kind != 'params' and scope.is_mutable_collection(kind):
      linen.value = variable[...]


def _resize(
  layer: Any, inputs: int, outputs: int, feature_groups: int
) -> dict[str, tuple[int, ...]]:
  """Sets the sizes of a layer; returns {variable: shape}, '' for vectors."""
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
  flat = {
    (_collection(variable), *map(str, path)): variable[...]
    for path, variable in nnx.iter_graph(model)
    if _collection(variable)
  }
  return flax.traverse_util.unflatten_dict(flat)


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
      training, or `table.slice_variables`). None: those of the first channels
      of each group, which only have the right shapes and must be trained again.

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
    call = small.layers.get('/'.join(map(str, path)))
    if call is not None:
      feature_groups = call.inputs if call.kind == 'depthwise' else call.groups
      sizes = _resize(layer, call.inputs, call.outputs, feature_groups)
      shapes |= {id(v): sizes.get(n, sizes['']) for n, v in _variables(layer)}
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
