"""The data set of a config, opened: batches to train on and to evaluate."""

import abc
import copy
import dataclasses
import pathlib
from typing import Any, Self

import jax
import ml_collections
import numpy as np

from pfs_jax import config, console, errors, storage
from pfs_jax.data import (
  arrays,
  listing,
  loading,
  own,
  pipeline,
  prepare,
  records,
  shapes,
  specs,
)


class Opened(abc.ABC):
  """The interface of a data set to the stages, for `Arrays` and `Streamed`.

  Attributes:
    spec: Its facts.
  """

  spec: specs.Spec
  _config: ml_collections.ConfigDict
  _held_out: np.ndarray  # bool [N], of the training images.
  _train: Any
  _test: Any

  def under(self, c: ml_collections.ConfigDict) -> Self:
    """The same images under the same config with another seed."""
    other = copy.copy(self)
    other._config = c
    return other

  def chosen(self, stage: str, hold_out: bool) -> np.ndarray:
    """Indices of a stage's images; refuses a batch that is larger than these.

    `hold_out`: whether the validation images are left out.
    """
    held_out = self._held_out if hold_out else np.zeros_like(self._held_out)
    chosen = np.flatnonzero(~held_out)
    size = self._config[stage].batch_size
    pipeline.check_batch(f'{stage}.batch_size', size, len(chosen))
    return chosen

  def train_source(self, stage: str, hold_out: bool) -> Any:
    """Training batches: `pipeline.ArraySource` or `loading.StreamSource`."""
    key = config.key(self._config.seed, f'{stage} data')
    return self._source(stage, self.chosen(stage, hold_out), key)

  def validation(self) -> Any:
    """An evaluation of the images held out from training, or None."""
    chosen = np.flatnonzero(self._held_out)
    return self._evaluation(self._train, chosen) if len(chosen) else None

  def test(self) -> Any:
    """An evaluation of the test images; for ImageNet, its validation images."""
    return self._evaluation(self._test, None)

  @abc.abstractmethod
  def _source(self, stage: str, chosen: np.ndarray, key: jax.Array) -> Any: ...

  @abc.abstractmethod
  def _evaluation(self, images: Any, chosen: np.ndarray | None) -> Any: ...

  def _augmentation(self, stage: str = '') -> pipeline.Augmentation:
    """The augmentation of a stage; without a stage, normalisation alone."""
    c, spec = self._config, self.spec
    dtype = config.DTYPES[c.dtype]
    plain = pipeline.Augmentation(spec.mean, spec.std, dtype=dtype)
    if not stage or not c.data.augment:
      return plain
    return dataclasses.replace(
      plain,
      padding=spec.crop_padding,
      flip=spec.flip and c.data.flip,
      colour_jitter=c[stage].colour_jitter,
      lighting=c[stage].lighting,
    )


class Arrays(Opened):
  """A data set in memory under one config; see `data.open_set`."""

  def __init__(
    self, c: ml_collections.ConfigDict, facts: specs.Spec, workdir: pathlib.Path
  ):
    for field in ('crop_scale', 'colour_jitter', 'lighting'):
      for stage in ('search', 'train'):
        if c[stage][field]:
          raise errors.UserError(
            f'config.{stage}.{field} must be 0 for {facts.name}, which is '
            f'not streamed; got {c[stage][field]:g}.'
          )
    fields = c.data
    if specs.is_own(fields):
      found = own.load(fields, workdir)
    else:
      found = arrays.load(
        fields.name,
        data_dir=fields.data_dir,
        source_dir=fields.source_dir,
        download=fields.download,
        train_examples=fields.train_examples,
      )
    self.spec, self._config = found.spec, c
    self._train = found.train_images, found.train_labels
    self._test = found.test_images, found.test_labels
    n, held_out = len(found.train_labels), fields.validation_examples
    if not 0 <= held_out < n:
      raise errors.UserError(
        f'config.data.validation_examples must be in 0..{n - 1}, less than the '
        f'training images; got {held_out}.'
      )
    self._held_out = np.arange(n) >= n - held_out  # The last ones.

  def _source(self, stage, chosen, key):
    images, labels = self._train
    return pipeline.ArraySource(
      images[chosen],
      labels[chosen],
      batch_size=self._config[stage].batch_size,
      key=key,
      augmentation=self._augmentation(stage),
    )

  def _evaluation(self, images, chosen):
    if chosen is not None:
      images = tuple(array[chosen] for array in images)
    return pipeline.ArrayEvaluation(
      *images,
      batch_size=self._config.data.eval_batch_size,
      augmentation=self._augmentation(),
    )


