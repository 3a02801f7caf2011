"""The report: what it says, its pictures, and the page in a real browser."""

import base64
import html
import html.parser
import importlib
import json
import math
import pathlib
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest

from pfs_jax import config, errors, models, report, runs, stages, storage
from pfs_jax.report import figures, page, run_page, study_page
from pfs_jax.stages import cutting
from pfs_jax.studies import plan, results
from tests import processes

# Runs.


def tiny(**fields):
  """A config of a network that nothing here builds."""
  c = config.default()
  c.model.name, c.model.base_width, c.model.width = 'vgg16', 2, 3
  c.data.name, c.data.validation_examples = 'digits', 300
  c.budget.keep = (0.5, 0.3)
  c.update_from_flattened_dict(fields)
  return c


def log(folder, records):
  storage.write_text(
    folder / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in records)
  )


def searching(workdir, **fields):
  """A job whose search is under way."""
  job = stages.Job(tiny(**fields), workdir)
  identity = config.identity(job.config, 'search')
  runs.claim(workdir / 'search', identity)
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
  return job, gates


def searched(workdir, **fields):
  """A job that is searched and cut, not trained."""
  job, gates = searching(workdir, **fields)
  storage.write_arrays(workdir / 'search' / 'gates.npz', gates)
  cutting.cut(job)
  return job


def trained(workdir, accuracy=0.8, reference=0.85):
  """A job whose first budget is trained: 240 of 300 images."""
  job = searched(workdir)
  name, structure = cutting.read(job)
  identity = config.identity(job.config, 'train')
  counts = {'structure.counts': list(structure.counts)}
  runs.claim(workdir / 'train', {**identity, **counts})
  for folder in ('train', 'reference'):
    log(
      workdir / folder,
      [
        {'step': s, 'loss': 2 / s, 'accuracy': s / 40, 'seconds': 4000.0}
        for s in (10, 20, 30)
      ],
    )
  result = {
    'test_accuracy': accuracy,
    'reference_test_accuracy': reference,
    'test_examples': 300,
    'macs': structure.macs,
    'params': structure.params,
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'budget': name,
    'versions': {'jax': '0.0.1', 'commit': 'abc', 'hardware': '1 x abacus'},
  }
  storage.write_json(workdir / 'result.json', result)
  return job, structure


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


def page_of(workdir):
  """The one page; its pictures are in the folder of the same name."""
  (path,) = workdir.glob('report*.html')
  return path


def read(workdir):
  text = page_of(workdir).read_text()
  outline = Outline(text)
  assert not outline.open, 'unclosed tags'
  return outline


def check_page(workdir, names):
  """What must hold of every report; `names` are its pictures."""
  outline = read(workdir)
  assert len(outline.ids) == len(set(outline.ids))
  for link in outline.links:  # Nothing is fetched.
    assert link.startswith('data:') or link[1:] in outline.ids, link[:80]
  assert 'script' not in outline.tags
  folder = page_of(workdir).with_suffix('')
  files = sorted(p.name for p in folder.iterdir())
  assert files == sorted(
    f'{n}.{kind}' for n in names for kind in ('png', 'svg')
  )
  assert [n for n in outline.ids if n in names] == names
  assert outline.tags.count('h1') == 1
  assert outline.tags.count('figure') == len(names) == len(outline.images)
  for name, image in zip(names, outline.images, strict=True):
    assert len(image['alt']) > 40 and re.search(r'\d', image['alt'])
    data = base64.b64decode(image['src'].partition('base64,')[2])
    assert data == (folder / f'{name}.svg').read_bytes()
    xml.etree.ElementTree.fromstring(data)
    png = (folder / f'{name}.png').read_bytes()
    assert png.startswith(b'\x89PNG')
  html = page_of(workdir).read_text()
  for figure in html.split('<figure')[1:]:
    assert '<table>' in figure.partition('</figure>')[0], 'no numbers beside'
  return outline


RUN_PICTURES = ['counts', 'counts-keep0.3', 'gates', 'gates-course', 'search']


def test_report_of_a_run(tmp_path):
  job, structure = trained(tmp_path)
  report.run(job)
  outline = check_page(tmp_path, [*RUN_PICTURES, 'training'])
  first_screen = outline.text.partition('Channels of each layer')[0]
  share = f'{structure.macs / job.network.reference_macs:.1%}'
  for said in (
    f'80.00% test accuracy with {structure.macs:,} MACs an image, {share}',
    'trained the same way: 85.00%; the narrow one is 5.00 points below it '
    '(15 of 300 images)',
    'n = 1',
    'keep0.3: cut to',
    'not trained yet',
  ):
    assert said in first_screen, said
  for said in ('vgg16', 'abacus', '1 h 06 min', 'abc', 'model.base_width'):
    assert said in outline.text, said
  count = dict(zip(structure.layers, structure.counts, strict=True))
  for layer, width in zip(job.network.cost_model.layers, [3] * 2, strict=False):
    row = (
      rf'>{layer}</th><td class="n">{count[layer]}</td><td class="n">{width}'
    )
    assert re.search(row, (tmp_path / 'report.html').read_text())


