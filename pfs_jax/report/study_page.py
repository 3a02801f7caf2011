"""The report of a study, made from its results file and its finished cells."""

import itertools
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from pfs_jax import console, errors
from pfs_jax.report import figures
from pfs_jax.report.page import Page
from pfs_jax.studies import plan, results, statistics, tables
from pfs_jax.tables import Table


class Arm(NamedTuple):
  """The runs of one arm at one value of the varied field.

  Attributes:
    title: Its number and label, such as '3. random', for pictures and tables.
    records: The records of its runs.
    values: The test accuracy of each trained run, in percent.
    versus: Its paired difference from the baseline.
  """

  title: str
  records: Sequence[tables.Record]
  values: Sequence[float]
  versus: statistics.Difference | None

  @property
  def spread(self) -> tuple[float, float]:
    """(mean, standard deviation) of the values; (value, 0) for one value."""
    total = statistics.summary(self.values)
    return total.mean, total.sd or 0.0


_TRAINED = (
  'The table compares the arms by test accuracy: mean and standard deviation '
  'over n seeds, and the mean difference from the baseline over pairs of seeds '
  'with its 95% interval. An arm is indistinguishable from the baseline where '
  "the interval holds 0. MACs are shares of the reference network's."
)
_CUT = (
  'How alike are the structures? Correlation is that of the shares that the '
  'layers keep: its mean over pairs, and the lowest and highest of the pairs. '
  'Overlap is the Jaccard index of the kept channels.'
)


def build(study: ml_collections.ConfigDict, workdir: pathlib.Path) -> Page:
  """The page of the finished cells of a study.

  Raises:
    errors.UserError: If no cell is finished.
  """
  records, total = results.mine(study, workdir), len(plan.cells(study))
  if not records:
    raise errors.UserError(
      f'{results.path(study, workdir)} and {workdir} hold no finished cell of '
      f'{study.study}: run --mode=study first.'
    )
  groups = tables.grouped(records)
  compared = tables.differences(study, groups)
  arms = [
    Arm(f'{i}. {k}', g, list(tables.values(g).values()), compared.get(k))
    for i, (k, g) in enumerate(groups.items(), 1)
  ]
  trained = [arm for arm in arms if arm.values]
  name, given = study.base.model.name, study.base.data
  report = Page(f'Study {study.study}: {name} on {given.factory or given.name}')
  count = f'{len(records)} of {total} cells are finished'
  if len(records) < total:
    count += '; the others may change what this page says'
  report.paragraph(f'{count}. {_TRAINED if trained else _CUT}', 'answer')
  if trained:
    numbered = [
      _numbered(tables.comparison(study, records, measure), arms)
      for measure in (tables.ACCURACY, tables.LOSS)
    ]
    for table in numbered:
      report.table(table)
    report.section('Accuracy')
    _accuracy(report, trained, numbered[0])
    _differences(report, tables.against(study), trained, numbered[0])
    _accuracy_over(report, study, trained, numbered[0])
  report.section('Structures')
  _shares(report, arms)
  _similarity(report, arms)
  _details(report, study, records)
  return report


def _numbered(table: Table, arms: Sequence[Arm]) -> Table:
  """The table with the arms' numbered titles in its first column."""
  titles = {arm.records[0]['label']: arm.title for arm in arms}
  rows = [[titles.get(first, first), *rest] for first, *rest in table.rows]
  return table._replace(rows=rows)


# Accuracy.


def _accuracy(report: Page, arms: Sequence[Arm], numbers: Table) -> None:
  rows = [figures.Interval(arm.title, *arm.spread, arm.values) for arm in arms]
  meaning = {True: 'mean ± standard deviation'}
  report.figure(
    'accuracy',
    'Test accuracy in % of every run (circles), and the mean and standard '
    'deviation of each arm (diamonds). The number of an arm is the same in all '
    'pictures.',
    figures.intervals(rows, 'test accuracy in %', meaning),
    numbers,
  )


def _differences(
  report: Page, baseline: str, arms: Sequence[Arm], numbers: Table
) -> None:
  rows = []
  for arm in arms:
    if arm.versus:
      mean, high = arm.versus.mean, arm.versus.high
      error = 0.0 if high is None else high - mean
      filled = tables.verdict(arm.versus) in ('better', 'worse')
      rows.append(figures.Interval(arm.title, mean, error, (), filled))
  if not rows:
    return
  xlabel = f'accuracy in points, minus that of\n{baseline}'
  meanings = {True: 'interval without 0', False: 'interval with 0, or n = 1'}
  report.figure(
    'differences',
    f'Accuracy in points minus that of {baseline}, paired by seed, with 95% '
    "intervals (Student's t). A diamond is filled where the interval does not "
    f'hold 0. The {len(rows)} intervals are not corrected for their number: '
    'even if no arm differed, one in 20 would miss 0 by chance.',
    figures.intervals(rows, xlabel, meanings),
    numbers,
  )


