"""TFDS without TensorFlow: prepare once, decode once, then one .npz file.

Under `data_dir`, for a data set NAME:
  NAME/VERSION/           what TFDS keeps: array_record, which its own builder
                          reads
  NAME/pfs_jax_uint8.npz  the same, decoded, with a checksum: what every later
                          start reads
  .pfs_jax_NAME_*         work in progress; renamed when complete

The examples are in the order of TFDS's prepared split: sorted by a hash of the
upstream index, the same on every machine, classes well mixed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tensorboardX import record_writer

from pfs_jax import console, errors, storage
from pfs_jax.data import archives, specs, upstream

_CACHE = 'pfs_jax_uint8.npz'
_CHUNK = 1000  # Records asked of TFDS at a time.

Arrays = dict[str, np.ndarray]


def load(
  spec: specs.Spec, data_dir: str, source_dir: str, download: bool
) -> Arrays:
  """The decoded arrays, from the cache or, the first time, made for it.

  Args:
    spec: Of mnist, fashion_mnist, cifar10 or cifar100.
    data_dir: See `arrays.load`, as for the others.
    source_dir: Read only if nothing is prepared yet, and never written.
    download: Whether the network may be used, once.

  Returns:
    The arrays of `arrays.Dataset` by name.

  Raises:
    errors.UserError: The data are missing, wrong, or cannot be kept.
  """
  root = _root(data_dir)
  cache = root / spec.name / _CACHE
  check = functools.partial(_check, spec)
  arrays = read_cached(cache, check)
  if arrays is not None:
    return arrays
  _make_root(root)
  busy = f'{spec.name}: another process prepares data in {root}; waiting'
  # Some network file systems have no locks: there two processes may both do the
  # work, and the renames still keep it whole.
  with storage.locked(root, wait=lambda: console.note(busy)):
    for left in root.glob(f'.pfs_jax_{spec.name}_*'):  # Of a killed process.
      shutil.rmtree(left, ignore_errors=True)
    arrays = read_cached(cache, check)  # Another process may have been first.
    if arrays is None:
      arrays = _decode_once(spec, root, source_dir, download)
  return arrays


def prepared(name: str, data_dir: str) -> tuple[pathlib.Path, Any]:
  """Finds a data set of TFDS that is prepared.

  Returns:
    (the directory that was looked into, TFDS's own builder or None).

  Raises:
    errors.UserError: The directory is damaged, or not a local one.
  """
  root = _root(data_dir)
  there = _is_prepared(name, root)
  return root, _stock_builder(name, root) if there else None


def _root(data_dir: str) -> pathlib.Path:
  if '://' in data_dir:
    raise errors.UserError(
      f'config.data.data_dir must be a local directory; got {data_dir}.'
    )
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(data_dir or default).expanduser()


def _make_root(root: pathlib.Path) -> None:
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f'config.data.data_dir must be a directory, or one that can be made; '
      f'got {root} ({e.strerror}).'
    ) from e


def _decode_once(
  spec: specs.Spec, root: pathlib.Path, source_dir: str, download: bool
) -> Arrays:
  """Prepares if need be, decodes, and keeps the result beside it."""
  if not _is_prepared(spec.name, root):
    raw = _raw_files(spec.name, root, source_dir, download)
    _prepare(spec, root, raw)
  arrays = _decode(_stock_builder(spec.name, root), spec)
  try:
    storage.write_arrays(root / spec.name / _CACHE, arrays, sealed=True)
  except errors.UserError as e:
    # Prepared data may well lie in a shared directory that is read-only.
    console.note(f'{spec.name}: decoded, but not kept: {e}')
  return arrays


def read_cached(
  path: pathlib.Path, check: Callable[[Arrays], None]
) -> Arrays | None:
  """Sealed arrays that can be made again; None where there are none.

  What was damaged or changed since is named on stderr and counts as none.

  Args:
    path: The file.
    check: Raises `ValueError` or `KeyError` if the arrays are others.
  """
  if not path.exists():
    return None
  try:
    arrays = storage.read_arrays(path)
    check(arrays)
    return arrays
  except errors.UserError as e:
    reason = str(e).splitlines()[0]
  except (KeyError, ValueError) as e:
    reason = f'{path} is damaged ({e}).'
  console.note(f'{reason} Making it again.')
  return None


def _check(spec: specs.Spec, arrays: Arrays) -> None:
  """`ValueError` unless shapes, types and labels are those of the data set."""
  for split, count in _counts(spec).items():
    images, labels = arrays[f'{split}_images'], arrays[f'{split}_labels']
    shape = (count, spec.image_size, spec.image_size, spec.channels)
    if images.shape != shape or images.dtype != np.uint8:
      raise ValueError(
        f'{split} images are {images.dtype} {images.shape}, not uint8 {shape}'
      )
    if labels.shape != (count,) or labels.dtype != np.int32:
      raise ValueError(
        f'{split} labels are {labels.dtype} {labels.shape}, not int32 [{count}]'
      )
    if count and not 0 <= labels.min() <= labels.max() < spec.num_classes:
      raise ValueError(f'{split} labels are not in 0..{spec.num_classes - 1}')


def _counts(spec: specs.Spec) -> dict[str, int]:
  return {'train': spec.train_examples, 'test': spec.test_examples}


# Upstream's bytes.


def _raw_files(
  name: str, root: pathlib.Path, source_dir: str, download: bool
) -> dict[str, bytes]:
  if source_dir:
    return upstream.from_folder(name, source_dir)
  if not download:
    raise _missing(name, root, 'config.data.download is False')
  try:
    return upstream.download(name)
  except upstream.Unreachable as e:
    raise _missing(name, root, f'the download failed: {e}') from e


def _missing(name: str, root: pathlib.Path, why: str) -> errors.UserError:
  names = ', '.join(file.name for file in upstream.expected(name))
  debian = (
    f', e.g. {upstream.DEBIAN_FASHION} after `apt-get install '
    f'dataset-fashion-mnist`'
    if name == 'fashion_mnist'
    else ''
  )
  return errors.UserError(
    f'{name} is not prepared in {root}, and {why}.\n'
    f'Supply it by network (config.data.download=True), by '
    f'config.data.data_dir (a directory prepared by TFDS),\n'
    f'or by config.data.source_dir (a directory with {names}{debian}).'
  )


# TFDS.


def _stock_builder(name: str, root: pathlib.Path):
  """TFDS's own builder, with the file format of what is on the disk."""
  import tensorflow_datasets as tfds

  stock = tfds.builder_cls(name)
  with _reading(name, root / name / str(stock.VERSION)):
    return stock(data_dir=root)


def _is_prepared(name: str, root: pathlib.Path) -> bool:
  # TFDS's `is_prepared` warns on stderr where the answer is no.
  folder = pathlib.Path(_stock_builder(name, root).data_path)
  return (folder / 'dataset_info.json').exists()


def _prepare(
  spec: specs.Spec, root: pathlib.Path, raw: dict[str, bytes]
) -> None:
  """Writes `root`/NAME/VERSION, complete or not at all."""
  import tensorflow_datasets as tfds

  console.note(f'{spec.name}: preparing in {root} (once, about half a minute)')
  splits = archives.parse(spec.name, raw)
  got = {split: len(examples) for split, examples in splits.items()}
  assert got == _counts(spec), (got, _counts(spec))
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    # Beside the final place, so that the rename is atomic.
    prefix = f'.pfs_jax_{spec.name}_'
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as work:
      builder = _builder(spec, work, splits)
      tfds.disable_progress_bar()
      with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner.
        builder.download_and_prepare(download_config=config)
      final = root / builder.data_path.relative_to(work)
      final.parent.mkdir(exist_ok=True)
      # Where there are no locks another process may have been first.
      if not _is_prepared(spec.name, root):
        os.rename(builder.data_path, final)
  except OSError as e:
    raise errors.UserError(
      f'config.data.data_dir must be a directory that can be written; '
      f'got {root} ({e}).'
    ) from e


def _builder(spec: specs.Spec, work: str, splits: archives.Examples):
  """TFDS's builder with our examples, images as PNG bytes.

  Name, version and features are TFDS's, so that its reader takes the result.
  Images are encoded here because TFDS would do it with TensorFlow.
  """
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered

  stock: Any = tfds.builder_cls(spec.name)

  def encode(examples):
    for i, example in enumerate(examples):
      png = io.BytesIO()
      Image.fromarray(example['image']).save(png, 'png')
      yield i, {**example, 'image': png.getvalue()}

  with registered.skip_registration():  # TFDS has this name.

    class Prepared(stock):
      name = stock.name
      pkg_dir_path = None

      def _split_generators(self, dl_manager):
        del dl_manager
        if spec.name.startswith('cifar'):  # Those of the archive.
          self.info.features['label'].names = list(spec.class_names)
        return {split: encode(examples) for split, examples in splits.items()}

  return Prepared(data_dir=work, file_format='array_record')


def _decode(builder: Any, spec: specs.Spec) -> Arrays:
  """All examples of a prepared data set, in its order."""
  arrays = {}
  with _reading(spec.name, builder.data_path):
    for split in ('train', 'test'):
      examples = list(_examples(builder, split))
      images, labels = zip(*examples, strict=True)
      arrays[f'{split}_images'] = np.stack(images)
      arrays[f'{split}_labels'] = np.array(labels, np.int32)
    _check(spec, arrays)
  return arrays


@contextlib.contextmanager
def _reading(name: str, folder: os.PathLike) -> Iterator[None]:
  """Names the directory that is damaged, or holds something else."""
  try:
    yield
  except Exception as e:  # TFDS, array_record, protobuf, Pillow: many kinds.
    reason = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
    raise errors.UserError(
      f'config.data.data_dir must hold {name} as prepared by TFDS; '
      f'{folder} cannot be read:\n{reason}\n'
      f'Delete that directory to prepare it again.'
    ) from e


def _examples(builder: Any, split: str) -> Iterator[tuple[np.ndarray, int]]:
  """(image uint8 [H, W, C], label) of one split."""
  import tensorflow_datasets as tfds
  from PIL import Image

  # Pillow without TFDS takes a third less time (1.0 against 1.4 s for 10,000
  # images), and TFDS warns that OpenCV is absent.
  as_png = {'image': tfds.decode.SkipDecoding()}
  features = builder.info.features
  for record in _records(builder, split):
    example = features.deserialize_example_np(record, decoders=as_png)
    with Image.open(io.BytesIO(example['image']), formats=['PNG']) as image:
      yield np.asarray(image).reshape(*image.size[::-1], -1), example['label']


def _records(builder, split: str) -> Iterator[bytes]:
  """The serialised examples, from array_record or TFDS's usual tfrecord."""
  import tensorflow_datasets as tfds

  if builder.info.file_format.value == 'tfrecord':
    for path in builder.info.splits[split].filepaths:
      yield from tfrecords(path)
    return
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  source = builder.as_data_source(split, deserialize_method=raw)
  for start in range(0, len(source), _CHUNK):
    indices = range(start, min(start + _CHUNK, len(source)))
    yield from source.__getitems__(list(indices))


def tfrecords(path: str | os.PathLike) -> Iterator[bytes]:
  """The records of a TFRecord file, each checked (a few MB a second).

  A record is its length (uint64, little-endian) and its data, each followed by
  its masked CRC-32C (uint32).

  Raises:
    ValueError: The file ends in the middle of a record, or a checksum differs.
  """
  with open(path, 'rb') as stream:
    size = os.fstat(stream.fileno()).st_size
    while header := stream.read(12):
      length = int.from_bytes(header[:8], 'little')
      if len(header) < 12 or length + 4 > size - stream.tell():
        raise ValueError(f'{path} ends in the middle of a record')
      record = stream.read(length + 4)
      for part in (header, record):
        check = record_writer.masked_crc32c(part[:-4])
        if check != int.from_bytes(part[-4:], 'little'):
          raise ValueError(f'{path} has a record that fails its checksum')
      yield record[:-4]
