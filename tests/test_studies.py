"""Studies: arms, cells, statistics, and studies that are cut off or shared."""

import importlib
import json
import math
import signal

import jax
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from benchmarks import study_results
from pfs_jax import errors, models, prune, scores, stages, studies
from pfs_jax.studies import arms, cells, engine, plan, products, results, tables
from pfs_jax.studies import statistics as stats
from tests import own_models, processes

CONFIGS = (processes.ROOT / 'configs' / 'studies').glob('*.py')
NAMES = sorted(path.stem for path in CONFIGS if path.stem != 'common')
VARIANTS = {
  'proportions': ('full', 'front', 'resnet20'),
  'tournament': ('full', 'resnet20'),
  'two_ceilings': ('full', 'tenth', 'again'),
}
STUDIES = [(n, variant) for n in NAMES for variant in VARIANTS.get(n, ['full'])]


def config_of(name, variant='smoke'):
  module = importlib.import_module(f'configs.studies.{name}')
  return module.get_config(variant)


@pytest.fixture(scope='module')
def vgg():
  return models.cost_model('vgg16', 10, 28, 1, 16)


# Rankings.


def test_over_layer_mean_is_blind_to_a_layer_s_scale(vgg):
  gates = scores.random(vgg, 0)
  gates['conv3'] = np.zeros_like(gates['conv3'])
  scaled = {k: g * (1 + i) for i, (k, g) in enumerate(gates.items())}
  found, again = (scores.over_layer_mean(g) for g in (gates, scaled))
  for name, score in found.items():
    assert score.mean() == pytest.approx(0 if name == 'conv3' else 1)
    assert (np.argsort(score) == np.argsort(gates[name])).all()
    np.testing.assert_allclose(again[name], score)


def test_channel_costs_by_hand():
  """VGG16, one image channel, 28x28, widths w = 1, 1, 2, 2, 4, ...

  A channel of conv0 (784 positions) costs 9 * 784 * (1 in + 1 out); of conv1,
  9 * 784 * 1 in and 9 * 196 * 2 out, after the max pool; the last one 9 * 9 * 8
  in and 10 classes out.
  """
  model = models.cost_model('vgg16', 10, 28, 1, 1)
  spent = scores.channel_costs(model)
  assert spent[0] == 9 * 784 * (1 + 1)
  assert spent[1] == 9 * 784 * 1 + 9 * 196 * 2
  assert spent[12] == 9 * 9 * 8 + 10


def test_over_cost(vgg):
  gates = scores.random(vgg, 0)
  spent = scores.channel_costs(vgg)
  plain, half, whole = (scores.over_cost(gates, vgg, p) for p in (0, 0.5, 1))
  for i, (name, gate) in enumerate(gates.items()):
    np.testing.assert_allclose(plain[name], gate)
    np.testing.assert_allclose(whole[name], gate * spent.mean() / spent[i])
    np.testing.assert_allclose(half[name] ** 2, gate * whole[name])


# Baselines, all through the same solver.


def dearest_channel(model):
  return int(scores.channel_costs(model).max())


def test_random_gates_favour_no_layer(vgg):
  """Over many seeds each layer keeps the same mean share.

  100 seeds: the standard error of a layer's mean is at most
  sqrt(0.25 / 16 / 100) = 0.0125.
  """
  shares, ceiling = [], int(0.3 * vgg.macs(vgg.widths))
  for seed in range(100):
    structure = prune.fit(scores.random(vgg, seed), vgg, ceiling)
    assert 0 <= structure.unused['macs'] < dearest_channel(vgg)
    shares.append(np.divide(structure.counts, vgg.widths))
  by_layer = np.mean(shares, axis=0)
  assert np.ptp(by_layer) < 0.06, by_layer
  small, large = by_layer[:2].mean(), by_layer[-6:].mean()
  assert abs(small - large) < 0.03
  assert np.std(shares, axis=0).min() > 0.01  # And they do differ.
  first, again = (scores.random(vgg, 0) for _ in range(2))
  assert all((first[k] == again[k]).all() for k in first)


