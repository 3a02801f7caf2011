"""What the report of a run tells: read from the files of its workdir."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import config, console, errors, models, runs, storage, structures
from pfs_jax.report import figures, page
from pfs_jax.stages import Job


@dataclasses.dataclass(frozen=True)
class Cut:
  """One budget of a run: its structure and, where trained, its result.

  Attributes:
    name: Of the budget.
    counts: {layer: channels kept}.
    macs: Of the narrow network.
    params: Its parameters.
    result: What result.json holds, None before the training.
  """

  name: str
  counts: Mapping[str, int]
  macs: int
  params: int
  result: Mapping[str, Any] | None


def build(job: Job) -> tuple[str, list[figures.Picture]]:
  """(HTML, pictures) of the run in the job's workdir."""
  _check_there(job)
  cuts = _cuts(job)
  sections, pictures = [], []
  for make in (_counts, _gates, _search_curves, _train_curves):
    found, drawn = make(job, cuts)
    sections += found
    pictures += drawn
  sections += [_times(job, cuts), _config(job)]
  title = _title(job, cuts)
  return page.document(title, _answer(job, cuts), sections), pictures


# What there is.


def _check_there(job: Job) -> None:
  """Refuses an empty folder, and the work of another config."""
  workdir, c = job.workdir, job.config
  search = workdir / 'search' / 'config.json'
  results = list(workdir.glob('result*.json'))
  if not (search.exists() or results or (workdir / 'train').exists()):
    raise errors.UserError(
      f'{workdir} holds no run yet: --mode=search or --mode=run makes one.'
    )
  if search.exists():
    runs.claim(search.parent, config.identity(c, 'search'))


def _cuts(job: Job) -> list[Cut]:
  """All budgets of the workdir, its first one first."""
  found: dict[str, Cut] = {}
  for path in _plain_first(job.workdir, 'structure'):
    s = structures.Structure.from_json(path.read_text())
    name = s.source.get('budget', path.stem)
    counts = dict(zip(s.layers, s.counts, strict=True))
    found[name] = Cut(name, counts, s.macs, s.params, None)
  for path in _plain_first(job.workdir, 'result'):
    r = storage.read_json(path)
    name = r['budget']
    found[name] = Cut(name, r['counts'], r['macs'], r['params'], r)
  for cut in found.values():
    if tuple(cut.counts) != job.network.cost_model.layers:
      raise errors.UserError(
        f'{job.workdir}: the counts of {cut.name} are not those of '
        f'{job.model_name}; give the config that made them.'
      )
    if cut.result:
      _check_trained(job, cut)
  return list(found.values())


def _plain_first(workdir: pathlib.Path, stem: str) -> list[pathlib.Path]:
  named = sorted(workdir.glob(f'{stem}-*.json'))
  return [p for p in (workdir / f'{stem}.json', *named) if p.exists()]


def _check_trained(job: Job, cut: Cut) -> None:
  """Refuses the training of another config, naming the fields that differ."""
  folder = job.file('train', cut.name)
  if (folder / 'config.json').exists():
    identity = config.identity(job.config, 'train')
    counts = {'structure.counts': list(cut.counts.values())}
    runs.claim(folder, {**identity, **counts})


def _share(job: Job, macs: int) -> str:
  return f'{macs / job.network.reference_macs:.1%}'


def _searched_widths(job: Job) -> tuple[int, ...]:
  return job.network.cost_model.widths


def _reference_widths(job: Job) -> tuple[int, ...]:
  """Widths of the reference network; a model of the user's own is its own."""
  description = job.network.description
  if 'name' not in description:
    return _searched_widths(job)
  sizes = models.gate_sizes(description['name'], description['base_width'])
  return tuple(sizes.values())


# The first screen.


def _title(job: Job, cuts: Sequence[Cut]) -> str:
  c, name = job.config, job.model_name
  shares = ' and '.join(_share(job, cut.macs) for cut in cuts)
  cut = f', cut to {shares} of the MACs' if cuts else ', search under way'
  return f'{name} on {c.data.name}{cut}, seed {c.seed}'


