"""Results of a study: records, the file they are kept in, and its tables.

results/<study>.json is a list of records, one a line, each with the fields

  study arm variation seed config_hash commit model macs reference_macs
  macs_share params counts test_accuracy seconds hardware

(test_accuracy 0..1 of the last epoch, null where only the structure was asked;
seconds of the training, those of search and wide training apart) and, for
whoever asks why, fields, train_epochs, search_epochs, sparsity, tie_share,
gate_means {layer: mean gate} and kept {layer: bits as hexadecimal, channel 0
the lowest}.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import console, storage
from pfs_jax.studies import arms, plan, statistics

Record = Mapping[str, Any]


def path(study, workdir: pathlib.Path) -> pathlib.Path:
  """The file of a study's results."""
  folder = pathlib.Path(study.results_dir) if study.results_dir else workdir
  return folder / f'{study.study}.json'


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file, [] if there is none."""
  return storage.read_json(file) if file.exists() else []


def merge(file: pathlib.Path, record: Record, order: Sequence[str]) -> None:
  """Puts one record into a file that other processes write to as well.

  Records stand in the study's order of cells (`order`, hashes); those of cells
  that the study no longer has come last.
  """
  with storage.locked(file.parent, wait=lambda: None):
    found = {r['config_hash']: r for r in read(file)}
    found[record['config_hash']] = record
    place = {h: i for i, h in enumerate(order)}
    ordered = sorted(found, key=lambda h: place.get(h, len(place)))
    lines = ',\n'.join(json.dumps(found[h]) for h in ordered)
    storage.write_text(file, f'[\n{lines}\n]\n')


def known(study, workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{config hash: record} of every study beside this one's file."""
  folder = path(study, workdir).parent
  found = {}
  for file in sorted(folder.glob('*.json')):
    content = read(file)
    if isinstance(content, list):  # Other files may lie there.
      records = [r for r in content if isinstance(r, dict)]
      found |= {r['config_hash']: r for r in records if 'config_hash' in r}
  return found


def bits(indices: Iterable[int]) -> str:
  """A set of channels as hexadecimal digits."""
  return f'{sum(1 << int(i) for i in indices):x}'


def channels(text: str) -> list[int]:
  """The set that `bits` wrote."""
  number = int(text, 16)
  return [i for i in range(number.bit_length()) if number >> i & 1]


# Tables.


