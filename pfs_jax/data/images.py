"""Image files to uint8 batches on the host; runs in worker processes.

A batch is a pure function of (key, step): which images, and how each is
cropped. Nothing here imports JAX or TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps

from pfs_jax import errors

SUFFIXES = ('.jpeg', '.jpg', '.png')
_ORIENTATION = 0x0112  # The EXIF tag.
_TRIES = 100  # Images in a row that may be corrupt before a batch gives up.


# Where images are.


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
  """A folder of class folders; images sorted by class, then by file name.

  Attributes:
    root: `source_dir`/train or `source_dir`/val.
    classes: Names of the class folders, sorted; a label is a place in it.
    labels: int32 [N].
    names: bytes [N], file names without folders. (An array of bytes is a tenth
      of a list of paths, and it is sent to every worker.)
  """

  root: str
  classes: tuple[str, ...]
  labels: np.ndarray
  names: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def where(self, i: int) -> str:
    """The path of image i."""
    folder = self.classes[self.labels[i]]
    return os.path.join(self.root, folder, os.fsdecode(self.names[i]))

  def read(self, i: int) -> tuple[bytes, int]:
    """(file content, label) of image i."""
    return pathlib.Path(self.where(i)).read_bytes(), int(self.labels[i])


def scan(root: pathlib.Path) -> Folder:
  """Lists a folder of class folders; reads no image.

  Args:
    root: Holds one folder a class with files named *.JPEG, *.jpg or *.png in
      any case. Names that start with a dot are passed over.

  Returns:
    The `Folder`.

  Raises:
    UserError: It cannot be read, or a class has no image.
  """
  try:
    classes = sorted(
      entry.name
      for entry in os.scandir(root)
      if entry.is_dir() and not entry.name.startswith('.')
    )
    found = [_file_names(root / name) for name in classes]
  except OSError as e:
    raise errors.UserError(
      'config.data.source_dir must hold train/<class>/*.JPEG and '
      f'val/<class>/*.JPEG; cannot read {e.filename or root} ({e.strerror}).'
    ) from e
  for name, files in zip(classes, found, strict=True):
    if not files:
      raise errors.UserError(
        f'config.data.source_dir must hold images of every class; {root / name}'
        f' has none ({", ".join(SUFFIXES)} in any case).'
      )
  if not classes:
    raise errors.UserError(
      f'config.data.source_dir must hold class folders; {root} has none.'
    )
  counts = [len(files) for files in found]
  labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
  names = np.array([os.fsencode(name) for files in found for name in files])
  return Folder(str(root), tuple(classes), labels, names)


def _file_names(folder: pathlib.Path) -> list[str]:
  return sorted(
    entry.name
    for entry in os.scandir(folder)
    if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith('.')
  )


@dataclasses.dataclass(frozen=True)
class Records:
  """One split of a data set that TFDS has prepared as array_record.

  Attributes:
    name: Data set.
    data_dir: TFDS's directory; absolute.
    split: 'train' or 'validation'.
    count: Number of images.
  """

  name: str
  data_dir: str
  split: str
  count: int

  def __len__(self) -> int:
    return self.count

  def where(self, i: int) -> str:
    """Data set, split, place and file name of image i."""
    file = os.fsdecode(_bytes(self.example(i)['file_name']))
    return f'{file} ({self.name} {self.split}[{i}] in {self.data_dir})'

  def read(self, i: int) -> tuple[bytes, int]:
    """(file content, label) of image i."""
    example = self.example(i)
    return example['image'], int(example['label'])

  def example(self, i: int) -> dict:
    """{'image': bytes, 'label': int, 'file_name': bytes}."""
    return self._examples([int(i)])[0]

  def names_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
    """File names (bytes [N]) and labels (int32 [N]); reads every record."""
    names, labels = [], []
    for start in range(0, self.count, 100):
      stop = min(start + 100, self.count)
      for example in self._examples(list(range(start, stop))):
        names.append(_bytes(example['file_name']))
        labels.append(int(example['label']))
    return np.array(names), np.array(labels, np.int32)

  def _examples(self, indices: list[int]) -> list[dict]:
    source, features, decoders = _opened(self)
    return [
      features.deserialize_example_np(record, decoders=decoders)
      for record in source.__getitems__(indices)
    ]


_OPEN: dict[Records, tuple] = {}  # Per process: readers cannot be sent.


def _opened(records: Records) -> tuple:
  if records not in _OPEN:
    import tensorflow_datasets as tfds

    builder = tfds.builder(
      records.name, data_dir=records.data_dir, file_format='array_record'
    )
    source = builder.as_data_source(
      records.split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
    decoders = {'image': tfds.decode.SkipDecoding()}
    _OPEN[records] = (source, builder.info.features, decoders)
  return _OPEN[records]


def _bytes(name: bytes | str) -> bytes:
  return name if isinstance(name, bytes) else os.fsencode(name)


# What is held out.


def held_out(
  names: np.ndarray, labels: np.ndarray, per_class: int
) -> np.ndarray:
  """Which training images are held out: a rule on file names alone.

  Of every class the `per_class` images whose file name has the least SHA-256
  (of its bytes, without folders) are held out. So the split does not depend on
  the order of the files, on a seed, or on whether ImageNet comes as a folder or
  by TFDS, which keeps the names.

  Args:
    names: bytes [N].
    labels: int [N].
    per_class: Images a class.

  Returns:
    bool [N].

  Raises:
    UserError: A class has no more than `per_class` images.
  """
  mask = np.zeros(len(labels), bool)
  if not per_class:
    return mask
  least = np.bincount(labels).min()
  if least <= per_class:
    raise errors.UserError(
      'config.data.validation_examples must leave images of every class to '
      f'train on: the smallest has {least}; asked are {per_class} a class.'
    )
  digests = np.array([hashlib.sha256(bytes(n)).digest() for n in names], 'S32')
  order = np.lexsort((names, digests, labels))
  starts = np.searchsorted(labels[order], np.arange(labels.max() + 1))
  mask[order[(starts[:, None] + np.arange(per_class)).ravel()]] = True
  return mask


# Pixels.


def crop_box(
  rng: np.random.Generator, width: int, height: int, scale: float
) -> tuple[int, int, int, int]:
  """A random crop of `scale`..1 of the area, sides 3:4 to 4:3.

  Ten attempts at a box that fits (area uniform, ratio log-uniform, place
  uniform), then the largest centred one within the ratios.

  Returns:
    (left, top, right, bottom), whole pixels.
  """
  for _ in range(10):
    area = rng.uniform(scale, 1.0) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(0, width - w + 1))
      top = int(rng.integers(0, height - h + 1))
      return left, top, left + w, top + h
  w = max(1, min(width, round(height * 4 / 3)))
  h = max(1, min(height, round(width * 4 / 3)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def decode(
  content: bytes,
  size: int,
  scale: float = 0.0,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """One image, upright, RGB, cropped and resized (bilinear, antialiased).

  What a file is, is read from its content, not from its name. Grey and palette
  images become RGB, CMYK is converted, alpha is dropped, and EXIF's orientation
  is followed.

  Args:
    content: A JPEG or PNG file.
    size: Height and width of the result.
    scale: Least share of the area of a random crop; 0: the centre crop of
      evaluation, which keeps 224/256 of the shorter side. (Crop and resize are
      one operation, without rounding in between.)
    rng: For the random crop.

  Returns:
    uint8 [size, size, 3].

  Raises:
    Exception: Of many kinds, where the content is no image or is damaged.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Odd EXIF and the like; the pixels count.
    image = Image.open(io.BytesIO(content))
    turned = image.getexif().get(_ORIENTATION, 1) != 1
    if turned:  # Rare.
      image = ImageOps.exif_transpose(image)
    width, height = image.size
    if scale:
      box = crop_box(rng, width, height, scale)
    else:
      box = _centre(width, height)
    if not turned:
      _halve(image, min(box[2] - box[0], box[3] - box[1]) / size)
    image = image.convert('RGB')
    x, y = image.width / width, image.height / height
    right, bottom = min(box[2] * x, image.width), min(box[3] * y, image.height)
    box = (box[0] * x, box[1] * y, right, bottom)
    return np.asarray(
      image.resize((size, size), Image.Resampling.BILINEAR, box)
    )


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
  side = min(width, height) * 224 / 256
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _halve(image: Image.Image, shrink: float) -> None:
  """Lets a JPEG decoder halve, while the crop stays larger than the result."""
  if image.format == 'JPEG' and shrink >= 2:
    width, height = image.size
    image.draft(None, (int(width / shrink), int(height / shrink)))


