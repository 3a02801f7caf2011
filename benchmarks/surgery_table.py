"""What surgery finds in a list of models: the table of docs/own_model.md.

  python -m benchmarks.surgery_table              prints the table
  python -m benchmarks.surgery_table --write      puts it into the document

Each model is traced in evaluation mode on one image; MACs after are those with
half the channels of every group, checked against the gated model (`check`) for
the small ones. Models of packages that are not installed are left out.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import models, surgery
from tests import own_models

DOCUMENT = pathlib.Path(__file__).parents[1] / 'docs' / 'own_model.md'
BEGIN, END = '<!-- table: begin -->', '<!-- table: end -->'


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


def small(name):
  """One of the tests."""
  case = own_models.CASES[name]
  return case.model, {'args': case.further, **case.options}


def table() -> list[tuple[str, int, object]]:
  """(title, side of the images, maker) of each model."""
  rows = [
    ('jax-resnet ResNet18', 64, functools.partial(from_jax_resnet, 'ResNet18')),
    ('jax-resnet ResNet50', 64, functools.partial(from_jax_resnet, 'ResNet50')),
    (
      'jax-resnet ResNeSt50',
      64,
      functools.partial(from_jax_resnet, 'ResNeSt50'),
    ),
    (
      'jax-resnet ResNeXt50',
      64,
      functools.partial(from_jax_resnet, 'ResNeXt50'),
    ),
    ('jax-models ConvMixer', 32, convmixer),
    ('image-classification-jax ResNet', 32, classification),
  ]
  rows += [
    (f'ours: {name}', side, functools.partial(builtin, name))
    for name, side in (
      ('resnet56', 32),
      ('vgg16', 32),
      ('mobilenet_v1', 224),
      ('mobilenet_v2', 224),
      ('resnet50', 224),
    )
  ]
  return rows + [
    (f'tests: {name}', 8, functools.partial(small, name))
    for name in own_models.CASES
  ]


def reasons(sites: surgery.Table) -> str:
  """Why layers were left alone, each kind of reason once, with its number."""
  kinds = collections.Counter()
  for path, reason in sites.left_alone.items():
    if sites.layers[path].kind == 'norm':
      continue  # Those of its producer.
    kind = reason.split(':')[0].split(' in ')[0].split(' between')[0]
    kinds[kind if not kind.startswith('read by') else 'read by such'] += 1
  return '; '.join(f'{n} {kind}' for kind, n in kinds.items())


def row(title: str, side: int, make) -> str:
  """One line of the table."""
  model, options = make()
  args = options.pop('args', ())
  x = np.random.default_rng(0).normal(size=(1, side, side, 3))
  x = jnp.asarray(x, jnp.float32)
  start = time.perf_counter()
  sites = surgery.discover(model, x, *args, **options)
  seconds = time.perf_counter() - start
  checked, before, after = '', '-', '-'
  if sites.groups:
    cost_model = surgery.cost_model(model, sites, x, *args)
    half = [max(1, n // 2) for n in cost_model.widths]
    before = f'{cost_model.macs(cost_model.widths):,}'
    after = f'{cost_model.macs(half):,}'
    if side <= 64:
      error = surgery.check(model, sites, half, jax.device_get(x), args)
      checked = f'{error:.0e}'
  channels = sum(sites.sizes.values())
  return (
    f'| {title} | {len(sites.groups)} ({channels}) | {reasons(sites)} '
    f'| {before} | {after} | {checked} | {seconds:.1f} |'
  )


def main():
  """Prints the table, or writes it into the document."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--write', action='store_true')
  write = parser.parse_args().write
  lines = [
    '| model | groups (channels) | convolutions and dense layers left alone '
    '| MACs | MACs at half | error | seconds |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for title, side, make in table():
    try:
      lines.append(row(title, side, make))
    except ModuleNotFoundError as e:
      print(f'{title}: {e}')
      continue
    print(lines[-1], flush=True)
  if write:
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    body = '\n'.join(lines)
    DOCUMENT.write_text(f'{head}{BEGIN}\n{body}\n{END}{tail}')


if __name__ == '__main__':
  main()
