"""Budgets as users mean them: many, together, rounded, in ms, with weights."""

import dataclasses
import functools
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from pfs_jax import (
  costs,
  errors,
  latency,
  models,
  prune,
  scores,
  stages,
  storage,
)
from tests import small_run, test_prune


@pytest.mark.parametrize('quantity', ['macs', 'params'])
@pytest.mark.parametrize('other_share', [0.6, 1.0])  # 1: it binds nothing.
@pytest.mark.parametrize(
  'name, size, round_to',
  [('resnet20', 16, 1), ('vgg16', 16, 4), ('mobilenet_v2', 32, 1)],
)
def test_raising_a_ceiling(name, size, round_to, other_share, quantity):
  """Never lowers the quantity that it bounds, the other ceiling kept."""
  model = models.cost_model(name, 10, size, 3, 8)
  budget = prune.Budget(round_to=round_to)
  most, least = budget.most(model), budget.least(model)
  other = 'params' if quantity == 'macs' else 'macs'
  cost, fixed = getattr(model, quantity), getattr(model, other)
  ceiling = int(other_share * fixed(most)) + fixed(least)
  gates, reached = test_prune.random_gates(model, 7, 2), []
  for limit in np.linspace(cost(least), cost(most), 25).astype(int):
    given = {f'max_{quantity}': int(limit), f'max_{other}': ceiling}
    found = prune.fit(gates, model, round_to=round_to, **given)
    assert cost(found.counts) <= limit and fixed(found.counts) <= ceiling
    reached.append(cost(found.counts))
  assert reached == sorted(reached)


def job(workdir, **overrides):
  return stages.Job(small_run.config(**overrides), workdir)


def structure(workdir, name=None):
  path = workdir / (name or '') / 'structure.json'
  return prune.Structure.from_json(path.read_text())


def test_several_budgets_from_one_search(finished, capsys):
  path = finished / 'search' / 'gates.npz'
  before, network = path.stat().st_mtime, job(finished).network
  gates = storage.read_arrays(path)
  free = prune.fit(gates, network.cost_model, network.reference_macs).params
  ceiling = int(0.8 * free)
  many = job(
    finished,
    budget__keep=(0.5, 0.6, 1.0),
    budget__params=(int(0.7 * free),),
    budget__max_params=ceiling,
  )
  stages.execute('prune', many)
  assert path.stat().st_mtime == before
  out = capsys.readouterr().out
  assert 'of reference' in out and 'of searched' in out and 'binding' in out
  found = [structure(finished, budget.name) for budget in many.budgets]
  assert all(b.name.endswith(f'-maxparams{ceiling}') for b in many.budgets)
  macs = [s.macs for s in found]
  assert macs[0] < macs[1] < macs[2]
  assert found[2].binding == 'params' and found[2].params <= ceiling
  assert found[3].params <= 0.7 * free
  checksums = {s.source['gates_sha256'] for s in found}
  assert checksums == {structure(finished).source['gates_sha256']}
  assert models.build_from(found[0]).counts == found[0].counts


@pytest.mark.parametrize(
  'ranking, suffix', [('layer_mean', 'layermean'), ('cost', 'cost0.5')]
)
def test_rankings(finished, ranking, suffix):
  fields = {'budget__ranking': ranking, 'budget__power': 0.5}
  one = job(finished, budget__keep=(0.6,), **fields)
  model = one.network.cost_model
  gates = scores.random(model, 0)  # Those of so short a search hardly differ.
  storage.write_arrays(finished / 'search' / 'gates.npz', gates)
  stages.execute('prune', one)
  ranked = scores.over_cost(gates, model, 0.5)
  if ranking == 'layer_mean':
    ranked = scores.over_layer_mean(gates)
  macs = one.budgets[0].max_macs
  wanted = prune.fit(ranked, model, macs).counts
  assert structure(finished, f'keep0.6-{suffix}').counts == wanted
  assert wanted != prune.fit(gates, model, macs).counts


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