def mine(study, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The records of the study's cells, in their order."""
  there = {r['config_hash']: r for r in read(path(study, workdir))}
  found = []
  for cell in plan.cells(study):
    if cell.hash in there:
      found.append({**there[cell.hash], 'label': cell.label})
  return found


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
  """{label of arm and variation: records}, in order of appearance."""
  groups: dict[str, list[Record]] = {}
  for record in records:
    groups.setdefault(record['label'], []).append(record)
  return groups


def accuracies(records: Sequence[Record]) -> dict[int, float]:
  """{seed: test accuracy in percent}."""
  return {
    r['seed']: 100 * r['test_accuracy']
    for r in records
    if r['test_accuracy'] is not None
  }


def _scratch_b(study) -> str:
  """The baseline trained as Scratch-B, '' if the study has no such arm."""
  name = f'{study.baseline}+scratch_b'
  return name if name in study.arms else ''


def against(study) -> str:
  """What differences are to, in words; '' if a study has no baseline."""
  other = _scratch_b(study)
  return f'{study.baseline} (Scratch-B: {other})' if other else study.baseline


def opponent(study, records, group) -> dict[int, float]:
  """The accuracies that a group is compared with, paired by seed.

  Those of the baseline trained the same way (Scratch-B against Scratch-B) where
  the study has it, at the same variation, or at none.
  """
  arm, variation = group[0]['arm'], group[0]['variation']
  name = study.baseline
  if 'scratch_b' in arm.split('+'):
    name = _scratch_b(study) or name
  if name in (arm, group[0]['label']) or study.baseline == arm:
    return {}
  for wanted in (variation, {}):
    arms_there = [r for r in records if r['arm'] == name]
    found = [r for r in arms_there if r['variation'] == wanted]
    if found:
      return accuracies(found)
  return accuracies([r for r in records if r['label'] == name])


def _signed(low: float | None, high: float | None) -> str:
  return '-' if low is None else f'{low:+.2f} .. {high:+.2f}'


def rows(study, records: Sequence[Record]) -> list[list[str]]:
  """One row for each arm and variation: accuracy, spread, difference, cost."""
  table = []
  for label, group in grouped(records).items():
    found = accuracies(group)
    if not found:
      continue
    total = statistics.summary(list(found.values()))
    share = np.mean([r['macs_share'] for r in group])
    seconds = np.mean([r['seconds'] for r in group])
    sd = '-' if total.sd is None else f'{total.sd:.2f}'
    row = [label, str(total.n), f'{total.mean:.2f}', sd]
    versus = statistics.paired(found, opponent(study, records, group))
    if versus is None:
      row += ['', '']
    else:
      pairs = '' if versus.n == total.n else f' (n = {versus.n})'
      row += [f'{versus.mean:+.2f}{pairs}', _signed(versus.low, versus.high)]
    table.append([*row, f'{share:.1%}', f'{seconds:.0f}'])
  return table


def shares(record: Record) -> list[float]:
  """Share kept of each layer."""
  counts = record['counts'].values()
  return [n / w for n, w in zip(counts, record['widths'], strict=True)]


def _mean(values: Sequence[float]) -> float | None:
  return float(np.mean(values)) if values else None


def overlap(a: Record, b: Record) -> tuple[float, float]:
  """(Jaccard index of the kept channels, that of chance), means over layers."""
  found, chance = [], []
  for layer, width in zip(a['counts'], a['widths'], strict=True):
    first, second = channels(a['kept'][layer]), channels(b['kept'][layer])
    found.append(statistics.jaccard(first, second))
    chance.append(statistics.chance_jaccard(width, len(first), len(second)))
  return float(np.mean(found)), float(np.mean(chance))


def _chose(record: Record) -> bool:
  """Whether its channels were chosen, and not merely counted from the first."""
  return 'kept' in record and arms.parse(record['arm']).scores != 'shuffled'


@dataclasses.dataclass(frozen=True)
class Similarity:
  """How alike pairs of structures are; None where nothing can be said.

  Attributes:
    pairs: Their number.
    correlation: Of the shares kept of the layers, mean over pairs.
    lowest: That of the pair least alike.
    highest: That of the pair most alike.
    overlap: Jaccard index of the kept channels, mean over layers and pairs.
    chance: That of random sets of the same sizes.
  """

  pairs: int
  correlation: float | None
  lowest: float | None
  highest: float | None
  overlap: float | None
  chance: float | None

  @property
  def texts(self) -> list[str]:
    """A cell for each of `SIMILARITY_COLUMNS`."""
    pairs, *values = dataclasses.astuple(self)
    return [str(pairs), *('-' if v is None else f'{v:.2f}' for v in values)]


SIMILARITY_COLUMNS = (
  'pairs',
  'correlation',
  'lowest',
  'highest',
  'overlap',
  'by chance',
)


def similarity(pairs: Sequence[tuple[Record, Record]]) -> Similarity:
  """How alike the two structures of each pair are."""
  correlations, found, chance = [], [], []
  for a, b in pairs:
    value = statistics.correlation(shares(a), shares(b))
    if value is not None:
      correlations.append(value)
    if _chose(a) and _chose(b) and a['widths'] == b['widths']:
      for values, value in zip((found, chance), overlap(a, b), strict=True):
        values.append(value)
  return Similarity(
    len(pairs),
    _mean(correlations),
    min(correlations, default=None),
    max(correlations, default=None),
    _mean(found),
    _mean(chance),
  )


def has_shape(record: Record) -> bool:
  """Whether an arm's layers differ in the share that they keep."""
  return arms.parse(record['arm']).scores not in ('full', 'equal')


def similarity_rows(records: Sequence[Record]) -> list[list[str]]:
  """Structures of different seeds, then those of one seed along a variation.

  Uniform and full width are left out: their shares differ by rounding alone.
  """
  shaped = [r for r in records if has_shape(r)]
  groups, table = grouped(shaped), []

  def row(label, pairs):
    if pairs:
      table.append([label, *similarity(pairs).texts])

  for label, group in groups.items():
    row(f'{label}: seeds', list(itertools.combinations(group, 2)))
  for a, b in itertools.combinations(groups, 2):
    if groups[a][0]['arm'] != groups[b][0]['arm']:
      continue
    other = {r['seed']: r for r in groups[b]}
    same = [(r, other[r['seed']]) for r in groups[a] if r['seed'] in other]
    row(f'{a} / {b.rpartition(", ")[2]}: same seed', same)
  return table


def show(study, workdir: pathlib.Path) -> None:
  """Prints the tables of what is finished."""
  records, total = mine(study, workdir), len(plan.cells(study))
  file = path(study, workdir)
  trained = any(r['test_accuracy'] is not None for r in records)
  if trained:
    difference = f'- {against(study)}' if study.baseline else ''
    console.table(
      f'{study.study}: test accuracy in %, {len(records)} of {total} cells, '
      f'{file}',
      ['arm', 'n', 'mean', 'sd', difference, '95 %', 'MACs', 's'],
      rows(study, records),
    )
  if records and (study.field or not trained):
    console.table(
      f'{study.study}: similarity of structures, {len(records)} of {total} '
      f'cells, {file}',
      ['between', *SIMILARITY_COLUMNS],
      similarity_rows(records),
    )
  if not records:
    console.say(f'{study.study}: none of {total} cells is finished ({file}).')