def interval(accuracy: float, n: int) -> tuple[float, float]:
  """Wilson's 95% interval of an accuracy that was counted on n images."""
  z = 1.959964
  middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n)
  half *= math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
  return middle - half, middle + half


def _outcome(job: Job, cut: Cut) -> str:
  """One budget in a sentence or two."""
  cost = (
    f'{cut.macs:,} MACs an image, {_share(job, cut.macs)} of the reference '
    f"network's {job.network.reference_macs:,}"
  )
  if not cut.result:
    return f'{cut.name}: cut to {cost}; not trained yet.'
  accuracy, n = cut.result['test_accuracy'], cut.result['test_examples']
  text = f'{accuracy:.2%} test accuracy with {cost}.'
  reference = cut.result['reference_test_accuracy']
  if reference is None:
    return f'{text} The reference network was not trained.'
  points = 100 * (accuracy - reference)
  side = 'below' if points < 0 else 'above'
  return (
    f'{text} The reference network, trained the same way: {reference:.2%}; '
    f'the narrow one is {abs(points):.2f} points {side} it '
    f'({abs(points) * n / 100:.0f} of {n:,} images).'
  )


def _answer(job: Job, cuts: Sequence[Cut]) -> list[str]:
  parts = [page.paragraph(_outcome(job, cut), 'answer') for cut in cuts]
  if not cuts:
    steps = [r['step'] for r in runs.read_metrics(job.workdir / 'search')]
    at = f'at step {steps[-1]}' if steps else 'at its start'
    parts = [
      page.paragraph(f'The search is {at}; nothing is cut yet.', 'answer')
    ]
  if any(cut.result for cut in cuts):
    parts.append(
      page.paragraph(
        'One seed (n = 1): the spread over seeds is not known. The intervals '
        'tell of the number of test images alone.',
        'soft',
      )
    )
  return [*parts, _networks(job, cuts)]


def _networks(job: Job, cuts: Sequence[Cut]) -> str:
  network, model = job.network, job.network.cost_model
  results = [cut.result for cut in cuts if cut.result]
  size = results[0]['test_examples'] if results else 0
  reference = results[0]['reference_test_accuracy'] if results else None

  def row(label, macs, params, accuracy):
    shown = ['-', '-']
    if accuracy is not None:
      low, high = interval(accuracy, size)
      shown = [f'{accuracy:.2%}', f'{100 * low:.1f} .. {100 * high:.1f}']
    return [label, *shown, f'{macs:,}', _share(job, macs), f'{params:,}']

  widths = model.widths
  rows = [
    row(
      f'narrow ({cut.name})',
      cut.macs,
      cut.params,
      cut.result and cut.result['test_accuracy'],
    )
    for cut in cuts
  ]
  rows += [
    row(
      'reference', network.reference_macs, network.reference_params, reference
    ),
    row('searched', model.macs(widths), model.params(widths), None),
  ]
  columns = ['test accuracy', '95% interval', 'MACs', 'share', 'parameters']
  return page.table('Networks', ['network', *columns], rows)


# Structure.


def _counts(job: Job, cuts: Sequence[Cut]):
  if not cuts:
    return [], []
  means = {k: float(g.mean()) for k, g in _chosen_gates(job).items()}
  html, pictures = [], []
  for i, cut in enumerate(cuts):
    picture = _draw_counts(job, cut, 'counts' if i == 0 else cut.name)
    pictures.append(picture)
    html.append(
      page.figure(
        picture,
        f'{cut.name}: channels kept of each layer (hatched) within the width '
        'that was searched (outline); a bar across marks the width of the '
        'reference network where it is another.',
        _counts_table(job, cut, means),
      )
    )
  return [page.section('Channels of each layer', *html)], pictures


