"""What surgery finds in a list of models: the table of docs/own_model.md.

  python -m benchmarks.surgery_table

Each model is traced in evaluation mode on one image; MACs at half are those
with half the channels of every group, checked against the gated model (`check`)
for the small ones. Models of packages that are not installed are left out.
"""

from __future__ import annotations

import collections
import functools
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import models, surgery


def by_call(module, x, train):
  """jax-resnet's models train where batch_stats are mutable."""
  del train
  return module(x)


def from_jax_resnet(name):
  """A model of jax-resnet 0.0.4."""
  module = importlib.import_module('jax_resnet')
  return getattr(module, name)(n_classes=10), {'call': by_call}


def convmixer():
  """ConvMixer of jax-models 0.0.5."""
  module = importlib.import_module('jax_models.models.conv_mixer')
  model = module.ConvMixer(
    features=64, patch_size=4, num_mixer_layers=4, num_classes=10
  )
  return model, {}


def classification():
  """The ResNet of image-classification-jax 0.1.4."""
  module = importlib.import_module('image_classification_jax.models.resnet')
  model = module.ResNet([3, 4, 6, 3], module.BottleneckResNetBlock, 10)
  return model, {}


def builtin(name):
  """One of the registry, taken as if it were the user's."""
  return models.build(name, 10), {}


def table() -> list[tuple[str, int, object]]:
  """(title, side of the images, maker) of each model."""
  rows = [
    (f'jax-resnet {name}', 64, functools.partial(from_jax_resnet, name))
    for name in ('ResNet18', 'ResNet50', 'ResNeSt50', 'ResNeXt50')
  ]
  rows += [
    ('jax-models ConvMixer', 32, convmixer),
    ('image-classification-jax ResNet', 32, classification),
  ]
  sides = {
    'resnet56': 32,
    'vgg16': 32,
    'mobilenet_v1': 224,
    'mobilenet_v2': 224,
    'resnet50': 224,
  }
  return rows + [
    (f'ours: {name}', side, functools.partial(builtin, name))
    for name, side in sides.items()
  ]


def reasons(sites: surgery.Table) -> str:
  """Why layers were left alone, each kind of reason once, with its number."""
  kinds = collections.Counter()
  for path, reason in sites.left_alone.items():
    if sites.layers[path].kind == 'norm':
      continue  # Those of its producer.
    kind = reason.split(':')[0].split(' in ')[0].split(' between')[0]
    kind = 'read by a layer left alone' if kind[:7] == 'read by' else kind
    kinds[kind] += 1
  return '; '.join(f'{n} {kind}' for kind, n in kinds.items())


def row(title: str, side: int, make) -> str:
  """One line of the table."""
  model, options = make()
  x = np.random.default_rng(0).normal(size=(1, side, side, 3))
  x = jnp.asarray(x, jnp.float32)
  start = time.perf_counter()
  sites = surgery.discover(model, x, **options)
  seconds = time.perf_counter() - start
  checked, before, after = '', '-', '-'
  if sites.groups:
    cost_model = surgery.cost_model(model, sites, x)
    half = [max(1, n // 2) for n in cost_model.widths]
    before = f'{cost_model.macs(cost_model.widths):,}'
    after = f'{cost_model.macs(half):,}'
    if side <= 64:
      error = surgery.check(model, sites, half, jax.device_get(x))
      checked = f'{error:.0e}'
  channels = sum(sites.sizes.values())
  return (
    f'| {title} | {len(sites.groups)} ({channels}) | {reasons(sites)} '
    f'| {before} | {after} | {checked} | {seconds:.1f} |'
  )


def main():
  """Prints the table."""
  print(
    '| model | groups (channels) | convolutions and dense layers left alone '
    '| MACs | MACs at half | error | seconds |'
  )
  print('| --- | --- | --- | --- | --- | --- | --- |')
  for title, side, make in table():
    try:
      print(row(title, side, make), flush=True)
    except ModuleNotFoundError as e:
      print(f'{title}: {e}')


if __name__ == '__main__':
  main()
