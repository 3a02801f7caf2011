"""The report of a study, made from its results file and its finished cells."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from pfs_jax import console, errors, storage
from pfs_jax.report import figures, page
from pfs_jax.studies import plan, results, statistics, tables
from pfs_jax.tables import Table

Groups = Mapping[str, Sequence[tables.Record]]


class Arm(NamedTuple):
  """The runs of one arm at one value of the varied field.

  Attributes:
    label: Its label.
    title: The label with the arm's number, for pictures.
    values: The test accuracy of each run, in percent.
    total: Their mean and standard deviation.
    share: MACs as a share of the reference network's, 0..1, the mean.
    record: The first run.
  """

  label: str
  title: str
  values: Sequence[float]
  total: statistics.Summary
  share: float
  record: tables.Record

  @property
  def spread(self) -> str:
    """'89.05% ± 0.35 (n = 5)'."""
    sd = '' if self.total.sd is None else f' ± {self.total.sd:.2f}'
    return f'{self.total.mean:.2f}%{sd} (n = {self.total.n})'


def build(
  study: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[str, list[figures.Picture]]:
  """(HTML, pictures) of the finished cells of a study.

  Raises:
    errors.UserError: If no cell is finished.
  """
  records, total = _records(study, workdir)
  groups = tables.grouped(records)
  arms, compared = _arms(groups), tables.differences(study, groups)
  name = study.base.model.name or study.base.model.factory
  report = page.Page(f'Study {study.study}: {name} on {study.base.data.name}')
  for line in outcome(study, arms, compared) or [_likeness(groups)]:
    report.paragraph(line, 'answer')
  count = f'{len(records)} of {total} cells are finished'
  if len(records) < total:
    count += '; the others may change what this page says'
  report.paragraph(f'{count}. {_TRAINED if arms else _CUT}', 'soft')
  table = tables.accuracy(study, records) if arms else _alike(groups)
  report.table(*_numbered(table, groups))
  if arms:
    report.section('Accuracy')
    _accuracy(report, arms)
    _differences(report, study, compared, _titles(groups))
    _costs(report, arms)
    _varied(report, study, arms)
  report.section('Structures')
  _shares(report, groups)
  _similarity(report, groups)
  _made(report, study, records)
  return report.html(), report.pictures


_TRAINED = (
  'Test accuracy: mean ± standard deviation over n seeds. MACs: of one image, '
  "as a share of the reference network's."
)
_CUT = (
  'Correlation: that of the shares that the layers keep, its mean over pairs '
  'of seeds, and that of the pairs least and most alike. Overlap: the Jaccard '
  'index of the kept channels.'
)


def _records(
  study: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[list[tables.Record], int]:
  """(finished records in the study's order, number of all cells)."""
  cells = plan.cells(study)
  there = {r['config_hash']: r for r in results.mine(study, workdir)}
  for cell in cells:  # Those that are in no results file yet.
    path = workdir / 'cells' / cell.hash / 'cell.json'
    if cell.hash not in there and path.exists():
      there[cell.hash] = {**storage.read_json(path), 'label': cell.label}
  if not there:
    raise errors.UserError(
      f'{results.path(study, workdir)} and {workdir} hold no finished cell of '
      f'{study.study}: run --mode=study first.'
    )
  return [there[c.hash] for c in cells if c.hash in there], len(cells)


def _titles(groups: Groups) -> dict[str, str]:
  """{label: '3. label', with the number that stands for it in pictures}."""
  return {label: f'{i}. {label}' for i, label in enumerate(groups, 1)}


def _numbered(table: Table, groups: Groups) -> Table:
  """The table with the arms' numbers in its first column."""
  titles = _titles(groups)
  rows = [[titles.get(first, first), *rest] for first, *rest in table.rows]
  return table._replace(rows=rows)


def _arms(groups: Groups) -> list[Arm]:
  """The groups that have accuracies."""
  found = []
  for label, title in _titles(groups).items():
    values = list(tables.accuracies(groups[label]).values())
    if values:
      total = statistics.summary(values)
      share = float(np.mean([r['macs_share'] for r in groups[label]]))
      found.append(Arm(label, title, values, total, share, groups[label][0]))
  return found


# The first screen.


def _alike(groups: Groups) -> Table:
  """How alike the seeds of each arm are."""
  found = tables.between_seeds(groups).items()
  columns = ['arm', *tables.similarity([]).columns[1:]]
  rows = [[label, *alike.texts] for label, alike in found]
  return Table('Likeness between seeds', columns, rows)


def outcome(
  study: ml_collections.ConfigDict,
  arms: Sequence[Arm],
  compared: Mapping[str, statistics.Difference],
) -> list[str]:
  """Sentences: the main arm beside baseline and full network, and verdicts.

  There are none without a training.
  """
  plain = (study.baseline, 'full')
  others = [arm for arm in arms if arm.label not in plain]
  if not arms:
    return []
  main = (others or list(arms))[0]
  text = f'{main.label}: {main.spread} at {main.share:.1%} of the MACs'
  for arm in arms:
    same = arm.record['variation'] in ({}, main.record['variation'])
    is_plain = arm.label in plain or (same and arm.record['arm'] in plain)
    if arm is not main and is_plain:
      text += f'; {arm.label}: {arm.spread} at {arm.share:.1%}'
  lines = [f'{text}.']
  if main.label in compared:
    lines.append(verdict(main.label, study.baseline, compared[main.label]))
  if len(compared) > 1:
    lines.append(_tally(tables.against(study), compared))
  return lines


def _side(versus: statistics.Difference) -> str:
  """'better', 'worse' or 'indistinguishable'."""
  if versus.low is not None and versus.low > 0:
    return 'better'
  if versus.high is not None and versus.high < 0:
    return 'worse'
  return 'indistinguishable'


def verdict(label: str, baseline: str, versus: statistics.Difference) -> str:
  """A paired difference in words.

  >>> verdict('a', 'b', statistics.Difference(3, 1.0, 0.5, 1.5))
  'a minus b: +1.00 points (95% interval +0.50 to +1.50, 3 pairs of seeds): a is better here.'
  """  # noqa: E501
  text = f'{label} minus {baseline}: {versus.mean:+.2f} points'
  if versus.low is None:
    return f'{text} with one seed (n = 1), so there is no interval.'
  text += f' (95% interval {versus.low:+.2f} to {versus.high:+.2f}, '
  text += f'{versus.n} pairs of seeds)'
  side = _side(versus)
  if side == 'indistinguishable':
    return f'{text}: the two are statistically indistinguishable.'
  return f'{text}: {label} is {side} here.'


def _tally(baseline: str, compared: Mapping[str, statistics.Difference]) -> str:
  """How many arms are better, worse, or neither, and which."""
  sides = {label: _side(versus) for label, versus in compared.items()}
  text = f'Of {len(sides)} arms compared with {baseline}: '
  for side in ('better', 'worse'):
    names = [label for label, found in sides.items() if found == side]
    text += f'{len(names)} {side}' + f' ({"; ".join(names)})' * bool(names)
    text += ', '
  open_ = list(sides.values()).count('indistinguishable')
  return f'{text}{open_} statistically indistinguishable.'


def _likeness(groups: Groups) -> str:
  """The answer of a study without trainings: are the seeds alike?"""
  known = {
    label: alike.correlation
    for label, alike in tables.between_seeds(groups).items()
    if alike.correlation is not None
  }
  if not known:
    return 'There are only structures so far, and too few to compare.'
  said = '; '.join(f'{k}: {v:.2f}' for k, v in list(known.items())[:3])
  if len(known) > 3:
    others = list(known.values())[3:]
    said += f'; the others: {min(others):.2f} to {max(others):.2f}'
  n = max(len(group) for group in groups.values())
  return (
    'How alike are the structures of different seeds? The shares that the '
    f'layers keep correlate, over {n} seeds, at {said}.'
  )


# Accuracy.

_NUMBERS = 'Test accuracy in %'  # The table on the first screen.


def _accuracy(report: page.Page, arms: Sequence[Arm]) -> None:
  rows = []
  for arm in arms:
    mean, sd = arm.total.mean, arm.total.sd or 0
    interval = (mean, mean - sd, mean + sd, arm.values)
    rows.append(figures.Interval(arm.title, *interval))
  picture = figures.intervals(
    'accuracy',
    'Test accuracy of each arm in %, mean ± standard deviation',
    rows,
    'test accuracy in %',
    {True: 'mean ± standard deviation'},
  )
  report.figure(
    picture,
    'Test accuracy of every run (circles), and the mean and standard deviation '
    'of each arm (diamonds). The number of an arm is the same in all pictures.',
    numbers=_NUMBERS,
  )


def _differences(
  report: page.Page,
  study: ml_collections.ConfigDict,
  compared: Mapping[str, statistics.Difference],
  titles: Mapping[str, str],
) -> None:
  if not compared:
    return
  baseline, rows = tables.against(study), []
  for label, v in compared.items():
    low, high = (v.mean if end is None else end for end in (v.low, v.high))
    filled = _side(v) != 'indistinguishable'
    rows.append(figures.Interval(titles[label], v.mean, low, high, (), filled))
  picture = figures.intervals(
    'differences',
    f'Accuracy minus that of {baseline}, in points, with 95% intervals',
    rows,
    f'accuracy in points, minus that of\n{baseline}',
    {True: 'interval without 0', False: 'interval with 0, or n = 1'},
  )
  report.figure(
    picture,
    f'Accuracy minus that of {baseline}, paired by seed, with 95% intervals '
    "(Student's t). A diamond is filled where the interval does not hold 0. "
    f'The {len(compared)} intervals are not corrected for their number: even '
    'if no arm differed, one in 20 would miss 0 by chance.',
    numbers=_NUMBERS,
  )


def _costs(report: page.Page, arms: Sequence[Arm]) -> None:
  """Accuracy against MACs, where arms differ in them."""
  places = Counter(round(100 * arm.share) for arm in arms)
  if len(places) < 2:
    return
  lines, drawn = [], Counter[int]()
  for arm in arms:
    place = round(100 * arm.share)  # Arms at one place stand side by side.
    x = 100 * arm.share + drawn[place] - (places[place] - 1) / 2
    drawn[place] += 1
    point = ([x], [arm.total.mean], [arm.total.sd or 0])
    lines.append(figures.Line(arm.title, *point))
  panels = {'test accuracy in %': lines}
  xlabel = "MACs in % of the reference network's"
  report.figure(
    figures.curves('macs', 'Accuracy against MACs', panels, xlabel),
    'Test accuracy against MACs. Bars reach one standard deviation up and '
    'down. Arms with the same MACs are drawn side by side; the table has the '
    'exact shares.',
    numbers=_NUMBERS,
  )


def _varied(
  report: page.Page, study: ml_collections.ConfigDict, arms: Sequence[Arm]
) -> None:
  """Accuracy over the values of the study's field."""
  points: dict[str, list[tuple[float, float, float]]] = {}
  for arm in arms:
    if study.field in arm.record['variation']:
      value = float(arm.record['variation'][study.field])
      found = points.setdefault(arm.record['arm'], [])
      found.append((value, arm.total.mean, arm.total.sd or 0.0))
  if not any(len(found) > 1 for found in points.values()):
    return
  lines = [
    figures.Line(name, *zip(*sorted(found), strict=True))
    for name, found in points.items()
  ]
  title = f'Test accuracy over {study.field}'
  panels = {'test accuracy in %': lines}
  report.figure(
    figures.curves('varied', title, panels, study.field),
    f'{title}: mean and standard deviation.',
    numbers=_NUMBERS,
  )


# Structures.


def _shares(report: page.Page, groups: Groups) -> None:
  """The mean share that each arm keeps of each layer."""
  some = {k: g for k, g in groups.items() if g[0]['arm'] != 'full'} or groups
  layers = list(next(iter(some.values()))[0]['counts'])
  values = [
    np.mean([tables.shares(r) for r in group], 0) for group in some.values()
  ]
  titles = [_titles(groups)[label] for label in some]
  title = f'Share kept of each of {len(layers)} layers, mean over seeds'
  args = (layers, titles, np.stack(values, 1), 'number of the arm')
  report.figure(
    figures.heat('shares', title, *args),
    "The share of each layer's channels that the arms keep, in %, mean over "
    'the seeds. A column stands for an arm, by its number.',
    _numbered(tables.counts(some), groups),
  )


def _similarity(report: page.Page, groups: Groups) -> None:
  """The correlation of the shares kept, between all structures."""
  some = {k: g for k, g in groups.items() if tables.has_shape(g[0])}
  records = [r for group in some.values() for r in group]
  matrix = tables.correlations(records)
  if not (~np.isnan(matrix) & ~np.eye(len(matrix), dtype=bool)).any():
    return
  blocks = [(_titles(groups)[label], len(g)) for label, g in some.items()]
  rows = [
    [title, *('-' if np.isnan(v) else f'{v:.2f}' for v in row)]
    for (title, _), row in zip(
      blocks, figures.block_means(matrix, blocks), strict=True
    )
  ]
  columns = ['arm', *(title.partition('.')[0] for title, _ in blocks)]
  title = f'Correlation between {len(records)} structures, by seeds of one arm'
  report.figure(
    figures.similarity('similarity', title, matrix, blocks),
    'How the shares that the layers keep correlate between every two '
    'structures. A small square is a pair, a block two arms (by number); the '
    'number in a block is its mean without the diagonal.',
    Table('Mean correlation, by number of the arm', columns, rows),
    tables.similarity(records),
  )


# How it was made.


def _made(
  report: page.Page,
  study: ml_collections.ConfigDict,
  records: Sequence[tables.Record],
) -> None:
  """Every cell, the time they took, and the config."""
  columns = ['arm', 'seed', 'test accuracy', 'MACs', 'share', 'seconds', 'cell']
  rows = [
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
  report.section('How it was made')
  report.folded(Table('Every cell', columns, rows))

  def time(field: str) -> str:
    return console.duration(sum(r.get(field) or 0.0 for r in records))

  def names(field: str) -> str:
    return ', '.join(sorted({str(r[field]) for r in records}))

  rows = [
    ['hardware', names('hardware')],
    ['commit', names('commit')],
    ['training, all cells', time('seconds')],
    ['search (a shared one counts for each cell)', time('search_seconds')],
  ]
  report.table('Time and hardware', ['what', 'value'], rows)
  fields = study.to_dict()
  base = fields.pop('base')
  fields = {k: v for k, v in fields.items() if v not in ('', (), False)}
  rows = [[k, json.dumps(v)] for k, v in sorted(fields.items())]
  report.table('The study', ['field', 'value'], rows)
  report.config(base, study.to_dict())