def test_shuffled_permutes_within_equal_layers(vgg):
  """Where the ceiling is that of the permuted counts, it gives just these."""
  counts = np.array([10, 4, 20, 7, 30, 11, 50, 90, 40, 21, 60, 33, 101])
  permutations = set()
  for seed in range(5):
    shuffled = scores.shuffled(vgg, counts, seed)
    wanted = np.array([round(s[0] / 2) for s in shuffled.values()])
    for width in set(vgg.widths):
      group = np.array(vgg.widths) == width
      assert sorted(wanted[group]) == sorted(counts[group])
    structure = prune.fit(shuffled, vgg, vgg.macs(wanted))
    assert structure.counts == tuple(wanted)
    permutations.add(tuple(wanted))
    # Another ceiling scales them all by one factor.
    structure = prune.fit(shuffled, vgg, vgg.macs(counts))
    assert 0 <= structure.unused['macs'] < dearest_channel(vgg)
    room = (wanted < vgg.widths) & (np.array(structure.counts) < vgg.widths)
    factors = (np.array(structure.counts) / wanted)[room & (wanted >= 20)]
    assert np.ptp(factors) < 0.12, factors
  assert len(permutations) > 1


def test_scores_of_trained_weights_by_hand():
  kernel = np.zeros((1, 1, 2, 3))
  kernel[0, 0] = [[1, -2, 0], [3, 2, 0]]  # L1 norms 4, 4, 0; their mean 8/3.
  norm = {'scale': np.array([-0.5, 0.25, 0.0])}
  params = {'a': {'b': {'conv': {'kernel': kernel}, 'bn': norm}}}
  found = scores.filters(params, ['a/b'])
  np.testing.assert_allclose(found['a/b'], [1.5, 1.5, 0])
  found = scores.scales(params, ['a/b'])
  np.testing.assert_allclose(found['a/b'], [0.5, 0.25, 0])


# The gates of MobileNets act on another BatchNorm than that of their layer.
@pytest.mark.parametrize('name', ['resnet8', 'mobilenet_v1'])
def test_folded_gates_act_as_gates(name, shallow_mobilenets):
  model = models.network(name, 10, 8, 1, base_width=4)
  rng = np.random.default_rng(0)
  x = rng.random((4, 8, 8, 1)).astype(np.float32)
  bare = own_models.drawn(model.gated, x)
  gates = jax.tree.map(
    lambda g: rng.uniform(0.2, 1.0, g.shape).astype(np.float32),
    bare.pop('gates'),
  )

  @jax.jit
  def apply(variables, gates):
    return model.gated.apply({**variables, 'gates': gates}, x)

  ones = jax.tree.map(np.ones_like, gates)
  norms = {g.name: g.norms[0] for g in model.table.groups}
  folded = cells.folded(bare, model.gated.by_layer(gates), norms)
  found, expected = apply(folded, ones), apply(bare, gates)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert not np.allclose(found, apply(bare, ones), rtol=1e-3)


def test_scale_penalty_by_hand():
  params = {
    'bn': {'scale': np.array([-2.0, 0.0, 3.0]), 'bias': np.array([1.0])},
    'conv': {'kernel': np.array([5.0])},
  }
  zeros = jax.tree.map(np.zeros_like, params)
  tx = products.scale_penalty(0.1)
  found, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(found['bn']['scale'], [-0.1, 0, 0.1])
  assert found['bn']['bias'] == 0 and found['conv']['kernel'] == 0


def test_words_of_arms(refused):
  arm = arms.parse('searched+cost0.5+min_share')
  assert arm.scores == 'gates'
  assert arm.overrides == {
    'budget.ranking': 'cost0.5',
    'budget.min_share': 0.25,
  }
  assert arms.parse('pretrained').pretrain_epochs == math.inf
  assert arms.parse('tilt-0.4').scores == 'profile'
  assert arms.parse('cost0.5') == arms.parse('searched+cost0.5')
  assert arms.parse('cost1') == arms.parse('cost')
  assert arms.parse('sensitivity0.2').scores == 'probe'
  refused('must be of the words full', arms.parse, 'searched+magic')
  given = (config_of('ratio').base, 'pretrained', 0)
  field = {'arm.pretrain_epochs': -1}
  refused('must be a whole number of epochs, or all', plan.cell, *given, field)
  for name in ('uniform+fine_tune', 'tilt1+rewind'):
    refused('no weights to start from', arms.parse, name)
  cell = plan.cell(config_of('ratio').base, 'seeing+epochs10', 3)
  for c in (cell.wide, cell.config):
    assert c.search.train_classifier and c.search.epochs == 10