def _accuracy_over(
  report: Page,
  study: ml_collections.ConfigDict,
  arms: Sequence[Arm],
  numbers: Table,
) -> None:
  shares = [
    100 * float(np.mean([r['macs_share'] for r in arm.records])) for arm in arms
  ]
  places, drawn = Counter(map(round, shares)), Counter[int]()
  costs, points = [], defaultdict(list)
  for arm, share in zip(arms, shares, strict=True):
    (mean, sd), first, place = arm.spread, arm.records[0], round(share)
    # Arms with the same MACs stand side by side.
    x = share + drawn[place] - (places[place] - 1) / 2
    drawn[place] += 1
    costs.append(figures.Line(arm.title, [x], [mean], [sd]))
    if study.field in first['variation']:
      value = float(first['variation'][study.field])
      points[first['arm']].append((value, mean, sd))
  pictures = []
  if len(places) > 1:
    pictures.append(('macs', "MACs in % of the reference network's", costs))
  if any(len(found) > 1 for found in points.values()):
    varied = [
      figures.Line(name, *zip(*sorted(found), strict=True))
      for name, found in points.items()
    ]
    pictures.append(('varied', study.field, varied))
  for name, xlabel, lines in pictures:
    report.figure(
      name,
      f'Test accuracy over {xlabel}: mean and standard deviation. Arms at one '
      'place are drawn side by side.',
      figures.curves({'accuracy in %': lines}, xlabel),
      numbers,
    )


# Structures.


def _shares(report: Page, arms: Sequence[Arm]) -> None:
  some = [arm for arm in arms if arm.records[0]['arm'] != 'full'] or arms
  table = tables.counts({arm.title: arm.records for arm in some})
  layers, titles = list(table.columns[2:]), [arm.title for arm in some]
  values = [
    100 * np.mean([tables.shares(r) for r in arm.records], 0) for arm in some
  ]
  report.figure(
    'shares',
    "The share of each layer's channels that the arms keep, in %, mean over "
    'the seeds. A column stands for an arm, by its number.',
    figures.heat(layers, titles, np.stack(values, 1), 'number of the arm'),
    table,
  )


def _similarity(report: Page, arms: Sequence[Arm]) -> None:
  some = [arm for arm in arms if tables.has_shape(arm.records[0])]
  values = np.full((len(some), len(some)), np.nan)
  for i, j in np.ndindex(values.shape):
    pairs = list(itertools.product(some[i].records, some[j].records))
    if i == j:
      pairs = list(itertools.combinations(some[i].records, 2))
    found = tables.correlations(pairs)
    values[i, j] = np.mean(found) if found else np.nan
  if np.isnan(values).all():
    return
  titles = [arm.title for arm in some]
  records = [{**r, 'label': a.title} for a in some for r in a.records]
  report.figure(
    'similarity',
    'How the shares that the layers keep correlate between the structures of '
    'two arms: the mean over pairs of seeds.',
    figures.heat(titles, titles, values, 'number of the arm', 2),
    tables.similarity(records),
  )


# How it was made.


def _details(
  report: Page,
  study: ml_collections.ConfigDict,
  records: Sequence[tables.Record],
) -> None:
  columns = ['arm', 'seed', 'test accuracy', 'MACs', 'share', 'seconds', 'cell']
  cells = [
    [
      r['label'],
      str(r['seed']),
      '-' if r['test_accuracy'] is None else f'{r["test_accuracy"]:.2%}',
      f'{r["macs"]:,}',
      f'{r["macs_share"]:.1%}',
      f'{r["seconds"]:.0f}',
      r['config_hash'],
    ]
    for r in records
  ]

  def time(field: str) -> str:
    return console.duration(sum(r.get(field) or 0.0 for r in records))

  def names(field: str) -> str:
    return ', '.join(sorted({str(r[field]) for r in records}))

  costs = [
    ['hardware', names('hardware')],
    ['commit', names('commit')],
    ['training, all cells', time('seconds')],
    ['search (a shared one counts for each cell)', time('search_seconds')],
  ]
  fields = study.to_dict()
  base = fields.pop('base')
  said = sorted((k, v) for k, v in fields.items() if v not in ('', (), False))
  report.section('How it was made')
  report.table(Table('Every cell', columns, cells), folded=True)
  report.table(Table('Time and hardware', ['what', 'value'], costs))
  rows = [[k, json.dumps(v)] for k, v in said]
  report.table(Table('The study', ['field', 'value'], rows))
  report.config(base, study.to_dict())