def test_train_takes_names_and_files(finished, tmp_path, capsys, refused):
  before = result(finished)
  short = {'budget__keep': (0.55,), 'train__epochs': 0.1}
  stages.execute('prune', job(finished, **short))
  stages.execute('train', job(finished, **short))
  found = structure(finished, 'keep0.55')
  assert result(finished / 'keep0.55')['macs'] == found.macs > before['macs']
  assert result(finished) == before  # That of the first budget stays.
  capsys.readouterr()
  del short['budget__keep']
  stages.execute('train', job(finished, train__structure='keep0.55', **short))
  assert 'Channels kept (keep0.55)' in capsys.readouterr().out
  path, counts = tmp_path / 'counts.json', found.to_list()
  given = {'train__structure': str(path), **short}
  for text in (json.dumps(counts), found.to_json()):  # A plain list, and ours.
    path.write_text(text)
    folder = tmp_path / str(len(text))
    stages.execute('train', job(folder, **given))
    assert list(result(folder)['counts'].values()) == counts
  wrong = job(tmp_path / 'v', **given)
  for bad, message in (
    (counts[:-1], 'must have 3 entries'),
    ([99, *counts[1:]], r'must be an integer in \[1, 6\]; got 99'),
  ):
    path.write_text(json.dumps(bad))
    refused(message, stages.execute, 'train', wrong)
  for name in ('../x', 'shapes', 'shared', ''):  # It names a folder.
    foreign = dataclasses.replace(found, source={'budget': name})
    path.write_text(foreign.to_json())
    refused('name of a budget must be', stages.execute, 'train', wrong)


