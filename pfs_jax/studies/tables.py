"""The tables of a study: accuracy and structures of its arms, and similarity.

Records are grouped by their label: the arm and, where the study varies a field,
its value. The terminal, the report and RESULTS.md show the same tables.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from pfs_jax import console
from pfs_jax.studies import arms, plan, results, statistics
from pfs_jax.tables import Table

Record = results.Record
Groups = Mapping[str, Sequence[Record]]


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
  """{label: its records}, in order of appearance.

  >>> grouped([{'label': 'a'}, {'label': 'b'}, {'label': 'a'}])
  {'a': [{'label': 'a'}, {'label': 'a'}], 'b': [{'label': 'b'}]}
  """
  groups: dict[str, list[Record]] = {}
  for record in records:
    groups.setdefault(record['label'], []).append(record)
  return groups


# Accuracy and loss.


class Measure(NamedTuple):
  """A quantity by which the arms of a study are compared.

  Attributes:
    title: The title of its table.
    field: The field of the records.
    scale: The factor for its values in the table.
    digits: The number of decimals.
    sign: 1 if more is better, -1 if less is.
  """

  title: str
  field: str
  scale: float
  digits: int
  sign: int


ACCURACY = Measure('Test accuracy in %', 'test_accuracy', 100, 2, 1)
LOSS = Measure('Test loss', 'test_loss', 1, 4, -1)


def values(
  records: Sequence[Record], measure: Measure = ACCURACY
) -> dict[int, float]:
  """{seed: value of a measure} of the records that have one."""
  there = [r for r in records if r.get(measure.field) is not None]
  return {r['seed']: measure.scale * r[measure.field] for r in there}


def _scratch_b_baseline(study: ml_collections.ConfigDict) -> str:
  """The name of the Scratch-B baseline, '' if the study has no such arm."""
  name = f'{study.baseline}+scratch_b'
  return name if name in study.arms else ''


def against(study: ml_collections.ConfigDict) -> str:
  """The name of the baseline, for titles; '' without a baseline."""
  other = _scratch_b_baseline(study)
  return f'{study.baseline} (Scratch-B: {other})' if other else study.baseline


def baseline_of(
  study: ml_collections.ConfigDict,
  records: Sequence[Record],
  group: Sequence[Record],
) -> list[Record]:
  """The records that a group is compared with.

  They are the records of the baseline, trained in the same way as the group if
  the study has such an arm (Scratch-B is compared with Scratch-B), at the same
  value of the varied field or, if there are none, without a value. The baseline
  itself has none to be compared with.
  """
  arm, variation = group[0]['arm'], group[0]['variation']
  name = study.baseline
  if 'scratch_b' in arm.split('+'):
    name = _scratch_b_baseline(study) or name
  if name in (arm, group[0]['label']) or study.baseline == arm:
    return []
  theirs = [r for r in records if r['arm'] == name]
  return (
    [r for r in theirs if r['variation'] == variation]
    or [r for r in theirs if not r['variation']]
    or [r for r in records if r['label'] == name]
  )


def differences(
  study: ml_collections.ConfigDict, groups: Groups, measure: Measure = ACCURACY
) -> dict[str, statistics.Difference]:
  """{label: paired difference from the baseline} if there are pairs."""
  records = [r for group in groups.values() for r in group]
  found = {}
  for label, group in groups.items():
    theirs = values(baseline_of(study, records, group), measure)
    versus = statistics.paired(values(group, measure), theirs)
    if versus is not None:
      found[label] = versus
  return found


def comparison(
  study: ml_collections.ConfigDict,
  records: Sequence[Record],
  measure: Measure = ACCURACY,
) -> Table:
  """Mean, spread, difference from the baseline, and costs of each arm."""
  groups, rows = grouped(records), []
  compared = differences(study, groups, measure)
  digits = f'.{measure.digits}f'
  for label, group in groups.items():
    found = list(values(group, measure).values())
    if not found:
      continue
    total, versus = statistics.summary(found), compared.get(label)
    sd = '-' if total.sd is None else f'{total.sd:{digits}}'
    row = [label, str(total.n), f'{total.mean:{digits}}', sd, '', '', '']
    if versus is not None:
      pairs = '' if versus.n == total.n else f' (n = {versus.n})'
      said, limits = verdict(versus, measure.sign), '-'
      if versus.low is not None and versus.high is not None:
        limits = f'{versus.low:+{digits}} .. {versus.high:+{digits}}'
      row[4:] = [f'{versus.mean:+{digits}}{pairs}', limits, said]
    share = np.mean([r['macs_share'] for r in group])
    seconds = np.mean([r['seconds'] for r in group])
    rows.append([*row, f'{share:.1%}', f'{seconds:.0f}'])
  other = against(study)
  minus = f'minus {other}' if other else 'difference'
  columns = ['arm', 'n', 'mean', 'sd', minus, '95 %', 'verdict', 'MACs']
  return Table(measure.title, [*columns, 'seconds'], rows)


def verdict(versus: statistics.Difference, sign: int = 1) -> str:
  """'better', 'worse', or 'indistinguishable' (it holds 0); '-' if no interval.

  `sign` is 1 if more is better, and -1 if less is.

  >>> verdict(statistics.Difference(3, 1.0, 0.5, 1.5))
  'better'
  """
  if versus.low is None or versus.high is None:
    return '-'
  if versus.low <= 0 <= versus.high:
    return 'indistinguishable'
  return 'better' if sign * versus.mean > 0 else 'worse'


# Structures.


def shares(record: Record) -> list[float]:
  """The share of its channels that each layer keeps, 0..1."""
  counts = record['counts'].values()
  return [n / w for n, w in zip(counts, record['widths'], strict=True)]


def counts(groups: Groups) -> Table:
  """The mean share that each arm keeps of each layer, in percent."""
  rows = []
  for label, group in groups.items():
    mean = np.mean([shares(r) for r in group], axis=0)
    rows.append([label, str(len(group)), *(f'{100 * v:.0f}' for v in mean)])
  layers = list(next(iter(groups.values()))[0]['counts'])
  return Table('Channels kept in %', ['share kept, %', 'n', *layers], rows)


def has_shape(record: Record) -> bool:
  """Whether an arm's layers differ in the share that they keep.

  The shares of uniform and full width differ by rounding alone.
  """
  return arms.parse(record['arm']).scores not in ('full', 'equal')


def _chose(record: Record) -> bool:
  """Whether the arm chose channels, and not only their number."""
  return 'kept' in record and arms.parse(record['arm']).scores != 'shuffled'


Pairs = Sequence[tuple[Record, Record]]


def correlations(pairs: Pairs) -> list[float]:
  """Correlations of the shares that layers keep, for pairs that have one."""
  found = (statistics.correlation(shares(a), shares(b)) for a, b in pairs)
  return [value for value in found if value is not None]


def overlaps(pairs: Pairs) -> list[tuple[float, float]]:
  """(Jaccard index of kept channels, that of random channels) of each pair.

  Each is a mean over the layers. Pairs are left out if an arm did not choose
  channels, or if their searched networks have different widths.
  """
  found = []
  for a, b in pairs:
    if not (_chose(a) and _chose(b) and a['widths'] == b['widths']):
      continue
    layers = []
    for layer, width in zip(a['counts'], a['widths'], strict=True):
      ours, theirs = (results.channels(r['kept'][layer]) for r in (a, b))
      chance = statistics.chance_jaccard(width, len(ours), len(theirs))
      layers.append((statistics.jaccard(ours, theirs), chance))
    found.append(tuple(np.mean(layers, axis=0).tolist()))
  return found


def similarity(records: Sequence[Record]) -> Table:
  """The similarity of structures between seeds, then between varied values."""
  groups, rows = grouped([r for r in records if has_shape(r)]), []

  def row(label: str, pairs: Pairs) -> None:
    if not pairs:
      return
    alike, kept = correlations(pairs), overlaps(pairs)
    numbers = [np.mean(alike), min(alike), max(alike)] if alike else [None] * 3
    numbers += list(np.mean(kept, axis=0)) if kept else [None] * 2
    shown = ('-' if v is None else f'{v:.2f}' for v in numbers)
    rows.append([label, str(len(pairs)), *shown])

  for label, group in groups.items():
    row(f'{label}: seeds', list(itertools.combinations(group, 2)))
  for a, b in itertools.combinations(groups, 2):
    if groups[a][0]['arm'] == groups[b][0]['arm']:
      other = {r['seed']: r for r in groups[b]}
      same = [(r, other[r['seed']]) for r in groups[a] if r['seed'] in other]
      row(f'{a} / {b.rpartition(", ")[2]}: same seed', same)
  columns = ('pairs', 'correlation', 'lowest', 'highest', 'overlap')
  title = 'Similarity of structures'
  return Table(title, ['between', *columns, 'by chance'], rows)


def show(study: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Prints the tables of the finished cells."""
  records, total = results.mine(study, workdir), len(plan.cells(study))
  file = results.path(study, workdir)
  shown = [comparison(study, records, m) for m in (ACCURACY, LOSS)]
  shown = [table for table in shown if table.rows]
  if records and (study.field or not shown):
    shown.append(similarity(records))
  for title, columns, rows in shown:
    count = f'{len(records)} of {total} cells, {file}'
    console.table(f'{study.study}: {title}, {count}', columns, rows)
  if not records:
    console.say(f'{study.study}: none of {total} cells is finished ({file}).')
