"""The report of a run, made from the files of its workdir."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pfs_jax import config, console, errors, models, runs, storage, structures
from pfs_jax.report import figures, run_logs
from pfs_jax.report.page import Page
from pfs_jax.stages import Job
from pfs_jax.tables import Table


class Cut(NamedTuple):
  """A network of a run: of one budget, the reference, or the searched one.

  Attributes:
    name: The name of the budget.
    counts: {layer: channels}.
    macs: MACs of an image.
    params: Parameters.
    result: The content of result.json; {} before the training.
  """

  name: str
  counts: Mapping[str, int]
  macs: int
  params: int
  result: Mapping[str, Any]


Cuts = Sequence[Cut]


def build(job: Job) -> Page:
  """The page of the run in the job's workdir, which need not be finished.

  Raises:
    errors.UserError: If the workdir holds no run, or another config's run.
  """
  _check_workdir(job)
  cuts = _cuts(job)
  trained = [cut for cut in cuts if cut.result]
  whole = _uncut(job, trained)
  report = Page(_title(job, cuts))
  _first_screen(report, job, cuts, trained, whole)
  if cuts:
    _structure(report, job, cuts, whole)
  run_logs.probe(report, job)
  run_logs.tournament(report, job)
  run_logs.gates(report, job)
  run_logs.search(report, job)
  folders = {cut.name: job.folder(cut.name) / 'train' for cut in cuts}
  run_logs.training(report, folders, job.workdir / 'reference')
  if trained:
    _mistakes(report, job, trained[0])
  _details(report, job, cuts)
  return report


# The networks of the workdir.


def _check_workdir(job: Job) -> None:
  """Refuses an empty folder and another config; `_cuts` checks trainings."""
  workdir, c = job.workdir, job.config
  probed = (workdir / 'probe.json').exists()
  if probed:
    runs.claim_part(workdir / 'probe', config.identity(c, 'train', 'probe'))
  if _searched(job):
    runs.claim_part(workdir / 'search', config.identity(c, 'search'))
  elif not (probed or job.budget_folders() or (workdir / 'train').exists()):
    raise errors.UserError(
      f'{workdir} holds no run yet: --mode=search or --mode=run makes one.'
    )


def _searched(job: Job) -> bool:
  return (job.workdir / 'search' / 'config.json').exists()


def _cuts(job: Job) -> list[Cut]:
  """All budgets of the workdir, the widest network first."""
  found = []
  for name, folder in job.budget_folders().items():
    path = folder / 'result.json'
    r: Mapping[str, Any] = {}
    if path.exists():
      r = runs.read_result(path)
      counts, macs, params = r['counts'], r['macs'], r['params']
    else:
      text = storage.read_text(folder / 'structure.json')
      s = structures.Structure.from_json(text, folder)
      counts = dict(zip(s.layers, s.counts, strict=True))
      macs, params = s.macs, s.params
    if tuple(counts) != job.network.cost_model.layers:
      raise errors.UserError(
        f'{folder}: the counts are not those of {job.model_name}; give the '
        'config that made them.'
      )
    if r and (folder / 'train' / 'config.json').exists():
      identity = config.identity(job.config, 'train')
      identity['structure.counts'] = list(counts.values())
      runs.claim(folder / 'train', identity)  # Refuses another config.
    found.append(Cut(name, counts, macs, params, r))
  return sorted(found, key=lambda cut: (-cut.macs, cut.name))


def _share(job: Job, macs: int) -> str:
  return f'{macs / job.network.reference_macs:.1%}'


def _uncut(job: Job, trained: Cuts) -> list[Cut]:
  """The reference network and the searched one, with their known results."""
  network, model = job.network, job.network.cost_model
  known: dict[str, Any] = {}
  for r in (cut.result for cut in trained):
    accuracy, n = r['reference_test_accuracy'], r['test_examples']
    if accuracy is not None and not known:
      times = dict(r.get('latency', {}))
      times['narrow_ms'] = times.get('reference_ms')
      known = {'test_accuracy': accuracy, 'test_examples': n, 'latency': times}
  widths = network.table.sizes
  counts, description = widths, network.description
  if 'name' in description and 'counts' not in description:
    sizes = (description['name'], description['base_width'])
    counts = models.gate_sizes(*sizes)
  costs = (network.reference_macs, network.reference_params)
  widest = (model.macs(model.widths), model.params(model.widths))
  return [
    Cut('reference', counts, *costs, known),
    Cut('searched', widths, *widest, {}),
  ]


# The first screen.


def _title(job: Job, cuts: Cuts) -> str:
  """A short title: 'vgg16 on digits, cut to 50.0% of the MACs, seed 0'."""
  c, name = job.config, job.model_name.rpartition(':')[2]
  done = f'{len(cuts)} budgets' if cuts else _before_cuts(job)[0]
  if len(cuts) == 1:
    done = f'cut to {_share(job, cuts[0].macs)} of the MACs'
  return f'{name} on {job.spec.name}, {done}, seed {c.seed}'


def _before_cuts(job: Job) -> tuple[str, str]:
  """How far a run without a structure has come: for the title, in words."""
  if not _searched(job):
    if (job.workdir / 'probe.json').exists():
      return 'probed', 'A probe was made, and no search'
    return 'training under way', 'A training is under way'
  steps = [r['step'] for r in runs.read_metrics(job.workdir / 'search')]
  at = f'at step {steps[-1]}' if steps else 'at its start'
  return 'search under way', f'The search is {at}'


def interval(accuracy: float, n: int) -> tuple[float, float]:
  """Wilson's 95% interval of an accuracy that was counted on n images.

  >>> [round(end, 3) for end in interval(0.8, 300)]
  [0.751, 0.841]
  """
  z = 1.959964
  middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n)
  half *= math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
  return middle - half, middle + half


def _first_screen(
  report: Page, job: Job, cuts: Cuts, trained: Cuts, whole: Cuts
) -> None:
  for line in _result_lines(job, cuts, trained):
    report.paragraph(line, 'answer')
  warnings = [w for cut in trained for w in cut.result.get('warnings', [])]
  if uncounted := job.network.table.uncounted:
    warnings.append(f'The MACs leave out: {", ".join(uncounted)}.')
  for warning in dict.fromkeys(warnings):
    report.paragraph(warning, 'warning')
  if trained:
    report.paragraph(
      'These are results of one seed (n = 1), so the spread over seeds is '
      'unknown. The 95% intervals reflect the number of test images alone. A '
      'time is the least of three batches right after the training; other work '
      'on the machine makes it longer.',
      'soft',
    )
  columns = ['network', 'test accuracy', '95% interval', 'MACs', 'share']
  columns += ['parameters', 'float32 weights']
  batches = [cut.result.get('latency', {}).get('batch') for cut in trained]
  batch = next(filter(None, batches), None)
  columns += [f'ms for {batch}'] * (batch is not None)
  rows = []
  for name, _, macs, params, r in [*cuts, *whole]:
    shown = ['-', '-']
    if 'test_accuracy' in r:
      low, high = interval(r['test_accuracy'], r['test_examples'])
      ends = f'{100 * low:.1f} .. {100 * high:.1f}'
      shown = [f'{r["test_accuracy"]:.2%}', ends]
    costs = [f'{macs:,}', _share(job, macs), f'{params:,}']
    times = r.get('latency', {})
    ms = times.get('narrow_ms') if times.get('batch') == batch else None
    last = [f'{4 * params / 1e6:.2f} MB', '-' if ms is None else f'{ms:.3g}']
    rows.append([name, *shown, *costs, *last][: len(columns)])
  networks = Table('Networks', columns, rows)
  report.table(networks)
  if len(trained) > 1:
    _accuracy_over_costs(report, trained, whole[0], networks)


def _result_lines(job: Job, cuts: Cuts, trained: Cuts) -> Sequence[str]:
  if not cuts:
    return [f'{_before_cuts(job)[1]}. No structure is cut yet.']
  lines = []
  if not len(cuts) == len(trained) == 1:
    n = len(trained)
    lines = [f'{len(cuts)} budgets are cut, and {n} of them trained.']
  for cut in trained:
    accuracy, n = cut.result['test_accuracy'], cut.result['test_examples']
    reference = cut.result['reference_test_accuracy']
    text = f'{cut.name}: {accuracy:.2%} test accuracy with '
    text += f"{_share(job, cut.macs)} of the reference network's MACs"
    if reference is not None:
      points = 100 * (accuracy - reference)
      side = 'below' if points < 0 else 'above'
      text += f', {abs(points):.2f} points {side} that network trained alike'
      text += f' ({abs(points) * n / 100:.0f} of {n:,} images)'
    lines.append(f'{text}.')
  return lines


def _accuracy_over_costs(
  report: Page, trained: Cuts, whole: Cut, networks: Table
) -> None:
  panels: dict[str, list[figures.Line]] = {}
  for label, cuts in (
    ('narrow networks', trained[::-1]),
    ('reference', [whole]),
  ):
    found = [cut for cut in cuts if 'test_accuracy' in cut.result]
    results = [cut.result for cut in found]
    ends = [interval(r['test_accuracy'], r['test_examples']) for r in results]
    half = [50 * (high - low) for low, high in ends]
    y = [100 * r['test_accuracy'] for r in results]
    for what, field in (('MACs', 'macs'), ('parameters', 'params')):
      full = getattr(whole, field)
      x = [100 * getattr(cut, field) / full for cut in found]
      lines = panels.setdefault(f'accuracy in %,\nover {what}', [])
      lines += [figures.Line(label, x, y, half)] if found else []
  report.figure(
    'macs',
    'Test accuracy against MACs and parameters, with 95% intervals (Wilson).',
    figures.curves(panels, "% of the reference network's"),
    networks,
  )


def _structure(report: Page, job: Job, cuts: Cuts, whole: Cuts) -> None:
  gates, layers = run_logs.chosen_gates(job), list(cuts[0].counts)
  reference, searched = (list(net.counts.values()) for net in whole)
  columns = ['layer', 'searched', 'reference', *(cut.name for cut in cuts)]
  rows = []
  for layer, width, other in zip(layers, searched, reference, strict=True):
    counts = [cut.counts[layer] for cut in cuts]
    shown = [f'{n} ({n / width:.0%})' for n in counts]
    mean = [f'{gates[layer].mean():.3f}'] if gates else []
    rows.append([layer, str(width), str(other), *shown, *mean])
  kept = {cut.name: list(cut.counts.values()) for cut in cuts}
  report.section('Channels of each layer')
  report.figure(
    'network',
    'The network from its input (top) to its output: the channels of each '
    'layer in the network that was searched (outline) and those that are kept. '
    'A line across marks the width of the reference network where it differs. '
    'Only layers that were cut are drawn.',
    figures.network(layers, searched, reference, kept),
    Table('Channels kept', columns + ['mean gate'] * bool(gates), rows),
  )


def _mistakes(report: Page, job: Job, cut: Cut) -> None:
  path = job.folder(cut.name) / 'train' / 'mistakes.npz'
  report.section('Misclassified images')
  if not path.exists():
    report.paragraph('The training kept no misclassified images.')
    return
  found = storage.read_arrays(path)
  names = cut.result.get('class_names') or []
  pairs = [
    [names[k] if k < len(names) else str(k) for k in pair]
    for pair in zip(found['labels'], found['predicted'], strict=True)
  ]
  rows = [[str(i), *pair] for i, pair in enumerate(pairs, 1)]
  titles = [f'{a},\nnot {b}' for a, b in pairs]
  report.figure(
    'mistakes',
    f'The first {len(rows)} test images that {cut.name} misclassifies, with '
    'the true class and the class that the network says.',
    figures.examples(found['images'], titles),
    Table('Misclassified', ['image', 'true class', 'network says'], rows),
  )


# How it was made.


def _details(report: Page, job: Job, cuts: Cuts) -> None:
  """Adds times, exported files, versions and the config."""
  folders = {'search': job.workdir / 'search'}
  for cut in cuts:
    folders[f'training, {cut.name}'] = job.folder(cut.name) / 'train'
  folders['wide network'] = job.workdir / 'wide'
  folders['reference network'] = job.workdir / 'reference'
  times = []
  for label, folder in folders.items():
    for record in runs.read_metrics(folder)[-1:]:
      time = console.duration(record.get('seconds', 0.0))
      times.append([label, str(record['step']), time])
  files = [
    [str(path.relative_to(job.workdir)), f'{path.stat().st_size / 1e6:.2f} MB']
    for cut in cuts
    for path in sorted((job.folder(cut.name) / 'export').glob('*'))
  ]
  noted = {
    path.stem: storage.read_json(path, dict[str, Any])
    for path in (job.workdir / 'versions.json', job.workdir / 'config.json')
    if path.exists()
  }
  trained = [cut.result for cut in cuts if 'versions' in cut.result]
  versions = (trained[0] if trained else noted).get('versions', {})
  rows = [[k, str(v)] for k, v in versions.items()]
  rows.sort(key=lambda row: row[0] not in ('commit', 'hardware'))
  report.section('How it was made')
  columns = ['stage', 'steps', 'time']
  report.table(Table('Time, compilation included', columns, times))
  report.table(Table('Exported files', ['file', 'size'], files))
  report.table(Table('Versions', ['of', 'value'], rows))
  fields = noted.get('config') or job.config.to_dict()
  report.config(fields, fields)
