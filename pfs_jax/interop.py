"""Weights from PyTorch: the names of the published implementation to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors, models
from pfs_jax.models import vgg

# What a ConvBN of ours holds: (collection, leaf) -> name behind the torch
# prefix of its convolution or its normalisation.
_CONV = {('params', 'conv/kernel'): 'weight'}
_NORM = {
  ('params', 'bn/scale'): 'weight',
  ('params', 'bn/bias'): 'bias',
  ('batch_stats', 'bn/mean'): 'running_mean',
  ('batch_stats', 'bn/var'): 'running_var',
}


def _vgg_names(name: str) -> dict[str, tuple[str, str]]:
  """{our layer: (torch convolution, torch normalisation)}; pools count."""
  names, index, layer = {}, 0, 0
  for depth in vgg.DEPTHS[name]:
    for _ in range(depth):
      prefix = f'feature.{index}'
      names[f'conv{layer}'] = (f'{prefix}.conv', f'{prefix}.bn')
      index, layer = index + 1, layer + 1
    index += 1  # The max pool.
  return names


def _resnet_names(path: str) -> tuple[str, str]:
  """(torch convolution, torch normalisation) of one of our layers."""
  if path == 'stem':
    return 'conv1', 'bn1'
  block, layer = path.split('/')
  stage, number = block.removeprefix('stage').split('_block')
  prefix = f'layer{stage}.{number}'
  if layer == 'shortcut':
    return f'{prefix}.shortcut.0', f'{prefix}.shortcut.1'
  return f'{prefix}.{layer}', f'{prefix}.bn{layer.removeprefix("conv")}'


def _torch_name(name: str) -> Callable[[str], tuple[str, str]]:
  if name in vgg.DEPTHS:
    return _vgg_names(name).__getitem__
  if name.startswith('resnet') and name != 'resnet50':
    return _resnet_names
  raise errors.UserError(f'from_torch does not know the names of {name!r}.')


def _sources(name: str, shapes: Mapping[str, Any]) -> dict[tuple, str]:
  """{(collection, path of ours): torch key} for every leaf of ours."""
  torch_name = _torch_name(name)
  linear = 'classifier' if name in vgg.DEPTHS else 'linear'
  sources = {}
  for collection in ('params', 'batch_stats'):
    flat = flax.traverse_util.flatten_dict(shapes[collection], sep='/')
    for path in flat:
      if path.startswith('classifier/'):
        leaf = 'weight' if path.endswith('kernel') else 'bias'
        sources[collection, path] = f'{linear}.{leaf}'
        continue
      layer, _, leaf = path.rpartition('/')
      layer, _, part = layer.rpartition('/')
      convolution, norm = torch_name(layer)
      key = (collection, f'{part}/{leaf}')
      prefix, names = (convolution, _CONV) if part == 'conv' else (norm, _NORM)
      sources[key[0], path] = f'{prefix}.{names[key]}'
  return sources


def _ours(value: np.ndarray) -> np.ndarray:
  """Torch layout to ours: OIHW -> HWIO, [out, in] -> [in, out]."""
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T


def from_torch(
  name: str,
  arrays: Mapping[str, np.ndarray],
  width: int | None = None,
  counts: tuple[int, ...] | None = None,
) -> dict[str, Any]:
  """Variables of ours from arrays under the published PyTorch names.

  Args:
    name: A model name of the registry.
    arrays: {torch name: array}: convolutions [O, I, H, W], linear layers
      [out, in]. `num_batches_tracked` is ignored. Gates may be there as
      `<normalisation>.gates`, running statistics as `.running_mean` and
      `.running_var`; where they are absent, statistics are 0 and 1.
    width: Base width.
    counts: Channels of the gated layers of a narrow network.

  Returns:
    {'params', 'batch_stats'} and, if the arrays hold gates, 'gates'; each array
    keeps its dtype.

  Raises:
    errors.UserError: Naming every unknown, missing or misshaped key.
  """
  arrays = {
    k: np.asarray(v)
    for k, v in arrays.items()
    if not k.endswith('num_batches_tracked')
  }
  linear = 'classifier' if name in vgg.DEPTHS else 'linear'
  shapes = _shapes(name, arrays, linear, width, counts)
  sources = _sources(name, shapes)
  flat = {
    c: flax.traverse_util.flatten_dict(tree, sep='/')
    for c, tree in shapes.items()
  }
  for path in flat['gates']:
    layer = path.removesuffix('/gate')
    sources['gates', path] = f'{_torch_name(name)(layer)[1]}.gates'
  taken, problems = {}, []
  optional = _absent(arrays, sources)
  for (collection, path), key in sources.items():
    shape = flat[collection][path].shape
    if key not in arrays:
      if collection == 'params' or collection not in optional:
        problems.append(f'missing {key}')
      elif collection == 'batch_stats':
        taken[collection, *path.split('/')] = _default(path, shape, taken)
      continue
    value = _ours(arrays[key])
    if value.shape != shape:
      problems.append(f'{key} has shape {arrays[key].shape}, ours {shape}')
    taken[collection, *path.split('/')] = value
  unknown = sorted(set(arrays) - set(sources.values()))
  problems += [f'unknown {key}' for key in unknown]
  if problems:
    raise errors.UserError(f'from_torch({name!r}): {"; ".join(problems)}.')
  return flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(value) for path, value in taken.items()}
  )


def _shapes(name, arrays, linear, width, counts) -> dict[str, Any]:
  """The shapes of our variables, gated."""
  if f'{linear}.bias' not in arrays:
    raise errors.UserError(f'from_torch({name!r}): missing {linear}.bias.')
  classes = len(arrays[f'{linear}.bias'])
  module = models.build(name, classes, width=width, counts=counts, gated=True)
  first = 'feature.0.conv.weight' if name in vgg.DEPTHS else 'conv1.weight'
  channels = arrays[first].shape[1] if first in arrays else 3
  x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(module.init, key, x)


def _absent(arrays, sources) -> set[str]:
  """Collections of which the arrays hold nothing at all: optional ones."""
  return {
    collection
    for collection in ('batch_stats', 'gates')
    if not any(
      key in arrays for (c, _), key in sources.items() if c == collection
    )
  }


def _default(path: str, shape, taken) -> np.ndarray:
  """Running statistics of a fresh network, in the dtype of the weights."""
  dtype = next(iter(taken.values())).dtype
  return np.full(shape, 1 if path.endswith('var') else 0, dtype)
