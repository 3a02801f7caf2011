"""Reads TFDS's older file format, TFRecord, without TensorFlow."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np

_AT_A_TIME = 4096  # Records whose checksums are computed together.


def records(path: str | os.PathLike) -> Iterator[bytes]:
  """The records of a file, each checked.

  A record is its length (uint64, little-endian) and its data, each followed by
  its masked CRC-32C (uint32).

  Args:
    path: The file.

  Yields:
    The data of each record.

  Raises:
    ValueError: The file ends in the middle of a record, or a checksum differs.
  """
  with open(path, 'rb') as stream:
    group: list[tuple[bytes, bytes]] = []
    while header := stream.read(12):
      length = int.from_bytes(header[:8], 'little')
      size = os.fstat(stream.fileno()).st_size - stream.tell()
      if len(header) < 12 or length + 4 > size:
        raise ValueError(f'{path} ends in the middle of a record')
      group.append((header, stream.read(length + 4)))
      if len(group) == _AT_A_TIME:
        yield from _checked(group, path)
        group = []
    yield from _checked(group, path)


def _checked(
  group: Sequence[tuple[bytes, bytes]], path: str | os.PathLike
) -> Iterator[bytes]:
  parts = [part for record in group for part in record]
  found = masked_crc32c([part[:-4] for part in parts])
  stated = [struct.unpack('<I', part[-4:])[0] for part in parts]
  if found.tolist() != stated:
    raise ValueError(f'{path} has a record that fails its checksum')
  yield from (data[:-4] for _, data in group)


def _table() -> np.ndarray:
  values: np.ndarray = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    values = np.uint32(0x82F63B78) * (values & 1) ^ values >> 1
  return values


def masked_crc32c(parts: Sequence[bytes]) -> np.ndarray:
  """TFRecord's checksum of each part, byte by byte over all parts at once.

  >>> [hex(v) for v in masked_crc32c([b'123456789'])]
  ['0xc78ab0e5']

  Args:
    parts: Bytes of any length.

  Returns:
    uint32 [len(parts)].
  """
  lengths = np.array([len(part) for part in parts], int)
  columns = np.zeros((len(parts), lengths.max(initial=0)), np.uint8)
  for row, part in zip(columns, parts, strict=True):
    row[: len(part)] = np.frombuffer(part, np.uint8)
  table, crc = _table(), np.full(len(parts), 0xFFFFFFFF, np.uint32)
  for i, column in enumerate(np.ascontiguousarray(columns.T)):
    updated = table[(crc ^ column) & 255] ^ crc >> 8
    crc = np.where(i < lengths, updated, crc)
  crc = ~crc
  return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
