"""Data sets that are streamed: ImageNet, and folders like it.

The host decodes, crops and resizes in worker processes and sends uint8; flip,
colour and normalisation are part of the compiled step. A batch is a function of
(key, step) alone, on any number of workers, devices and processes. See
docs/imagenet.md.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pfs_jax import config as config_lib
from pfs_jax import devices, errors
from pfs_jax.data import (
  files,
  images,
  pipeline,
  prepare,
  registry,
  shapes,
  workers,
)

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's RGB in
# 0..1, as given with AlexNet's code and used ever since.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
  (-0.5675, 0.7192, 0.4009),
  (-0.5808, -0.0045, -0.8140),
  (-0.5836, -0.6948, 0.4203),
)
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision have it.


# On the device.


def jitter(x: jax.Array, key: jax.Array, strength: float) -> jax.Array:
  """Random brightness, contrast and saturation, each by 1 +- `strength`.

  Brightness scales towards black, contrast towards the image's mean grey,
  saturation towards each pixel's grey, and the result is clipped once. Without
  clipping the three commute, so their order is not drawn.

  Args:
    x: [N, H, W, 3], 0..1.
    key: A PRNG key.
    strength: 0..1.

  Returns:
    [N, H, W, 3], 0..1.
  """
  low = max(0.0, 1 - strength)
  factors = jax.random.uniform(
    key, (3, x.shape[0], 1, 1, 1), x.dtype, low, 1 + strength
  )
  brightness, contrast, saturation = factors
  x = x * brightness
  grey = _grey(x)
  mean = grey.mean(axis=(1, 2), keepdims=True)
  x = mean + contrast * (x - mean)
  grey = _grey(x)
  return jnp.clip(grey + saturation * (x - grey), 0, 1)


def _grey(x: jax.Array) -> jax.Array:
  weights = jnp.asarray(_GREY, x.dtype).reshape(1, 1, 1, 3)
  return (x * weights).sum(axis=-1, keepdims=True)


def lighting(x: jax.Array, key: jax.Array, strength: float) -> jax.Array:
  """AlexNet's PCA lighting: adds a random colour to each image.

  The colour is sum_k a_k * eigenvalue_k * eigenvector_k, a_k from
  N(0, strength), on the scale of pixels in 0..1. (The published code adds the
  same number to pixels in 0..255, where it is next to nothing.)

  Args:
    x: [N, H, W, 3], 0..1.
    key: A PRNG key.
    strength: Standard deviation of a_k.

  Returns:
    [N, H, W, 3]; may leave 0..1.
  """
  a = strength * jax.random.normal(key, (x.shape[0], 3), x.dtype)
  values = jnp.asarray(_EIGENVALUES, x.dtype).reshape(1, 3)
  colour = (a * values) @ jnp.asarray(_EIGENVECTORS, x.dtype).T
  return x + colour[:, None, None, :]


@dataclasses.dataclass(frozen=True)
class Augmentation(pipeline.Augmentation):
  """Flip, then colour jitter, then lighting, then normalisation.

  Attributes:
    colour_jitter: Strength of brightness, contrast and saturation; 0: none.
    lighting: Strength of PCA lighting; 0: none.
  """

  colour_jitter: float = 0.0
  lighting: float = 0.0

  def train(self, images: jax.Array, key: jax.Array) -> jax.Array:
    """Augmented and normalised training images."""
    flip_key, jitter_key, lighting_key = jax.random.split(key, 3)
    images = pipeline.crop_and_flip(images, flip_key, self.padding, self.flip)
    if not (self.colour_jitter or self.lighting):
      return self.test(images)
    x = images.astype(jnp.promote_types(self.dtype, jnp.float32)) / 255
    if self.colour_jitter:
      x = jitter(x, jitter_key, self.colour_jitter)
    if self.lighting:
      x = lighting(x, lighting_key, self.lighting)
    return pipeline.standardise(x, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class Draw:
  """One batch (x normalised, y) of a `Source`, inside the program.

  Equal by value, so that a second source does not compile the step again.
  """

  augmentation: Augmentation
  augment: bool = True

  def __call__(self, resident, item) -> tuple[jax.Array, jax.Array]:
    """The batch of one step; nothing is resident."""
    del resident
    pixels, labels, (step, key) = item
    if not self.augment:
      return self.augmentation.test(pixels), labels
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return self.augmentation.train(pixels, key), labels


# Sources and evaluations.


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


class Corrupt:
  """What becomes of files that cannot be decoded: an error, or a count.

  Attributes:
    found: Places of the images that were skipped so far, on this process.
  """

  def __init__(self, listed: images.Folder | images.Records, skip: bool):
    self.skip, self.found = skip, set()
    self._listed = listed

  def note(self, batch: dict, must_fill: bool) -> None:
    """Takes the corrupt images of a batch to account.

    Args:
      batch: From `workers.Loader`.
      must_fill: Whether every row needs an image.

    Raises:
      UserError: There is one and they are not to be skipped, or there are too
        many to fill a batch.
    """
    for i in batch['corrupt']:
      if not self.skip:
        raise errors.UserError(
          f'{self._listed.where(i)} cannot be decoded ({self._reason(i)}).\n'
          "Replace it, or leave such files out: config.data.corrupt='skip'."
        )
      if i not in self.found:
        self.found.add(i)
        files.say(
          f'skipped, cannot be decoded: {self._listed.where(i)} '
          f'({len(self.found)} so far)'
        )
    if must_fill and not batch['weights'].all():
      raise errors.UserError(
        f'{len(self.found)} images cannot be decoded, too many in a row to '
        f'fill a batch; the last is {self._listed.where(i)}.'
      )

  def _reason(self, i: int) -> str:
    try:
      images.decode(self._listed.read(i)[0], 8)
    except Exception as e:
      return ' '.join(str(e).split())[:100] or type(e).__name__
    return 'only at times'


class Source:
  """Training batches from workers; the interface of `pipeline.ArraySource`.

  A context manager: leaving it ends the workers.

  Attributes:
    resident: Nothing.
    steps_per_epoch: Whole batches in an epoch.
    draw: See `Draw`.
    seconds_waited: Time that `chunk` has waited for workers.
  """

  def __init__(
    self,
    batches: images.Batches,
    key: jax.Array,
    draw: Draw,
    corrupt: Corrupt,
    processes: int,
  ):
    self.resident = ()
    self.steps_per_epoch = batches.steps_per_epoch
    self.draw = draw
    self._batches, self._corrupt, self._workers = batches, corrupt, processes
    self._key = np.asarray(jax.random.key_data(key))
    self._loader, self._next = None, -1
    self._waited = 0.0

  def __enter__(self) -> Source:
    """Itself; workers start with the first batch."""
    return self

  def __exit__(self, *_) -> None:
    """Ends the workers."""
    self.close()

  def close(self) -> None:
    """Ends the workers; the next chunk would start new ones."""
    if self._loader:
      self._waited += self._loader.seconds_waited
      self._loader.close()
      self._loader = None

  @property
  def seconds_waited(self) -> float:
    """Seconds that `chunk` waited for workers."""
    return self._waited + (self._loader.seconds_waited if self._loader else 0)

  def chunk(self, step: int, k: int):
    """What `draw` needs for steps step .. step + k - 1, leading axis k.

    Raises:
      UserError: A file cannot be decoded and is not to be skipped.
    """
    if self._loader is None or step != self._next:
      self.close()
      self._loader = workers.Loader(self._batches, step, self._workers)
    self._next = step + k
    local = [self._loader.next() for _ in range(k)]
    for batch in local:
      self._corrupt.note(batch, must_fill=True)

    def joined(name):
      stacked = [batch[name] for batch in local]
      stacked = stacked[0][None] if k == 1 else np.stack(stacked)
      return _global(stacked, 1, self._batches.batch_size)

    steps = np.arange(step, step + k, dtype=np.uint32)
    keys = np.broadcast_to(self._key, (k, *self._key.shape))
    return (
      joined('pixels'),
      joined('labels'),
      devices.replicate((steps, keys)),
    )


class Evaluation:
  """Evaluation batches that hold every image exactly once.

  Iterating gives (x, y, weight): uint8 [B, H, W, 3], int32 [B], float32 [B],
  split over the devices; weight 0 pads the last batch and stands for images
  that were skipped.

  Attributes:
    augmentation: Its `test` normalises.
    size: Number of images; after a pass, of those that could be decoded.
  """

  def __init__(
    self,
    batches: images.Batches,
    augmentation: Augmentation,
    corrupt: Corrupt,
    processes: int,
  ):
    self.augmentation = augmentation
    self.size = len(batches.chosen)
    self._batches, self._corrupt, self._workers = batches, corrupt, processes

  def __iter__(self):
    """Yields (images, labels, weights) on the devices."""
    skipped = 0
    with workers.Loader(self._batches, 0, self._workers) as loader:
      for _ in range(self._batches.steps_per_epoch):
        batch = loader.next()
        self._corrupt.note(batch, must_fill=False)
        skipped += len(batch['corrupt'])
        yield tuple(
          _global(batch[name], 0, self._batches.batch_size)
          for name in ('pixels', 'labels', 'weights')
        )
    if jax.process_count() > 1:
      skipped = multihost_utils.process_allgather(np.int32(skipped)).sum()
    self.size = len(self._batches.chosen) - int(skipped)


# The data set.


class Streamed:
  """A data set of image files under one config; see `data.open_set`.

  Attributes:
    spec: Its facts, with the image size and classes of the config; the names
      of the classes are those of the folders, where there are folders.
  """

  def __init__(self, c: ml_collections.ConfigDict, workdir: pathlib.Path):
    self.spec = registry.configured(c.data)
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
    if isinstance(self._train, images.Folder):
      self.spec = dataclasses.replace(
        self.spec, class_names=self._train.classes
      )
    self._held_out = np.zeros(len(self._train), bool)
    if per_class:
      names, labels = _names_and_labels(self._train, workdir)
      self._held_out = images.held_out(names, labels, per_class)
    skip = c.data.corrupt == 'skip'
    self._corrupt = Corrupt(self._train, skip)
    self._corrupt_test = Corrupt(self._test, skip)
    self._workers = c.data.workers
    if self._workers < 0:
      self._workers = len(os.sched_getaffinity(0))

  def train_source(self, stage: str, hold_out: bool) -> Source:
    """Training batches of a stage ('search' or 'train').

    Args:
      stage: The section of the config with batch size and augmentation.
      hold_out: Whether the validation images are left out.
    """
    c, recipe = self._config, self._config[stage]
    chosen = np.flatnonzero(~self._held_out) if hold_out else None
    if chosen is None:
      chosen = np.arange(len(self._train))
    devices.check_batch(f'{stage}.batch_size', recipe.batch_size)
    if recipe.batch_size > len(chosen):
      raise errors.UserError(
        f'config.{stage}.batch_size must be in [1, {len(chosen)}], the number '
        f'of training images; got {recipe.batch_size}.'
      )
    host_key, device_key = jax.random.split(
      config_lib.key(c.seed, f'{stage} data')
    )
    augment = c.data.augment
    batches = images.Batches(
      self._train,
      chosen,
      recipe.batch_size,
      _local_rows(recipe.batch_size),
      self.spec.image_size,
      key=tuple(jax.random.key_data(host_key).tolist()),
      scale=(recipe.crop_scale or self.spec.crop_scale) if augment else 0.0,
      skip=self._corrupt.skip,
    )
    draw = Draw(self._augmentation(stage), augment)
    return Source(batches, device_key, draw, self._corrupt, self._workers)

  def validation(self) -> Evaluation | None:
    """The images held out from training, or None."""
    if not self._per_class:
      return None
    chosen = np.flatnonzero(self._held_out)
    return self._evaluation(self._train, chosen, self._corrupt)

  def test(self) -> Evaluation:
    """The test images: ImageNet's validation images."""
    chosen = np.arange(len(self._test))
    return self._evaluation(self._test, chosen, self._corrupt_test)

  def _evaluation(self, listed, chosen, corrupt) -> Evaluation:
    n = jax.device_count()
    size = min(self._config.data.eval_batch_size, len(chosen))
    size = -(-size // n) * n
    batches = images.Batches(
      listed, chosen, size, _local_rows(size), self.spec.image_size
    )
    augmentation = self._augmentation(None)
    return Evaluation(batches, augmentation, corrupt, self._workers)

  def _augmentation(self, stage: str | None) -> Augmentation:
    recipe = self._config[stage] if stage else None
    return Augmentation(
      mean=self.spec.mean,
      std=self.spec.std,
      flip=self.spec.flip,
      dtype=config_lib.DTYPES[self._config.dtype],
      colour_jitter=recipe.colour_jitter if recipe else 0.0,
      lighting=recipe.lighting if recipe else 0.0,
    )


def _splits(c, spec: registry.Spec, workdir: pathlib.Path):
  """(training images, test images) of the config."""
  source_dir = c.data.source_dir
  if spec.name == 'shapes' and not source_dir:
    source_dir = shapes.make_folder(workdir / 'shapes', spec)
  if source_dir:
    return _folders(pathlib.Path(source_dir).expanduser(), spec)
  return _prepared(c.data.data_dir, spec)


def _folders(root: pathlib.Path, spec: registry.Spec):
  train = images.scan(root / 'train')
  test = images.scan(root / 'val')
  if len(train.classes) != spec.num_classes:
    raise errors.UserError(
      f'config.data.source_dir must hold {spec.num_classes} class folders '
      f'(config.data.num_classes); {root / "train"} has {len(train.classes)}.'
    )
  if test.classes != train.classes:
    odd = sorted(set(test.classes) ^ set(train.classes))
    raise errors.UserError(
      f'config.data.source_dir must hold the same classes in train and val; '
      f'{root} has {", ".join(odd[:3])} in one only.'
    )
  return train, test


def _prepared(data_dir: str, spec: registry.Spec):
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
  return tuple(
    images.Records(
      spec.name, str(root.absolute()), split, info.splits[split].num_examples
    )
    for split in ('train', 'validation')
  )


def _names_and_labels(
  listed: images.Folder | images.Records, workdir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """File names and labels of all images.

  TFDS keeps them in the records: all are read once, and the result is kept in
  the workdir.
  """
  if isinstance(listed, images.Folder):
    return listed.names, listed.labels
  path = workdir / 'data' / f'{listed.name}-{listed.split}-names.npz'
  if path.exists():
    with np.load(path) as kept:
      if len(kept['labels']) == len(listed):
        return kept['names'], kept['labels']
  files.say(
    f'{listed.name}: reading {len(listed):,} names for the held-out split '
    '(once a workdir)'
  )
  names, labels = listed.names_and_labels()
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{os.getpid()}.{path.name}')
  np.savez(temporary, names=names, labels=labels)
  os.replace(temporary, path)
  return names, labels
