"""Which image files there are, and which of them are held out. No JAX.

A folder may come from anywhere. Only regular files inside it are read: a link
that leads out of it, a pipe or a device is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import threading
from typing import Any

import numpy as np

from pfs_jax import errors

SUFFIXES = ('.jpeg', '.jpg', '.png')
MAX_BYTES = 1 << 28  # Of one image file.


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
  """A folder of class folders; images sorted by class, then by file name.

  Attributes:
    root: The folder.
    classes: Names of the class folders, sorted; a label is a place in it.
    labels: int32 [N].
    names: bytes [N], file names without folders (as an array: a tenth of the
      memory of a list of paths).
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
    with open(self.where(i), 'rb') as file:
      content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
      raise ValueError(f'larger than {MAX_BYTES >> 20} MiB')
    return content, int(self.labels[i])

  def subset(self, mask: np.ndarray) -> Folder:
    """The images where `mask` (bool [N]) holds, of the same classes."""
    return dataclasses.replace(
      self, labels=self.labels[mask], names=self.names[mask]
    )


def scan(root: pathlib.Path) -> Folder:
  """Lists a folder of class folders; reads no image.

  Args:
    root: Holds a folder for each class with files named *.JPEG, *.jpg or *.png
      in any case. Names that start with a dot are passed over.

  Raises:
    errors.UserError: The folder cannot be read, a class has no image, or a link
      leads out of the folder.
  """
  must = 'config.data.source_dir must hold'
  try:
    inside = os.path.realpath(root)
    folders = [e.name for e in _entries(root, inside) if e.is_dir()]
    classes = sorted(folders)
    found = [_file_names(root / name, inside) for name in classes]
  except OSError as e:
    raise errors.UserError(
      f'{must} class folders with image files; cannot read '
      f'{e.filename or root} ({e.strerror}).'
    ) from e
  if not classes:
    raise errors.UserError(f'{must} class folders; {root} has none.')
  for name, files in zip(classes, found, strict=True):
    if not files:
      raise errors.UserError(
        f'{must} images of every class; {root / name} has none '
        f'({", ".join(SUFFIXES)} in any case).'
      )
  counts = [len(files) for files in found]
  labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
  names = np.array([os.fsencode(name) for files in found for name in files])
  return Folder(str(root), tuple(classes), labels, names)


def scan_pair(root: pathlib.Path, *splits: str) -> tuple[Folder, Folder]:
  """Lists the folders of training and test images, of the same classes."""
  train, test = (scan(root / split) for split in splits)
  if test.classes != train.classes:
    odd = sorted(set(test.classes) ^ set(train.classes))
    raise errors.UserError(
      'config.data.source_dir must hold the same classes in '
      f'{" and ".join(splits)}; {root} has {", ".join(odd[:3])} in one only.'
    )
  return train, test


def _file_names(folder: pathlib.Path, inside: str) -> list[str]:
  files = [
    entry
    for entry in _entries(folder, inside)
    if entry.name.lower().endswith(SUFFIXES)
  ]
  for entry in files:
    if not entry.is_file():
      raise errors.UserError(
        f'config.data.source_dir must hold regular files; {entry.path} is none.'
      )
  return sorted(entry.name for entry in files)


def _entries(folder: pathlib.Path, inside: str) -> list[os.DirEntry]:
  """What is in a folder and not hidden; a link out of `inside` is refused."""
  with os.scandir(folder) as found:
    entries = [entry for entry in found if not entry.name.startswith('.')]
  for entry in entries:
    if entry.is_symlink():
      target = os.path.realpath(entry.path)
      if os.path.commonpath([target, inside]) != inside:
        raise errors.UserError(
          f'config.data.source_dir must not hold links that lead out of it; '
          f'{entry.path} leads to {target}.\n'
          '`cp -rL` makes a copy without links.'
        )
  return entries


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
    file = os.fsdecode(self._examples([int(i)])[0]['file_name'])
    return f'{file} ({self.name} {self.split}[{i}] in {self.data_dir})'

  def read(self, i: int) -> tuple[bytes, int]:
    """(file content, label) of image i."""
    (example,) = self._examples([int(i)])
    return example['image'], int(example['label'])

  def names_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
    """File names (bytes [N]) and labels (int32 [N]); reads every record."""
    names, labels = [], []
    for start in range(0, self.count, 100):
      stop = min(start + 100, self.count)
      for example in self._examples(list(range(start, stop))):
        names.append(os.fsencode(example['file_name']))
        labels.append(int(example['label']))
    return np.array(names), np.array(labels, np.int32)

  def _examples(self, indices: list[int]) -> list[dict[str, Any]]:
    source, features, decoders = _open_records(self)
    return [
      features.deserialize_example_np(record, decoders=decoders)
      for record in source.__getitems__(indices)
    ]


_READERS: dict[Records, tuple] = {}
_OPENING = threading.Lock()


def _open_records(records: Records) -> tuple:
  """(data source, features, decoders), opened once and used by all threads."""
  with _OPENING:
    if records not in _READERS:
      import tensorflow_datasets as tfds

      builder = tfds.builder(
        records.name, data_dir=records.data_dir, file_format='array_record'
      )
      source = builder.as_data_source(
        records.split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      )
      decoders = {'image': tfds.decode.SkipDecoding()}
      _READERS[records] = (source, builder.info.features, decoders)
    return _READERS[records]


def held_out(
  names: np.ndarray, labels: np.ndarray, per_class: int | np.ndarray
) -> np.ndarray:
  """Which images are held out: a rule on file names alone.

  In each class, the `per_class` images whose file names (bytes, without
  folders) have the least SHA-256. So the split does not depend on the order of
  the files, on a seed, or on whether ImageNet comes as a folder or from TFDS,
  which keeps the names.

  >>> names = np.array([b'a.png', b'b.png', b'c.png', b'd.png'])
  >>> held_out(names, np.array([0, 0, 1, 1]), 1)
  array([False,  True,  True, False])

  Args:
    names: bytes [N].
    labels: int [N]; every class has an image.
    per_class: Images held out in each class; one number, or one for each class.

  Returns:
    bool [N].

  Raises:
    errors.UserError: A class has no more images than it should give.
  """
  counts = np.bincount(labels)
  wanted = np.broadcast_to(per_class, counts.shape)
  least = np.argmin(counts - wanted)
  if counts[least] <= wanted[least]:
    raise errors.UserError(
      'config.data.validation_examples must leave images of every class to '
      f'train on: the smallest has {counts[least]}; asked are '
      f'{wanted[least]} a class.'
    )
  digests = np.array([hashlib.sha256(bytes(n)).digest() for n in names], 'S32')
  order = np.lexsort((names, digests, labels))
  rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
  mask = np.zeros(len(labels), bool)
  mask[order] = rank < np.repeat(wanted, counts)
  return mask
