"""TFDS without TensorFlow: prepare once, decode once, then one .npz file.

Under `data_dir`, for a data set NAME:
  NAME/VERSION/           what TFDS keeps: array_record, readable by its stock
                          builder (and by nothing less than TFDS)
  NAME/pfs_jax_uint8.npz  the same, decoded: what every later start reads
  .pfs_jax_NAME_*         work in progress; renamed into place when complete

The examples stand in the order of TFDS's prepared split: sorted by a hash of
the upstream index, the same on every machine, classes well mixed.
"""

import contextlib
import fcntl
import gzip
import io
import os
import pathlib
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from pfs_jax import errors
from pfs_jax.data import files, registry

_CACHE = 'pfs_jax_uint8.npz'
_KEYS = ('train_images', 'train_labels', 'test_images', 'test_labels')
_CHUNK = 1000  # Records asked of TFDS at a time.

Arrays = dict[str, np.ndarray]


def load(
  spec: registry.Spec, data_dir: str, source_dir: str, download: bool
) -> Arrays:
  """The decoded arrays, from the cache or, the first time, made for it.

  Args:
    spec: mnist, fashion_mnist, cifar10 or cifar100.
    data_dir: TFDS's directory; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    source_dir: '' or a directory with upstream's files; read only if nothing
      is prepared yet, and never written.
    download: whether the network may be asked, once.

  Returns:
    train_images and test_images uint8 [N, H, W, C], train_labels and
    test_labels int32 [N].

  Raises:
    UserError: the data is not there, not right, or cannot be kept.
  """
  root = _root(data_dir)
  cache = root / spec.name / _CACHE
  arrays = _read_cache(cache, spec)
  if arrays is not None:
    return arrays
  _make_root(root)
  with _one_at_a_time(root, spec.name):
    arrays = _read_cache(cache, spec)  # Another process may have been first.
    if arrays is None:
      arrays = _decode_once(spec, root, source_dir, download)
  return arrays


def prepared(name: str, data_dir: str):
  """The stock builder of a data set that is prepared, or None.

  Args:
    name: any data set of TFDS.
    data_dir: as in `load`.

  Returns:
    (the directory that was looked into, the builder or None).

  Raises:
    UserError: the directory is damaged, or not a local one.
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


@contextlib.contextmanager
def _one_at_a_time(root: pathlib.Path, name: str) -> Iterator[None]:
  """Others wait here and then find the work done.

  The lock is on the directory itself, so that no file of it stays behind; it
  ends with the process. Some network file systems have no locks: there two
  processes may both do the work, and the renames still keep it whole.
  """
  handle = os.open(root, os.O_RDONLY)
  try:
    locked = _lock(handle, f'{name}: another process prepares data in {root}')
    if locked:
      # Only now is it sure that these belong to a process that was killed.
      for left in root.glob(f'.pfs_jax_{name}_*'):
        shutil.rmtree(left, ignore_errors=True)
    yield
  finally:
    os.close(handle)


def _lock(handle: int, why: str) -> bool:
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      files.say(f'{why}; waiting')
      fcntl.flock(handle, fcntl.LOCK_EX)
  except OSError:
    return False
  return True


def _decode_once(
  spec: registry.Spec, root: pathlib.Path, source_dir: str, download: bool
) -> Arrays:
  """Prepares if need be, decodes, and keeps the result beside it."""
  if not _is_prepared(spec.name, root):
    raw = _raw_files(spec.name, root, source_dir, download)
    _prepare(spec, root, raw)
  arrays = _decode(_stock_builder(spec.name, root), spec)
  try:
    with _work_folder(root, spec.name) as work:
      np.savez(work / _CACHE, **arrays)
      os.replace(work / _CACHE, root / spec.name / _CACHE)
  except OSError as e:
    # A shared, read-only directory is a fair place for prepared data.
    files.say(f'{spec.name}: decoded, but not kept in {root} ({e.strerror})')
  return arrays


def _read_cache(path: pathlib.Path, spec: registry.Spec) -> Arrays | None:
  """The cache if it is there and whole, else None; zip checks the CRC."""
  try:
    # Our own open(): np.load leaves a damaged zip file open.
    with open(path, 'rb') as f, np.load(f, allow_pickle=False) as stored:
      arrays = {key: stored[key] for key in _KEYS}
    _check(arrays, spec)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (
    *(OSError, ValueError, KeyError, EOFError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
  ) as e:
    files.say(f'{spec.name}: {path} is damaged ({e}); making it again')
    return None
  return arrays


def _check(arrays: Arrays, spec: registry.Spec) -> None:
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


def _counts(spec: registry.Spec) -> dict[str, int]:
  return {'train': spec.train_examples, 'test': spec.test_examples}


@contextlib.contextmanager
def _work_folder(root: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """A folder on the file system of `root`, so that a rename is atomic."""
  with tempfile.TemporaryDirectory(
    prefix=f'.pfs_jax_{name}_', dir=root
  ) as work:
    yield pathlib.Path(work)


# Upstream's bytes.


def _raw_files(
  name: str, root: pathlib.Path, source_dir: str, download: bool
) -> dict[str, bytes]:
  if source_dir:
    return files.from_folder(name, source_dir)
  if not download:
    raise _missing(name, root, 'config.data.download is False')
  try:
    return files.download(name)
  except files.Unreachable as e:
    raise _missing(name, root, f'the download failed: {e}') from e


def _missing(name: str, root: pathlib.Path, why: str) -> errors.UserError:
  names = ', '.join(file.name for file in files.expected(name))
  debian = (
    f', e.g. {files.DEBIAN_FASHION} after `apt-get install '
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


def _parse_mnist(raw: dict[str, bytes]) -> dict[str, list[dict]]:
  """The four IDX files as the examples of TFDS's mnist, image as array."""
  splits = {}
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    images = _idx(raw[f'{prefix}-images-idx3-ubyte.gz'])
    labels = _idx(raw[f'{prefix}-labels-idx1-ubyte.gz'])
    splits[split] = [
      {'image': image, 'label': int(label)}
      for image, label in zip(images, labels, strict=True)
    ]
  return splits


