"""Batches of a stream of image files, over all devices of all processes.

The host decodes, crops and resizes in threads and sends uint8; flip, colour and
normalisation are part of the compiled step. A batch is a function of (key,
step) alone, on any number of threads, devices and processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pfs_jax import devices
from pfs_jax.data import loading, pipeline


def local_rows(n: int) -> np.ndarray:
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

  `key` is that of the augmentation in the compiled step.
  """

  def __init__(
    self,
    *reader: Any,
    key: jax.Array,
    augmentation: pipeline.Augmentation,
  ):
    super().__init__(*reader)
    self.resident = ()  # No data stay on the device.
    self.steps_per_epoch = self.batches.steps_per_epoch
    self.draw = pipeline.Draw(augmentation)
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
      return _global(stacked, 1, self.batches.batch_size)

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
    *reader: Any,
    augmentation: pipeline.Augmentation,
  ):
    self.augmentation = augmentation
    self.size = len(batches.chosen)
    self._arguments = batches, *reader

  def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
    """Yields (images, labels, weights) on the devices."""
    skipped = 0
    with loading.Reader(*self._arguments) as reader:
      batches = reader.batches
      for step in range(len(batches)):
        batch = reader.batch(step)
        skipped += len(batch['corrupt'])
        arrays = (batch[name] for name in loading.ARRAYS)
        yield tuple(_global(a, 0, batches.batch_size) for a in arrays)
    if jax.process_count() > 1:
      skipped = multihost_utils.process_allgather(np.int32(skipped)).sum()
    self.size = len(batches.chosen) - int(skipped)
