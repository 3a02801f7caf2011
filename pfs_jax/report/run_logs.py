"""Sections about the work of a run: probe, tournament, gates and metrics."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from pfs_jax import errors, runs, storage
from pfs_jax.report import figures
from pfs_jax.report.page import Page
from pfs_jax.stages import Job
from pfs_jax.studies.tournament import DIVERGED
from pfs_jax.tables import Table


class _Shown(TypedDict):
  """The fields that a report shows of probe.json and of tournament.json."""

  layers: list[str]
  sentence: str
  columns: list[str]
  rows: list[list[str]]


class _Probe(_Shown):
  losses: list[list[float]]
  mean: dict[str, float]
  error: dict[str, float]


class _Round(TypedDict):
  epochs: float
  losses: dict[str, list[float]]


class _Tournament(_Shown):
  counts: dict[str, list[int]]
  rounds: list[_Round]


def thinned(n: int, most: int) -> list[int]:
  """At most `most` of the indices 0..n-1, evenly, with the first and last.

  >>> thinned(9, 3)
  [0, 4, 8]
  """
  return sorted({int(i) for i in np.linspace(0, n - 1, min(n, most)).round()})


def probe(report: Page, job: Job) -> None:
  """Adds the rise of the loss when a layer loses channels, if it is known.

  probe.json holds a mean and a standard error for each layer, and the values of
  single draws.
  """
  path = job.workdir / 'probe.json'
  if not path.exists():
    return
  found: _Probe = storage.read_json(path, _Probe)
  layers = set(found['layers'])
  if not layers <= found['mean'].keys() & found['error'].keys():
    raise errors.UserError(f'{path}: mean and error must name all layers.')
  if len(found['losses']) != len(found['layers']):
    raise errors.UserError(f'{path}: losses must have an entry for each layer.')
  rows = [
    figures.Interval(k, found['mean'][k], found['error'][k], values)
    for k, values in zip(found['layers'], found['losses'], strict=True)
  ]
  meaning = {True: 'mean ± standard error'}
  report.section('Probe')
  report.paragraph(found['sentence'])
  report.figure(
    'probe',
    'The rise of the held-out loss for each million MACs, when channels are '
    'dropped in one layer alone.',
    figures.intervals(rows, 'rise of the loss', meaning),
    Table('Probe', found['columns'], found['rows']),
  )


def tournament(report: Page, job: Job) -> None:
  """Adds the losses and the widths of the candidates, if there was one."""
  path = job.workdir / 'tournament.json'
  if not path.exists():
    return
  found: _Tournament = storage.read_json(path, _Tournament)
  widths = job.network.cost_model.widths
  lengths = {len(counts) for counts in found['counts'].values()}
  if lengths | {len(found['layers'])} != {len(widths)}:
    raise errors.UserError(f'{path} is not of the {len(widths)} layers here.')
  lines = []
  for name in found['counts']:
    rounds = [r for r in found['rounds'] if name in r['losses']]
    rounds = [r for r in rounds if max(r['losses'][name]) < DIVERGED]
    values = [r['losses'][name] for r in rounds]
    means = [float(np.mean(v)) for v in values]
    spread = [float(np.std(v, ddof=len(v) > 1) / len(v) ** 0.5) for v in values]
    epochs = [r['epochs'] for r in rounds]
    lines += [figures.Line(name, epochs, means, spread)] if rounds else []
  shares = 100 * np.divide(list(found['counts'].values()), widths).T
  titles = [f'{i}. {name}' for i, name in enumerate(found['counts'], 1)]
  rows = [
    [layer, *(f'{v:.0f}' for v in row)]
    for layer, row in zip(found['layers'], shares, strict=True)
  ]
  report.section('Tournament')
  report.paragraph(found['sentence'])
  report.figure(
    'tournament',
    'Held-out loss of the candidates after each round: mean and standard error '
    'over seeds.',
    figures.curves({'held-out loss': lines}, 'epochs', last=True),
    Table('Candidates', found['columns'], found['rows']),
  )
  report.figure(
    'candidates',
    'Share in % that the candidates keep of each layer. Columns are numbered '
    'as the candidates are in the table.',
    figures.heat(found['layers'], titles, shares, 'candidate'),
    Table('Share kept in %', ['layer', *titles], rows),
  )


def chosen_gates(job: Job) -> dict[str, np.ndarray]:
  """The gates that the search chose; {} before its end."""
  path = job.workdir / 'search' / 'gates.npz'
  return storage.read_arrays(path) if path.exists() else {}


def _gates_by_label(job: Job) -> dict[str, np.ndarray]:
  """{label: gates}: all at evaluations of the search, then kept, dropped."""
  paths = sorted((job.workdir / 'search' / 'gates').glob('[0-9]*.npz'))
  found = {}
  for i in thinned(len(paths), 8):
    read = storage.read_arrays(paths[i]).values()
    found[f'step {int(paths[i].stem)}'] = [g.ravel() for g in read]
  chosen, path = chosen_gates(job), job.workdir / 'kept.json'
  if chosen and path.exists():
    kept = storage.read_json(path, dict[str, list[int]])
    masks = {
      k: np.isin(np.arange(g.size), kept.get(k, [])) for k, g in chosen.items()
    }
    found['kept'] = [g[masks[k]] for k, g in chosen.items()]
    found['dropped'] = [g[~masks[k]] for k, g in chosen.items()]
  joined = {label: np.concatenate(parts) for label, parts in found.items()}
  return {label: gates for label, gates in joined.items() if gates.size}


def gates(report: Page, job: Job) -> None:
  """Adds how the gates are distributed, over the search and at its end."""
  found = _gates_by_label(job)
  if not found:
    return
  inner = np.linspace(0, 1, 6)
  names = [f'{a:.1f}-{b:.1f}' for a, b in zip(inner, inner[1:], strict=False)]
  shares, rows = [], []
  for label, values in found.items():
    between = values[(values > 0) & (values < 1)]
    counts = np.histogram(between, inner)[0]
    ends = np.sum(values <= 0), np.sum(values >= 1)
    shares.append(100 * np.array([ends[0], *counts, ends[1]]) / values.size)
    shown = (f'{v:.1f}' for v in shares[-1])
    rows.append([label, str(values.size), f'{values.mean():.3f}', *shown])
  bins = ['at 0', *names, 'at 1']
  report.section('Gates')
  report.figure(
    'gates',
    'How many gates, in %, are 0, in each fifth between, or 1. The first rows '
    'are evaluations of the search, in order. The last two are the chosen '
    'gates of the channels that the first budget keeps, and of the others.',
    figures.heat(list(found), bins, np.stack(shares), 'gate'),
    Table('Gates in %', ['gates', 'number', 'mean', *bins], rows),
  )


Log = Sequence[Mapping[str, Any]]  # The records of metrics.jsonl.
Panels = Mapping[str, Mapping[str, str]]  # {axis: {field: label}}.
_SEARCH: Panels = {
  'cross-entropy': {'ce': 'training'},
  'share': {
    'gates_mean': 'mean gate',
    'gates_density': 'non-zero gates',
    'validation_accuracy': 'validation accuracy',
  },
}
_TRAIN: Panels = {
  'loss': {'loss': 'training', 'validation_loss': 'validation'},
  'accuracy': {'accuracy': 'training', 'validation_accuracy': 'validation'},
}


def search(report: Page, job: Job) -> None:
  """Adds the metrics of the search."""
  log = runs.read_metrics(job.workdir / 'search')
  if log:
    report.section('Search')
    _curves(report, 'search', {'': log}, _SEARCH)


def training(
  report: Page, folders: Mapping[str, pathlib.Path], reference: pathlib.Path
) -> None:
  """Adds the metrics of all trainings, in one picture.

  For several budgets it shows the validation metrics alone or, if there are
  none, those of the training set. `folders` is {budget: folder of its training}
  and `reference` that of the reference network.
  """
  read = {name: runs.read_metrics(folder) for name, folder in folders.items()}
  logs: dict[str, Log] = {f'{name}, ': log for name, log in read.items() if log}
  if not logs:
    return
  panels = _TRAIN
  if len(logs) > 1:
    held_out = any('validation_loss' in r for log in logs.values() for r in log)
    panels = {
      axis: dict([list(labels.items())[held_out]])
      for axis, labels in _TRAIN.items()
    }
  logs['reference, '] = runs.read_metrics(reference)
  report.section('Training')
  _curves(report, 'training', logs, panels)


def _curves(
  report: Page, name: str, logs: Mapping[str, Log], panels: Panels
) -> None:
  """Adds tables of metrics by step, and a picture of lines with two points."""
  found, drawn = {}, {}  # {axis: lines}, and those of at least two points.
  for axis, fields in panels.items():
    for prefix, log in logs.items():
      for field, label in fields.items():
        points = [(r['step'], r[field]) for r in log if field in r]
        if points:
          line = figures.Line(prefix + label, *zip(*points, strict=True))
          found.setdefault(axis, []).append(line)
          if len(points) > 1:
            drawn.setdefault(axis, []).append(line)
  by_step = [_step_table(axis, lines) for axis, lines in found.items()]
  if not drawn:
    for table in by_step:
      report.table(table)
    return
  report.figure(
    name,
    'Metrics by step; those of the training set are means since the point '
    'before. The legend has the last values, metrics.jsonl has all.',
    figures.curves(drawn, 'step', last=True),
    *by_step,
  )


def _step_table(axis: str, lines: Sequence[figures.Line]) -> Table:
  """A table of the curves at 8 steps at which half of them have a value."""
  values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
  present = {s: sum(s in v for v in values) for v in values for s in v}
  steps = sorted(s for s, n in present.items() if 2 * n >= len(values))
  steps = steps or sorted(present)
  rows = []
  for i in thinned(len(steps), 8):
    found = [v.get(steps[i]) for v in values]
    shown = ('-' if v is None else f'{v:.3g}' for v in found)
    rows.append([str(steps[i]), *shown])
  columns = ['step', *(line.label for line in lines)]
  return Table(axis.capitalize(), columns, rows)
