"""Batches of a stream of image files, decoded by threads ahead of time.

The host decodes, crops and resizes in threads and sends uint8; flip, colour and
normalisation are part of the compiled step. A batch is a pure function of (key,
step), on any number of threads, devices and processes. Pillow releases Python's
global lock while it decodes and resizes, so threads are as fast as processes
here (measured: docs/imagenet.md).
"""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pfs_jax import console, devices, errors, runs
from pfs_jax.data import decoding, listing, pipeline, records

_PIECE = 16  # Images that a thread decodes at a time.
_AHEAD = 4  # Batches that are decoded before they are asked for.
_TRIES = 100  # So many corrupt images in a row are an error.
ARRAYS = ('pixels', 'labels', 'weights')

Images = listing.Folder | records.Records


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """The rows of every batch that this process decodes.

  Training: the order of an epoch is a permutation from (key, epoch); the crop
  of a row comes from (key, step, row in the global batch). Images that remain
  after the last whole batch of a permutation are left out. Evaluation (`key`
  None): every image once, in order.

  Attributes:
    images: The files.
    chosen: int [N], the indices of the images that belong to this set.
    batch_size: Images in a global batch.
    rows: int [B], the rows of the global batch that this process decodes.
    size: Height and width.
    key: Two 32-bit numbers, or None.
    scale: Least share of the area of a random crop; 0: centre crops.
    skip: Whether corrupt images are left out instead of an error. In training,
      the next image of the set replaces a corrupt one.
    keep: Share of the shorter side that a centre crop keeps.
  """

  images: Images
  chosen: np.ndarray
  batch_size: int
  rows: np.ndarray
  size: int
  key: tuple[int, int] | None = None
  scale: float = 0.0
  skip: bool = False
  keep: float = decoding.EVALUATION_CROP

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch, or in all of an evaluation."""
    if self.key is None:
      return -(-len(self.chosen) // self.batch_size)
    return len(self.chosen) // self.batch_size

  def __len__(self) -> int:
    """Batches of an evaluation; for a training, more than any run takes."""
    return self.steps_per_epoch if self.key is None else 1 << 40

  def places(self, step: int, rows: np.ndarray) -> np.ndarray:
    """Places in `chosen` of some rows of a batch; -1 after the last image."""
    n = len(self.chosen)
    if self.key is None:
      places = step * self.batch_size + rows
      return np.where(places < n, places, -1)
    epoch, position = divmod(step, self.steps_per_epoch)
    return _order(self.key, epoch, n)[position * self.batch_size + rows]

  def piece(self, step: int, rows: np.ndarray) -> dict[str, Any]:
    """Decodes some rows of one batch.

    Returns:
      pixels: uint8 [n, size, size, 3]; zeros where there is no image.
      labels: int32 [n].
      weights: float32 [n], 1, or 0 where there is no image.
      corrupt: [(index in `images`, reason)] of those that cannot be decoded.
    """
    n = len(rows)
    pixels = np.zeros((n, self.size, self.size, 3), np.uint8)
    labels, weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
    corrupt = []
    places = self.places(step, rows)
    for i, (place, row) in enumerate(zip(places, rows, strict=True)):
      rng = None
      if self.key is not None:
        rng = np.random.default_rng([*self.key, 1, step, int(row)])
      for image in self._candidates(place):
        try:
          content, labels[i] = self.images.read(image)
          pixels[i] = decoding.decode(
            content, self.size, self.scale, rng, keep=self.keep
          )
          weights[i] = 1
          break
        except (errors.UserError, MemoryError):
          raise
        except Exception as e:  # Pillow raises many types of errors.
          corrupt.append((image, reason(e)))
    arrays = dict(zip(ARRAYS, (pixels, labels, weights), strict=True))
    return {**arrays, 'corrupt': corrupt}

  def _candidates(self, place: int) -> list[int]:
    """The image at a place, then those that may replace it."""
    if place < 0:
      return []
    tries = _TRIES if self.skip and self.key is not None else 1
    n = len(self.chosen)
    return [int(self.chosen[(place + i) % n]) for i in range(min(tries, n))]


@functools.lru_cache(maxsize=2)
def _order(key: tuple[int, int], epoch: int, n: int) -> np.ndarray:
  """The permutation of n places in one epoch."""
  return np.random.default_rng([*key, 0, epoch]).permutation(n)


def reason(e: Exception) -> str:
  """The message of an exception of Pillow or the file system, on one line."""
  text = (e.strerror if isinstance(e, OSError) else '') or str(e)
  if 'cannot identify image file' in text:
    return 'neither JPEG nor PNG'
  return ' '.join(text.split())[:100] or type(e).__name__


class Reader(contextlib.AbstractContextManager):
  """Batches by step, decoded ahead by threads; a context manager.

  0 and -1 `workers` mean one thread for each core. `named` has the indices of
  corrupt images that were named on stderr; more are added.

  The attribute `seconds_waited` says how long `batch` has waited for threads.
  """

  def __init__(
    self, batches: Batches, workers: int, named: set[int] | None = None
  ):
    self.batches, self.seconds_waited = batches, 0.0
    self._named = set() if named is None else named
    threads = workers if workers > 0 else runs.cores()
    self._new_pool = functools.partial(
      futures.ThreadPoolExecutor, threads, 'decode'
    )
    self._pool = self._new_pool()
    self._ahead: dict[int, list[futures.Future]] = {}  # Of each step.

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown(cancel_futures=True)
    self._pool = self._new_pool()  # It starts a thread when it gets work.
    self._ahead.clear()

  def batch(self, step: int) -> dict[str, Any]:
    """All rows of a batch, as from `Batches.piece`; fast if asked in order.

    Raises:
      errors.UserError: An image cannot be decoded and must not be skipped, or
        too many images cannot be decoded to fill a batch.
    """
    if step != next(iter(self._ahead), None):  # It is not the next step.
      self.__exit__()
      # Warnings about odd EXIF and the like do not matter here.
      warnings.filterwarnings('ignore', module=r'PIL\.')
    rows = self.batches.rows
    parts = [rows[i : i + _PIECE] for i in range(0, len(rows), _PIECE)]
    for ahead in range(step, min(step + _AHEAD, len(self.batches))):
      if ahead not in self._ahead:
        self._ahead[ahead] = [
          self._pool.submit(self.batches.piece, ahead, part) for part in parts
        ]
    begin = time.perf_counter()
    pieces = [future.result() for future in self._ahead.pop(step)]
    self.seconds_waited += time.perf_counter() - begin
    joined = {k: np.concatenate([piece[k] for piece in pieces]) for k in ARRAYS}
    corrupt = [found for piece in pieces for found in piece['corrupt']]
    self._report_corrupt(corrupt, joined['weights'])
    return {**joined, 'corrupt': corrupt}

  def _report_corrupt(
    self, corrupt: Sequence[tuple[int, str]], weights: np.ndarray
  ) -> None:
    """Names corrupt images, each once, or raises an error."""
    for i, why in corrupt:
      where = self.batches.images.where(i)
      if not self.batches.skip:
        raise errors.UserError(
          f'{where} cannot be decoded ({why}).\n'
          "Replace it, or leave such files out: config.data.corrupt='skip'."
        )
      if i not in self._named:
        self._named.add(i)
        n = len(self._named)
        console.note(f'skipped, cannot be decoded: {where} ({n} so far)')
    if self.batches.key is not None and not weights.all():
      raise errors.UserError(
        f'{len(self._named)} images cannot be decoded, too many in a row to '
        f'fill a batch; the last is {where}.'
      )


# Over the devices of all processes.


def local_rows(n: int) -> np.ndarray:
  """The rows of a global batch of n that lie on this process's devices."""
  sharding = NamedSharding(devices.mesh(), PartitionSpec('data'))
  slices = sharding.addressable_devices_indices_map((n,)).values()
  rows = np.arange(n)
  return np.unique(np.concatenate([rows[i] for i in slices]))