def test_same_folder_gives_the_same_bytes(tmp_path):
  job, _ = trained(tmp_path)
  report.run(job)
  paths = [tmp_path / 'report.html', *(tmp_path / 'report').iterdir()]
  before = {p: p.read_bytes() for p in paths}
  report.run(stages.Job(tiny(), tmp_path))
  assert all(p.read_bytes() == data for p, data in before.items())


def test_report_of_a_search_alone(tmp_path):
  report.run(searched(tmp_path))
  outline = check_page(tmp_path, RUN_PICTURES)
  assert 'keep0.5: cut to' in outline.text
  assert 'test images' not in outline.text and 'Training' not in outline.text


def test_report_of_a_search_under_way(tmp_path):
  job, _ = searching(tmp_path)
  report.run(job)
  outline = check_page(tmp_path, ['gates-course', 'search'])
  assert 'The search is at step 30; nothing is cut yet.' in outline.text


def test_structure_from_elsewhere_is_enough(tmp_path):
  """A workdir that only trained, from --config.train.structure."""
  job, _ = trained(tmp_path)
  shutil.rmtree(tmp_path / 'search')
  for name in ('structure', 'kept'):
    for path in tmp_path.glob(f'{name}*.json'):
      path.unlink()
  report.run(job)
  check_page(tmp_path, ['counts', 'training'])


def test_empty_workdir_is_refused_and_left_alone(tmp_path):
  job = stages.Job(tiny(), tmp_path / 'none')
  with pytest.raises(errors.UserError, match='holds no run yet'):
    report.run(job)
  assert not job.workdir.exists()


@pytest.mark.parametrize('field', ['seed', 'search.epochs', 'train.epochs'])
def test_work_of_another_config_is_refused(tmp_path, field):
  trained(tmp_path)
  other = stages.Job(tiny(**{field: 7}), tmp_path)
  with pytest.raises(errors.UserError, match=f'config.{field} '):
    report.run(other)


@pytest.mark.parametrize('accuracy, n', [(0.8, 300), (0.0, 50), (1.0, 7)])
def test_interval_is_wilsons(accuracy, n):
  """Its ends p solve |accuracy - p| = z sqrt(p (1 - p) / n)."""
  for p in run_page.interval(accuracy, n):
    half = 1.959964 * math.sqrt(max(p * (1 - p), 0) / n)
    assert abs(accuracy - p) == pytest.approx(half, abs=1e-9)


def test_thinned_keeps_both_ends():
  assert run_page.thinned(0, 8) == []
  assert run_page.thinned(3, 8) == [0, 1, 2]
  for n in range(9, 60):
    found = run_page.thinned(n, 8)
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
# 2 -+ t(0.975, 2 degrees of freedom) / sqrt(3) = 2 -+ 4.3027 / 1.7321.
SEARCHED = '+2.00 points (95% interval -0.48 to +4.48, 3 pairs by seed)'


def study_of(workdir, **fields):
  c = importlib.import_module('configs.studies.headline').get_config('smoke')
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
    yield {
      'study': study.study,
      'arm': cell.name,
      'variation': dict(cell.variation),
      'seed': cell.seed,
      'config_hash': cell.hash,
      'commit': 'abc123',
      'hardware': '1 x abacus',
      'test_accuracy': None if accuracy is None else accuracy / 100,
      'seconds': 60.0,
      'model': base.name,
      'macs': int(1000 * share),
      'macs_share': share,
      'counts': dict(zip(model.layers, counts, strict=True)),
      'widths': widths,
      'kept': {
        layer: results.bits(range(n))
        for layer, n in zip(model.layers, counts, strict=True)
      },
    }


def finished(workdir, study, left_out=0):
  records = list(cell_records(study))
  records = records[: len(records) - left_out]
  storage.write_json(results.path(study, workdir), records)
  return records


STUDY_PICTURES = ['accuracy', 'differences', 'macs', 'shares', 'similarity']


def test_report_of_a_study(tmp_path):
  study = study_of(tmp_path)
  finished(tmp_path, study)
  report.study(study, tmp_path)
  outline = check_page(tmp_path, STUDY_PICTURES)
  first_screen = outline.text.partition('Contents')[0]
  for said in (
    'searched: 83.00% ± 1.73 (n = 3) at 50.0% of the MACs',
    'uniform: 81.00% ± 1.00 (n = 3)',
    'full: 91.00% ± 1.00 (n = 3) at 100.0%',
    f'searched minus uniform: {SEARCHED}: which is better cannot be told',
    'Of 3 compared with uniform: 1 better (full), 0 worse, for 2 it cannot',
    '12 of 12 cells are finished',
  ):
    assert said in first_screen, said
  assert '1 x abacus' in outline.text and 'abc123' in outline.text
  similar = next(i['alt'] for i in outline.images if 'Correlation' in i['alt'])
  assert 'uniform' not in similar  # Its shares differ by rounding alone.


