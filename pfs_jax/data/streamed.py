"""Data sets that are streamed: ImageNet, and folders like it.

The host decodes, crops and resizes in threads and sends uint8; flip, colour and
normalisation are part of the compiled step. A batch is a function of (key,
step) alone, on any number of threads, devices and processes. See
docs/imagenet.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pfs_jax import config, console, devices, errors, storage
from pfs_jax.data import (
  colour,
  listing,
  loading,
  pipeline,
  prepare,
  shapes,
  specs,
)


def _local_rows(n: int) -> np.ndarray:
  """The rows of a global batch of n that lie on this process's devices."""
  sharding = NamedSharding(devices.mesh(), PartitionSpec('data'))
  slices = sharding.addressable_devices_indices_map((n,)).values()
  rows = np.arange(n)
  return np.unique(np.concatenate([rows[i] for i in slices]))


def _global(local: np.ndarray, axis: int, n: int) -> jax.Array:
  """One array over all devices from every process's rows along `axis`."""
  spec = PartitionSpec(*[None] * axis, 'data')
  shape = (*local.shape[:axis], n, *local.shape[axis + 1 :])
  return jax.make_array_from_process_local_data(
    NamedSharding(devices.mesh(), spec), local, shape
  )


class StreamSource(loading.Reader):
  """Training batches from threads; the interface of `pipeline.ArraySource`.

  Attributes:
    resident: Empty: no data stay on the device.
    steps_per_epoch: Whole batches in an epoch.
    draw: See `colour.StreamDraw`.
  """

  def __init__(
    self,
    batches: loading.Batches,
    workers: int,
    named: set[int],
    key: jax.Array,
    draw: colour.StreamDraw,
  ):
    super().__init__(batches, workers, named)
    self.resident = ()
    self.steps_per_epoch = batches.steps_per_epoch
    self.draw = draw
    self._key = key

  def chunk(self, step: int, k: int) -> Any:
    """What `draw` needs for steps step .. step + k - 1, leading axis k.

    Raises:
      errors.UserError: A file cannot be decoded and is not to be skipped.
    """
    local = [self.batch(i) for i in range(step, step + k)]

    def joined(name: str) -> jax.Array:
      parts = [batch[name] for batch in local]
      stacked = parts[0][None] if k == 1 else np.stack(parts)
      return _global(stacked, 1, self._batches.batch_size)

    keys = pipeline.keys_of_steps(self._key, step, k)
    return joined('pixels'), joined('labels'), keys


class StreamEvaluation:
  """Evaluation batches that hold every image exactly once.

  Iterating gives (x, y, weight) as `pipeline.ArrayEvaluation` does; weight 0
  also stands for images that were skipped.

  Attributes:
    augmentation: Its `test` normalises.
    size: Number of images; after a pass, of those that could be decoded.
  """

  def __init__(
    self,
    batches: loading.Batches,
    workers: int,
    named: set[int],
    augmentation: colour.ColourAugmentation,
  ):
    self.augmentation = augmentation
    self.size = len(batches.chosen)
    self._batches, self._workers, self._named = batches, workers, named

  def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
    """Yields (images, labels, weights) on the devices."""
    skipped, batches = 0, self._batches
    with loading.Reader(batches, self._workers, self._named) as reader:
      for step in range(len(batches)):
        batch = reader.batch(step)
        skipped += len(batch['corrupt'])
        yield tuple(
          _global(batch[name], 0, batches.batch_size)
          for name in ('pixels', 'labels', 'weights')
        )
    if jax.process_count() > 1:
      skipped = multihost_utils.process_allgather(np.int32(skipped)).sum()
    self.size = len(batches.chosen) - int(skipped)