# Statistics, against values worked out by hand.


def test_summary():
  assert stats.summary([1, 2, 3, 6]) == stats.Summary(
    4, 3.0, pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3))
  )
  assert stats.summary([7]).sd is None


def test_paired():
  """Differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653 (tables)."""
  found = stats.paired({0: 2, 1: 4, 2: 6, 9: 99}, {0: 1, 1: 2, 2: 3, 7: 0})
  half = 4.302653 / math.sqrt(3)
  assert (found.n, found.mean) == (3, 2)
  assert found.low == pytest.approx(2 - half, abs=1e-5)
  assert found.high == pytest.approx(2 + half, abs=1e-5)
  assert stats.paired({0: 1.0}, {0: 3.0}) == stats.Difference(1, -2, None, None)
  assert stats.paired({0: 1.0}, {1: 3.0}) is None


def test_correlation():
  assert stats.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
  assert stats.correlation([1, 2, 3], [1, 2, 1]) == pytest.approx(0)
  # Deviations (-1, 0, 1), (-2, 1, 1): 3 / sqrt(2 * 6).
  assert stats.correlation([1, 2, 3], [1, 4, 4]) == pytest.approx(
    3 / math.sqrt(12)
  )
  assert stats.correlation([1, 1], [1, 2]) is None


def test_chance_jaccard():
  """Two of four against two of four: overlap 0, 1, 2 in 1, 4, 1 of 6 ways."""
  expected = (1 * 0 + 4 * (1 / 3) + 1 * 1) / 6
  assert stats.chance_jaccard(4, 2, 2) == pytest.approx(expected)
  assert stats.chance_jaccard(5, 5, 2) == pytest.approx(2 / 5)
  assert stats.jaccard([0, 1, 2], [2, 3]) == 1 / 4


def test_bits():
  for channels in ([], [0], [0, 3, 127], list(range(64))):
    assert results.channels(results.bits(channels)) == channels


# Cells.


@pytest.mark.parametrize('name, variant', STUDIES)
def test_every_study_is_a_list_of_cells(name, variant):
  """Committed results are found again by their hashes; a change costs hours.

  If the work really changed, raise plan.REVISION; if a default of the config
  did, see `plan.Cell.identity`.
  """
  assert plan.cells(config_of(name, 'smoke'))
  study = config_of(name, variant)
  assert study.study == (name if variant == 'full' else f'{name}_{variant}')
  cells = plan.cells(study)
  hashes = {cell.hash for cell in cells}
  committed = results.read(processes.ROOT / 'results' / f'{study.study}.json')
  assert {r['config_hash'] for r in committed} <= hashes
  assert len(hashes) == len(cells)
  seeds = [cell.seed for cell in cells]
  assert seeds == sorted(seeds)  # Pairs exist early.


def test_all_committed_results_are_of_these_studies():
  found = {p.stem for p in (processes.ROOT / 'results').glob('*.json')}
  assert found - {'versus_pytorch'} <= {config_of(*s).study for s in STUDIES}


def test_the_width_of_the_reference_is_the_default():
  wide = {c.hash for c in plan.cells(config_of('expansion', 'full'))}
  assert wide & {c.hash for c in plan.cells(config_of('headline', 'full'))}


def test_a_field_that_changes_nothing_makes_no_cell():
  study = config_of('ratio')
  study.update({'field': 'search.epochs', 'values': (1.0, 2.0)})
  labels = [cell.label for cell in plan.cells(study)]
  assert labels == ['searched, epochs 1', 'uniform', 'searched, epochs 2']