# Batches.


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """The rows of every batch that this process decodes.

  Training: the order of an epoch is a permutation from (key, epoch), the crop
  of a row comes from (key, step, row in the global batch). What remains of a
  permutation after whole batches is left out. Evaluation (`key` None): every
  image once, in order.

  Attributes:
    images: `Folder` or `Records`.
    chosen: int [N], the images of it that belong to this set.
    batch_size: Images in a global batch.
    rows: int [B], the rows of the global batch that this process decodes.
    size: Height and width.
    key: Two 32-bit numbers, or None.
    scale: Least share of the area of a random crop; 0: centre crops.
    skip: Whether the place of a corrupt training image is taken by the next
      one of the set.
  """

  images: Folder | Records
  chosen: np.ndarray
  batch_size: int
  rows: np.ndarray
  size: int
  key: tuple[int, int] | None = None
  scale: float = 0.0
  skip: bool = False

  def __repr__(self) -> str:
    return f'Batches({len(self.chosen)} images, {self.batch_size} a batch)'

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch, or in all of an evaluation."""
    if self.key is None:
      return -(-len(self.chosen) // self.batch_size)
    return len(self.chosen) // self.batch_size

  def __len__(self) -> int:
    """Batches of an evaluation; a training has no end."""
    return self.steps_per_epoch if self.key is None else 1 << 40

  def _places(self, step: int) -> np.ndarray:
    """Places in `chosen` of this process's rows; -1 after the last image."""
    n = len(self.chosen)
    if self.key is None:
      places = step * self.batch_size + self.rows
      return np.where(places < n, places, -1)
    epoch, position = divmod(step, self.steps_per_epoch)
    return self._order(epoch)[position * self.batch_size + self.rows]

  def _order(self, epoch: int) -> np.ndarray:
    if self.__dict__.get('_epoch') != epoch:  # A memory, not a state.
      rng = np.random.default_rng([*self.key, 0, epoch])
      self.__dict__['_permutation'] = rng.permutation(len(self.chosen))
      self.__dict__['_epoch'] = epoch
    return self.__dict__['_permutation']

  def piece(
    self, step: int, rows: slice
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Some of this process's rows of one batch.

    Args:
      step: Which batch.
      rows: Which of `self.rows`.

    Returns:
      pixels: uint8 [n, size, size, 3]; zeros where there is no image.
      labels: int32 [n].
      weights: float32 [n], 1, or 0 where there is no image.
      corrupt: Places in `images` that could not be decoded.
    """
    places, numbers = self._places(step)[rows], self.rows[rows]
    n = len(places)
    pixels = np.zeros((n, self.size, self.size, 3), np.uint8)
    labels, weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
    corrupt = []
    for row, (place, number) in enumerate(zip(places, numbers, strict=True)):
      rng = None
      if self.key is not None:
        rng = np.random.default_rng([*self.key, 1, step, int(number)])
      for image in self._candidates(place):
        try:
          content, labels[row] = self.images.read(image)
          pixels[row] = decode(content, self.size, self.scale, rng)
          weights[row] = 1
          break
        except Exception:  # Pillow's own kinds are many.
          corrupt.append(image)
    return pixels, labels, weights, corrupt

  def _candidates(self, place: int) -> list[int]:
    """The image at a place, and those that may stand in for it."""
    if place < 0:
      return []
    tries = _TRIES if self.skip and self.key is not None else 1
    n = len(self.chosen)
    return [int(self.chosen[(place + i) % n]) for i in range(min(tries, n))]
