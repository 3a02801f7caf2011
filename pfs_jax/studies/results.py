"""Results of a study: its records, and the file that holds them.

results/<study>.json is a list of records, one a line, each with the fields

  study arm variation seed config_hash commit model macs reference_macs
  macs_share params counts widths test_accuracy seconds hardware

(test_accuracy 0..1 of the last epoch, null if only the structure was asked for;
seconds of the training, without those of search and wide training). Further
fields, which `cells.run` writes, explain a result: test_loss, search_seconds,
tie_share, kept {layer: bits as hexadecimal, channel 0 the lowest} and others.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import ml_collections
import msgspec

from pfs_jax import storage
from pfs_jax.studies import plan

Record = Mapping[str, Any]


def path(
  study: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """The file of a study's results."""
  folder = storage.expanded(study.results_dir or workdir)
  return folder / f'{study.study}.json'


class _Fields(TypedDict):
  """What each record must hold."""

  study: str
  arm: str
  variation: dict[str, Any]
  seed: int
  config_hash: str
  model: str
  macs: int
  macs_share: float
  params: int
  counts: dict[str, int]
  widths: list[int]
  commit: str
  hardware: str
  test_accuracy: float | None
  seconds: float
  kept: NotRequired[
    dict[str, Annotated[str, msgspec.Meta(pattern='^[0-9a-f]+$')]]
  ]


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file, [] if there is none.

  Raises:
    errors.UserError: The file is no list of records with the fields above.
  """
  if not file.exists():
    return []
  return _read(file, list[_Fields])


def _read(file: pathlib.Path, kind: Any) -> Any:
  """The content of a file, checked as this type, which may lack fields."""
  content = storage.read_bytes(file)
  storage.decode(content, kind, file)  # This drops other fields.
  return storage.decode(content, Any, file)


def merge(file: pathlib.Path, record: Record, order: Sequence[str]) -> None:
  """Puts one record into a file to which other processes write as well.

  Records have the study's order of cells (`order`, hashes); records of cells
  that are no longer in the study come last.
  """
  with storage.locked(file.parent, wait=lambda: None):
    found: dict[str, Record] = {r['config_hash']: r for r in read(file)}
    found[record['config_hash']] = record
    place = {h: i for i, h in enumerate(order)}
    ordered = sorted(found, key=lambda h: place.get(h, len(place)))
    lines = ',\n'.join(json.dumps(found[h]) for h in ordered)
    storage.write_text(file, f'[\n{lines}\n]\n')


def known(
  study: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """{config hash: record} of all studies in the folder of this one's file."""
  found = {}
  for file in sorted(path(study, workdir).parent.glob('*.json')):
    # Other files may be there.
    if storage.read_bytes(file).lstrip().startswith(b'['):
      found |= {r['config_hash']: r for r in read(file)}
  return found


def mine(
  study: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """The records of the study's finished cells, in their order."""
  there = {r['config_hash']: r for r in read(path(study, workdir))}
  found = []
  for cell in plan.cells(study):
    file = workdir / 'cells' / cell.hash / 'cell.json'
    if cell.hash not in there and file.exists():  # In no results file yet.
      there[cell.hash] = _read(file, _Fields)
    if cell.hash in there:
      names = {'arm': cell.name, 'variation': dict(cell.variation)}
      found.append({**there[cell.hash], **names, 'label': cell.label})
  return found


def bits(indices: Iterable[int]) -> str:
  """A set of channels as hexadecimal digits."""
  return f'{sum(1 << int(i) for i in indices):x}'


def channels(text: str) -> list[int]:
  """The channels that `bits` wrote."""
  number = int(text, 16)
  return [i for i in range(number.bit_length()) if number >> i & 1]