def _draw_counts(job: Job, cut: Cut, name: str) -> figures.Picture:
  searched = _searched_widths(job)
  kept = list(cut.counts.values())
  shares = {
    k: n / w for (k, n), w in zip(cut.counts.items(), searched, strict=True)
  }
  least, most = min(shares, key=shares.get), max(shares, key=shares.get)
  alt = (
    f'Bar chart of {len(kept)} layers, {cut.name}: {sum(kept)} of '
    f'{sum(searched)} channels kept; the largest share in {most} '
    f'({shares[most]:.0%}), the smallest in {least} ({shares[least]:.0%}).'
  )
  stem = name if name == 'counts' else f'counts-{name}'
  reference = _reference_widths(job)
  return figures.render(
    stem, alt, figures.counts, list(cut.counts), kept, searched, reference
  )


def _counts_table(job: Job, cut: Cut, means: Mapping[str, float]) -> str:
  columns = ['layer', 'kept', 'searched', 'share', 'reference']
  widths = zip(_searched_widths(job), _reference_widths(job), strict=True)
  rows = [
    [layer, str(n), str(searched), f'{n / searched:.0%}', str(reference)]
    for (layer, n), (searched, reference) in zip(
      cut.counts.items(), widths, strict=True
    )
  ]
  if means:
    columns.append('mean gate')
    rows = [[*row, f'{means[row[0]]:.3f}'] for row in rows]
  return page.beside(f'Channels kept, {cut.name}', columns, rows)


# Gates.


def _chosen_gates(job: Job) -> dict[str, np.ndarray]:
  """The gates that the selection rule took, {} before."""
  path = job.workdir / 'search' / 'gates.npz'
  return storage.read_arrays(path) if path.exists() else {}


def _gates(job: Job, cuts: Sequence[Cut]):
  html, pictures = [], []
  chosen = _chosen_gates(job)
  kept_path = job.workdir / 'kept.json'
  if chosen and kept_path.exists() and cuts:
    picture, table = _histogram(chosen, storage.read_json(kept_path))
    pictures.append(picture)
    caption = (
      'The gates that were taken: channels kept '
      f'({cuts[0].name}, hatched) on top of which stand those dropped (white).'
    )
    html.append(page.figure(picture, caption, table))
  rows = _course_rows(job)
  if rows:
    picture, table = _course(rows)
    pictures.append(picture)
    caption = (
      'The course of the gates: one histogram for each evaluation of the '
      'search, the first at the top, each as high as its fullest bin allows.'
    )
    html.append(page.figure(picture, caption, table))
  return ([page.section('Gates', *html)] if html else []), pictures


def _histogram(gates, kept) -> tuple[figures.Picture, str]:
  masks = {
    k: np.isin(np.arange(g.size), kept.get(k, [])) for k, g in gates.items()
  }
  values = np.concatenate([g.ravel() for g in gates.values()])
  mask = np.concatenate([masks[k] for k in gates])
  inside, outside = values[mask], values[~mask]
  counts, edges = np.histogram(np.clip(values, 0, 1), np.linspace(0, 1, 11))
  rows = []
  for i, total in enumerate(counts):
    last = i == len(counts) - 1
    high = edges[i + 1] if not last else np.inf
    n = int(((inside >= edges[i]) & (inside < high)).sum())
    end = f'{edges[i + 1]:.1f}'
    rows.append([f'{edges[i]:.1f} to {end}', str(n), str(int(total) - n)])
  alt = (
    f'Histogram of {values.size} gates: {inside.size} kept with mean '
    f'{_mean(inside)}, {outside.size} dropped with mean {_mean(outside)}; '
    f'{np.mean(values == 0):.0%} of all are 0.'
  )
  picture = figures.render('gates', alt, figures.gates, inside, outside)
  return picture, page.table('Gates', ['gate', 'kept', 'dropped'], rows)


def _mean(values: np.ndarray) -> str:
  return f'{values.mean():.2f}' if values.size else '-'


