"""Data of your own: class folders, a .npz file, or a function; docs/data.md.

All three become arrays in memory. The training images are shuffled once, by a
fixed permutation, so that the last ones can be held out as a random sample.
"""

import contextlib
import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pfs_jax import errors, storage, user_code
from pfs_jax.data import arrays, decoding, listing, loading, specs

MAX_BYTES = 4 << 30  # For all arrays; larger folders can be streamed.
_NAMES = ('images', 'labels', 'test_images', 'test_labels')


def configured(fields: Any) -> specs.Spec:
  """The facts of the data of `config.data`; decodes no image of a folder."""
  if fields.factory or fields.name == 'npz':
    return _array_dataset(fields).spec
  return _listed(fields)[0]


def load(fields: Any, workdir: pathlib.Path) -> arrays.Dataset:
  """Reads the data of `config.data`, training images in a fixed random order.

  The workdir keeps the SHA-256 of the arrays, in data/identity.json.

  Raises:
    errors.UserError: The data are missing or wrong, or the workdir was begun
      with other data.
  """
  if fields.factory or fields.name == 'npz':
    found = _array_dataset(fields)
  else:
    spec, *splits = _listed(fields)
    train, test = (_decoded(s, spec.image_size, fields) for s in splits)
    found = arrays.Dataset(*train, *test, spec)
  check_identity(
    workdir / 'data' / 'identity.json',
    f'the data ({found.spec.name})',
    identity(found),
  )
  order = np.random.default_rng(0).permutation(len(found.train_labels))
  return dataclasses.replace(
    found,
    train_images=found.train_images[order],
    train_labels=found.train_labels[order],
  ).first(fields.train_examples)


class OtherData(errors.UserError):
  """The data are not those with which the work was begun."""


def identity(found: arrays.Dataset) -> dict[str, Any]:
  """What no later use of the data may change."""
  images = [found.train_images, found.train_labels]
  images += [found.test_images, found.test_labels]
  return {
    'sha256': storage.checksum(images),
    'image_size': found.spec.image_size,
    'class_names': list(found.spec.class_names),
  }


def check_identity(path: pathlib.Path, what: str, known: Any) -> None:
  """Notes the identity of data in a file, or compares it with the file.

  Raises:
    OtherData: The data differ.
  """
  if not path.exists():
    with contextlib.suppress(errors.UserError):  # A folder that is read only.
      storage.write_json(path, known)
    return
  there = storage.read_json(path, dict[str, Any])
  if any(there.get(name, value) != value for name, value in known.items()):
    raise OtherData(
      f'{what} are not those that {path} knows: an image, a label or a class '
      'differs.\nPut the former data back, or give another --workdir.'
    )


# Arrays.


def _array_dataset(fields: Any) -> arrays.Dataset:
  """The arrays of a function or a .npz file, checked."""
  sizes = fields.image_size, fields.num_classes
  if fields.factory:
    return _from_factory(fields.factory, *sizes)
  path = storage.expanded(fields.source_dir)
  changed = path.stat().st_mtime_ns if path.is_file() else 0
  return _from_npz(path, changed, *sizes)


@functools.lru_cache(maxsize=1)
def _from_factory(factory: str, *sizes: int) -> arrays.Dataset:
  call = user_code.imported('data.factory', factory)
  with user_code.blamed('data.factory', factory):
    found = call()
    where = f'config.data.factory={factory}'
    _require(
      where,
      isinstance(found, Mapping),
      f'must return a dict of arrays ({", ".join(_NAMES)})',
      type(found).__name__,
    )
    return _checked(found, where, factory, *sizes)


@functools.lru_cache(maxsize=1)
def _from_npz(path: pathlib.Path, changed: int, *sizes: int) -> arrays.Dataset:
  """The arrays of a file, read again when it has `changed`."""
  where = f'config.data.source_dir={path}'
  # Reading it would wait for ever.
  _require(where, not path.is_fifo(), 'must be a .npz file', 'a pipe')
  try:
    with zipfile.ZipFile(path) as file:
      size = sum(member.file_size for member in file.infolist())
  except Exception as e:  # zipfile raises many types of errors.
    raise errors.UserError(
      f'{where} must be a .npz file ({loading.reason(e)}).'
    ) from e
  most = f'must hold at most {MAX_BYTES:,} bytes'
  _require(where, size <= MAX_BYTES, most, f'{size:,}')
  return _checked(storage.read_arrays(path), where, 'npz', *sizes)


def _require(where: str, holds: Any, rule: str, got: Any) -> None:
  if not holds:
    raise errors.UserError(f'{where}: {rule}; got {got}.')


