"""What the report of a study tells: read from its results, or its cells."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import console, errors, storage
from pfs_jax.report import figures, page, run_page
from pfs_jax.studies import plan, results, statistics

Groups = Mapping[str, Sequence[results.Record]]


def build(study, workdir: pathlib.Path) -> tuple[str, list[figures.Picture]]:
  """(HTML, pictures) of the finished cells of a study."""
  records, total = _records(study, workdir)
  groups = results.grouped(records)
  sections, pictures = [], []
  for make in (_accuracy, _differences, _trade, _varied, _shares, _similarity):
    found, drawn = make(study, groups)
    sections += found
    pictures += drawn
  sections += [_cells(records), _made(records), _config(study)]
  first = records[0]
  title = (
    f'Study {study.study}: {first["model"]}, base width '
    f'{study.base.model.base_width or "default"}, on {study.base.data.name}'
  )
  answer = _answer(study, groups, len(records), total)
  return page.document(title, answer, sections), pictures


def _records(study, workdir: pathlib.Path) -> tuple[list[Any], int]:
  """(finished records in the study's order, cells in all)."""
  cells = plan.cells(study)
  there = {r['config_hash']: r for r in results.mine(study, workdir)}
  for cell in cells:  # What no results file has yet.
    path = workdir / 'cells' / cell.hash / 'cell.json'
    if cell.hash not in there and path.exists():
      there[cell.hash] = {**storage.read_json(path), 'label': cell.label}
  if not there:
    raise errors.UserError(
      f'{results.path(study, workdir)} and {workdir} hold no finished cell of '
      f'{study.study}: run --mode=study first.'
    )
  return [there[c.hash] for c in cells if c.hash in there], len(cells)


def _numbers(groups: Groups) -> dict[str, int]:
  """{label: number that stands for it in pictures and tables}."""
  return {label: i + 1 for i, label in enumerate(groups)}


def _drawn(groups: Groups) -> list[figures.Group]:
  """The groups that have accuracies, for the pictures."""
  found = []
  for label, number in _numbers(groups).items():
    values = list(results.accuracies(groups[label]).values())
    if values:
      total = statistics.summary(values)
      share = float(np.mean([r['macs_share'] for r in groups[label]]))
      found.append(
        figures.Group(number, label, values, total.mean, total.sd, share)
      )
  return found


def _spread(group: figures.Group) -> str:
  """'89.05% ± 0.35 (n = 5)'."""
  sd = '' if group.sd is None else f' ± {group.sd:.2f}'
  return f'{group.mean:.2f}%{sd} (n = {len(group.values)})'


# The first screen.


def _answer(study, groups: Groups, done: int, total: int) -> list[str]:
  drawn = _drawn(groups)
  if drawn:
    lines = _outcome(study, groups, drawn)
  else:
    lines = _likeness(groups)
  count = f'{done} of {total} cells are finished'
  if done < total:
    count += '; the rest may change what is said here'
  soft = f'{count}. '
  if drawn:
    soft += (
      'Test accuracy, mean ± standard deviation over n seeds; MACs of one '
      "image, as a share of the reference network's."
    )
  else:
    soft += (
      'Correlation is that of the shares kept per layer, its mean over pairs '
      'of seeds and that of the pairs least and most alike; overlap is the '
      'Jaccard index of the kept channels.'
    )
  parts = [page.paragraph(line, 'answer') for line in lines]
  parts.append(page.paragraph(soft, 'soft'))
  table = _arms_table(study, groups) if drawn else _alike_table(groups)
  return [*parts, table]


def _main(study, drawn: Sequence[figures.Group]) -> figures.Group:
  """The group that the study is about: its first that is no baseline."""
  others = [g for g in drawn if g.label not in (study.baseline, 'full')]
  return (others or list(drawn))[0]


def _outcome(study, groups: Groups, drawn) -> list[str]:
  """The main arm, its baseline, the full network; then the verdicts."""
  first = _main(study, drawn)
  variation = groups[first.label][0]['variation']
  text = f'{first.label}: {_spread(first)} at {first.share:.1%} of the MACs'
  for group in drawn:
    record = groups[group.label][0]
    known = {group.label, record['arm']} & {study.baseline, 'full'}
    same = record['variation'] in ({}, variation)
    if group is not first and known and (same or group.label in known):
      text += f'; {group.label}: {_spread(group)} at {group.share:.1%}'
  lines = [f'{text}.']
  found = _versus(study, groups)
  if first.label in found:
    lines.append(_verdict(first.label, study.baseline, found[first.label]))
  if len(found) > 1:
    lines.append(_tally(results.against(study), found))
  return lines


def _side(versus: statistics.Difference) -> str:
  """What a paired difference says."""
  if versus.low is not None and versus.low > 0:
    return 'better'
  if versus.high is not None and versus.high < 0:
    return 'worse'
  return 'open'


def _tally(baseline: str, found: Mapping[str, statistics.Difference]) -> str:
  """How many arms are better, worse, or neither, and which."""
  sides: dict[str, list[str]] = {'better': [], 'worse': [], 'open': []}
  for label, versus in found.items():
    sides[_side(versus)].append(label)
  parts = []
  for side in ('better', 'worse'):
    names = sides[side]
    parts.append(
      f'{len(names)} {side}' + f' ({"; ".join(names)})' * bool(names)
    )
  return (
    f'Of {len(found)} compared with {baseline}: {", ".join(parts)}, for '
    f'{len(sides["open"])} it cannot be told at this n.'
  )


def _verdict(label: str, baseline: str, versus: statistics.Difference) -> str:
  """A paired difference in words."""
  text = f'{label} minus {baseline}: {versus.mean:+.2f} points'
  if versus.low is None:
    return f'{text} over n = 1 seed, so no interval.'
  text += f' (95% interval {versus.low:+.2f} to {versus.high:+.2f}'
  text += f', {versus.n} pairs by seed)'
  side = _side(versus)
  if side == 'open':
    return f'{text}: which is better cannot be told at this n.'
  return f'{text}: {label} is {side} here.'


def _between_seeds(groups: Groups) -> dict[str, results.Similarity]:
  """{label: how alike its seeds are}, where there are pairs."""
  found = {}
  for label, group in groups.items():
    pairs = list(itertools.combinations(group, 2))
    if pairs and results.has_shape(group[0]):
      found[label] = results.similarity(pairs)
  return found


def _likeness(groups: Groups) -> list[str]:
  """What a study without trainings comes to: are seeds alike?"""
  found = {k: v.correlation for k, v in _between_seeds(groups).items()}
  found = {k: v for k, v in found.items() if v is not None}
  if not found:
    return ['Only structures so far, too few to compare.']
  said = '; '.join(f'{k}: {v:.2f}' for k, v in list(found.items())[:3])
  if len(found) > 3:
    others = list(found.values())[3:]
    said += f'; others: {min(others):.2f} to {max(others):.2f}'
  n = max(len(group) for group in groups.values())
  return [
    'How alike are the structures of different seeds? Correlation of the '
    f'shares kept per layer (n = {n} seeds) in {said}.'
  ]


def _alike_table(groups: Groups) -> str:
  numbers = _numbers(groups)
  rows = [
    [label, str(numbers[label]), *found.texts]
    for label, found in _between_seeds(groups).items()
  ]
  return page.table(
    'Likeness between seeds',
    ['arm', 'no.', *results.SIMILARITY_COLUMNS],
    rows,
  )


def _arms_table(study, groups: Groups) -> str:
  numbers = _numbers(groups)
  records = [r for group in groups.values() for r in group]
  rows = [
    [label, str(numbers[label]), *(v or '-' for v in values), n, macs, seconds]
    for label, n, *values, macs, seconds in results.rows(study, records)
  ]
  minus = f'minus {results.against(study)}'
  against = minus if study.baseline else 'difference'
  columns = ['mean in %', 'sd', against, '95%', 'n', 'MACs', 'seconds']
  return page.table('Arms', ['arm', 'no.', *columns], rows)


# Accuracy.


def _versus(study, groups: Groups) -> dict[str, statistics.Difference]:
  """{label: its paired difference from the baseline}."""
  records = [r for group in groups.values() for r in group]
  found = {}
  for label, group in groups.items():
    ours = results.accuracies(group)
    theirs = results.opponent(study, records, group)
    versus = statistics.paired(ours, theirs)
    if versus is not None:
      found[label] = versus
  return found


def _accuracy(study, groups: Groups):
  del study
  drawn = _drawn(groups)
  if not drawn:
    return [], []
  alt = 'Test accuracy of each arm. ' + '; '.join(
    f'{g.label}: {_spread(g)}' for g in drawn
  )
  picture = figures.render('accuracy', f'{alt}.', figures.accuracy, drawn)
  rows = [
    [g.label, str(g.number), ', '.join(f'{v:.2f}' for v in g.values)]
    for g in drawn
  ]
  figure = page.figure(
    picture,
    'Test accuracy of every run (circles), and the mean and standard deviation '
    'of each arm (diamonds). The number of an arm is the same everywhere.',
    page.beside(
      'Test accuracy in %, seed by seed', ['arm', 'no.', 'runs'], rows
    ),
  )
  return [page.section('Accuracy', figure)], [picture]


def _differences(study, groups: Groups):
  found = _versus(study, groups)
  if not found:
    return [], []
  numbers = _numbers(groups)

  def limits(versus):
    if versus.low is None:
      return '-'
    return f'{versus.low:+.2f} .. {versus.high:+.2f}'

  minus = f'Accuracy minus that of {results.against(study)}'
  listed = (
    f'{label}: {v.mean:+.2f}, {limits(v)}' for label, v in found.items()
  )
  alt = f'{minus}, in points. {"; ".join(listed)}'
  picture = figures.render(
    'differences',
    f'{alt}.',
    figures.differences,
    [f'{label}  {numbers[label]}' for label in found],
    list(found.values()),
    results.against(study),
  )
  rows = [
    [label, str(numbers[label]), str(v.n), f'{v.mean:+.2f}', limits(v)]
    for label, v in found.items()
  ]
  figure = page.figure(
    picture,
    f'{minus}, paired by seed, with 95% '
    "intervals (Student's t). A filled diamond: the interval does not hold 0. "
    f'The intervals are not corrected for there being {len(found)} of them: '
    'where nothing differs, one in 20 misses 0 by chance.',
    page.beside(
      'Paired differences in points',
      ['arm', 'no.', 'pairs', 'mean', '95%'],
      rows,
    ),
  )
  return [page.section('Paired differences', figure)], [picture]


def _trade(study, groups: Groups):
  del study
  drawn = _drawn(groups)
  if len({round(100 * g.share) for g in drawn}) < 2:
    return [], []
  alt = 'Accuracy against MACs. ' + '; '.join(
    f'{g.label}: {g.mean:.2f}% at {g.share:.1%}' for g in drawn
  )
  picture = figures.render('macs', f'{alt}.', figures.trade, drawn)
  rows = [
    [
      g.label,
      str(g.number),
      f'{g.share:.1%}',
      f'{g.mean:.2f}',
      '-' if g.sd is None else f'{g.sd:.2f}',
    ]
    for g in drawn
  ]
  figure = page.figure(
    picture,
    'Test accuracy against MACs; bars are one standard deviation up and down. '
    'Arms at the same MACs are drawn side by side: the table has the shares.',
    page.beside(
      'Accuracy and MACs', ['arm', 'no.', 'MACs', 'mean in %', 'sd'], rows
    ),
  )
  return [page.section('Accuracy against MACs', figure)], [picture]


def _varied(study, groups: Groups):
  """Accuracy over the values of the study's field."""
  lines: dict[str, list[tuple[float, float, float | None]]] = {}
  for group in _drawn(groups):
    first = groups[group.label][0]
    if study.field in first['variation']:
      value = float(first['variation'][study.field])
      lines.setdefault(first['arm'], []).append((value, group.mean, group.sd))
  lines = {arm: sorted(p, key=lambda p: p[0]) for arm, p in lines.items()}
  if not any(len(points) > 1 for points in lines.values()):
    return [], []
  alt = f'Test accuracy over {study.field}. ' + '; '.join(
    f'{arm}: ' + ', '.join(f'{mean:.2f}% at {v:g}' for v, mean, _ in points)
    for arm, points in lines.items()
  )
  picture = figures.render(
    'varied', f'{alt}.', figures.varied, study.field, lines
  )
  rows = [
    [arm, f'{v:g}', f'{mean:.2f}', '-' if sd is None else f'{sd:.2f}']
    for arm, points in lines.items()
    for v, mean, sd in points
  ]
  figure = page.figure(
    picture,
    f'Test accuracy over {study.field}: mean and standard deviation.',
    page.beside(
      f'Over {study.field}', ['arm', study.field, 'mean in %', 'sd'], rows
    ),
  )
  return [page.section(f'Accuracy over {study.field}', figure)], [picture]


# Structures.


def _shares(study, groups: Groups):
  """The mean share kept of each layer, arm by arm."""
  del study
  numbers = _numbers(groups)
  shown = {k: g for k, g in groups.items() if g[0]['arm'] != 'full'} or groups
  layers = list(next(iter(shown.values()))[0]['counts'])
  columns = {
    label: np.mean([results.shares(r) for r in group], 0)
    for label, group in shown.items()
  }
  values = np.stack(list(columns.values()), 1)
  alt = (
    f'Share kept of each of {len(layers)} layers, mean over seeds. '
    + '; '.join(
      f'{label}: {layers[int(v.argmin())]} least ({v.min():.0%}), '
      f'{layers[int(v.argmax())]} most ({v.max():.0%})'
      for label, v in columns.items()
    )
  )
  names = [str(numbers[label]) for label in columns]
  picture = figures.render(
    'shares', f'{alt}.', figures.shares, layers, names, values
  )
  rows = [
    [layer, *(f'{100 * v:.0f}' for v in row)]
    for layer, row in zip(layers, values, strict=True)
  ]
  key = ', '.join(f'{numbers[label]} {label}' for label in columns)
  figure = page.figure(
    picture,
    "Share of each layer's channels that is kept, in %, mean over the seeds. "
    f'Columns are the arms: {key}.',
    page.beside(
      'Share kept in %, by number of the arm', ['layer', *names], rows
    ),
  )
  return [page.section('Channels of each layer', figure)], [picture]


def _similarity(study, groups: Groups):
  """Correlation of the shares kept, between all structures."""
  del study
  shown = {k: g for k, g in groups.items() if results.has_shape(g[0])}
  records = [r for group in shown.values() for r in group]
  matrix = _correlations(records)
  if not (~np.isnan(matrix) & ~np.eye(len(matrix), dtype=bool)).any():
    return [], []
  numbers = _numbers(groups)
  blocks = [(str(numbers[k]), len(g)) for k, g in shown.items()]
  means = figures.block_means(matrix, blocks)

  alt = (
    f'Correlation between {len(records)} structures, between seeds of one '
    'arm: '
    + '; '.join(
      f'{k}: {_correlation(means[i, i])}' for i, k in enumerate(shown)
    )
  )
  picture = figures.render(
    'similarity', f'{alt}.', figures.similarity, matrix, blocks
  )
  figure = page.figure(
    picture,
    'Correlation of the shares kept per layer between every two structures: '
    'one small square for each pair, one block for each two arms (by number), '
    'the number in it the mean of the block without the diagonal.',
    _similarity_tables(groups, shown, means),
  )
  return [page.section('Similarity of structures', figure)], [picture]


def _similarity_tables(groups: Groups, shown: Groups, means: np.ndarray) -> str:
  numbers = _numbers(groups)
  rows = [
    [label, str(numbers[label]), *map(_correlation, row)]
    for label, row in zip(shown, means, strict=True)
  ]
  names = [str(numbers[label]) for label in shown]
  columns = ['between', *results.SIMILARITY_COLUMNS]
  records = [r for group in shown.values() for r in group]
  pairs = page.table('Similarity', columns, results.similarity_rows(records))
  return page.table('Mean correlation', ['arm', 'no.', *names], rows) + (
    page.details('Pairs, and overlap of the kept channels by chance', pairs)
  )


def _correlation(value: float) -> str:
  return '-' if np.isnan(value) else f'{value:.2f}'


def _correlations(records: Sequence[results.Record]) -> np.ndarray:
  """[n, n] correlations, NaN where a structure keeps one share everywhere."""
  found = np.full((len(records), len(records)), np.nan)
  vectors = [results.shares(r) for r in records]
  for i, j in np.ndindex(found.shape):
    value = statistics.correlation(vectors[i], vectors[j])
    found[i, j] = np.nan if value is None else value
  return found


# How it was made.


def _cells(records: Sequence[results.Record]) -> tuple[str, str]:
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
  columns = ['arm', 'seed', 'test accuracy', 'MACs', 'share', 'seconds', 'cell']
  table = page.table('Every cell', columns, rows)
  return page.section(
    'Cells', page.details(f'Every cell ({len(rows)} rows)', table)
  )


def _made(records: Sequence[results.Record]) -> tuple[str, str]:
  """Commits, hardware, time."""

  def total(field):
    return sum(r.get(field) or 0.0 for r in records)

  def all_of(field):
    return ', '.join(sorted({str(r[field]) for r in records}))

  rows = [
    ['hardware', all_of('hardware')],
    ['commit', all_of('commit')],
    ['training, all cells', console.duration(total('seconds'))],
    [
      'search, shared ones counted for each cell',
      console.duration(total('search_seconds')),
    ],
  ]
  return page.section(
    'Time, hardware, versions', page.table('Made with', ['of', 'value'], rows)
  )


def _config(study) -> tuple[str, str]:
  fields = study.to_dict()
  base = fields.pop('base')
  fields = {k: v for k, v in fields.items() if v not in ('', (), False)}
  rows = [[k, json.dumps(v)] for k, v in sorted(fields.items())]
  changed = run_page.changed_rows(base)
  text = json.dumps(study.to_dict(), indent=2, sort_keys=True)
  return page.section(
    'Config',
    page.table('The study', ['field', 'value'], rows),
    page.table(
      'Fields of a run that are not the default',
      ['field', 'value', 'default'],
      changed,
    ),
    page.details('The whole config', page.preformatted(text)),
  )