def _course_rows(job: Job) -> list[tuple[int, np.ndarray, float | None]]:
  """(step, all gates, validation accuracy) of at most 8 evaluations."""
  paths = sorted((job.workdir / 'search' / 'gates').glob('[0-9]*.npz'))
  records = {
    r['step']: r.get('validation_accuracy')
    for r in runs.read_metrics(job.workdir / 'search')
  }
  found = []
  for i in thinned(len(paths), 8):
    step = int(paths[i].stem)
    arrays = storage.read_arrays(paths[i]).values()
    gates = np.concatenate([g.ravel() for g in arrays])
    found.append((step, gates, records.get(step)))
  return found


def thinned(n: int, most: int) -> list[int]:
  """Indices 0..n-1, at most so many, evenly, the first and last among them."""
  return sorted({int(i) for i in np.linspace(0, n - 1, min(n, most)).round()})


def _course(rows) -> tuple[figures.Picture, str]:
  table = []
  for step, gates, accuracy in rows:
    low, median, high = np.quantile(gates, (0.1, 0.5, 0.9))
    numbers = (gates.mean(), low, median, high)
    table.append(
      [
        str(step),
        *(f'{v:.3f}' for v in numbers),
        f'{np.mean(gates == 0):.1%}',
        '-' if accuracy is None else f'{accuracy:.1%}',
      ]
    )
  first, last = rows[0], rows[-1]
  alt = (
    f'Histograms of the gates at {len(rows)} steps: mean '
    f'{first[1].mean():.2f} at step {first[0]}, {last[1].mean():.2f} with '
    f'{np.mean(last[1] == 0):.0%} at 0 at step {last[0]}.'
  )
  drawn = [(f'step {step}', gates) for step, gates, _ in rows]
  picture = figures.render('gates-course', alt, figures.course, drawn)
  columns = ['step', 'mean', '10%', '50%', '90%', 'at 0', 'validation']
  return picture, page.table('Gates by step: mean, quantiles', columns, table)


# Curves.

_SEARCH = {
  'cross-entropy': {'ce': 'training'},
  'share': {
    'gates_mean': 'mean gate',
    'gates_density': 'non-zero gates',
    'validation_accuracy': 'validation accuracy',
  },
}
_TRAIN = {
  'loss': {'loss': 'training', 'validation_loss': 'validation'},
  'accuracy': {'accuracy': 'training', 'validation_accuracy': 'validation'},
}


def _search_curves(job: Job, cuts: Sequence[Cut]):
  del cuts
  records = {'': runs.read_metrics(job.workdir / 'search')}
  found = _curves('Search', 'search', records, _SEARCH)
  if found is None:
    return [], []
  picture, html = found
  return [page.section('Search', html)], [picture]


def _train_curves(job: Job, cuts: Sequence[Cut]):
  """One picture for each budget, against the reference network."""
  html, pictures = [], []
  reference = runs.read_metrics(job.workdir / 'reference')
  for i, cut in enumerate(cuts):
    log = runs.read_metrics(job.file('train', cut.name))
    records = {'narrow, ': log, 'reference, ': reference}
    stem = 'training' if i == 0 else f'training-{cut.name}'
    found = _curves(f'Training, {cut.name}', stem, records, _TRAIN)
    if log and found is not None:
      pictures.append(found[0])
      html.append(found[1])
  return ([page.section('Training', *html)] if html else []), pictures