def test_reports_of_two_studies_share_a_folder(tmp_path):
  for name in ('one', 'two'):
    study = study_of(tmp_path)
    with study.unlocked():
      study.study = name
    finished(tmp_path, study)
    folder = tmp_path / f'report-{name}'
    folder.mkdir()
    (folder / 'varied.png').write_text('of an earlier report')
    report.study(study, tmp_path)
  for name in ('one', 'two'):
    assert f'Study {name}' in (tmp_path / f'report-{name}.html').read_text()
    names = {p.stem for p in (tmp_path / f'report-{name}').iterdir()}
    assert names == set(STUDY_PICTURES)


def test_cells_that_are_in_no_results_file_count(tmp_path):
  study = study_of(tmp_path)
  records = finished(tmp_path, study, left_out=1)
  results.path(study, tmp_path).unlink()
  for record in records:
    folder = tmp_path / 'cells' / record['config_hash']
    storage.write_json(folder / 'cell.json', record)
  report.study(study, tmp_path)
  assert '11 of 12 cells are finished; the rest may change' in (
    read(tmp_path).text
  )


def test_report_of_a_study_of_structures_alone(tmp_path):
  study = study_of(
    tmp_path,
    arms=('searched+structure', 'random+structure'),
    field='search.epochs',
    baseline='',
  )
  study = study.copy_and_resolve_references()
  with study.unlocked():
    study['values'] = (0.0, 1.0)
  finished(tmp_path, study)
  report.study(study, tmp_path)
  outline = check_page(tmp_path, ['shares', 'similarity'])
  assert 'How alike are the structures of different seeds?' in outline.text


def test_study_over_a_field(tmp_path):
  study = study_of(tmp_path, arms=('searched', 'uniform'), field='budget.keep')
  with study.unlocked():
    study['values'] = (0.4, 0.5)
  finished(tmp_path, study)
  report.study(study, tmp_path)
  outline = read(tmp_path)
  assert 'Accuracy over budget.keep' in outline.text
  assert any('83.00% at 0.5' in image['alt'] for image in outline.images)


def test_study_without_a_cell_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='hold no finished cell'):
    report.study(study_of(tmp_path), tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_verdicts():
  difference = study_page.statistics.Difference
  said = [
    study_page._verdict('a', 'b', difference(3, mean, low, high))
    for mean, low, high in ((1, 0.5, 1.5), (-1, -1.5, -0.5), (1, -1, 3))
  ]
  assert 'a is better' in said[0] and 'a is worse' in said[1]
  assert 'cannot be told' in said[2]
  alone = study_page._verdict('a', 'b', difference(1, 1.0, None, None))
  assert 'n = 1' in alone and 'interval' in alone


# Pictures and page.


def test_lines_differ_in_more_than_colour():
  lines = [(str(i), [0, 1], [i, i]) for i in range(6)]
  axes = figures.curves({'loss': lines}).axes[0]
  drawn = axes.get_lines()
  assert len({(str(x.get_linestyle()), x.get_marker()) for x in drawn}) == 6


def test_block_means_leave_out_the_diagonal():
  matrix = np.array([[1, 0.2, 0.3], [0.2, 1, 0.5], [0.3, 0.5, 1]])
  found = figures.block_means(matrix, [('a', 2), ('b', 1)])
  np.testing.assert_allclose(found, [[0.2, 0.4], [0.4, np.nan]])


def test_text_is_escaped():
  html = page.table('<b>', ['x"'], [['<script>'], ['a & b']])
  assert '<script>' not in html and '&lt;script&gt;' in html
  assert 'aria-label="&lt;b&gt;"' in html and 'a &amp; b' in html


# The command line, and a browser.


def test_command_line(tmp_path):
  done = processes.run(
    [
      'main.py',
      '--config=configs/digits.py',
      '--mode=report',
      f'--workdir={tmp_path / "none"}',
    ]
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert 'holds no run yet' in done.stderr


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


def test_opens_in_a_browser_at_both_widths(tmp_path):
  """No console errors, all pictures there, nothing wider than the window."""
  folders = [tmp_path / name for name in ('run', 'study')]
  report.run(trained(folders[0])[0])
  study = study_of(folders[1])
  finished(folders[1], study)
  report.study(study, folders[1])
  pages = [
    (f'{folder.name}/{page_of(folder).name}', width)
    for folder in folders
    for width in (1280, 390)
  ]
  harness = tmp_path / 'harness.html'
  harness.write_text(HARNESS.replace('PAGES', json.dumps(pages)))
  document, console = browse(harness.as_uri(), tmp_path / 'profile')
  assert console == []
  title = re.search('<title>(.*?)</title>', document).group(1)
  found = json.loads(html.unescape(title))
  assert sorted((f['path'], f['width']) for f in found) == sorted(pages)
  for opened in found:
    assert opened['images'] >= 5 and opened['broken'] == 0, opened
    assert opened['scroll'] <= opened['width'] and not opened['wide'], opened


def test_console_errors_would_be_seen(tmp_path):
  path = pathlib.Path(tmp_path / 'bad.html')
  path.write_text('<script>missing()</script>')
  _, console = browse(path.as_uri(), tmp_path / 'profile')
  assert any('missing is not defined' in line for line in console)
