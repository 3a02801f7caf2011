"""Batches as a pure function of (key, step), drawn on the device.

The images of a small set lie on the device as one uint8 array. The order of an
epoch is a permutation from (key, epoch); crop and flip come from (key, step).
So the state of the pipeline is the step alone: a run that continues sees
exactly the batches of one that was never interrupted, on any number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pfs_jax import config, devices, errors
from pfs_jax.data import arrays, own, specs


def normalise(
  images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any
) -> jax.Array:
  """uint8 [..., C] -> float (x / 255 - mean) / std, at least float32.

  >>> white = jnp.full((1, 1, 1), 255, jnp.uint8)
  >>> float(normalise(white, (0.5,), (0.25,), jnp.float32)[0, 0, 0])
  2.0
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  return standardise(images.astype(dtype) / 255, mean, std)


def standardise(
  x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """float [..., C] of 0..1 -> (x - mean) / std."""
  shape = (1,) * (x.ndim - 1) + (-1,)
  shift, scale = (jnp.asarray(v, x.dtype).reshape(shape) for v in (mean, std))
  return (x - shift) / scale


def crop_and_flip(
  images: jax.Array, key: jax.Array, padding: int, flip: bool
) -> jax.Array:
  """Random crop of the zero-padded images; a left-right flip of half of them.

  Args:
    images: [N, H, W, C] uint8. Raw zeros are padded, before normalising.
    key: A typed PRNG key.
    padding: Zeros on each side, 0 for no crop.
    flip: Whether to flip.

  Returns:
    [N, H, W, C], as `images`.
  """
  n, height, width, _ = images.shape
  crop_key, flip_key = jax.random.split(key)
  if padding:
    offsets = jax.random.randint(crop_key, (n, 2), 0, 2 * padding + 1)
    padded = jnp.pad(
      images, ((0, 0), (padding, padding), (padding, padding), (0, 0))
    )
    # Slices, not indices by image: the compiler keeps each on its device.
    crop = functools.partial(
      jax.lax.dynamic_slice, slice_sizes=(height, width, images.shape[-1])
    )
    images = jax.vmap(lambda image, o: crop(image, (o[0], o[1], 0)))(
      padded, offsets
    )
  if flip:
    flipped = jax.random.bernoulli(flip_key, shape=(n,))
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
  return images


def check_batch(field: str, batch_size: int, images: int) -> None:
  """Refuses a batch that is too large or does not split over the devices."""
  devices.check_batch(field, batch_size)
  if not 1 <= batch_size <= images:
    raise errors.UserError(
      f'config.{field} must be in [1, {images}], the number of training '
      f'images; got {batch_size}.'
    )


def keys_of_steps(key: jax.Array, step: int, k: int) -> tuple[jax.Array, Any]:
  """(steps uint32 [k], key data [k, 2]), from which a draw makes its keys."""
  steps = np.arange(step, step + k, dtype=np.uint32)
  data = jax.random.key_data(key)
  return devices.replicate((steps, np.broadcast_to(data, (k, *data.shape))))


@functools.partial(jax.jit, static_argnums=1)
def _permutation(key: jax.Array, n: int) -> jax.Array:
  return jax.random.permutation(key, n)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is done to training images; hashable, so static under jit.

  Attributes:
    mean: Per channel, of pixels in 0..1.
    std: Per channel.
    padding: Zeros around the image before the random crop; 0 for no crop.
    flip: Whether half of the images, at random, are flipped left-right.
    dtype: Dtype of the normalised images.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  padding: int = 0
  flip: bool = False
  dtype: Any = jnp.float32

  def train(self, images: jax.Array, key: jax.Array) -> jax.Array:
    """Augmented and normalised training images."""
    images = crop_and_flip(images, key, self.padding, self.flip)
    return self.test(images)

  def test(self, images: jax.Array) -> jax.Array:
    """Normalised images, nothing random."""
    return normalise(images, self.mean, self.std, self.dtype)


@dataclasses.dataclass(frozen=True)
class ArrayDraw:
  """One batch of an `ArraySource`, inside the compiled program.

  Equal by value, so that a second source does not compile the step again.
  """

  augmentation: Augmentation

  def __call__(self, resident: Any, item: Any) -> tuple[jax.Array, jax.Array]:
    """(x normalised, y) of one step."""
    images, labels = resident
    indices, (step, key) = item
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return self.augmentation.train(images[indices], key), labels[indices]


class ArraySource:
  """Training batches from arrays that lie on the device.

  A step's batch is `draw(resident, item)` inside the compiled program, where
  `item` is that step's slice of `chunk(step, k)`.

  Attributes:
    resident: (images, labels), uint8 and int32, on every device.
    steps_per_epoch: Whole batches in an epoch; what remains of the permutation
      is left out; these are other images in each epoch.
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    key: jax.Array,
    augmentation: Augmentation,
  ):
    check_batch('batch_size', batch_size, len(images))
    self.resident = devices.replicate((images, labels.astype(np.int32)))
    self.steps_per_epoch = len(images) // batch_size
    self.draw = ArrayDraw(augmentation)
    self._batch_size, self._n = batch_size, len(images)
    self._order_key, self._augment_key = jax.random.split(key)
    self._epoch, self._order = -1, np.empty(0, int)

  def __enter__(self) -> ArraySource:
    """Returns the source."""
    return self

  def __exit__(self, *_: object) -> None:
    """Does nothing; a streamed source ends its threads here."""

  def _indices(self, step: int) -> np.ndarray:
    epoch, position = divmod(step, self.steps_per_epoch)
    if epoch != self._epoch:
      key = jax.random.fold_in(self._order_key, epoch)
      self._order = np.asarray(_permutation(key, self._n))
      self._epoch = epoch
    start = position * self._batch_size
    return self._order[start : start + self._batch_size]

  def chunk(self, step: int, k: int) -> Any:
    """What `draw` needs for steps step .. step + k - 1, leading axis k."""
    indices = np.stack([self._indices(s) for s in range(step, step + k)])
    keys = keys_of_steps(self._augment_key, step, k)
    return devices.split_batch(indices, axis=1), keys


class ArrayEvaluation:
  """Evaluation batches that hold every image exactly once.

  The last batch is padded with images of weight 0. Iterating gives (x, y,
  weight): uint8 [B, H, W, C], int32 [B], float32 [B], split over the devices.
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    augmentation: Augmentation,
  ):
    self.augmentation = augmentation
    self.size = len(images)
    n = jax.device_count()
    self._batch_size = -(-min(batch_size, len(images)) // n) * n
    self._images, self._labels = images, labels.astype(np.int32)

  def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
    """Yields (images, labels, weights) on the devices."""
    for start in range(0, self.size, self._batch_size):
      x = self._images[start : start + self._batch_size]
      y = self._labels[start : start + self._batch_size]
      short = self._batch_size - len(x)
      weight = np.pad(np.ones(len(x), np.float32), (0, short))
      x = np.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))
      yield devices.split_batch((x, np.pad(y, (0, short)), weight))