def _curves(
  title: str,
  name: str,
  records: Mapping[str, Sequence[Mapping[str, Any]]],
  panels: Mapping[str, Mapping[str, str]],
) -> tuple[figures.Picture, str] | None:
  """Curves over steps, of one or several metrics logs; None without records."""
  drawn: dict[str, list[figures.Line]] = {}
  for axis, fields in panels.items():
    for prefix, log in records.items():
      for field, label in fields.items():
        points = [(r['step'], r[field]) for r in log if field in r]
        if points:
          line = (prefix + label, *zip(*points, strict=True))
          drawn.setdefault(axis, []).append(line)
  if not drawn:
    return None
  ends = [
    f'{axis}, {label}: {y[0]:.3g} at step {x[0]}, {y[-1]:.3g} at step {x[-1]}'
    for axis, lines in drawn.items()
    for label, x, y in lines
  ]
  alt = f'{title}, curves over steps. {"; ".join(ends)}.'
  picture = figures.render(name, alt, figures.curves, drawn)
  tables = [_curve_table(axis, lines) for axis, lines in drawn.items()]
  caption = (
    f'{title}: metrics by step, those of the training set as means since the '
    'point before; the legend has the last values, metrics.jsonl all.'
  )
  return picture, page.figure(picture, caption, '\n'.join(tables))


def _curve_table(axis: str, lines: Sequence[figures.Line]) -> str:
  """The curves at 8 of the steps at which half of them or more have a value."""
  values = [dict(zip(x, y, strict=True)) for _, x, y in lines]
  present = {s: sum(s in v for v in values) for v in values for s in v}
  steps = sorted(s for s, n in present.items() if 2 * n >= len(values))
  steps = steps or sorted(present)
  rows = []
  for i in thinned(len(steps), 8):
    found = [v.get(steps[i]) for v in values]
    shown = ('-' if v is None else f'{v:.3g}' for v in found)
    rows.append([str(steps[i]), *shown])
  columns = ['step', *(label for label, _, _ in lines)]
  return page.table(axis.capitalize(), columns, rows)


# How it was made.


def _times(job: Job, cuts: Sequence[Cut]) -> tuple[str, str]:
  folders = {'search': job.workdir / 'search'}
  for cut in cuts:
    label = 'training' if len(cuts) == 1 else f'training, {cut.name}'
    folders[label] = job.file('train', cut.name)
  folders['wide network'] = job.workdir / 'wide'
  folders['reference network'] = job.workdir / 'reference'
  rows = []
  for label, folder in folders.items():
    records = runs.read_metrics(folder)
    if records:
      last = records[-1]
      time = console.duration(last.get('seconds', 0.0))
      rows.append([label, str(last['step']), time])
  parts = []
  if rows:
    columns = ['stage', 'steps', 'time']
    parts.append(page.table('Time, compilation included', columns, rows))
  found = {}
  path = job.workdir / 'versions.json'
  if path.exists():
    found = storage.read_json(path)
  for cut in cuts:
    if cut.result:
      found = cut.result['versions']
      break
  if found:
    versions = [[k, str(v)] for k, v in found.items()]
    versions.sort(key=lambda row: row[0] not in ('commit', 'hardware'))
    parts.append(page.table('Versions', ['of', 'value'], versions))
  return page.section('Time, hardware, versions', *parts)


def _config(job: Job) -> tuple[str, str]:
  path = job.workdir / 'config.json'
  found = storage.read_json(path) if path.exists() else job.config.to_dict()
  text = json.dumps(found, indent=2, sort_keys=True)
  rows = changed_rows(found)
  return page.section(
    'Config',
    page.table(
      'Fields that are not the default', ['field', 'value', 'default'], rows
    ),
    page.details('The whole config', page.preformatted(text)),
  )


def changed_rows(fields: Mapping[str, Any]) -> list[list[str]]:
  """(field, value, default) of the fields of a run's config that differ."""
  plain = _flat(config.default().to_dict())
  flat = _flat(fields)
  return [
    [name, _shown(value), _shown(plain.get(name, '-'))]
    for name, value in sorted(flat.items())
    if name == 'seed' or value != plain.get(name)
  ]


def _flat(fields: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'train.epochs': 8.0}; sequences are lists, as JSON has them."""
  found = {}
  for name, value in fields.items():
    if isinstance(value, Mapping):
      found |= _flat(value, f'{prefix}{name}.')
    else:
      found[prefix + name] = list(value) if isinstance(value, tuple) else value
  return found


def _shown(value: Any) -> str:
  return value or "''" if isinstance(value, str) else json.dumps(value)