def _idx(content: bytes) -> np.ndarray:
  """IDX: two zero bytes, type (8 = uint8), rank; sizes big-endian; data."""
  content = gzip.decompress(content)
  rank = content[3]
  shape = struct.unpack_from(f'>{rank}I', content, 4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _parse_cifar(raw: dict[str, bytes]) -> dict[str, list[dict]]:
  """The binary archive as the examples of TFDS's cifar10 or cifar100.

  A record is its labels, one byte each (CIFAR-100: coarse, fine), then 3072
  bytes [channel, row, column].
  """
  ((name, content),) = raw.items()
  if name.startswith('cifar-100'):
    prefix, keys = 'cifar-100-binary/', ('coarse_label', 'label')
    members = {'train': ['train.bin'], 'test': ['test.bin']}
  else:
    prefix, keys = 'cifar-10-batches-bin/', ('label',)
    batches = [f'data_batch_{i}.bin' for i in range(1, 6)]
    members = {'train': batches, 'test': ['test_batch.bin']}
  found = _members(content, prefix, [m for ms in members.values() for m in ms])
  splits = {}
  for split, names in members.items():
    data = np.frombuffer(b''.join(found[n] for n in names), np.uint8)
    data = data.reshape(-1, len(keys) + 3072)
    images = data[:, len(keys) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    splits[split] = [
      {
        'id': f'{split}_{i:05d}',
        'image': image,
        **{key: int(v) for key, v in zip(keys, labels, strict=False)},
      }
      for i, (image, labels) in enumerate(zip(images, data, strict=True))
    ]
  return splits


def _members(content: bytes, prefix: str, names: list[str]) -> dict[str, bytes]:
  """Reads named regular files of a .tar.gz; extracts nothing to the disk."""
  found = {}
  with tarfile.open(fileobj=io.BytesIO(content), mode='r:gz') as archive:
    for member in archive:
      name = member.name.removeprefix('./').removeprefix(prefix)
      if name in names and member.isfile():
        found[name] = archive.extractfile(member).read()
  absent = [name for name in names if name not in found]
  assert not absent, f'the archive has the right sha256 but lacks {absent}'
  return found


_PARSERS = {
  'mnist': _parse_mnist,
  'fashion_mnist': _parse_mnist,
  'cifar10': _parse_cifar,
  'cifar100': _parse_cifar,
}


# TFDS.


def _stock_builder(name: str, root: pathlib.Path):
  """TFDS's own builder; what is on the disk decides its file format."""
  import tensorflow_datasets as tfds

  stock = tfds.builder_cls(name)
  with _reading(name, root / name / str(stock.VERSION)):
    return stock(data_dir=root)


def _is_prepared(name: str, root: pathlib.Path) -> bool:
  # TFDS's own question warns on stderr when the answer is no.
  folder = pathlib.Path(_stock_builder(name, root).data_path)
  return (folder / 'dataset_info.json').exists()


def _prepare(
  spec: registry.Spec, root: pathlib.Path, raw: dict[str, bytes]
) -> None:
  """Writes `root`/NAME/VERSION, complete or not at all."""
  import tensorflow_datasets as tfds

  files.say(f'{spec.name}: preparing in {root} (once, about half a minute)')
  splits = _PARSERS[spec.name](raw)
  got = {split: len(examples) for split, examples in splits.items()}
  assert got == _counts(spec), (got, _counts(spec))
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  with _writing(root), _work_folder(root, spec.name) as work:
    builder = _builder(spec, work, splits)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner.
      builder.download_and_prepare(download_config=config)
    made = work / builder.data_path.relative_to(work)
    final = root / made.relative_to(work)
    final.parent.mkdir(exist_ok=True)
    try:
      os.rename(made, final)
    except OSError:
      # Where there are no locks another process may have been first.
      if not _is_prepared(spec.name, root):
        raise


@contextlib.contextmanager
def _writing(root: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as e:
    raise errors.UserError(
      f'config.data.data_dir must be a directory that can be written; '
      f'got {root} ({e}).'
    ) from e


def _builder(
  spec: registry.Spec, work: pathlib.Path, splits: dict[str, list[dict]]
):
  """The stock builder with upstream's examples handed in, images as PNG bytes.

  Name, version and features are the stock ones, hence its reader takes the
  result. Images are encoded here because TFDS would do it with TensorFlow.
  """
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered

  stock = tfds.builder_cls(spec.name)

  def encode(examples):
    for i, example in enumerate(examples):
      png = io.BytesIO()
      Image.fromarray(example['image']).save(png, 'png')
      yield i, {**example, 'image': png.getvalue()}

  with registered.skip_registration():  # The stock builder has the name.

    class Prepared(stock):
      name = stock.name
      pkg_dir_path = None

      def _split_generators(self, dl_manager):
        del dl_manager
        if spec.name.startswith('cifar'):  # Upstream's archive names them.
          self.info.features['label'].names = list(spec.class_names)
        return {split: encode(examples) for split, examples in splits.items()}

  return Prepared(data_dir=work, file_format='array_record')


def _decode(builder, spec: registry.Spec) -> Arrays:
  """All examples of a prepared data set, in its order.

  Raises:
    UserError: the directory is damaged, or holds something else.
  """
  arrays = {}
  with _reading(spec.name, builder.data_path):
    for split, count in _counts(spec).items():
      images, labels = _decode_split(builder, split, count, spec)
      arrays.update({f'{split}_images': images, f'{split}_labels': labels})
    _check(arrays, spec)
  return arrays


@contextlib.contextmanager
def _reading(name: str, folder: os.PathLike) -> Iterator[None]:
  """Says which directory is damaged, or holds something else.

  All exceptions: TFDS, array_record, protobuf and Pillow have many kinds.
  """
  try:
    yield
  except Exception as e:
    reason = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
    raise errors.UserError(
      f'config.data.data_dir must hold {name} as prepared by TFDS; '
      f'{folder} cannot be read:\n{reason}\n'
      f'Delete that directory to prepare it again.'
    ) from e


def _decode_split(builder, split: str, count: int, spec: registry.Spec):
  """Images uint8 [count, H, W, C] and labels int32 [count] of one split."""
  import tensorflow_datasets as tfds
  from PIL import Image

  # Pillow at once takes a third less than by way of TFDS (1.0 against 1.4 s for
  # 10,000 images), which also warns that OpenCV is absent.
  as_png = {'image': tfds.decode.SkipDecoding()}
  shape = (spec.image_size, spec.image_size, spec.channels)
  images = np.empty((count, *shape), np.uint8)
  labels = np.empty(count, np.int32)
  features = builder.info.features
  found = 0
  for found, record in enumerate(_records(builder, split), start=1):
    if found > count:
      break
    example = features.deserialize_example_np(record, decoders=as_png)
    with Image.open(io.BytesIO(example['image'])) as image:
      images[found - 1] = np.asarray(image).reshape(shape)
    labels[found - 1] = example['label']
  if found != count:
    raise ValueError(f'{split} does not have {count} examples')
  return images, labels


def _records(builder, split: str) -> Iterator[bytes]:
  """The serialised examples, from array_record or TFDS's usual tfrecord."""
  import tensorflow_datasets as tfds

  if builder.info.file_format.value == 'tfrecord':
    for path in builder.info.splits[split].filepaths:
      yield from _tfrecords(path)
    return
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  source = builder.as_data_source(split, deserialize_method=raw)
  for start in range(0, len(source), _CHUNK):
    indices = range(start, min(start + _CHUNK, len(source)))
    yield from source.__getitems__(list(indices))


def _tfrecords(path: os.PathLike) -> Iterator[bytes]:
  """TFRecord: length (uint64, little-endian), its CRC, data, its CRC.

  The CRCs (CRC-32C) are not checked; the length must add up.
  """
  with open(path, 'rb') as stream:
    while header := stream.read(12):
      if len(header) < 12:
        raise ValueError(f'{path} ends in the middle of a record')
      (length,) = struct.unpack('<Q', header[:8])
      record = stream.read(length + 4)
      if len(record) < length + 4:
        raise ValueError(f'{path} ends in the middle of a record')
      yield record[:length]
