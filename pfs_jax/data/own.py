"""Data of your own: class folders, a .npz file, or a function.

See docs/data.md. All three become arrays in memory. Their order is shuffled
once, by a fixed permutation, so that the last training images are a fair sample
to hold out.
"""

from __future__ import annotations

import functools
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pfs_jax import errors, storage, user_code
from pfs_jax.data import arrays, decoding, listing, loading, specs

MAX_BYTES = 4 << 30  # Of all arrays in memory; larger folders can be streamed.
_NAMES = ('images', 'labels', 'test_images', 'test_labels')
_TEST_SHARE = 5  # Without test/, every fifth image of a class is for the test.
# ImageNet's mean and deviation, customary for photographs.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_own(fields: Any) -> bool:
  """Whether `config.data` asks for data of the user's own."""
  return bool(fields.factory) or fields.name in specs.OWN


def configured(fields: Any) -> specs.Spec:
  """The facts of the data; class folders are listed, other data are read.

  Args:
    fields: `config.data`.

  Raises:
    errors.UserError: The data are missing, or not what they should be.
  """
  if fields.factory or fields.name == 'npz':
    return load(fields).spec
  return _Folders(fields).spec


def load(fields: Any) -> arrays.Dataset:
  """Reads the data.

  Args:
    fields: `config.data`.

  Returns:
    The `Dataset`, its training images in a fixed random order.

  Raises:
    errors.UserError: The data are missing, or not what they should be.
  """
  sizes = fields.image_size, fields.num_classes
  if fields.factory:
    found = _called(fields.factory, *sizes)
  elif fields.name == 'npz':
    path = pathlib.Path(fields.source_dir).expanduser()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    found = _read(str(path), changed, *sizes)
  else:
    found = _Folders(fields).load()
  order = np.random.default_rng(0).permutation(len(found.train_labels))
  return arrays.Dataset(
    found.train_images[order],
    found.train_labels[order],
    found.test_images,
    found.test_labels,
    found.spec,
  )


def claim(workdir: pathlib.Path, dataset: arrays.Dataset) -> None:
  """Binds a workdir to these data: other pixels or labels are refused.

  Args:
    workdir: Keeps their SHA-256, in data/identity.json.
    dataset: All of the data.

  Raises:
    errors.UserError: The workdir was begun with other data.
  """
  found = {
    name: getattr(dataset, name)
    for name in ('train_images', 'train_labels', 'test_images', 'test_labels')
  }
  # The values and their order; shapes follow from the spec.
  known = {
    'sha256': storage.checksum(found),
    'image_size': dataset.spec.image_size,
    'class_names': list(dataset.spec.class_names),
  }
  path = workdir / 'data' / 'identity.json'
  if not path.exists():
    storage.write_json(path, known)
  elif storage.read_json(path) != known:
    raise errors.UserError(
      f'the data ({dataset.spec.name}) are not those that {workdir} was begun '
      'with: an image, a label or a class differs.\n'
      'Put the former data back, or give another --workdir.'
    )


# Arrays.


@functools.lru_cache(maxsize=1)
def _called(factory: str, image_size: int, num_classes: int) -> arrays.Dataset:
  call = user_code.imported('data.factory', factory)
  with user_code.blamed('data.factory', factory):
    found = call()
  if not isinstance(found, Mapping):
    raise errors.UserError(
      f'config.data.factory={factory}: must return a dict of arrays '
      f'({", ".join(_NAMES)}); got {type(found).__name__}.'
    )
  where = f'config.data.factory={factory}'
  return _checked(found, where, factory, image_size, num_classes)


