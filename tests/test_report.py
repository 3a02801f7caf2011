"""The report: what it says, its pictures, and the page in a real browser."""

import base64
import copy
import html
import html.parser
import importlib
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest

from pfs_jax import (
  config,
  errors,
  models,
  report,
  runs,
  stages,
  storage,
  tables,
)
from pfs_jax.report import figures, page, run_logs, run_page
from pfs_jax.stages import cutting
from pfs_jax.studies import plan, results, statistics
from pfs_jax.studies import tables as study_tables
from tests import test_studies

# Runs.


def tiny(**fields):
  """A config of a network that nothing here builds."""
  c = config.default()
  c.model.name, c.model.base_width, c.model.width = 'vgg16', 2, 3
  c.data.name, c.data.validation_examples = 'digits', 300
  c.budget.keep = (0.3, 0.5)
  c.update_from_flattened_dict(fields)
  return c


def log(folder, records):
  storage.write_text(
    folder / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in records)
  )


def searched(workdir):
  """A job that is searched and cut, not trained."""
  job = stages.Job(tiny(), workdir)
  runs.claim(workdir / 'search', config.identity(job.config, 'search'))
  job.note_config()
  model, rng = job.network.cost_model, np.random.default_rng(0)
  records = []
  for step in (10, 20, 30):
    gates = {
      layer: np.clip(rng.normal(1 - step / 50, 0.4, width), 0, 1)
      for layer, width in zip(model.layers, model.widths, strict=True)
    }
    storage.write_arrays(
      workdir / 'search' / 'gates' / f'{step:08d}.npz', gates
    )
    numbers = {'gates_mean': 0.5, 'gates_density': 0.9, 'ce': 2.0 - step / 50}
    records.append({'step': step, **numbers, 'seconds': step / 10})
  log(workdir / 'search', records)
  storage.write_arrays(workdir / 'search' / 'gates.npz', gates)
  cutting.cut(job)
  return job


def trained(workdir, budgets=1, **changes):
  """A job whose first budgets are trained: 240 of 300 images."""
  job = searched(workdir)
  for folder in ('train', 'reference'):
    records = [
      {'step': s, 'loss': 2 / s, 'accuracy': s / 40, 'seconds': 4000.0}
      for s in (10, 20, 30)
    ]
    log(workdir / folder, records)
  for name in ('keep0.3', 'keep0.5')[:budgets]:
    path = job.folder(name) / 'structure.json'
    there = storage.read_json(path)
    identity = config.identity(job.config, 'train')
    counts = {'structure.counts': list(there['counts'].values())}
    runs.claim(job.folder(name) / 'train', {**identity, **counts})
    result = {
      'test_accuracy': 0.8,
      'reference_test_accuracy': 0.85,
      'test_examples': 300,
      'macs': there['macs'],
      'params': there['params'],
      'counts': there['counts'],
      'budget': name,
      'class_names': [],
      'steps': 30,
      'seconds': 4000.0,
      'versions': {'jax': '0.0.1', 'commit': 'abc', 'hardware': '1 x abacus'},
      **changes,
    }
    storage.write_json(job.folder(name) / 'result.json', result)
  return job


