"""Weights from PyTorch, under the names of the published implementation."""

import itertools
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors, models
from pfs_jax.models import vgg

# {our leaf of a ConvBN or linear layer: torch name behind the layer's prefix}.
_LEAVES = {
  'conv/kernel': 'weight',
  'bn/scale': 'weight',
  'bn/bias': 'bias',
  'bn/mean': 'running_mean',
  'bn/var': 'running_var',
  'gate': 'gates',
  'kernel': 'weight',
  'bias': 'bias',
}


def _prefixes(name: str, layer: str) -> tuple[str, str]:
  """(torch convolution, torch normalisation) of one of our layers."""
  if name in vgg.DEPTHS:
    index = int(layer.removeprefix('conv'))
    ends = itertools.accumulate(vgg.DEPTHS[name])
    index += sum(index >= end for end in ends)  # Max pools count, too.
    prefix = f'feature.{index}'
    return f'{prefix}.conv', f'{prefix}.bn'
  if layer == 'stem':
    return 'conv1', 'bn1'
  block, part = layer.split('/')
  stage, number = block.removeprefix('stage').split('_block')
  prefix = f'layer{stage}.{number}'
  if part == 'shortcut':
    return f'{prefix}.shortcut.0', f'{prefix}.shortcut.1'
  return f'{prefix}.{part}', f'{prefix}.bn{part.removeprefix("conv")}'


def _torch_key(name: str, linear: str, path: str) -> str:
  """The torch key of one of our leaves, such as `stem/bn/scale`."""
  layer, _, leaf = path.rpartition('/')
  if layer == 'classifier':
    return f'{linear}.{_LEAVES[leaf]}'
  part = 'gate'
  if leaf != part:
    layer, _, part = layer.rpartition('/')
    leaf = f'{part}/{leaf}'
  convolution, norm = _prefixes(name, layer)
  return f'{convolution if part == "conv" else norm}.{_LEAVES[leaf]}'


def from_torch(
  name: str,
  arrays: Mapping[str, np.ndarray],
  width: int | None = None,
  counts: tuple[int, ...] | None = None,
) -> dict[str, Any]:
  """Our variables, from arrays with the published PyTorch names.

  Args:
    name: A VGG of the registry, or one of its ResNets for CIFAR.
    arrays: {torch name: array}: convolutions [O, I, H, W], linear layers
      [out, in]. `num_batches_tracked` is ignored. Gates may be there as
      `<normalisation>.gates`, running statistics as `.running_mean` and
      `.running_var`; without these, means are 0 and variances 1.
    width: Base width.
    counts: Channels of the gated layers of a narrow network.

  Returns:
    {'params', 'batch_stats'} and, if the arrays hold gates, 'gates'; each array
    keeps its dtype (float64 only if JAX's x64 mode is on).

  Raises:
    errors.UserError: It names all keys that are unknown, missing or misshapen.
  """
  arrays = {
    k: np.asarray(v)
    for k, v in arrays.items()
    if not k.endswith('num_batches_tracked')
  }
  if name in vgg.DEPTHS:
    first, linear = 'feature.0.conv', 'classifier'
  elif name.startswith('resnet') and name != 'resnet50':
    first, linear = 'conv1', 'linear'
  else:
    raise errors.UserError(f'from_torch does not know the names of {name!r}.')
  if f'{linear}.bias' not in arrays:
    raise errors.UserError(f'from_torch({name!r}): missing {linear}.bias.')
  bias = arrays[f'{linear}.bias']
  kernel = arrays.get(f'{first}.weight', np.empty(0))
  channels = kernel.shape[1] if kernel.ndim == 4 else 3
  module = models.build(name, bias.size, width=width, counts=counts, gated=True)
  x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
  flat = flax.traverse_util.flatten_dict(shapes)
  keys = {p: _torch_key(name, linear, '/'.join(p[1:])) for p in flat}
  # All statistics, or all gates, may be absent, but not only some of them.
  held = {path[0] for path, key in keys.items() if key in arrays} | {'params'}
  found, problems = {}, []
  for path, key in keys.items():
    shape = flat[path].shape
    if key in arrays:
      # OIHW -> HWIO, [out, in] -> [in, out].
      found[path] = arrays[key].T
      if arrays[key].ndim == 4:
        found[path] = arrays[key].transpose(2, 3, 1, 0)
      if found[path].shape != shape:
        problems.append(f'{key} has shape {arrays[key].shape}, ours {shape}')
    elif path[0] in held:
      problems.append(f'missing {key}')
    elif path[0] == 'batch_stats':
      found[path] = np.full(shape, 1 if path[-1] == 'var' else 0, bias.dtype)
  unknown = sorted(set(arrays) - set(keys.values()))
  problems += [f'unknown {key}' for key in unknown]
  if problems:
    raise errors.UserError(f'from_torch({name!r}): {"; ".join(problems)}.')
  return flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(value) for path, value in found.items()}
  )
