"""The archives of MNIST, Fashion-MNIST and CIFAR, read in memory.

The archives are unpacked in memory, so no name, link or device in them can
reach a file. Only regular members with the expected names are read, and at most
`MAX_BYTES` are unpacked.
"""

import gzip
import io
import struct
import tarfile

import numpy as np

from pfs_jax import errors

MAX_BYTES = 1 << 28  # Per unpacked file; the largest archive has 184 MB.
# What the readers of a damaged archive raise.
_DAMAGED = (ValueError, KeyError, EOFError, OSError, struct.error)

# {'train': (images, labels), 'test': (images, labels)}.
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def parse(name: str, files: dict[str, bytes]) -> Splits:
  """Images (uint8 [N, H, W, C]) and labels (int32 [N]) in the original order.

  `files` is {file name: content} of `upstream`.

  Raises:
    errors.UserError: An archive is incomplete or wrong.
  """
  try:
    splits = _mnist(files) if 'mnist' in name else _cifar(files)
  except (*_DAMAGED, tarfile.TarError) as e:
    raise errors.UserError(
      f'{name}: {", ".join(files)} cannot be unpacked ({e}).'
    ) from e
  return {k: (x, y.astype(np.int32)) for k, (x, y) in splits.items()}


def _mnist(files: dict[str, bytes]) -> Splits:
  return {
    split: (
      idx(files[f'{prefix}-images-idx3-ubyte.gz'])[..., None],
      idx(files[f'{prefix}-labels-idx1-ubyte.gz']),
    )
    for split, prefix in (('train', 'train'), ('test', 't10k'))
  }


def idx(content: bytes) -> np.ndarray:
  """A gzipped IDX file of bytes as an array.

  IDX: two zero bytes, type (8 = uint8), rank; sizes big-endian; data.

  >>> idx(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))).tolist()
  [7, 9]
  """
  content = _unpacked(content)
  rank = content[3]
  shape = struct.unpack_from(f'>{rank}I', content, 4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _unpacked(content: bytes) -> bytes:
  with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    raise ValueError(f'unpacks to more than {MAX_BYTES >> 20} MiB')
  return content


def _cifar(files: dict[str, bytes]) -> Splits:
  """The binary archive of CIFAR-10 or CIFAR-100.

  A record is its labels, one byte each (CIFAR-100: coarse, then fine), then
  3072 bytes [channel, row, column].
  """
  ((name, content),) = files.items()
  if name.startswith('cifar-100'):
    prefix, labels = 'cifar-100-binary/', 2
    wanted = {'train': ['train.bin'], 'test': ['test.bin']}
  else:
    prefix, labels = 'cifar-10-batches-bin/', 1
    batches = [f'data_batch_{i}.bin' for i in range(1, 6)]
    wanted = {'train': batches, 'test': ['test_batch.bin']}
  found = members(content, prefix, sum(wanted.values(), []))
  splits = {}
  for split, names in wanted.items():
    data = np.frombuffer(b''.join(found[n] for n in names), np.uint8)
    data = data.reshape(-1, labels + 3072)
    images = data[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    splits[split] = images, data[:, labels - 1]
  return splits


def members(content: bytes, prefix: str, names: list[str]) -> dict[str, bytes]:
  """{name: content} of regular files in the folder `prefix` of a .tar.gz.

  Raises:
    ValueError: A file is missing, not regular, there twice or too large.
    tarfile.TarError: The content is no such archive.
  """
  found: dict[str, bytes] = {}
  # The limit covers all that is unpacked, also to find the next member.
  unpacked = io.BytesIO(_unpacked(content))
  with tarfile.open(fileobj=unpacked, mode='r:') as archive:
    for member in archive:
      name = member.name.removeprefix('./').removeprefix(prefix)
      if name not in names:
        continue
      if name in found or not member.isreg() or member.issparse():
        raise ValueError(f'{member.name} is not one regular file')
      file = archive.extractfile(member)
      assert file is not None, 'it is a regular file'
      found[name] = file.read()
  absent = [name for name in names if name not in found]
  if absent:
    raise ValueError(f'{", ".join(absent)} is missing')
  return found
