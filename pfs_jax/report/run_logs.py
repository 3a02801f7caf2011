"""What the logs of a run show: its gates and its metrics, over the steps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfs_jax import runs, storage
from pfs_jax.report import figures, page
from pfs_jax.stages import Job
from pfs_jax.tables import Table

# Gates.


def chosen_gates(job: Job) -> dict[str, np.ndarray]:
  """The gates that the selection rule took, {} before."""
  path = job.workdir / 'search' / 'gates.npz'
  return storage.read_arrays(path) if path.exists() else {}


def gates(report: page.Page, job: Job) -> None:
  """Adds histograms of the gates: at evaluations of the search, then chosen."""
  paths = sorted((job.workdir / 'search' / 'gates').glob('[0-9]*.npz'))
  found: dict[str, list[np.ndarray]] = {}
  for i in thinned(len(paths), 8):
    read = storage.read_arrays(paths[i])
    found[f'step {int(paths[i].stem)}'] = list(read.values())
  chosen, path = chosen_gates(job), job.workdir / 'kept.json'
  if chosen and path.exists():
    kept = storage.read_json(path)
    masks = [
      np.isin(np.arange(g.size), kept.get(k, [])) for k, g in chosen.items()
    ]
    pairs = list(zip(chosen.values(), masks, strict=True))
    found['kept'] = [g[mask] for g, mask in pairs]
    found['dropped'] = [g[~mask] for g, mask in pairs]
  drawn, rows = [], []
  for label, arrays in found.items():
    values = np.concatenate([g.ravel() for g in arrays])
    if values.size:
      drawn.append((label, values))
      numbers = [values.mean(), *np.quantile(values, (0.1, 0.5, 0.9))]
      shown = [f'{v:.3f}' for v in numbers]
      zero = f'{np.mean(values == 0):.1%}'
      rows.append([label, str(values.size), *shown, zero])
  if not rows:
    return
  report.section('Gates')
  columns = ['gates', 'number', 'mean', '10%', '50%', '90%', 'at 0']
  caption = (
    'The gates at evaluations of the search, the first at the top; then those '
    'that the search chose, of the channels that the first budget keeps and '
    'drops. Each histogram is scaled to its fullest bin.'
  )
  report.figure(
    figures.histograms('gates', caption, drawn),
    Table('Gates: mean and quantiles', columns, rows),
  )


def thinned(n: int, most: int) -> list[int]:
  """At most so many of the indices 0..n-1, evenly, with the first and last.

  >>> thinned(9, 3)
  [0, 4, 8]
  """
  return sorted({int(i) for i in np.linspace(0, n - 1, min(n, most)).round()})


# Metrics.

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


def search(report: page.Page, job: Job) -> None:
  """Adds the metrics of the search."""
  log = runs.read_metrics(job.workdir / 'search')
  if log:
    report.section('Search')
    _curves(report, 'search', {'': log}, _SEARCH)


def training(
  report: page.Page,
  folders: Mapping[str, pathlib.Path],
  reference: pathlib.Path,
) -> None:
  """Adds the metrics of all trainings, in one picture.

  Of several budgets it shows the validation metrics alone or, where there are
  none, those of the training set.

  Args:
    report: The page.
    folders: {budget: folder of its training}.
    reference: The folder of the reference network's training.
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
  report: page.Page, name: str, logs: Mapping[str, Log], panels: Panels
) -> None:
  """Tables of metrics by step, and a picture where one has two points."""
  found: dict[str, list[figures.Line]] = {}
  for axis, fields in panels.items():
    for prefix, log in logs.items():
      for field, label in fields.items():
        points = [(r['step'], r[field]) for r in log if field in r]
        if points:
          line = figures.Line(prefix + label, *zip(*points, strict=True))
          found.setdefault(axis, []).append(line)
  tables = [_by_step(axis, lines) for axis, lines in found.items()]
  drawn = {
    axis: [line for line in lines if len(line.x) > 1]
    for axis, lines in found.items()
    if any(len(line.x) > 1 for line in lines)
  }
  if not drawn:
    for table in tables:
      report.table(*table)
    return
  caption = (
    'Metrics by step; those of the training set are means since the point '
    'before. The legend has the last values, metrics.jsonl has all.'
  )
  report.figure(
    figures.curves(name, caption, drawn, 'step', last=True),
    *tables,
  )


def _by_step(axis: str, lines: Sequence[figures.Line]) -> Table:
  """The curves at 8 of the steps at which half of them or more have a value."""
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