def test_identity_depends_on_what_matters_only():
  def hashes(**fields):
    study = config_of('headline')
    study.base.update_from_flattened_dict(fields)
    return {c.name: c.hash for c in plan.cells(study) if c.seed == 0}

  plain = hashes()

  def differing(**fields):
    other = hashes(**fields)
    return {name for name in plain if plain[name] != other[name]}

  searched = {'searched', 'searched+cost1+structure'}
  assert differing(**{'search.epochs': 2.0}) == searched
  assert differing(**{'budget.keep': (0.4,)}) == {*searched, 'uniform'}
  assert differing(**{'train.epochs': 3.0}) == {'searched', 'uniform'}
  assert differing(**{'data.source_dir': '/x', 'log_steps': 3}) == set()


def varied(field, value):
  return {'field': field, 'values': (value,)}


@pytest.mark.parametrize(
  'change,message',
  [
    ({'arms': ()}, 'arms must not be empty'),
    ({'seeds': (1, 1)}, 'seeds must name each once'),
    ({'seeds': (0.5,)}, 'seeds must be integers; got 0.5'),
    (varied('search.epoch', 1), 'field must be a field of config.base'),
    (varied('arm.magic', 1), 'field must be .* or arm.pretrain_epochs; got'),
    ({'field': 'search.epochs'}, 'field and .* must be given together'),
    (varied('search.epochs', '1'), "values must be numbers; got '1'"),
    (varied('model.width', 8.5), 'values do not fit model.width'),
    (varied('search.sparsity', 7.0), r'search.sparsity must be in \[0, 1\]'),
    ({'base.model.factory': 'a:b'}, "base.model.factory must be ''"),
    ({'base.budget.ranking': 'cost'}, "base.budget.ranking must be 'global'"),
    ({'base.budget.keep': (0.3, 0.5)}, 'base.budget must name one budget; it'),
    ({'baseline': 'magic'}, 'baseline must be one of searched; '),
  ],
)
def test_errors_of_a_study(change, message, refused):
  study = config_of('headline')
  study.baseline = ''
  study.update_from_flattened_dict(change)
  refused(f'^config.{message}', plan.cells, study)


def test_wide_training_leaves_out_the_images_held_out(tmp_path, monkeypatch):
  given = {}
  monkeypatch.setattr(stages, 'fit', lambda *_, **more: given.update(more))
  cell = plan.cell(config_of('ratio').base, 'pretrained', 0)
  with pytest.raises(AttributeError):  # There is no state.
    products.trained(cell, tmp_path, math.inf)
  assert given['hold_out']


def test_pretraining_is_in_whole_epochs(refused):
  study = config_of('ratio')
  study.update(varied('arm.pretrain_epochs', 0.5))
  refused('^arm.* must be a whole number of epochs', plan.cells, study)


# Results.


def record(arm, seed, accuracy, variation=None, label=None):
  return {
    'study': 'x',
    'model': 'vgg16',
    'macs': 300,
    'params': 30,
    'arm': arm,
    'label': label or arm,
    'variation': variation or {},
    'seed': seed,
    'config_hash': f'{arm}{seed}{variation}',
    'commit': 'abc123',
    'hardware': '1 x abacus',
    'test_accuracy': accuracy,
    'macs_share': 0.3,
    'seconds': 10.0,
    'counts': {'a': 1, 'b': 2},
    'widths': [4, 4],
  }


def test_rows_compare_with_what_is_comparable():
  study = config_of('compare', 'full')
  means = {'uniform': 0.8, 'searched': 0.9}
  means |= {'uniform+scratch_b': 0.85, 'searched+scratch_b': 0.91}
  records = [
    record(a, i, m + i / 100) for i in (0, 1) for a, m in means.items()
  ]
  by_label = {row[0]: row for row in tables.comparison(study, records).rows}
  first = '|'.join(by_label['searched'][1:6])
  assert first == '2|90.50|0.71|+10.00|+10.00 .. +10.00'
  assert by_label['searched+scratch_b'][4] == '+6.00'
  assert by_label['uniform'][4] == ''
  assert tables.against(study) == 'uniform (Scratch-B: uniform+scratch_b)'
  # Scratch-B waits for its baseline.
  records = [record('uniform', 0, 0.8), record('searched+scratch_b', 0, 0.9)]
  assert tables.baseline_of(study, records, records[1:]) == []
  # Pairs are counted.
  records[1:] = [record('searched', seed, 0.9) for seed in (0, 1)]
  _, row = tables.comparison(study, records).rows
  assert row[1] == '2' and row[4] == '+10.00 (n = 1)'


