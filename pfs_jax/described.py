"""Describes the layers of Flax, and layers that a user registers.

A rule takes a bound layer, its input and its output, and returns the fields of
`costs.Layer` that describe the call.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from pfs_jax import errors


def convolution(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a convolution's record."""
  kernel = tuple(np.atleast_1d(module.kernel_size).tolist())
  strides = getattr(module, 'strides', None) or 1  # One, or one for each axis.
  groups = getattr(module, 'feature_group_count', 1)
  depthwise = groups > 1 and groups == x.shape[-1]
  space = y.shape[-1 - len(kernel) : -1]
  return {
    'kind': 'depthwise' if depthwise else 'conv',
    'obstacle': '' if depthwise or groups == 1 else 'a grouped convolution',
    'positions': math.prod(space),
    'groups': groups,
    'vectors': _vectors(module, y.shape[-1]),
    'output_size': space,
    'input_size': x.shape[-1 - len(kernel) : -1],
    'kernel': kernel,
    'strides': tuple(np.broadcast_to(strides, len(kernel)).tolist()),
  }


def _own_convolution(module: Any, x: Any, y: Any) -> dict[str, Any]:
  fields = convolution(module, x, y)
  params = jax.tree.leaves(module.variables.get('params', {}))
  if fields['kernel'] not in [leaf.shape[:-2] for leaf in params]:
    raise errors.UserError(
      f'{type(module).__name__}.kernel_size must have a number for each '
      f'axis of its kernel [..., inputs, outputs]; got {module.kernel_size}.'
    )
  return fields


def transposed(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a transposed convolution's record."""
  fields = convolution(module, x, y)
  fields['positions'] = math.prod(fields['input_size'])
  # Timed as a convolution with as many operations.
  fields['strides'] = (1,) * len(fields['kernel'])
  return {**fields, 'transposed': module.transpose_kernel}


def dense(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a dense layer's record."""
  del x
  space = y.shape[1:-1]  # On a feature map it is applied at each position.
  return {
    'kind': 'dense',
    'positions': math.prod(space),
    'vectors': _vectors(module, y.shape[-1]),
    'output_size': space,
  }


def norm(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a normalisation's record."""
  channels, obstacle, joint = x.shape[-1], '', False
  axes = getattr(module, 'axis', getattr(module, 'feature_axes', -1))
  if np.any(np.atleast_1d(axes) % x.ndim != x.ndim - 1):
    obstacle = 'its channels are not on the last axis'
  elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
    joint = True
  elif hasattr(module, 'num_groups'):
    size = getattr(module, 'group_size', 0) or channels // (
      module.num_groups or 1
    )
    if size != 1:
      obstacle = f'it normalises {size} neighbouring channels together'
  return {
    'kind': 'norm',
    'obstacle': obstacle,
    'joint': joint,
    'groups': getattr(module, 'num_groups', None) or 1,
    'positions': math.prod(y.shape[1:-1]),
    'vectors': _vectors(module, y.shape[-1]),
  }


def _vectors(module: nn.Module, channels: int) -> int:
  """How many parameters of a bound layer are vectors over its channels."""
  params = module.variables.get('params', {})
  return sum(leaf.shape == (channels,) for leaf in jax.tree.leaves(params))


def pool(module: nn.Module, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a pooling's record, whose inputs count as MACs."""
  del module, y
  return {'kind': 'pool', 'positions': math.prod(x.shape[1:-1])}


# {class of layers: its rule}. If several classes fit, the last one counts.
_RULES: dict[type, Callable[..., dict[str, Any]]] = {
  nn.ConvTranspose: transposed,
  nn.Conv: convolution,
  nn.Dense: dense,
  nn.BatchNorm: norm,
  nn.LayerNorm: norm,
  nn.RMSNorm: norm,
  nn.InstanceNorm: norm,
  nn.GroupNorm: norm,
}


def register_norm(cls: type[nn.Module]) -> None:
  """Registers a class of the user's own as a BatchNorm.

  Subclasses of Flax's normalisations, and classes that call them, do not need
  it. The class must normalise each channel of the last axis separately, and
  hold its parameters and statistics itself, as vectors [C].
  """
  register(cls, norm)


def register_conv(cls: type[nn.Module]) -> None:
  """Registers a class of the user's own as a convolution.

  Subclasses of `nn.Conv`, and classes that call it, do not need it. The class
  must have the fields `features` (the number of outputs, which narrowing sets)
  and `kernel_size` (one number for each axis of space), and a kernel [...,
  inputs, outputs].

  Raises:
    errors.UserError: A field is missing, or as for `register`.
  """
  register(cls, _own_convolution, 'features', 'kernel_size')


def register(
  cls: type[nn.Module], rule: Callable[..., dict[str, Any]], *needed: str
) -> None:
  """Registers a class of Linen modules that have the needed fields.

  `rule` maps (module, x, y) to the fields of `Layer` that describe the call
  y = module(x).
  """
  if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
    raise errors.UserError(f'{cls!r} must be a class of flax.linen.Module.')
  missing = set(needed).difference(f.name for f in dataclasses.fields(cls))
  if missing:
    raise errors.UserError(
      f'{cls.__name__} must have the fields {" and ".join(needed)} to be a '
      f'convolution; it has no {" and no ".join(sorted(missing))}.'
    )
  _RULES[cls] = rule


def rule(module: nn.Module) -> Callable[..., dict[str, Any]] | None:
  """The rule that describes a call of this module; None if it is no layer."""
  for cls in reversed(_RULES):  # The user's classes come first.
    if isinstance(module, cls):
      return _RULES[cls]
  if isinstance(module, nn.DenseGeneral):
    plain = isinstance(module.features, int) and not module.batch_dims
    return dense if plain and module.axis in (-1, (-1,)) else None
  return pool if getattr(type(module), 'macs_per_input', 0) else None