@functools.lru_cache(maxsize=1)
def _read(
  path: str, changed: int, image_size: int, num_classes: int
) -> arrays.Dataset:
  """The data of a .npz file; `changed` is when, so that a new file is read."""
  where = f'config.data.source_dir={path}'
  try:
    with zipfile.ZipFile(path) as file:
      size = sum(member.file_size for member in file.infolist())
  except (OSError, zipfile.BadZipFile) as e:
    raise errors.UserError(
      f'{where} must be a .npz file ({loading.reason(e)}).'
    ) from e
  if size > MAX_BYTES:
    raise errors.UserError(
      f'{where} must hold at most {MAX_BYTES >> 30} GiB; it has '
      f'{size / 2**30:.1f}.'
    )
  found = storage.read_arrays(pathlib.Path(path))
  return _checked(found, where, 'npz', image_size, num_classes)


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
  """The data set of arrays by name; a broken rule is named."""
  require = functools.partial(_require, where)
  require(
    set(_NAMES) <= set(found) <= {*_NAMES, 'class_names'},
    f'the arrays must be {", ".join(_NAMES)} and, if wanted, class_names',
    ', '.join(map(str, found)) or 'none',
  )
  images, labels = _pair(found, '', require)
  test_images, test_labels = _pair(found, 'test_', require)
  shape = images.shape[1:]
  require(
    test_images.shape[1:] == shape,
    f'test_images must be {list(shape)} as images are',
    list(test_images.shape[1:]),
  )
  require(
    image_size in (0, shape[0]),
    f'config.data.image_size must be 0 or {shape[0]}',
    image_size,
  )
  classes = num_classes or int(labels.max()) + 1
  for split, values in (('', labels), ('test_', test_labels)):
    require(
      0 <= values.min() and values.max() < classes,
      f'{split}labels must be in 0..{classes - 1}',
      f'{values.min()}..{values.max()}',
    )
  absent = np.setdiff1d(np.arange(classes), labels)
  require(
    num_classes or not len(absent),
    'every class must have a training image (or set config.data.num_classes)',
    f'none of class {", ".join(map(str, absent[:5]))}',
  )
  texts = tuple(map(str, np.asarray(found.get('class_names', range(classes)))))
  require(len(texts) == classes, f'class_names must be {classes}', len(texts))
  counts = len(labels), len(test_labels)
  return arrays.Dataset(
    *(images, labels.astype(np.int32)),
    *(test_images, test_labels.astype(np.int32)),
    _spec(name, shape, texts, counts, _moments(images)),
  )


def _pair(
  found: Mapping[str, Any], split: str, require: Callable[..., None]
) -> arrays.Pair:
  """(images [N, H, H, C], labels [N]) of one split, of the right types."""
  images = np.asarray(found[f'{split}images'])
  labels = np.asarray(found[f'{split}labels'])
  require(
    images.dtype == np.uint8 and images.ndim in (3, 4) and images.size,
    f'{split}images must be uint8 [N, H, W] or [N, H, W, C], 0..255',
    f'{images.dtype} {images.shape}',
  )
  require(
    images.shape[1] == images.shape[2],
    f'{split}images must be squares',
    images.shape,
  )
  require(
    labels.dtype.kind in 'iu' and labels.shape == images.shape[:1],
    f'{split}labels must be {len(images)} integers, one for each image',
    f'{labels.dtype} {labels.shape}',
  )
  return images.reshape(*images.shape[:3], -1), labels


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], ...]:
  """Mean and deviation of each channel of pixels in 0..1, to 4 digits."""
  means, deviations = [], []
  values = np.arange(256) / 255
  for channel in range(images.shape[-1]):
    counts = np.bincount(images[..., channel].ravel(), minlength=256)
    mean = np.average(values, weights=counts)
    deviation = np.average((values - mean) ** 2, weights=counts) ** 0.5
    means.append(round(float(mean), 4))
    deviations.append(round(max(float(deviation), 1 / 255), 4))
  return tuple(means), tuple(deviations)


def _spec(
  name: str,
  shape: tuple[int, ...],
  class_names: tuple[str, ...],
  counts: tuple[int, int],
  moments: tuple[tuple[float, ...], ...],
) -> specs.Spec:
  mean, std = moments
  return specs.Spec(
    name=name,
    image_size=shape[0],
    channels=shape[-1],
    num_classes=len(class_names),
    mean=mean,
    std=std,
    flip=True,  # config.data.flip=False turns it off.
    crop_padding=shape[0] // 8,  # As for CIFAR: 4 of 32 pixels.
    class_names=class_names,
    train_examples=counts[0],
    test_examples=counts[1],
  )