def cut_record(arm, seed, counts=(2, 4), kept='3f'):
  names = {'counts': counts, 'kept': kept}
  cut = {k: dict(zip('ab', v, strict=True)) for k, v in names.items()}
  return record(arm, seed, None) | cut


def test_similarity_of_records():
  a = cut_record('searched', 0)
  b = cut_record('searched', 1, (2, 3), '67')
  chance = (14 / 36 + 3 / 4) / 2
  (found,) = tables.overlaps([(a, b)])
  assert found == pytest.approx(((1 / 3 + 3 / 4) / 2, chance))
  found = tables.correlations([(a, b), (a, cut_record('searched', 2, (4, 2)))])
  assert found == pytest.approx([1, -1])
  assert tables.overlaps([(a, b | {'widths': [8, 8]})]) == []
  # It is that of structures that were chosen, and not of uniform widths.
  assert not tables.similarity([cut_record('uniform', i) for i in (0, 1)]).rows
  shuffled = [cut_record('shuffled', i) for i in (0, 1)]
  (row,) = tables.similarity(shuffled).rows
  assert row[2:] == ['1.00', '1.00', '1.00', '-', '-']


def test_merge_keeps_the_order_of_the_study(tmp_path):
  file = tmp_path / 'x.json'
  order = ['c', 'a', 'b']
  for name in ('b', 'gone', 'a', 'c', 'a'):
    results.merge(
      file, {**record('searched', 0, None), 'config_hash': name}, order
    )
  found = [r['config_hash'] for r in json.loads(file.read_text())]
  assert found == ['c', 'a', 'b', 'gone']
  assert len(file.read_text().splitlines()) == 6  # A record a line.
  assert {p.name for p in tmp_path.iterdir()} == {'x.json', '.lock'}


@pytest.mark.parametrize(
  'wrong',
  [
    {'macs': 'many'},
    {'counts': [1]},
    {'config_hash': None},
    {'kept': {'conv': 'zz'}},
  ],
)
def test_a_damaged_record_is_refused(tmp_path, wrong, refused):
  file = tmp_path / 'x.json'
  file.write_text(json.dumps([{**record('searched', 0, None), **wrong}]))
  refused(r'x.json: Expected .* at `\$', results.read, file)


# Whole studies, on digits.


def table(workdir, study):
  """What a study came out at, without times."""
  found = json.loads((workdir / f'{study}.json').read_text())
  without = ('seconds', 'search_seconds', 'wide_seconds', 'commit')
  return [{k: v for k, v in r.items() if k not in without} for r in found]


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """One workdir: studies share their cells."""
  return tmp_path_factory.mktemp('studies')


# The fast and the slow ones: together all scores and all ways to train.
# `test_every_study_is_a_list_of_cells` makes the plans of the others, too.
FAST = ('headline', 'headline10')
SLOW = (
  *('compare', 'long', 'mobile', 'pretrained', 'proportions', 'similarity'),
  'tournament',
)