class Outline(html.parser.HTMLParser):
  """Tags that are left open, images, links, text."""

  VOID = ('meta', 'link', 'img', 'wbr')

  def __init__(self, text):
    super().__init__()
    self.open, self.images, self.links, self.tags = [], [], [], []
    self.ids, self.text = [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    fields = dict(attributes)
    assert not [k for k in fields if k.startswith('on')], fields
    self.tags.append(tag)
    self.ids += [fields['id']] if 'id' in fields else []
    self.links += [fields[k] for k in ('href', 'src') if k in fields]
    if tag == 'img':
      self.images.append(fields)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.text += data


def check_page(workdir, names, stem='report'):
  """What must hold of every report; `names` are its pictures."""
  text, folder = (workdir / f'{stem}.html').read_text(), workdir / stem
  outline = Outline(text)
  assert not outline.open, 'unclosed tags'
  assert len(outline.ids) == len(set(outline.ids))
  for link in outline.links:  # Nothing is fetched.
    assert link.startswith('data:') or link[1:] in outline.ids, link[:80]
  assert 'script' not in outline.tags and outline.tags.count('h1') == 1
  assert set(names) <= set(report.PICTURES)
  found = {p.name for p in folder.glob('*')} - {'my own.svg'}
  assert found == {f'{name}.svg' for name in names}
  assert [n for n in outline.ids if n in names] == names
  assert outline.tags.count('figure') == len(names) == len(outline.images)
  for name, image in zip(names, outline.images, strict=True):
    assert len(image['alt']) > 40 and re.search(r'\d', image['alt'])
    data = base64.b64decode(image['src'].partition('base64,')[2])
    assert data == (folder / f'{name}.svg').read_bytes()
    xml.etree.ElementTree.fromstring(data)
  for figure in text.split('<figure')[1:]:  # Numbers beside each picture.
    figure = figure.partition('</figure>')[0]
    assert '<table' in figure or '<a href="#table-' in figure
  return outline


SEARCH_PICTURES = ['network', 'gates', 'search']


@pytest.fixture(scope='module')
def of_run(tmp_path_factory):
  """(job, folder of its report): one of two budgets is trained."""
  folder = tmp_path_factory.mktemp('run')
  job = trained(folder / 'run')
  before = {p: p.stat().st_mtime_ns for p in job.workdir.rglob('*')}
  report.write(job.config, job.workdir, folder / 'out')
  # A workdir that cannot be written is reported elsewhere.
  assert before == {p: p.stat().st_mtime_ns for p in job.workdir.rglob('*')}
  return job, folder / 'out'


def test_report_of_a_run(of_run):
  outline = check_page(of_run[1], [*SEARCH_PICTURES, 'training'])
  first_screen = outline.text.partition('Channels of each layer')[0]
  for said in (
    'vgg16 on digits, 2 budgets, seed 0',
    '2 budgets are cut, and 1 of them trained.',
    "keep0.3: 80.00% test accuracy with 29.7% of the reference network's MACs, "
    '5.00 points below that network trained alike (15 of 300 images).',
    'one seed (n = 1)',
  ):
    assert said in first_screen, said
  for said in ('abacus', '1 h 06 min', 'abc', 'model.base_width'):
    assert said in outline.text, said
  assert 'Exported files' not in outline.text  # There are none.


def cells_of(text, table):
  """The texts of the cells of a table, row by row."""
  (found,) = re.findall(rf'(?s)<table id="table-{table}">.*?</table>', text)
  rows = re.findall('(?s)<tr>(.*?)</tr>', found)
  return [re.findall('<t[hd].*?>(.*?)</t[hd]', row) for row in rows]


def test_all_budgets_stand_in_one_table_the_widest_first(of_run):
  job, out = of_run
  text = (out / 'report.html').read_text()
  (columns, *rows), model = cells_of(text, 'channels-kept'), job.network
  words = 'layer searched reference keep0.5 keep0.3'.split()
  assert columns == [*words, 'mean gate']
  assert len(rows) == len(model.cost_model.layers)
  for name, column in (('keep0.5', 3), ('keep0.3', 4)):
    counts = storage.read_json(job.folder(name) / 'structure.json')['counts']
    shown = [int(row[column].split()[0]) for row in rows]
    assert shown == list(counts.values())
  first = ', '.join(f'{a} {b}' for a, b in zip(columns, rows[0], strict=True))
  alt = Outline(text).images[0]['alt']
  assert first.removeprefix('layer ').replace(', ', ': ', 1) in alt


def test_the_shares_of_gates(of_run):
  """Each row of the table adds up to all gates; 'kept' has those kept."""
  job, out = of_run
  rows = cells_of((out / 'report.html').read_text(), 'gates-in')[1:]
  names = [*(f'step {n}' for n in (10, 20, 30)), 'kept', 'dropped']
  assert [row[0] for row in rows] == names
  for row in rows:
    assert sum(map(float, row[3:])) == pytest.approx(100, abs=0.4)
  kept = storage.read_json(job.workdir / 'kept.json').values()
  assert int(rows[3][1]) == sum(map(len, kept))
  gates = storage.read_arrays(job.workdir / 'search' / 'gates.npz').values()
  zero = 100 * np.mean(np.concatenate(list(gates)) == 0)
  assert float(rows[2][3]) == pytest.approx(zero, abs=0.06)


def test_the_same_folder_gives_the_same_bytes(of_run, tmp_path):
  job, out = of_run
  report.write(tiny(), job.workdir, tmp_path)
  for path in (p for p in out.rglob('*') if p.is_file()):
    assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_all_that_a_run_may_leave_is_shown(tmp_path):
  """Two trained budgets, latency, warnings, mistakes, an export, a probe."""
  job = trained(
    tmp_path,
    budgets=2,
    class_names=['cat', 'dog'],
    latency={'batch': 8, 'narrow_ms': 1.25, 'reference_ms': 4.5},
    reference_test_accuracy=None,
    warnings=['The search stayed at chance.'],
  )
  mistakes = {'labels': [0, 1], 'predicted': [1, 0]}
  images = np.zeros((2, 4, 4, 5), np.uint8)  # Of 5 channels.
  path = job.folder('keep0.5') / 'train' / 'mistakes.npz'
  storage.write_arrays(path, {'images': images, **mistakes})
  bundle = job.folder('keep0.3') / 'export'
  bundle.mkdir()
  (bundle / 'model.onnx').write_bytes(bytes(2_340_000))
  elsewhere = shutil.copytree(tmp_path / 'keep0.5', tmp_path / 'exported')
  (elsewhere / 'manifest.json').touch()  # It is no budget.
  path = tmp_path / 'result.json'  # The other one was measured otherwise.
  result = storage.read_json(path)
  result['latency'] = {'batch': 9, 'narrow_ms': 7.75}
  storage.write_json(path, result | {'reference_test_accuracy': 0.85})
  choices(job)
  report.write(job.config, tmp_path)
  chosen = ['probe', 'tournament', 'candidates']
  names = ['macs', 'network', *chosen, 'gates', 'search', 'training']
  outline = check_page(tmp_path, [*names, 'mistakes'])
  alts = dict(zip([*names, 'mistakes'], outline.images, strict=True))
  assert 'keep0.3: test accuracy 80.00%' in alts['macs']['alt']
  assert '1: true class cat, network says dog' in alts['mistakes']['alt']
  for said in ('at chance', 'ms for 8', '1.25', '4.5', 'model.onnx', '2.34 MB'):
    assert said in outline.text, said
  assert 'ms for 8.0' not in outline.text


def choices(job, *chosen):
  """Writes a probe, a tournament, or both."""
  layers, n = list(job.network.cost_model.layers), 13
  probe = {
    'layers': layers,
    'losses': [[0.1, 0.3]] * n,
    'mean': dict.fromkeys(layers, 0.2),
    'error': dict.fromkeys(layers, 0.1),
  }
  losses = {'uniform': [0.5, 0.7], 'tilt1': [0.4, 0.6]}
  rounds = [{'epochs': 1, 'losses': losses}, {'epochs': 2, 'losses': losses}]
  counts = {'uniform': [1] * n, 'tilt1': [2] * n}
  tournament = {'layers': layers, 'rounds': rounds, 'counts': counts}
  contents = {'probe': probe, 'tournament': tournament}
  for name in chosen or contents:
    words = {'columns': ['a', 'b'], 'rows': [[name, '1']], 'sentence': EVIL}
    storage.write_json(job.workdir / f'{name}.json', contents[name] | words)


def test_a_probe_alone(tmp_path):
  """Its picture, table and sentence; not that of another config."""
  job = stages.Job(tiny(), tmp_path)
  made = config.identity(job.config, 'train', 'probe')
  runs.claim(tmp_path / 'probe', {**made, 'budget': 'keep0.3'})
  with pytest.raises(errors.UserError, match='holds no run yet'):
    report.write(job.config, tmp_path)  # It is not finished.
  choices(job, 'probe')
  report.write(job.config, tmp_path)
  outline = check_page(tmp_path, ['probe'])
  assert 'vgg16 on digits, probed, seed 0' in outline.text
  assert 'A probe was made, and no search.' in outline.text
  assert EVIL.replace('\x07', '') in outline.text.replace('\x07', '')
  text = (tmp_path / 'report.html').read_text()
  assert cells_of(text, 'probe') == [['a', 'b'], ['probe', '1']]
  (tmp_path / 'structure.json').touch()  # After a cut as before it.
  with pytest.raises(errors.UserError, match='config.probe.epochs '):
    report.write(tiny(**{'probe.epochs': 1.5}), tmp_path)


@pytest.mark.parametrize(
  'name, field, value, message',
  [
    ('probe', 'sentence', None, 'sentence'),
    ('probe', 'losses', [], 'losses must have an entry for each layer'),
    ('probe', 'error', {}, 'mean and error must name all layers'),
    ('tournament', 'rounds', [{'epochs': 1}], 'losses'),
    ('tournament', 'layers', ['a'], 'is not of the 13 layers here'),
  ],
)
def test_a_choice_is_checked(
  of_run, tmp_path, refused, name, field, value, message
):
  job = copy.copy(of_run[0])
  job.workdir = tmp_path
  choices(job, name)
  path = tmp_path / f'{name}.json'
  found = storage.read_json(path)
  storage.write_json(path, {**found, field: value})
  e = refused(message, getattr(run_logs, name), page.Page('a run'), job)
  assert str(path) in str(e)


def test_a_single_point_is_no_curve(tmp_path):
  log(tmp_path, [{'step': 10, 'loss': 0.25}])
  shown = page.Page('a run')
  run_logs.training(shown, {'keep0.3': tmp_path}, tmp_path / 'none')
  assert not shown.pictures
  rows = [['step', 'keep0.3, training'], ['10', '0.25']]
  assert cells_of(shown.html(), 'loss') == rows


def test_given_counts_are_the_widths_of_the_reference(tmp_path):
  c = tiny(**{'model.width': 0, 'model.counts': (3,) * 13})
  whole = run_page._uncut(stages.Job(c, tmp_path), [])
  assert whole[0].counts == whole[1].counts


def test_a_search_alone_and_a_search_under_way(tmp_path):
  report.write(searched(tmp_path).config, tmp_path)
  outline = check_page(tmp_path, SEARCH_PICTURES)
  assert '2 budgets are cut, and 0 of them trained.' in outline.text
  assert 'one seed' not in outline.text and 'Training' not in outline.text
  for path in [*tmp_path.glob('*.json'), *tmp_path.glob('keep*/*.json')]:
    path.unlink()
  report.write(tiny(), tmp_path)
  outline = check_page(tmp_path, SEARCH_PICTURES[1:])
  assert 'The search is at step 30. No structure is cut yet.' in outline.text
  (tmp_path / 'search').rename(tmp_path / 'train')
  report.write(tiny(), tmp_path)
  outline = check_page(tmp_path, [])
  assert 'A training is under way. No structure is cut yet.' in outline.text


def test_structure_from_elsewhere_is_enough(tmp_path):
  """A workdir that only trained, from --config.train.structure."""
  job = trained(tmp_path)
  shutil.rmtree(tmp_path / 'search')
  for path in [*tmp_path.rglob('structure*'), *tmp_path.rglob('kept*')]:
    path.unlink()
  report.write(job.config, tmp_path)
  outline = check_page(tmp_path, ['network', 'training'])
  assert re.search(
    r'vgg16 on digits, cut to \d+\.\d% of the MACs', outline.text
  )


def test_empty_workdir_is_refused_and_left_alone(tmp_path, refused):
  refused('holds no run yet', report.write, tiny(), tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_a_result_that_was_edited_wrongly_is_named(tmp_path, refused):
  job = trained(tmp_path)
  result = storage.read_json(tmp_path / 'result.json')
  del result['counts']
  storage.write_json(tmp_path / 'result.json', result)
  refused('result.json: .*`counts`', report.write, job.config, tmp_path)


@pytest.mark.parametrize('field', ['seed', 'search.epochs', 'train.epochs'])
def test_work_of_another_config_is_refused(of_run, tmp_path, field):
  with pytest.raises(errors.UserError, match=f'config.{field} '):
    report.write(tiny(**{field: 7}), of_run[0].workdir, tmp_path)


@pytest.mark.parametrize('accuracy, n', [(0.8, 300), (0.0, 50), (1.0, 7)])
def test_interval_is_wilsons(accuracy, n):
  """Its ends p solve |accuracy - p| = z sqrt(p (1 - p) / n)."""
  for p in run_page.interval(accuracy, n):
    half = 1.959964 * math.sqrt(max(p * (1 - p), 0) / n)
    assert abs(accuracy - p) == pytest.approx(half, abs=1e-9)


def test_thinned_keeps_both_ends():
  assert run_logs.thinned(0, 8) == []
  assert run_logs.thinned(3, 8) == [0, 1, 2]
  for n in range(9, 60):
    found = run_logs.thinned(n, 8)
    assert (len(found), found[0], found[-1]) == (8, 0, n - 1)


# Studies.

# Accuracies in percent by arm and seed, chosen so that the paired differences
# from uniform are 1, 2, 3 (searched: mean 2, sd 1) and -1, 0, 1 (random).
ACCURACIES = {
  'searched': (81, 84, 84),
  'uniform': (80, 82, 81),
  'random': (79, 82, 82),
  'full': (90, 91, 92),
}
# n, mean, sd, difference, interval: 2 -+ t(0.975, 2 degrees of freedom) *
# sd / sqrt(3) = 2 -+ 4.3027 / 1.7321, and 0 -+ the same.
SAME = 'indistinguishable'
SEARCHED = ['3', '83.00', '1.73', '+2.00', '-0.48 .. +4.48', SAME]
RANDOM = ['3', '81.00', '1.73', '+0.00', '-2.48 .. +2.48', SAME]
FULL = ['3', '91.00', '1.00', '+10.00', '+7.52 .. +12.48', 'better']
STUDY_PICTURES = ['accuracy', 'differences', 'macs', 'shares', 'similarity']


def study_of(**fields):
  c = importlib.import_module('configs.studies.headline').get_config('smoke')
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.update({'arms': tuple(ACCURACIES), 'seeds': (0, 1, 2), **fields})
  return c


def cell_records(study):
  """A record of each cell, the shares of layers drawn at random."""
  rng = np.random.default_rng(0)
  base = study.base.model
  model = models.cost_model(base.name, 10, 8, 1, base.base_width)
  widths = list(model.widths)
  for cell in plan.cells(study):
    counts = [int(rng.integers(1, w + 1)) for w in widths]
    share = 1.0 if cell.arm.scores == 'full' else 0.5
    accuracy = ACCURACIES.get(cell.name, [None] * 9)[cell.seed]
    kept = [results.bits(range(n)) for n in counts]
    made = test_studies.record(
      cell.name, cell.seed, accuracy and accuracy / 100, dict(cell.variation)
    )
    yield made | {
      'study': study.study,
      'config_hash': cell.hash,
      'seconds': 60.0,
      'model': base.name,
      'macs': int(1000 * share),
      'macs_share': share,
      'counts': dict(zip(model.layers, counts, strict=True)),
      'widths': widths,
      'kept': dict(zip(model.layers, kept, strict=True)),
    }


def write_study(workdir, study):
  """Writes the report of a study whose cells are finished."""
  records = list(cell_records(study))
  storage.write_json(results.path(study, workdir), records)
  report.write(study, workdir)


@pytest.fixture(scope='module')
def of_studies(tmp_path_factory):
  """A folder with the reports of two studies, 'headline' and 'two'."""
  folder = tmp_path_factory.mktemp('studies')
  (folder / 'report-headline').mkdir()
  (folder / 'report-headline' / 'varied.svg').write_text('an earlier one')
  (folder / 'report-headline' / 'my own.svg').write_text('kept')
  varied = {'field': 'budget.keep', 'values': (0.4, 0.5)}
  two = study_of(study='two', arms=('searched', 'uniform'), **varied)
  for study in (study_of(), two):
    write_study(folder, study)
  return folder


def test_report_of_a_study(of_studies):
  outline = check_page(of_studies, STUDY_PICTURES, 'report-headline')
  assert (of_studies / 'report-headline' / 'my own.svg').exists()
  assert 'Study headline' in outline.text
  assert '12 of 12 cells are finished. The table compares' in outline.text
  text = (of_studies / 'report-headline.html').read_text()
  assert cells_of(text, 'test-accuracy-in')[1:] == [
    ['1. searched', *SEARCHED, '50.0%', '60'],
    ['2. uniform', '3', '81.00', '1.00', '', '', '', '50.0%', '60'],
    ['3. random', *RANDOM, '50.0%', '60'],
    ['4. full', *FULL, '100.0%', '60'],
  ]
  assert '1 x abacus' in outline.text and 'abc123' in outline.text
  alts = [image['alt'] for image in outline.images]
  assert '1. searched: n 3, mean 83.00, sd 1.73' in alts[0]
  assert 'uniform' not in alts[-1]  # Its shares differ by rounding alone.


def test_cells_that_are_in_no_results_file_count(tmp_path):
  study = study_of()
  for record in list(cell_records(study))[:-1]:
    record['arm'] = 'as another study calls it'
    folder = tmp_path / 'cells' / record['config_hash']
    storage.write_json(folder / 'cell.json', record)
  report.write(study, tmp_path)
  outline = check_page(tmp_path, STUDY_PICTURES, 'report-headline')
  assert '11 of 12 cells are finished; the others may change' in outline.text


def test_report_of_a_study_of_structures_alone(tmp_path):
  arms = ('searched+structure', 'random+structure')
  varied = {'field': 'search.epochs', 'values': (0.0, 1.0)}
  write_study(tmp_path, study_of(arms=arms, baseline='', **varied))
  outline = check_page(tmp_path, ['shares', 'similarity'], 'report-headline')
  assert 'How alike are the structures?' in outline.text


def test_study_over_a_field(of_studies):
  names = ['accuracy', 'differences', 'varied', 'shares', 'similarity']
  outline = check_page(of_studies, names, 'report-two')
  assert 'Study two' in outline.text
  assert 'Test accuracy over budget.keep' in outline.text


def test_study_without_a_cell_is_refused(tmp_path, refused):
  refused('hold no finished cell', report.write, study_of(), tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(
  'numbers, said',
  [
    ((3, 1, 0.5, 1.5), 'better'),
    ((3, -1, -1.5, -0.5), 'worse'),
    ((3, 1, -1, 3), SAME),
    ((1, 1, None, None), '-'),
  ],
)
def test_verdicts(numbers, said):
  assert study_tables.verdict(statistics.Difference(*numbers)) == said


# Pictures and text.


def test_lines_differ_in_more_than_colour():
  lines = [figures.Line(str(i), [0, 1], [i, i]) for i in range(6)]
  drawn = figures.curves({'loss': lines}, 'step')
  shapes = [(x.get_linestyle(), x.get_marker()) for x in drawn.axes[0].lines]
  assert len({str(s) for s in shapes if s[1] in tuple('osD^vP')}) == 6


EVIL = '$x_{$<script>document.title="evil"</script>\x07"\'&'


def evil(tmp_path):
  """A run with hostile text wherever a file, a folder or a config holds any."""
  workdir = tmp_path / EVIL.replace('/', '|')
  job = trained(workdir, class_names=[EVIL] * 2, warnings=[EVIL])
  for path in (workdir / 'result.json', workdir / 'structure.json'):
    path.write_text(path.read_text().replace('keep0.3', json.dumps(EVIL)[1:-1]))
  storage.write_text(workdir / 'budget.txt', EVIL, sealed=True)
  mistakes = {'labels': [0, 5], 'predicted': [1, 0]}
  images = np.zeros((2, 4, 4, 1), np.uint8)
  storage.write_arrays(
    workdir / 'train' / 'mistakes.npz', {'images': images, **mistakes}
  )
  bundle = workdir / 'export'
  bundle.mkdir(parents=True)
  (bundle / EVIL.replace('/', '|')).write_text(EVIL)
  versions = {'jax': EVIL, EVIL: EVIL}
  fields = {**job.config.to_dict(), 'seed': EVIL, EVIL: {EVIL: EVIL}}
  storage.write_json(workdir / 'config.json', fields)
  result = storage.read_json(workdir / 'result.json')
  storage.write_json(workdir / 'result.json', {**result, 'versions': versions})
  report.write(job.config, workdir, tmp_path / 'evil')
  return tmp_path / 'evil'


def test_text_from_files_and_configs_is_escaped(tmp_path):
  out = evil(tmp_path)
  names = [*SEARCH_PICTURES, 'training', 'mistakes']
  outline = check_page(out, names)
  assert outline.text.count('<script>') > 8  # As text.
  table = tables.html(EVIL, [EVIL, EVIL], [[EVIL, EVIL]])
  assert '<script' not in table and Outline(table).tags.count('td') == 1
  shown = page.Page(EVIL)
  shown.paragraph(EVIL)
  assert 'script' not in Outline(shown.html()).tags


# A browser.


HARNESS = """<!DOCTYPE html><title>pending</title><body>
<script>
const done = [];
const pages = PAGES;
for (const [path, width] of pages) {
  const frame = document.createElement('iframe');
  frame.width = width; frame.height = 900; frame.src = path;
  frame.onload = () => {
    const inner = frame.contentDocument, root = inner.documentElement;
    const images = [...inner.images];
    done.push({path, width, scroll: root.scrollWidth, title: inner.title,
      images: images.length,
      broken: images.filter(i => !i.naturalWidth).length,
      hints: [...inner.querySelectorAll('.scroll')]
        .filter(e => e.checkVisibility() && (e.scrollWidth > e.clientWidth) !=
          (parseFloat(getComputedStyle(e, '::before').height) > 9))
        .map(e => e.getAttribute('aria-label')),
      wide: [...inner.querySelectorAll('img, p, h1, h2, .scroll, pre')]
        .filter(e => e.getBoundingClientRect().right > width + 0.5)
        .map(e => e.outerHTML.slice(0, 80))});
    if (done.length == pages.length) document.title = JSON.stringify(done);
  };
  document.body.append(frame);
}
</script>"""


def browse(url, profile):
  """(document after its load, what the console said) in headless Chromium."""
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('chromium is not installed (apt-get install chromium)')
  flags = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
    '--disable-background-networking --disable-component-update '
    '--disable-sync --disable-dev-shm-usage --allow-file-access-from-files '
    '--enable-logging=stderr --v=0 --virtual-time-budget=10000 --dump-dom'
  ).split()
  done = subprocess.run(
    [chromium, *flags, f'--user-data-dir={profile}', url],
    capture_output=True,
    text=True,
    timeout=180,
  )
  console = [x for x in done.stderr.splitlines() if 'CONSOLE' in x]
  return done.stdout, console


@pytest.mark.slow  # Chromium takes about 10 seconds.
def test_opens_in_a_browser_at_both_widths(of_studies, tmp_path):
  """No console errors, all pictures there, nothing wider than the window.

  No text runs as a script, and a table says that it scrolls where it does.
  """
  job = trained(tmp_path / 'run', budgets=2)
  report.write(job.config, job.workdir)
  shutil.copytree(of_studies, tmp_path / 'study')
  evil(tmp_path)
  files = ['run/report.html', 'study/report-headline.html', 'evil/report.html']
  pages = [(file, width) for file in files for width in (1280, 390)]
  bad = '<script>missing()</script>'  # An error of it is seen, so others are.
  harness = tmp_path / 'harness.html'
  harness.write_text(bad + HARNESS.replace('PAGES', json.dumps(pages)))
  document, console = browse(harness.as_uri(), tmp_path / 'profile')
  assert len(console) == 1 and 'missing is not defined' in console[0]
  title = re.search('<title>(.*?)</title>', document).group(1)
  found = json.loads(html.unescape(title))
  assert sorted((f['path'], f['width']) for f in found) == sorted(pages)
  for opened in found:
    assert opened['images'] >= 5 and opened['broken'] == 0, opened
    assert opened['scroll'] <= opened['width'] and not opened['wide'], opened
    assert opened['title'] != 'evil' and not opened['hints'], opened