def _checked(
  found: Mapping[str, Any],
  where: str,
  name: str,
  image_size: int,
  num_classes: int,
) -> arrays.Dataset:
  """The data set with these arrays; an error names the rule that they break."""
  require = functools.partial(_require, where)
  require(
    set(_NAMES) <= set(found) <= {*_NAMES, 'class_names'},
    f'the arrays must be {", ".join(_NAMES)} and, if wanted, class_names',
    ', '.join(map(str, found)) or 'none',
  )
  pairs = []
  for split in ('', 'test_'):
    images = np.asarray(found[f'{split}images'])
    labels = np.asarray(found[f'{split}labels'])
    require(
      images.dtype == np.uint8 and images.ndim in (3, 4) and images.size,
      f'{split}images must be uint8 [N, H, W] or [N, H, W, C], 0..255',
      f'{images.dtype} {images.shape}',
    )
    is_square = images.shape[1] == images.shape[2]
    require(is_square, f'{split}images must be squares', images.shape)
    require(
      labels.dtype.kind in 'iu' and labels.shape == images.shape[:1],
      f'{split}labels must be {len(images)} integers, one for each image',
      f'{labels.dtype} {labels.shape}',
    )
    pairs.append((images.reshape(*images.shape[:3], -1), labels))
  (images, labels), (test_images, test_labels) = pairs
  shape, test_shape = images.shape[1:], test_images.shape[1:]
  rule = f'test_images must be {list(shape)} as images are'
  require(test_shape == shape, rule, list(test_shape))
  rule = f'config.data.image_size must be 0 or {shape[0]}'
  require(image_size in (0, shape[0]), rule, image_size)
  classes = num_classes or int(labels.max()) + 1
  require(2 <= classes <= 2**20, 'there must be 2 to 2**20 classes', classes)
  for split, values in (('', labels), ('test_', test_labels)):
    low, high = values.min(), values.max()
    rule = f'{split}labels must be in 0..{classes - 1}'
    require(0 <= low and high < classes, rule, f'{low}..{high}')
  absent = np.setdiff1d(np.arange(min(classes, len(labels) + 1)), labels)
  require(
    num_classes or not len(absent),
    'every class must have a training image (or set config.data.num_classes)',
    f'none of class {", ".join(map(str, absent[:5]))}',
  )
  texts = tuple(map(str, np.ravel(found.get('class_names', range(classes)))))
  require(len(texts) == classes, f'class_names must be {classes}', len(texts))
  counts = len(labels), len(test_labels)
  spec = specs.described(name, shape[0], texts, counts, _moments(images))
  labels, test_labels = (v.astype(np.int32) for v in (labels, test_labels))
  return arrays.Dataset(images, labels, test_images, test_labels, spec)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and deviation of each channel of pixels in 0..1, to 4 digits."""
  values, found = np.arange(256) / 255, []
  for channel in np.moveaxis(images, -1, 0):
    counts = np.bincount(channel.ravel(), minlength=256)
    mean = np.average(values, weights=counts)
    deviation = np.average((values - mean) ** 2, weights=counts) ** 0.5
    found.append((round(mean, 4), round(max(deviation, 1 / 255), 4)))
  means, deviations = zip(*found, strict=True)
  return tuple(map(float, means)), tuple(map(float, deviations))


# Folders.


def _listed(fields: Any) -> tuple[specs.Spec, listing.Folder, listing.Folder]:
  """The facts of a folder, its training images, and its test images."""
  if not fields.source_dir:
    raise errors.UserError(
      'config.data.source_dir must be a folder of class folders for '
      'config.data.name=folder; got nothing.'
    )
  train, test = _splits(storage.expanded(fields.source_dir))
  size, classes = fields.image_size or _first_size(train), train.classes
  if fields.num_classes not in (0, len(classes)):
    raise errors.UserError(
      f'config.data.num_classes must be 0 or {len(classes)}, the number of '
      f'class folders in {train.root}; got {fields.num_classes}.'
    )
  counts = len(train), len(test)
  need = sum(counts) * size**2 * 3
  if need > MAX_BYTES:
    raise errors.UserError(
      f'{sum(counts)} images of config.data.image_size={size} must take at '
      f'most {MAX_BYTES:,} bytes in memory; got {need:,}.\n'
      'config.data.name=imagenet2012 streams large folders: see '
      'docs/imagenet.md.'
    )
  moments = specs.IMAGENET_MOMENTS  # Customary for photographs.
  spec = specs.described('folder', size, classes, counts, moments)
  return spec, train, test


def _splits(root: pathlib.Path) -> tuple[listing.Folder, listing.Folder]:
  """The images of train/ and test/ (or val/), or a split of one folder.

  The split takes a fifth of each class for the test: the images whose file
  names have the least SHA-256.
  """
  tests = [name for name in ('test', 'val') if (root / name).is_dir()]
  if (root / 'train').is_dir() and tests:
    return listing.scan_pair(root, 'train', tests[0])
  every = listing.scan(root)
  counts = np.bincount(every.labels)
  if counts.min() < 2:
    raise errors.UserError(
      'config.data.source_dir must hold at least 2 images of every class '
      f'where it has no train/ and test/; {root} has 1 of '
      f'{every.classes[int(counts.argmin())]}.'
    )
  per_class = np.maximum(1, counts // 5)
  is_test = listing.held_out(every.names, every.labels, per_class)
  return every.subset(~is_test), every.subset(is_test)


def _first_size(train: listing.Folder) -> int:
  """The shorter side of the first image of the first class."""
  try:
    return min(decoding.size(train.read(0)[0]))
  except Exception as e:  # Pillow raises many types of errors.
    raise errors.UserError(
      f'{train.where(0)} cannot be decoded ({loading.reason(e)}), and '
      'config.data.image_size is 0 (the size of the first image).'
    ) from e


def _decoded(
  images: listing.Folder, size: int, fields: Any
) -> tuple[np.ndarray, np.ndarray]:
  """(pixels, labels) of all images, without those that are skipped."""
  n = len(images)
  rows, skip = np.arange(min(n, 64)), fields.corrupt == 'skip'
  batches = loading.Batches(
    images, np.arange(n), len(rows), rows, size, skip=skip, keep=1.0
  )
  pixels = np.empty((n, size, size, 3), np.uint8)
  labels: list[int] = []
  with loading.Reader(batches, fields.workers) as reader:
    for step in range(len(batches)):
      batch = reader.batch(step)
      good = batch['weights'] > 0
      pixels[len(labels) : len(labels) + good.sum()] = batch['pixels'][good]
      labels += batch['labels'][good].tolist()
  absent = set(range(len(images.classes))).difference(labels)
  if absent:
    folder = pathlib.Path(images.root) / images.classes[min(absent)]
    raise errors.UserError(f'no image in {folder} can be decoded.')
  return pixels[: len(labels)], np.array(labels, np.int32)