class Arrays:
  """A data set in memory under one config; see `data.open_set`.

  Attributes:
    spec: Its facts.
  """

  def __init__(self, c: ml_collections.ConfigDict, workdir: pathlib.Path):
    self._config = c
    fields = c.data
    if specs.is_own(fields):
      self._dataset = own.load(fields, workdir)
    else:
      specs.configured(fields)  # Refuses what the set cannot have.
      self._dataset = arrays.load(
        fields.name,
        data_dir=fields.data_dir,
        source_dir=fields.source_dir,
        download=fields.download,
        train_examples=fields.train_examples,
      )
    self.spec = self._dataset.spec
    for field in ('crop_scale', 'colour_jitter', 'lighting'):
      for stage in ('search', 'train'):
        if c[stage][field]:
          raise errors.UserError(
            f'config.{stage}.{field} must be 0 for {self.spec.name}, which is '
            f'not streamed; got {c[stage][field]:g}.'
          )

  def _split(self) -> tuple[arrays.Pair, arrays.Pair]:
    d = self._dataset
    return arrays.split(
      d.train_images, d.train_labels, self._config.data.validation_examples
    )

  def _augmentation(self) -> Augmentation:
    augment = self._config.data.augment
    return Augmentation(
      mean=self.spec.mean,
      std=self.spec.std,
      padding=self.spec.crop_padding if augment else 0,
      flip=self.spec.flip and self._config.data.flip and augment,
      dtype=config.DTYPES[self._config.dtype],
    )

  def train_source(self, stage: str, hold_out: bool) -> ArraySource:
    """Training batches of a stage ('search' or 'train').

    Args:
      stage: The section of the config with the recipe.
      hold_out: Whether the validation images are left out.

    Raises:
      errors.UserError: The batch is larger than the training set.
    """
    examples = (self._dataset.train_images, self._dataset.train_labels)
    if hold_out:
      examples, _ = self._split()
    batch_size = self._config[stage].batch_size
    check_batch(f'{stage}.batch_size', batch_size, len(examples[0]))
    return ArraySource(
      *examples,
      batch_size=batch_size,
      key=config.key(self._config.seed, f'{stage} data'),
      augmentation=self._augmentation(),
    )

  def validation(self) -> ArrayEvaluation | None:
    """The images held out from training, or None."""
    _, held_out = self._split()
    return self._evaluation(*held_out) if len(held_out[0]) else None

  def test(self) -> ArrayEvaluation:
    """The test images."""
    return self._evaluation(
      self._dataset.test_images, self._dataset.test_labels
    )

  def _evaluation(
    self, images: np.ndarray, labels: np.ndarray
  ) -> ArrayEvaluation:
    return ArrayEvaluation(
      images,
      labels,
      batch_size=self._config.data.eval_batch_size,
      augmentation=self._augmentation(),
    )