class Streamed:
  """A data set of image files under one config; see `data.open_set`.

  Attributes:
    spec: Its facts, with the image size and classes of the config. The names of
      the classes are those of the folders, where there are folders.
  """

  def __init__(self, c: ml_collections.ConfigDict, workdir: pathlib.Path):
    self.spec = specs.configured(c.data)
    if c.data.train_examples:
      raise errors.UserError(
        'config.data.train_examples must be 0 for a data set that is streamed; '
        f'got {c.data.train_examples}.'
      )
    per_class, rest = divmod(c.data.validation_examples, self.spec.num_classes)
    if rest:
      raise errors.UserError(
        'config.data.validation_examples must be a multiple of the '
        f'{self.spec.num_classes} classes, since as many of each are held out; '
        f'got {c.data.validation_examples}.'
      )
    self._config, self._per_class = c, per_class
    self._train, self._test = _splits(c, self.spec, workdir)
    if isinstance(self._train, listing.Folder):
      self.spec = dataclasses.replace(
        self.spec, class_names=self._train.classes
      )
    self._held_out = np.zeros(len(self._train), bool)
    if per_class:
      names, labels = _names_and_labels(self._train, workdir)
      self._held_out = listing.held_out(names, labels, per_class)
    self._skip, self._workers = c.data.corrupt == 'skip', c.data.workers
    self._named: tuple[set[int], set[int]] = (set(), set())

  def train_source(self, stage: str, hold_out: bool) -> StreamSource:
    """Training batches of a stage; see `pipeline.Arrays.train_source`."""
    c, recipe = self._config, self._config[stage]
    chosen = np.arange(len(self._train))
    if hold_out:
      chosen = np.flatnonzero(~self._held_out)
    field = f'{stage}.batch_size'
    pipeline.check_batch(field, recipe.batch_size, len(chosen))
    host_key, device_key = jax.random.split(config.key(c.seed, f'{stage} data'))
    augment = c.data.augment
    batches = loading.Batches(
      self._train,
      chosen,
      recipe.batch_size,
      _local_rows(recipe.batch_size),
      self.spec.image_size,
      key=tuple(jax.random.key_data(host_key).tolist()),
      scale=(recipe.crop_scale or self.spec.crop_scale) if augment else 0.0,
      skip=self._skip,
    )
    draw = colour.StreamDraw(self._augmentation(stage if augment else None))
    return StreamSource(
      batches, self._workers, self._named[0], device_key, draw
    )

  def validation(self) -> StreamEvaluation | None:
    """The images held out from training, or None."""
    if not self._per_class:
      return None
    chosen = np.flatnonzero(self._held_out)
    return self._evaluation(self._train, chosen, self._named[0])

  def test(self) -> StreamEvaluation:
    """The test images: ImageNet's validation images."""
    chosen = np.arange(len(self._test))
    return self._evaluation(self._test, chosen, self._named[1])

  def _evaluation(
    self, images: loading.Images, chosen: np.ndarray, named: set[int]
  ) -> StreamEvaluation:
    n = jax.device_count()
    size = min(self._config.data.eval_batch_size, len(chosen))
    size = -(-size // n) * n
    rows, pixels = _local_rows(size), self.spec.image_size
    batches = loading.Batches(
      images, chosen, size, rows, pixels, skip=self._skip
    )
    augmentation = self._augmentation(None)
    return StreamEvaluation(batches, self._workers, named, augmentation)

  def _augmentation(self, stage: str | None) -> colour.ColourAugmentation:
    """Of a stage; None only normalises."""
    plain = colour.ColourAugmentation(
      self.spec.mean, self.spec.std, dtype=config.DTYPES[self._config.dtype]
    )
    if stage is None:
      return plain
    return dataclasses.replace(
      plain,
      flip=self.spec.flip and self._config.data.flip,
      colour_jitter=self._config[stage].colour_jitter,
      lighting=self._config[stage].lighting,
    )


def _splits(
  c: ml_collections.ConfigDict, spec: specs.Spec, workdir: pathlib.Path
) -> tuple[loading.Images, loading.Images]:
  """(training images, test images) of the config."""
  source_dir = c.data.source_dir
  if spec.name == 'shapes' and not source_dir:
    source_dir = shapes.make_folder(workdir / 'shapes', spec)
  if source_dir:
    return _folders(pathlib.Path(source_dir).expanduser(), spec)
  return _prepared(c.data.data_dir, spec)


def _folders(root: pathlib.Path, spec: specs.Spec) -> tuple[Any, Any]:
  train, test = listing.scan_pair(root, 'train', 'val')
  if len(train.classes) != spec.num_classes:
    raise errors.UserError(
      f'config.data.source_dir must hold {spec.num_classes} class folders '
      f'(config.data.num_classes); {root / "train"} has {len(train.classes)}.'
    )
  return train, test


def _prepared(
  data_dir: str, spec: specs.Spec
) -> tuple[listing.Records, listing.Records]:
  """The splits that TFDS has prepared as array_record."""
  root, builder = prepare.prepared(spec.name, data_dir)
  if builder is None:
    raise errors.UserError(
      f'{spec.name} is not prepared in {root}. Supply it by '
      'config.data.source_dir (a folder with\ntrain/<class>/*.JPEG and '
      'val/<class>/*.JPEG) or by config.data.data_dir (prepared by TFDS as '
      'array_record);\nsee docs/imagenet.md.'
    )
  info = builder.info
  classes = info.features['label'].num_classes
  written = info.file_format.value
  if written != 'array_record' or classes != spec.num_classes:
    raise errors.UserError(
      f'config.data.data_dir must hold {spec.name} as array_record with '
      f'{spec.num_classes} classes; got {written} with {classes} in {root}.\n'
      'TFDS can convert: see docs/imagenet.md.'
    )
  train, test = (
    listing.Records(
      spec.name, str(root.absolute()), split, info.splits[split].num_examples
    )
    for split in ('train', 'validation')
  )
  return train, test


def _names_and_labels(
  images: loading.Images, workdir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """File names and labels of all images.

  TFDS keeps them in the records: all are read once, and the result is kept in
  the workdir.
  """
  if isinstance(images, listing.Folder):
    return images.names, images.labels
  path = workdir / 'data' / f'{images.name}-{images.split}-names.npz'

  def check(arrays: dict[str, np.ndarray]) -> None:
    if not len(arrays['names']) == len(arrays['labels']) == len(images):
      raise ValueError('it is of other images')

  found = prepare.read_cached(path, check)
  if found is None:
    console.note(
      f'{images.name}: reading {len(images):,} names for the held-out split '
      '(once a workdir)'
    )
    names, labels = images.names_and_labels()
    found = {'names': names, 'labels': labels}
    storage.write_arrays(path, found, sealed=True)
  return found['names'], found['labels']
