"""Batches as a pure function of (key, step), drawn on the device.

The images of a small set lie on the device as one uint8 array. The order of an
epoch is a permutation from (key, epoch); augmentation comes from (key, step).
So the state of the pipeline is the step alone: a run that continues gets
exactly the batches of a run without interruption, on any number of devices.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import devices, errors
from pfs_jax.data import colour


def crop_and_flip(
  images: jax.Array, key: jax.Array, padding: int, flip: bool
) -> jax.Array:
  """Random crop of padded images; a left-right flip of half of them.

  Images, before and after, are uint8 [N, H, W, C]. `padding` is the number of
  raw zeros on each side, added before normalising; 0 is no crop.
  """
  n, height, width, _ = images.shape
  crop_key, flip_key = jax.random.split(key)
  if padding:
    offsets = jax.random.randint(crop_key, (n, 2), 0, 2 * padding + 1)
    padded = jnp.pad(
      images, ((0, 0), (padding, padding), (padding, padding), (0, 0))
    )
    # With slices, not indices, the compiler keeps each image on its device.
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


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The augmentation of training images; hashable, so static under jit.

  Attributes:
    mean: Per channel, of pixels in 0..1.
    std: Per channel.
    padding: Zeros around the image before the random crop; 0 for no crop.
    flip: Whether half of the images, at random, are flipped left-right.
    dtype: Dtype of the normalised images.
    colour_jitter: Strength of brightness, contrast and saturation; 0: none.
    lighting: Strength of PCA lighting, which follows jitter; 0: none.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  padding: int = 0
  flip: bool = False
  dtype: Any = jnp.float32
  colour_jitter: float = 0.0
  lighting: float = 0.0

  def train(self, images: jax.Array, key: jax.Array) -> jax.Array:
    """Augmented and normalised training images."""
    images = crop_and_flip(images, key, self.padding, self.flip)
    x = self._scaled(images)
    if self.colour_jitter or self.lighting:
      jitter_key, lighting_key = jax.random.split(jax.random.fold_in(key, 1))
      if self.colour_jitter:
        x = colour.jitter(x, jitter_key, self.colour_jitter)
      if self.lighting:
        x = colour.lighting(x, lighting_key, self.lighting)
    return self._normalised(x)

  def test(self, images: jax.Array) -> jax.Array:
    """uint8 [N, H, W, C] -> float (x / 255 - mean) / std, at least float32.

    >>> white = jnp.full((1, 1, 1, 1), 255, jnp.uint8)
    >>> float(Augmentation(mean=(0.5,), std=(0.25,)).test(white).item())
    2.0
    """
    return self._normalised(self._scaled(images))

  def _scaled(self, images: jax.Array) -> jax.Array:
    return images.astype(jnp.promote_types(self.dtype, jnp.float32)) / 255

  def _normalised(self, x: jax.Array) -> jax.Array:
    mean, std = (
      jnp.asarray(v, x.dtype).reshape(1, 1, 1, -1)
      for v in (self.mean, self.std)
    )
    return (x - mean) / std


@dataclasses.dataclass(frozen=True)
class Draw:
  """Makes one batch of a source, inside the compiled program.

  Compared by value, so that a second source does not compile the step again.
  """

  augmentation: Augmentation

  def __call__(self, resident: Any, item: Any) -> tuple[jax.Array, jax.Array]:
    """(x normalised, y) of one step.

    `resident` is (images, labels) on the device, and `item` holds indices into
    them; or `resident` is (), and `item` holds images and labels. In both cases
    (step, key data) comes last in `item`.
    """
    *batch, (step, key) = item
    if resident:
      batch = [array[batch[0]] for array in resident]
    images, labels = batch
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return self.augmentation.train(images, key), labels


def keys_of_steps(key: jax.Array, step: int, k: int) -> tuple[jax.Array, Any]:
  """(steps uint32 [k], key data [k, 2]), from which a draw makes its keys."""
  steps = np.arange(step, step + k, dtype=np.uint32)
  data = jax.random.key_data(key)
  return devices.replicate((steps, np.broadcast_to(data, (k, *data.shape))))


def check_batch(field: str, batch_size: int, images: int) -> None:
  """Refuses a batch that is too large or does not split over the devices."""
  n = jax.device_count()
  if batch_size % n:
    raise errors.UserError(
      f'config.{field} must be a multiple of the {n} devices; got {batch_size}.'
    )
  if not 1 <= batch_size <= images:
    raise errors.UserError(
      f'config.{field} must be in [1, {images}], the number of training '
      f'images; got {batch_size}.'
    )


_permutation = jax.jit(jax.random.permutation, static_argnums=1)


class ArraySource(contextlib.AbstractContextManager):
  """Training batches from arrays that lie on the device.

  A step's batch is `draw(resident, item)` inside the compiled program, where
  `item` is that step's slice of `chunk(step, k)`.

  Attributes:
    resident: (images, labels), uint8 and int32, on every device.
    steps_per_epoch: Whole batches in an epoch; the images that remain at the
      end of the permutation are left out, which are others in each epoch.
    draw: See `Draw`.
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
    self.draw = Draw(augmentation)
    self._batch_size, self._n = batch_size, len(images)
    self._order_key, self._augment_key = jax.random.split(key)
    self._epoch, self._order = -1, np.empty(0, int)

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
    weights = np.ones(len(images), np.float32)
    self._arrays = (images, labels.astype(np.int32), weights)

  def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
    """Yields (images, labels, weights) on the devices."""
    for start in range(0, self.size, self._batch_size):
      stop, batch = start + self._batch_size, []
      for array in self._arrays:
        ends = [(0, max(0, stop - self.size))] + [(0, 0)] * (array.ndim - 1)
        batch.append(np.pad(array[start:stop], ends))
      yield devices.split_batch(tuple(batch))
