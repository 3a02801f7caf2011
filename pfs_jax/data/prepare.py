"""MNIST, Fashion-MNIST and CIFAR as arrays, made once and kept in one file.

`data_dir`/NAME/pfs_jax_uint8.npz holds the arrays, with a checksum; every later
start reads this file alone. If it is absent or damaged, it is made from the
files that TFDS has prepared in `data_dir`, or else from the original files.
Both give TFDS's order: by the MD5 of split and original index, the same on
every machine, with classes well mixed.
"""

import functools
import hashlib
import io
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pfs_jax import console, errors, storage
from pfs_jax.data import archives, records, specs, upstream

_CACHE = 'pfs_jax_uint8.npz'

Arrays = dict[str, np.ndarray]


def load(
  spec: specs.Spec, data_dir: str, source_dir: str, download: bool
) -> Arrays:
  """The arrays of `arrays.Dataset` by name; see `arrays.load`.

  Raises:
    errors.UserError: The data are missing or wrong.
  """
  root = records.directory(data_dir)
  cache = root / spec.name / _CACHE
  check = functools.partial(_check, spec)
  arrays = read_cached(cache, check)
  if arrays is not None:
    return arrays
  busy = f'{spec.name}: another process prepares data in {root}; waiting'
  # Some network file systems have no locks. There, two processes may both do
  # the work; since the write is atomic, the file is still complete.
  with storage.locked(root, wait=lambda: console.note(busy)):
    arrays = read_cached(cache, check)  # Another process may have been first.
    if arrays is None:
      arrays = _build(spec, root, source_dir, download)
      try:
        storage.write_arrays(cache, arrays, sealed=True)
      except errors.UserError as e:
        # Prepared data may well lie in a shared directory that is read-only.
        console.note(f'{spec.name}: decoded, but not saved: {e}')
  return arrays


def read_cached(
  path: pathlib.Path, check: Callable[[Arrays], None]
) -> Arrays | None:
  """Sealed arrays that can be made again; None if there are none.

  A file that is damaged or was changed counts as none, and is named on stderr.

  `check` raises `ValueError` or `KeyError` if the arrays are the wrong ones.
  """
  if not path.exists():
    return None
  try:
    arrays = storage.read_arrays(path)
    check(arrays)
    return arrays
  except errors.UserError as e:
    reason = str(e).splitlines()[0]
  except (KeyError, ValueError) as e:
    reason = f'{path} is damaged ({e}).'
  console.note(f'{reason} Making it again.')
  return None


def _check(spec: specs.Spec, arrays: Arrays) -> None:
  """Raises ValueError unless the arrays fit the data set."""
  wanted: dict[str, tuple] = {}
  counts = {'train': spec.train_examples, 'test': spec.test_examples}
  size = (spec.image_size, spec.image_size, spec.channels)
  for split, count in counts.items():
    wanted[f'{split}_images'] = (np.dtype(np.uint8), (count, *size))
    wanted[f'{split}_labels'] = (np.dtype(np.int32), (count,))
  found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
  if found != wanted:
    name = min(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))
    raise ValueError(f'{name} is {found.get(name)}, not {wanted.get(name)}')
  for name in ('train_labels', 'test_labels'):
    if not 0 <= arrays[name].min() <= arrays[name].max() < spec.num_classes:
      raise ValueError(f'{name} are not in 0..{spec.num_classes - 1}')


def _build(
  spec: specs.Spec, root: pathlib.Path, source_dir: str, download: bool
) -> Arrays:
  """The arrays from TFDS's prepared files, or from the original files."""
  builder = records.find(spec.name, root)
  if builder is not None:
    with records.reading(spec.name, builder.data_path):
      arrays = {**_decoded(builder, 'train'), **_decoded(builder, 'test')}
      _check(spec, arrays)
    return arrays
  arrays = {}
  files = _original_files(spec.name, root, source_dir, download)
  for split, (images, labels) in archives.parse(spec.name, files).items():
    order = tfds_order(split, len(labels))
    arrays[f'{split}_images'] = images[order]
    arrays[f'{split}_labels'] = labels[order]
  _check(spec, arrays)
  return arrays


def _decoded(builder: Any, split: str) -> Arrays:
  """A split that TFDS has prepared, in its order."""
  images, labels = [], []
  for png, label, _ in records.Records(builder, split):
    with Image.open(io.BytesIO(png), formats=['PNG']) as image:
      images.append(np.asarray(image).reshape(*image.size[::-1], -1))
    labels.append(label)
  return {
    f'{split}_images': np.stack(images),
    f'{split}_labels': np.array(labels, np.int32),
  }


def tfds_order(split: str, count: int) -> list[int]:
  """Original indices in the order in which TFDS keeps a split.

  TFDS sorts by the MD5 of the split's name followed by the example's key, here
  its index.

  >>> tfds_order('test', 5)
  [1, 4, 3, 2, 0]
  """
  digest = functools.partial(hashlib.md5, usedforsecurity=False)
  keys = [digest(f'{split}{i}'.encode()).digest() for i in range(count)]
  return sorted(range(count), key=keys.__getitem__)


def _original_files(
  name: str, root: pathlib.Path, source_dir: str, download: bool
) -> dict[str, bytes]:
  if source_dir:
    return upstream.from_folder(name, source_dir)
  why = 'config.data.download is False'
  if download:
    try:
      return upstream.download(name)
    except upstream.Unreachable as e:
      why = f'the download failed: {e}'
  names = ', '.join(file.name for file in upstream.expected(name))
  debian = (
    f', e.g. {upstream.DEBIAN_FASHION} after `apt-get install '
    f'dataset-fashion-mnist`'
    if name == 'fashion_mnist'
    else ''
  )
  raise errors.UserError(
    f'{name} is not prepared in {root}, and {why}.\n'
    f'Allow the download (config.data.download=True), or give '
    f'config.data.data_dir (a directory prepared by TFDS)\n'
    f'or config.data.source_dir (a directory with {names}{debian}).'
  )