def test_rankings_without_gates_need_no_search(tmp_path, capsys, refused):
  both = {'budget__keep': (0.5,), 'budget__params': ()}
  for ranking in ('uniform', 'tilt1'):
    stages.execute('prune', job(tmp_path, budget__ranking=ranking, **both))
  assert 'warning' not in capsys.readouterr().out
  uniform = structure(tmp_path, '')
  assert uniform.source == {'budget': 'keep0.5-uniform', 'seed': 0}
  assert np.ptp(np.divide(uniform.counts, (6, 12, 24))) < 0.2
  early = job(tmp_path / 'new', budget__ranking='random', **both)
  late = job(tmp_path / 'new', budget__ranking='uniform', **both)
  for one in (early, late):  # Both began when the workdir was new.
    stages.execute('prune', one)
  found = structure(tmp_path / 'new', '')
  assert found.source['budget'] == 'keep0.5-random'
  drawn = scores.random(early.network.cost_model, 0)
  kept = storage.read_json(tmp_path / 'new' / 'kept.json')
  for layer, n in zip(found.layers, found.counts, strict=True):
    assert kept[layer] == sorted(np.argsort(-drawn[layer])[:n])
  few = {**both, 'budget__max_params': uniform.params // 2}
  stages.execute('prune', job(tmp_path, budget__ranking='uniform', **few))
  assert 'budget.ranking=tilt uses' in capsys.readouterr().out
  whole = job(tmp_path, budget__keep=(), budget__macs=(10**9,))
  whole.config.budget.ranking = 'uniform'
  stages.execute('prune', stages.Job(whole.config, tmp_path))
  assert 'removes no channel' in capsys.readouterr().out
  with pytest.raises(errors.UserError, match='run --mode=search in this'):
    stages.execute('prune', job(tmp_path, budget__ranking='layer_mean', **both))
  (tmp_path / 'budget.txt').write_text('keep0.5-tilt9\n')  # A bit is flipped.
  refused('budget.txt is damaged', job, tmp_path)


def test_an_unreachable_budget_says_what_is_reachable(finished, refused):
  unreachable = {'budget__round_to': 4, 'budget__keep': (0.6,)}
  one = job(finished, **unreachable)
  text = str(refused('of the reference network', stages.execute, 'prune', one))
  assert '(the floor)' in text and 'multiples of 2' in text
  share = float(re.search(r'MACs, (0\.\d+) of the ref', text)[1])
  unreachable['budget__keep'] = (share,)
  stages.execute('prune', job(finished, **unreachable))


@pytest.mark.parametrize('init', ['inherit', 'rewind'])
def test_weights_come_along(finished_run, tmp_path, init, monkeypatch):
  """The narrow network starts with the kept channels of the wide one."""
  for name in ('structure.json', 'kept.json'):
    shutil.copy(finished_run / name, tmp_path / name)
  fields = {'train__scratch': 'B', 'train__wide_epochs': 3.0}
  fields |= {'train__learning_rate': 0.01, 'train__wide_learning_rate': 0.3}
  one = job(tmp_path, train__init=init, **fields)
  first, given, lengths = one.first_weights['params'], {}, {}
  rates = {}
  trained = {
    'params': jax.tree.map(lambda leaf: np.asarray(leaf) + 1, first),
    'batch_stats': one.first_weights['batch_stats'],
  }

  def fit(job, module, folder, label, epochs, weights):
    given[label], lengths[label] = weights['params'], epochs
    rates[label] = job.config.train.learning_rate
    if label == 'train':
      raise KeyboardInterrupt  # The test has seen enough.
    return types.SimpleNamespace(variables=trained)

  monkeypatch.setattr(stages.training, 'fit', fit)
  with pytest.raises(KeyboardInterrupt):
    stages.execute('train', one)
  wide = first
  if init == 'inherit':
    kernel = given['wide']['stem']['conv']['kernel']
    np.testing.assert_array_equal(kernel, first['stem']['conv']['kernel'])
    wide = trained['params']
  assert set(given) == {'train', *(['wide'] if init == 'inherit' else [])}
  # As much compute as the reference network needs for 2 epochs.
  share = structure(tmp_path).macs / one.network.reference_macs
  assert lengths['train'] == pytest.approx(2 / share)
  assert lengths.get('wide', 3) == 3
  assert (rates['train'], rates.get('wide', 0.3)) == (0.01, 0.3)
  if init == 'inherit':  # It does not depend on the fine-tuning's recipe.
    wide_of = functools.partial(job, tmp_path, train__init=init)
    again = wide_of(**{**fields, 'train__learning_rate': 0.02})
    with pytest.raises(KeyboardInterrupt):
      shutil.rmtree(tmp_path / 'train')
      stages.execute('train', again)
    other = wide_of(**{**fields, 'train__wide_learning_rate': 0.2})
    with pytest.raises(errors.UserError, match='wide holds .*learning_rate'):
      shutil.rmtree(tmp_path / 'train')
      stages.execute('train', other)
  other = job(tmp_path, train__init=init, seed=1, train__structure='keep0.5')
  with pytest.raises(errors.UserError, match='config.seed must be 0, that of'):
    shutil.rmtree(tmp_path / 'train', ignore_errors=True)
    stages.execute('train', other)
  kept = json.loads((tmp_path / 'kept.json').read_text())['stage1_block0/conv1']
  ours, block = given['train']['stage1_block0'], wide['stage1_block0']
  for layer, at in (('conv1', np.s_[..., kept]), ('conv2', np.s_[:, :, kept])):
    np.testing.assert_array_equal(
      ours[layer]['conv']['kernel'],
      np.asarray(block[layer]['conv']['kernel'])[at],
    )


@pytest.mark.parametrize('holdout', [False, True])
def test_what_is_held_out_is_evaluated(tmp_path, monkeypatch, holdout):
  one, given = job(tmp_path, train__holdout=holdout), {}

  def loop(state, step, source, plan, evaluate, **_):
    given.update(evaluate(state, 1), images=len(source.resident[0]))

  monkeypatch.setattr(stages.training.train, 'loop', loop)
  stages.fit(one, one.network.reference, tmp_path, 'train', 1.0)
  assert given['images'] == (1200 if holdout else 1500)
  assert ('validation_accuracy' in given) == holdout


def test_kept_of_another_structure_is_refused(finished_run, tmp_path):
  shutil.copy(finished_run / 'structure.json', tmp_path)
  kept = json.loads((finished_run / 'kept.json').read_text())
  kept['stage1_block0/conv1'] = [0, 1, 2, 3, 4]
  (tmp_path / 'kept.json').write_text(json.dumps(kept))
  with pytest.raises(errors.UserError, match='does not belong'):
    stages.execute('train', job(tmp_path, train__init='rewind'))


# Latency.


class Clock:
  """A device whose time is a rule: no noise, so exact expectations."""

  def __init__(self, monkeypatch):
    self.calls = 0
    monkeypatch.setattr(latency, '_time_layer', self)

  def __call__(self, op, inputs, outputs, batch, dtype):
    self.calls += 1
    # As units that take 8 channels at a time, and 16 the fastest.
    padded = -(-outputs // 8) * 8
    return 1e-6 * op.positions * inputs * padded * (0.1 if padded == 16 else 1)


def test_latency_is_a_ceiling_and_cached(monkeypatch, tmp_path, capsys):
  clock = Clock(monkeypatch)
  model = models.cost_model('vgg16', 10, 8, 1, 8)
  times = latency.LatencyModel(model, 4, tmp_path / 'l.json')
  measured = clock.calls
  assert measured > 13
  latency.LatencyModel(model, 4, tmp_path / 'l.json')
  assert clock.calls == measured  # All from the file.
  latency.LatencyModel(model, 8, tmp_path / 'l.json')
  assert clock.calls > measured  # Another batch size is another time.
  latency.LatencyModel(model, 4, tmp_path / 'l.json' / 'not a folder')
  assert 'measured, but not saved' in capsys.readouterr().err
  for damage in (b'[]', b'\xff', b'{"a": "b"}', b'{"a": -1.0}'):
    (tmp_path / 'l.json').write_bytes(damage)
    before = clock.calls
    latency.LatencyModel(model, 4, tmp_path / 'l.json')
    assert clock.calls == before + measured
  gates = test_prune.random_gates(model, 1, 2)
  full, floor = times(model.widths), times((1,) * 13)
  reached = []
  for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
    limit = floor + share * (full - floor)
    found = prune.fit(gates, model, max_latency_ms=limit, latency=times)
    assert found.latency_ms <= limit
    reached.append(found.latency_ms)
  assert reached == sorted(reached)
  assert prune.Structure.from_json(found.to_json()) == found
  with pytest.raises(prune.Infeasible) as e:
    prune.fit(gates, model, max_latency_ms=floor * 0.99, latency=times)
  assert e.value.quantity == 'latency_ms'


def test_a_time_never_falls_when_a_count_grows(monkeypatch, tmp_path):
  Clock(monkeypatch)
  model = models.cost_model('resnet8', 10, 8, 1, 16)
  times = latency.LatencyModel(model, 1, tmp_path / 'l.json')
  rng = np.random.default_rng(0)
  for _ in range(20):
    counts = np.array([rng.integers(1, n + 1) for n in model.widths])
    for i in np.flatnonzero(counts < model.widths):
      wider = counts.copy()
      wider[i] += 1
      assert times(wider) >= times(counts)


def test_latency_counts_each_call_positions_and_groups(monkeypatch, tmp_path):
  layer = costs.Layer('a', 'dense', 4, 4, positions=1)
  image = {'kernel': (3,), 'strides': (1,), 'input_size': (6,)}
  grouped = dataclasses.replace(layer, kind='conv', groups=2, **image)
  shapes = []  # Of what goes in and comes out of the timed layer.

  def milliseconds(_, call, x, *rest):
    shapes.append((x.shape, call(x, *rest).shape))
    return [1.0]

  monkeypatch.setattr(latency, 'milliseconds', milliseconds)
  for op in (layer, dataclasses.replace(layer, positions=64), grouped):
    assert latency._time_layer(op, 4, 4, 2, np.float32) == 1e-3
  assert shapes == [((2, n, 4), (2, n, 4)) for n in (1, 64, 6)]
  Clock(monkeypatch)
  calls = [layer, dataclasses.replace(layer, again=True)]
  model = costs.CostModel((), (), calls)
  times = latency.LatencyModel(model, 1, tmp_path / 'l.json')
  assert times(()) == times.layers(())['a'] == pytest.approx(2 * 32e-3)
  ends = {'reads': ((0, 1),), 'makes': ((0, 2),)}
  doubled = dataclasses.replace(grouped, kind='depthwise', outputs=8, **ends)
  model = costs.CostModel(('a',), (4,), [doubled])
  timed = []
  monkeypatch.setattr(
    latency, '_time_layer', lambda _, *n: timed.append(n[:2]) or 1.0
  )
  latency.LatencyModel(model, 1, tmp_path / 'l.json')
  assert timed == [(n, 2 * n) for n in (1, 2, 3, 4)]


def test_latency_on_this_device(finished, capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  stages.execute('info', job(finished, budget__latency_ms=(2.5,)))
  assert 'measured when cut' in capsys.readouterr().out
  assert not (tmp_path / 'pfs_jax').exists()
  c = job(finished, budget__keep=(), budget__latency_ms=(50.0,))
  stages.execute('prune', c)
  out = capsys.readouterr().out
  assert 'the whole network: least' in out and 'of 128' in out
  found = structure(finished, 'latency50ms')
  assert 0 < found.latency_ms <= 50.0
  cached = json.loads((tmp_path / 'pfs_jax' / 'latency.json').read_text())
  assert min(cached.values()) > 0
  c.config.budget.latency_ms = (1e-6,)
  with pytest.raises(errors.UserError, match='cannot be met'):
    stages.execute('prune', stages.Job(c.config, finished))


def test_what_is_trained_is_not_cut_by_new_times(finished, monkeypatch, capsys):
  """Another machine has other times; the trained structure stays."""
  fields = {'budget__keep': (), 'budget__latency_ms': (5.0,)}
  for ms in (2.0, 1.0):
    times = lambda counts, ms=ms: ms * sum(counts) / 10  # noqa: E731
    monkeypatch.setattr(stages.Job, 'latency_model', staticmethod(times))
    monkeypatch.setattr(stages.cutting, '_show_latency', lambda *_: None)
    stages.execute('prune', job(finished, **fields))
    kept = structure(finished, 'latency5ms').counts
    if ms == 2.0:
      first = kept
      (finished / 'latency5ms' / 'train').mkdir()
  assert kept == first
  assert 'is trained and is kept' in capsys.readouterr().out


def test_padding_use():
  model = models.cost_model('vgg16', 10, 8, 1, 8)
  shares = latency.padding_use(model, (5,) * 13, 8)
  assert shares['conv1/conv'] == pytest.approx(25 / 64)
  assert shares['conv0/conv'] == pytest.approx(5 / 64)
  assert shares['classifier'] == pytest.approx(50 / (8 * 16))


def test_an_edited_structure_is_kept(finished, capsys, refused):
  path = finished / 'structure.json'
  fresh = structure(finished)
  model = job(finished).network.cost_model
  counts = (fresh.counts[0] % model.widths[0] + 1, *fresh.counts[1:])
  edited = dataclasses.replace(
    fresh, counts=counts, macs=model.macs(counts), params=model.params(counts)
  )
  path.write_text(edited.to_json())
  stages.execute('search', job(finished))
  assert structure(finished).counts == counts
  assert f'{path} was edited and is kept' in capsys.readouterr().out
  kept = storage.read_json(finished / 'kept.json')
  assert [len(indices) for indices in kept.values()] == list(counts)
  # Costs that do not fit are refused, not kept and not overwritten.
  path.write_text(dataclasses.replace(edited, macs=1).to_json())
  refused('the file says 1 and', stages.execute, 'prune', job(finished))
  path.unlink()
  stages.execute('prune', job(finished))
  assert structure(finished).counts == fresh.counts
