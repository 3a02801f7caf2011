"""Reads data that TFDS has prepared in `data_dir`, without TensorFlow."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pfs_jax import errors, storage

_CHUNK = 1000  # Records asked of TFDS at a time.

Example = tuple[bytes, int, bytes]  # File content, label, file name or b''.


def directory(data_dir: str) -> pathlib.Path:
  """`config.data.data_dir` as a path; '' is TFDS's default.

  Raises:
    errors.UserError: It is not a local directory.
  """
  if '://' in data_dir:
    raise errors.UserError(
      f'config.data.data_dir must be a local directory; got {data_dir}.'
    )
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return storage.expanded(data_dir or default)


def find(name: str, root: pathlib.Path) -> Any:
  """TFDS's own builder of a data set that is prepared in `root`, or None.

  Raises:
    errors.UserError: The data set is damaged, or not in array_record format.
  """
  import tensorflow_datasets as tfds

  stock = tfds.builder_cls(name)
  folder = root / name / str(stock.VERSION)
  if not (folder / 'dataset_info.json').exists():
    return None
  with reading(name, folder):
    builder = stock(data_dir=root)
  written = builder.info.file_format.value
  if written != 'array_record':  # Only TensorFlow reads tfrecord.
    raise errors.UserError(
      f'config.data.data_dir must hold {name} as array_record; got {written} '
      f'in {folder}.\nTFDS can convert: see docs/imagenet.md.'
    )
  return builder


@contextlib.contextmanager
def reading(name: str, folder: os.PathLike | str) -> Iterator[None]:
  """Turns an exception into an error that names the damaged folder."""
  try:
    yield
  except Exception as e:  # TFDS, protobuf and Pillow raise any type.
    reason = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
    raise errors.UserError(
      f'config.data.data_dir must hold {name} as prepared by TFDS; '
      f'{folder} cannot be read:\n{reason}\n'
      f'Delete that directory to prepare it again.'
    ) from e


class Records:
  """One split of a data set that TFDS has prepared; images stay encoded."""

  def __init__(self, builder: Any, split: str):
    import tensorflow_datasets as tfds

    self.name, self.split = builder.name, split
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    self._source = builder.as_data_source(split, deserialize_method=raw)
    self._features = builder.info.features
    # Pillow without TFDS is faster, and TFDS warns that OpenCV is absent.
    self._decoders = {'image': tfds.decode.SkipDecoding()}

  def __len__(self) -> int:
    return len(self._source)

  def identity(self) -> str:
    """What changes if other images are prepared."""
    return f'{self.name} {self.split}[{len(self)}]'

  def __iter__(self) -> Iterator[Example]:
    """(file content, label, file name or b'') of all images, in order."""
    for start in range(0, len(self), _CHUNK):
      yield from self._examples(range(start, min(start + _CHUNK, len(self))))

  def _examples(self, places: Iterable[int]) -> Iterator[Example]:
    for record in self._source.__getitems__(list(places)):
      example = self._features.deserialize_example_np(
        record, decoders=self._decoders
      )
      name = os.fsencode(example.get('file_name', b''))
      yield example['image'], int(example['label']), name

  def read(self, i: int) -> tuple[bytes, int]:
    """(file content, label) of image i."""
    ((content, label, _),) = self._examples([int(i)])
    return content, label

  def where(self, i: int) -> str:
    """File name, data set, split and place of image i."""
    place = f'({self.name} {self.split}[{i}])'
    try:
      ((_, _, file),) = self._examples([int(i)])
    except Exception:  # The record itself is damaged.
      return f'the record {place}'
    return f'{os.fsdecode(file)} {place}'

  def names_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
    """File names (bytes [N]) and labels (int32 [N]); reads every record."""
    pairs = [(label, name) for _, label, name in self]  # Without the images.
    labels, names = zip(*pairs, strict=True)
    return np.array(names), np.array(labels, np.int32)
