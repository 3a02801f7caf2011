"""Which image files a folder holds, and which of them are held out. No JAX.

A folder may come from anywhere. Only regular files inside it are read: a link
that leads out of it, a pipe or a device is refused.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Self

import numpy as np

from pfs_jax import errors

SUFFIXES = ('.jpeg', '.jpg', '.png')
MAX_BYTES = 1 << 28  # Per image file.


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
  """A folder of class folders; images sorted by class, then by file name.

  Attributes:
    root: The folder.
    classes: Names of the class folders, sorted; a label is an index into it.
    labels: int32 [N].
    names: bytes [N], file names without folders. This array takes a tenth of
      the memory of a list of paths.
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

  def identity(self) -> str:
    """A hash of classes, labels and file names, which the images follow."""
    known = ['\0'.join(self.classes).encode('utf-8', 'surrogateescape')]
    known += [self.labels.tobytes(), b'\0'.join(self.names.tolist())]
    return hashlib.sha256(b'\0\0'.join(known)).hexdigest()

  def read(self, i: int) -> tuple[bytes, int]:
    """(file content, label) of image i."""
    path = self.where(i)
    try:
      with open(path, 'rb') as file:
        content = file.read(MAX_BYTES + 1)
    except OSError as e:  # The image may be good: it must not be left out.
      raise errors.UserError(f'{path} cannot be read: {e.strerror}.') from e
    if len(content) > MAX_BYTES:
      raise ValueError(f'larger than {MAX_BYTES >> 20} MiB')
    return content, int(self.labels[i])

  def subset(self, mask: np.ndarray) -> Self:
    """The images where `mask` (bool [N]) holds, of the same classes."""
    return dataclasses.replace(
      self, labels=self.labels[mask], names=self.names[mask]
    )


def scan(root: pathlib.Path) -> Folder:
  """Lists a folder of class folders; reads no image.

  Images are named *.jpeg, *.jpg or *.png in any case. Names that start with a
  dot are left out.

  Raises:
    errors.UserError: The folder cannot be read, a class has no image, or a link
      leads out of the folder.
  """
  must = 'config.data.source_dir must hold'
  try:
    inside = os.path.realpath(root)
    classes = sorted(e.name for e in _entries(root, inside) if e.is_dir())
    found = [_file_names(root / name, inside) for name in classes]
  except OSError as e:
    raise errors.UserError(
      f'{must} class folders with image files; cannot read '
      f'{e.filename or root} ({e.strerror}).'
    ) from e
  if len(classes) < 2:
    have = f'{root} has {len(classes)}'
    raise errors.UserError(f'{must} at least 2 class folders; {have}.')
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
      f'{" and ".join(splits)}; in {root}, one lacks {", ".join(odd[:3])}.'
    )
  return train, test


def _file_names(folder: pathlib.Path, inside: str) -> list[str]:
  names = []
  for entry in _entries(folder, inside):
    if not entry.name.lower().endswith(SUFFIXES):
      continue
    if not entry.is_file():
      raise errors.UserError(
        f'config.data.source_dir must hold regular files; {entry.path} is not.'
      )
    names.append(entry.name)
  return sorted(names)


def _entries(folder: pathlib.Path, inside: str) -> list[os.DirEntry]:
  """The entries of a folder that are not hidden; no link may leave `inside`."""
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


def held_out(
  names: np.ndarray, labels: np.ndarray, per_class: int | np.ndarray
) -> np.ndarray:
  """Which images are held out: a rule on file names alone.

  In each class, the `per_class` images (one number, or one for each class)
  whose file names (bytes, without folders) have the least SHA-256 are held out.
  So the split does not depend on the order of the files, on a seed, or on
  whether ImageNet comes as a folder or from TFDS, which keeps the names.

  >>> names = np.array([b'a.png', b'b.png', b'c.png', b'd.png'])
  >>> held_out(names, np.array([0, 0, 1, 1]), 1)
  array([False,  True,  True, False])

  Raises:
    errors.UserError: No image of some class would remain.
  """
  counts = np.bincount(labels)
  wanted = np.broadcast_to(per_class, counts.shape)
  least = np.argmin(counts - wanted)
  if counts[least] <= wanted[least]:
    raise errors.UserError(
      'config.data.validation_examples must leave images of every class to '
      f'train on: the smallest has {counts[least]}; got {wanted[least]} for '
      'each class.'
    )
  digests = np.array([hashlib.sha256(bytes(n)).digest() for n in names], 'S32')
  order = np.lexsort((names, digests, labels))
  rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
  mask = np.zeros(len(labels), bool)
  mask[order] = rank < np.repeat(wanted, counts)
  return mask
