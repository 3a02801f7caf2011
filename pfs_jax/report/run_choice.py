"""What the report of a run says about its probe and its tournament."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfs_jax import storage
from pfs_jax.report import figures, page
from pfs_jax.stages import Job
from pfs_jax.tables import Table


def probe(report: page.Page, job: Job) -> None:
  """Adds how much the loss rises where a layer loses channels, if it is known.

  probe.json holds a mean and a standard error for each layer, and the values of
  single draws.
  """
  path = job.workdir / 'probe.json'
  if not path.exists():
    return
  found: dict[str, Any] = storage.read_json(path)
  rows = []
  draws = zip(found['layers'], found['losses'], strict=True)
  for layer, values in draws:
    mean, error = found['mean'][layer], found['error'][layer]
    ends = (mean - error, mean + error)
    rows.append(figures.Interval(layer, mean, *ends, values))
  meaning = {True: 'mean ± standard error'}
  caption = (
    'The rise of the held-out loss when channels are dropped in one layer '
    'alone, as many in each as save the same MACs.'
  )
  report.section('Probe')
  report.paragraph(found['sentence'])
  report.figure(
    figures.intervals('probe', caption, rows, 'rise of the loss', meaning),
    Table('Probe', found['columns'], found['rows']),
  )


def tournament(report: page.Page, job: Job) -> None:
  """Adds the losses and the widths of the candidates, if there was one."""
  path = job.workdir / 'tournament.json'
  if not path.exists():
    return
  found: dict[str, Any] = storage.read_json(path)
  lines = []
  for name in found['counts']:
    rounds = [r for r in found['rounds'] if name in r['losses']]
    values = [r['losses'][name] for r in rounds]
    means = [float(np.mean(v)) for v in values]
    errors = [float(np.std(v, ddof=len(v) > 1) / len(v) ** 0.5) for v in values]
    lines.append(
      figures.Line(name, [r['epochs'] for r in rounds], means, errors)
    )
  names, layers = list(found['counts']), found['layers']
  widths = job.network.cost_model.widths
  shares = np.divide(list(found['counts'].values()), widths).T
  report.section('Tournament')
  report.paragraph(found['sentence'])
  panels = {'held-out loss': lines}
  caption = (
    'Held-out loss of the candidates after each round: mean and standard error '
    'over seeds.'
  )
  report.figure(
    figures.curves('tournament', caption, panels, 'epochs', last=True),
    Table('Candidates', found['columns'], found['rows']),
  )
  caption = (
    'Share in % that the candidates keep of each layer. Columns are numbered '
    'as the candidates are in the table.'
  )
  titles = [f'{i}. {name}' for i, name in enumerate(names, 1)]
  args = (layers, titles, 100 * shares, 'candidate')
  rows = [
    [layer, *(f'{100 * v:.0f}' for v in row)]
    for layer, row in zip(layers, shares, strict=True)
  ]
  report.figure(
    figures.heat('candidates', caption, *args),
    Table('Share kept in %', ['layer', *titles], rows),
  )