class Streamed(Opened):
  """ImageNet, or a folder like it, under one config.

  If there are class folders, they give the class names of its `spec`.
  """

  def __init__(
    self, c: ml_collections.ConfigDict, spec: specs.Spec, workdir: pathlib.Path
  ):
    if c.data.train_examples:
      raise errors.UserError(
        'config.data.train_examples must be 0 for a data set that is streamed; '
        f'got {c.data.train_examples}.'
      )
    per_class, rest = divmod(c.data.validation_examples, spec.num_classes)
    if rest:
      raise errors.UserError(
        'config.data.validation_examples must be a multiple of the '
        f'{spec.num_classes} classes, which have equally many held-out images; '
        f'got {c.data.validation_examples}.'
      )
    self._config = c
    self._train, self._test = _splits(c, spec, workdir)
    if isinstance(self._train, listing.Folder):
      spec = dataclasses.replace(spec, class_names=self._train.classes)
    self.spec = spec
    splits = (self._train, self._test)
    own.check_identity(
      workdir / 'data' / 'identity.json',
      f'the images ({spec.name})',
      {type(self._train).__name__: [split.identity() for split in splits]},
    )
    self._held_out = np.zeros(len(self._train), bool)
    if per_class:
      names, labels = _names_and_labels(self._train, workdir)
      self._held_out = listing.held_out(names, labels, per_class)
    # The corrupt images named so far: (training images, test images).
    self._named: tuple[set[int], set[int]] = (set(), set())

  def _batches(self, images, chosen, size) -> loading.Batches:
    return loading.Batches(
      images,
      np.arange(len(images)) if chosen is None else chosen,
      size,
      loading.local_rows(size),
      self.spec.image_size,
      skip=self._config.data.corrupt == 'skip',
    )

  def _source(self, stage, chosen, key):
    c, recipe = self._config, self._config[stage]
    host_key, device_key = jax.random.split(key)
    scale = recipe.crop_scale or self.spec.crop_scale
    batches = dataclasses.replace(
      self._batches(self._train, chosen, recipe.batch_size),
      key=tuple(jax.random.key_data(host_key).tolist()),
      scale=scale if c.data.augment else 0.0,
    )
    return loading.StreamSource(
      batches,
      c.data.workers,
      self._named[0],
      key=device_key,
      augmentation=self._augmentation(stage),
    )

  def _evaluation(self, images, chosen):
    c, n = self._config, jax.device_count()
    if chosen is not None:  # By class; a probe takes the first batches alone.
      chosen = np.random.default_rng(0).permutation(chosen)
    count = len(images) if chosen is None else len(chosen)
    size = -(-min(c.data.eval_batch_size, count) // n) * n
    return loading.StreamEvaluation(
      self._batches(images, chosen, size),
      c.data.workers,
      self._named[images is self._test],
      augmentation=self._augmentation(),
    )


def _splits(
  c: ml_collections.ConfigDict, spec: specs.Spec, workdir: pathlib.Path
) -> tuple[loading.Images, loading.Images]:
  """The training and test images of a config."""
  if c.data.source_dir:
    root = storage.expanded(c.data.source_dir)
  elif spec.name == 'shapes':
    root = shapes.make_folder(workdir / 'shapes', spec)
  else:
    return _prepared_splits(records.directory(c.data.data_dir), spec)
  train, test = listing.scan_pair(root, 'train', 'val')
  if len(train.classes) != spec.num_classes:
    raise errors.UserError(
      f'config.data.source_dir must hold {spec.num_classes} class folders '
      f'(config.data.num_classes); {root / "train"} has {len(train.classes)}.'
    )
  return train, test


def _prepared_splits(
  root: pathlib.Path, spec: specs.Spec
) -> tuple[records.Records, records.Records]:
  """The training and test images that TFDS has prepared."""
  builder = records.find(spec.name, root)
  if builder is None:
    raise errors.UserError(
      f'{spec.name} is not prepared in {root}. Give '
      'config.data.source_dir (a folder with\ntrain/<class>/*.JPEG and '
      'val/<class>/*.JPEG) or config.data.data_dir (prepared by TFDS as '
      'array_record);\nsee docs/imagenet.md.'
    )
  classes = builder.info.features['label'].num_classes
  if classes != spec.num_classes:
    raise errors.UserError(
      f'config.data.num_classes must be 0 or {classes} for {spec.name} as '
      f'prepared in {root}; got {spec.num_classes}.'
    )
  with records.reading(spec.name, builder.data_path):
    train = records.Records(builder, 'train')
    return train, records.Records(builder, 'validation')


def _names_and_labels(
  images: loading.Images, workdir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """File names and labels; the workdir keeps those of TFDS's records."""
  if isinstance(images, listing.Folder):
    return images.names, images.labels
  path = workdir / 'data' / f'{images.name}-{images.split}-names.npz'

  def check(found: dict[str, np.ndarray]) -> None:
    if not len(found['names']) == len(found['labels']) == len(images):
      raise ValueError('it holds other images')

  found = prepare.read_cached(path, check)
  if found is None:
    console.note(
      f'{images.name}: reading {len(images):,} names for the held-out split '
      '(once for each workdir)'
    )
    names, labels = images.names_and_labels()
    found = {'names': names, 'labels': labels}
    storage.write_arrays(path, found, sealed=True)
  return found['names'], found['labels']