# Folders.


class _Folders:
  """Class folders in train/ and test/ (or val/), or in one folder.

  One folder is split by file name: of each class, a fifth of the images, those
  whose names have the least SHA-256, are test images.
  """

  def __init__(self, fields: Any):
    self._skip = fields.corrupt == 'skip'
    self._workers = fields.workers
    if not fields.source_dir:
      raise errors.UserError(
        'config.data.source_dir must be a folder of class folders for '
        'config.data.name=folder; got nothing.'
      )
    root = pathlib.Path(fields.source_dir).expanduser()
    self._train, self._test = _listed(root)
    size = fields.image_size or self._first_size()
    classes = self._train.classes
    if fields.num_classes not in (0, len(classes)):
      raise errors.UserError(
        f'config.data.num_classes must be 0 or {len(classes)}, the number of '
        f'class folders in {self._train.root}; got {fields.num_classes}.'
      )
    counts = len(self._train), len(self._test)
    needed = sum(counts) * size**2 * 3
    if needed > MAX_BYTES:
      raise errors.UserError(
        f'config.data.image_size={size} for {sum(counts)} images takes '
        f'{needed / 2**30:.1f} GiB; at most {MAX_BYTES >> 30} GiB are kept in '
        'memory.\nconfig.data.name=imagenet2012 streams large folders: see '
        'docs/imagenet.md.'
      )
    self.spec = _spec('folder', (size, size, 3), classes, counts, (_MEAN, _STD))

  def _first_size(self) -> int:
    """The shorter side of the first image of the first class."""
    try:
      return min(decoding.size(self._train.read(0)[0]))
    except Exception as e:  # Pillow raises many kinds.
      raise errors.UserError(
        f'{self._train.where(0)} cannot be decoded ({loading.reason(e)}), and '
        'config.data.image_size is 0 (the size of the first image).'
      ) from e

  def load(self) -> arrays.Dataset:
    train, test = map(self._decoded, (self._train, self._test))
    return arrays.Dataset(*train, *test, self.spec)

  def _decoded(self, images: listing.Folder) -> arrays.Pair:
    n, size = len(images), self.spec.image_size
    batches = loading.Batches(
      images, np.arange(n), min(n, 64), np.arange(min(n, 64)), size, keep=1.0
    )
    corrupt = loading.Corrupt(images, self._skip)
    pixels = np.empty((n, size, size, 3), np.uint8)
    labels: list[int] = []
    with loading.Loader(batches, 0, loading.threads(self._workers)) as loader:
      for _ in range(len(batches)):
        batch = loader.next()
        corrupt.note(batch, must_fill=False)
        good = batch['weights'] > 0
        pixels[len(labels) : len(labels) + good.sum()] = batch['pixels'][good]
        labels += batch['labels'][good].tolist()
    if not labels:
      raise errors.UserError(f'no image in {images.root} can be decoded.')
    return pixels[: len(labels)], np.array(labels, np.int32)


def _listed(root: pathlib.Path) -> tuple[listing.Folder, listing.Folder]:
  """(training images, test images) of a folder."""
  tests = [name for name in ('test', 'val') if (root / name).is_dir()]
  if (root / 'train').is_dir() and tests:
    train, test = listing.scan(root / 'train'), listing.scan(root / tests[0])
    listing.check_same_classes(train, test)
    return train, test
  every = listing.scan(root)
  counts = np.bincount(every.labels)
  if counts.min() < 2:
    raise errors.UserError(
      'config.data.source_dir must hold at least 2 images of every class '
      f'where it has no train/ and test/; {root} has 1 of '
      f'{every.classes[int(counts.argmin())]}.'
    )
  per_class = np.maximum(1, counts // _TEST_SHARE)
  test_mask = listing.held_out(every.names, every.labels, per_class)
  return every.subset(~test_mask), every.subset(test_mask)