def _over_all_devices(
  local: Sequence[np.ndarray], axis: int
) -> tuple[jax.Array, ...]:
  """Arrays over all devices from every process's rows along `axis`."""
  spec = PartitionSpec(*[None] * axis, 'data')
  sharding = NamedSharding(devices.mesh(), spec)
  return jax.make_array_from_process_local_data(sharding, tuple(local))


class StreamSource(Reader):
  """Training batches from threads; the interface of `pipeline.ArraySource`.

  `key` is the key of the augmentation in the compiled step.
  """

  def __init__(
    self, *reader: Any, key: jax.Array, augmentation: pipeline.Augmentation
  ):
    super().__init__(*reader)
    self.resident = ()  # No data stay on the device.
    self.steps_per_epoch = self.batches.steps_per_epoch
    self.draw = pipeline.Draw(augmentation)
    self._key = key

  def chunk(self, step: int, k: int) -> Any:
    """What `draw` needs for steps step .. step + k - 1, leading axis k.

    Raises:
      errors.UserError: A file cannot be decoded and must not be skipped.
    """
    local = [self.batch(i) for i in range(step, step + k)]
    stacked = [
      # One batch needs no copy.
      np.stack([b[name] for b in local]) if k > 1 else local[0][name][None]
      for name in ARRAYS[:2]
    ]
    keys = pipeline.keys_of_steps(self._key, step, k)
    return *_over_all_devices(stacked, axis=1), keys


class StreamEvaluation:
  """Evaluation batches that hold every image exactly once.

  Iterating gives (x, y, weight) as `pipeline.ArrayEvaluation` does; weight 0
  also stands for images that were skipped.

  Attributes:
    augmentation: Its `test` normalises.
    size: Number of images; after a pass, of those that could be decoded.
  """

  def __init__(self, *reader: Any, augmentation: pipeline.Augmentation):
    self.augmentation = augmentation
    self._reader = Reader(*reader)
    self.size = len(self._reader.batches.chosen)

  def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
    """Yields (images, labels, weights) on the devices."""
    skipped = 0
    batches = self._reader.batches
    with self._reader as reader:
      for step in range(len(batches)):
        batch = reader.batch(step)
        skipped += len(batch['corrupt'])
        yield _over_all_devices([batch[name] for name in ARRAYS], axis=0)
    if jax.process_count() > 1:
      skipped = multihost_utils.process_allgather(np.int32(skipped)).sum()
    self.size = len(batches.chosen) - int(skipped)
    if not self.size:
      raise errors.UserError('no image of an evaluation can be decoded.')
