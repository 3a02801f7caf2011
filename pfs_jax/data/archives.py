"""The archives of MNIST, Fashion-MNIST and CIFAR, read in memory.

`upstream` has verified every byte, so each archive is the one expected.
"""

import gzip
import io
import struct
import tarfile

import numpy as np

# {'train': (images, labels), 'test': (images, labels)}.
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def parse(name: str, files: dict[str, bytes]) -> Splits:
  """Images (uint8 [N, H, W, C]) and labels (int32 [N]) in the original order.

  `files` is {file name: content} of `upstream`.
  """
  splits = _mnist(files) if 'mnist' in name else _cifar(files)
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
  content = gzip.decompress(content)
  rank = content[3]
  shape = struct.unpack_from(f'>{rank}I', content, 4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


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
  found = {}
  with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    for member in archive:
      file = archive.extractfile(member)
      if file is not None:  # It is no folder.
        found[member.name.removeprefix('./')] = file.read()
  splits = {}
  for split, names in wanted.items():
    data = b''.join(found[prefix + name] for name in names)
    rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3072)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    splits[split] = images, rows[:, labels - 1]
  return splits