@pytest.mark.parametrize(
  'name', [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_smoke(name, shared, capsys, monkeypatch):
  monkeypatch.setattr(products, 'forget_programs', lambda: None)  # For speed.
  study = config_of(name)
  studies.run(study, shared)
  cells = plan.cells(study)
  found = json.loads((shared / f'{name}.json').read_text())
  assert [r['config_hash'] for r in found] == [c.hash for c in cells]
  for cell, r in zip(cells, found, strict=True):
    trained = cell.arm.training != 'none'
    assert (r['study'], r['arm'], r['seed']) == (name, cell.name, cell.seed)
    assert (r['test_accuracy'] is not None) == trained
    share = cell.config.budget.keep[0]
    assert r['macs'] <= share * r['reference_macs']
    assert r['macs_share'] == r['macs'] / r['reference_macs']
    assert r['hardware'] and r['model']
    if trained:
      assert 0 <= r['test_accuracy'] <= 1 and r['seconds'] > 0
    if cell.arm.searches:
      assert set(r['gate_means']) == set(r['counts'])
  out = capsys.readouterr().out
  assert f'{name} {len(cells)}/{len(cells)}' in out or 'are done' in out
  assert f'{len(cells)} of {len(cells)} cells' in out


def test_rankings_share_one_search(shared):
  """A search for each setting, not for each arm."""
  study = config_of('headline')
  studies.run(study, shared)  # Nothing is left to do after its smoke test.
  wanted = [c for c in plan.cells(study) if c.arm.searches]
  records = {r['config_hash']: r for r in table(shared, 'headline')}
  means = {(c.seed, json.dumps(records[c.hash]['gate_means'])) for c in wanted}
  assert len(means) == len({c.seed for c in wanted}) < len(wanted)


def test_finished_cells_are_taken_from_committed_results(shared, tmp_path):
  """A fresh machine with results but no folders does nothing again."""
  study = config_of('headline')
  studies.run(study, shared)
  study.results_dir = str(tmp_path / 'results')
  (tmp_path / 'results').mkdir()
  text = (shared / 'headline.json').read_text()
  file = tmp_path / 'results' / 'headline.json'
  file.write_text(text)
  (tmp_path / 'results' / 'other.json').write_text('{"what": "ever"}')
  studies.run(study, tmp_path / 'fresh')
  assert file.read_text() == text
  assert not list((tmp_path / 'fresh').glob('*/*'))


def finished_cell(cell):
  """The record of a cell of which nothing was done."""
  return record(cell.name, cell.seed, 0.5) | {'config_hash': cell.hash}


@pytest.fixture
def instead(monkeypatch):
  """Calls a function instead of doing a cell; the list of the cells done."""

  def replace(act):
    def run(cell, root):
      act(cell)
      done.append(cell)
      return finished_cell(cell)

    done = []
    monkeypatch.setattr(engine.cells, 'run', run)
    return done

  return replace


def test_a_cell_that_another_workdir_finishes_is_not_run_again(
  tmp_path, instead
):
  """Two processes with one folder of results, and a workdir each."""
  study = config_of('headline')
  study.results_dir = str(tmp_path / 'results')
  *others, last = plan.cells(study)
  file = results.path(study, tmp_path)

  def act(cell):  # Meanwhile the other process does the last cell.
    if not done:
      results.merge(file, finished_cell(last), [last.hash])

  done = instead(act)
  studies.run(study, tmp_path / 'ours')
  assert [cell.hash for cell in done] == [cell.hash for cell in others]
  assert len(results.read(file)) == len(others) + 1
  study.results_dir = str(file / 'results')  # It cannot be made.
  with pytest.raises(NotADirectoryError):
    studies.run(study, tmp_path / 'new')
  assert len(done) == len(others)  # That is found before any cell is done.


def test_report_only_runs_nothing(tmp_path, capsys):
  study = config_of('headline')
  study.report_only = True
  studies.run(study, tmp_path)
  assert 'none of 3 cells is finished' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, instead):
  def act(cell):
    if cell.name == 'uniform':
      raise errors.UserError('loss is nan')

  done = instead(act)
  with pytest.raises(errors.UserError, match='uniform, seed 0: loss is nan'):
    studies.run(config_of('headline'), tmp_path)
  assert len(done) == 2


def test_a_cell_without_enough_memory_does_not_stop_the_others(
  tmp_path, instead
):
  def act(cell):
    if cell.name == 'searched':
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  done = instead(act)
  with pytest.raises(errors.UserError, match='searched, seed 0: RESOURCE'):
    studies.run(config_of('headline'), tmp_path)
  assert len(done) == 2


def test_a_study_keeps_to_its_data(tmp_path, instead):
  """In its workdir, and on another machine by its results."""
  study = config_of('headline')
  study.results_dir = str(tmp_path / 'results')
  study.base.data.name, study.base.data.image_size = 'folder', 8
  study.base.data.validation_examples = 2

  def made(name, *values):
    for split, count in (('train', 6), ('test', 2)):
      for kind, value in zip('ab', values, strict=True):
        folder = tmp_path / name / split / kind
        folder.mkdir(parents=True)
        for i in range(count):
          image = Image.new('RGB', (8, 8), (value, i, 0))
          image.save(folder / f'{i}.png')
    study.base.data.source_dir = str(tmp_path / name)

  instead(lambda cell: None)
  made('first', 10, 20)
  studies.run(study, tmp_path / 'w')
  study.base.data.source_dir = '/nowhere'  # A finished study needs no data.
  studies.run(study, tmp_path / 'w')
  made('second', 10, 30)
  for workdir in ('w', 'new'):
    with pytest.raises(errors.UserError, match='are not those that'):
      studies.run(study, tmp_path / workdir)


def test_a_cell_whose_search_is_in_work_waits(tmp_path, monkeypatch, instead):
  """Busy puts a cell back; the others go first."""
  busy = ['searched', 'searched']

  def act(cell):
    if cell.name in busy:
      busy.remove(cell.name)
      raise products.Busy('search')

  done = instead(act)
  monkeypatch.setattr(engine, '_POLL_SECONDS', 0.01)
  studies.run(config_of('headline'), tmp_path)
  names = [cell.name for cell in done]
  assert names == ['uniform', 'searched+cost1+structure', 'searched']


def test_modes_want_their_kind_of_config(refused):
  assert studies.asked('study', config_of('ratio'))
  refused('the config of a study', studies.asked, 'run', config_of('ratio'))
  refused('config of one run', studies.asked, 'study', config_of('ratio').base)


# Processes.

# Three cells: two of them share a search, and two have a training.
COMMAND = [
  'main.py',
  '--config=configs/studies/ratio.py:smoke',
  '--mode=study',
  '--config.arms=("searched", "searched+layer_mean+structure", "uniform")',
  '--config.values=(0.7,)',
  '--config.base.checkpoint_steps=5',
  '--config.base.log_steps=5',
]


def start(workdir):
  return processes.start([*COMMAND, f'--workdir={workdir}'])


def finished(process):
  done = process.finish(300)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def untouched(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('studies') / 'untouched'
  return workdir, finished(start(workdir))


def shown(out):
  """The table, without its title and times."""
  lines = [line.rsplit('│', 2)[0] for line in out.splitlines() if '│' in line]
  assert lines
  return lines


@pytest.mark.slow
def test_sigkill_and_again(untouched, tmp_path):
  """Killed in its second training, it goes on to the same table."""
  expected, out = untouched
  workdir = tmp_path / 'w'
  process = start(workdir)
  process.wait_for(
    lambda: len(list(workdir.glob('cells/*/train/metrics.jsonl'))) == 2
  )
  process.send_signal(signal.SIGKILL)
  assert process.finish(60).returncode == -signal.SIGKILL
  assert len(table(workdir, 'ratio')) < len(table(expected, 'ratio'))
  assert shown(finished(start(workdir))) == shown(out)
  assert table(workdir, 'ratio') == table(expected, 'ratio')


@pytest.mark.slow
def test_two_processes_do_no_cell_twice(untouched, tmp_path):
  expected, _ = untouched
  both = [start(tmp_path / 'w') for _ in range(2)]
  outs = [finished(process) for process in both]
  assert table(tmp_path / 'w', 'ratio') == table(expected, 'ratio')
  logs = list((tmp_path / 'w').glob('*/*/*/metrics.jsonl'))
  assert len(logs) == 3  # Of two trainings and the search.
  for path in logs:
    lines = path.read_text().splitlines()
    steps = [json.loads(line)['step'] for line in lines]
    assert steps == sorted(set(steps))
  logs = [p.read_text() for p in (tmp_path / 'w').glob('cells/*/log.txt')]
  assert sorted(text.count('of training') for text in logs) == [0, 1, 1]
  for out in outs:
    assert '3 of 3 cells' in out


@pytest.mark.slow
def test_results_page_is_that_of_the_committed_results(monkeypatch):
  """Else: python -m benchmarks.study_results."""
  # Only what is said of the pictures; drawing them takes most of a minute.
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda *_, **__: 0)
  text = (processes.ROOT / 'RESULTS.md').read_text()
  assert study_results.filled(text) == text
  wanted = {processes.ROOT / path for path in study_results.drawn(text)}
  folder = processes.ROOT / study_results.PICTURES
  assert set(folder.glob('*.svg')) == wanted


def test_one_study_over_several_hosts_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(errors.UserError, match='start the command several times'):
    studies.run(config_of('headline'), tmp_path)
