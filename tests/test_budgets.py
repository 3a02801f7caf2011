"""Budgets as users mean them: many, together, rounded, in ms, with weights."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from pfs_jax import (
  budgets,
  checkpointing,
  config,
  errors,
  latency,
  models,
  prune,
  scores,
  stages,
  storage,
)
from tests import processes

FAMILIES = {
  'resnet20': (8, 16),
  'vgg16': (8, 16),
  'mobilenet_v1': (8, 32),
  'mobilenet_v2': (8, 32),
  'resnet50': (8, 32),
}


def cost_model(name):
  width, size = FAMILIES[name]
  return models.cost_model(name, 10, size, 3, width)


def tied_gates(model, seed):
  """Gates of few levels: many ties, most at 0 and 1."""
  rng = np.random.default_rng(seed)
  return {
    layer: rng.choice([0.0, 0.3, 1.0], n, p=[0.5, 0.2, 0.3])
    for layer, n in zip(model.layers, model.widths, strict=True)
  }


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('round_to', [1, 4, 8])
def test_ceilings_and_minimum_widths_hold(name, round_to):
  model = cost_model(name)
  for seed, (macs_share, params_share, min_share) in enumerate(
    [(0.7, 1.0, 0.0), (1.0, 0.6, 0.25), (0.8, 0.75, 0.1)]
  ):
    conditions = {'round_to': round_to, 'min_share': min_share}
    budget = prune.Budget(min_channels=2, **conditions)
    least, most = budget.least(model), budget.most(model)
    macs = max(model.macs(least), int(macs_share * model.macs(most)))
    params = max(model.params(least), int(params_share * model.params(most)))
    gates = tied_gates(model, seed)
    found = prune.fit(gates, model, macs, params, min_channels=2, **conditions)
    assert found.macs <= macs and found.params <= params
    assert found.binding in ('macs', 'params')
    for width, low, count in zip(
      model.widths, least, found.counts, strict=True
    ):
      assert low <= count <= width
      assert count % round_to == 0 or count == width < round_to
    again = prune.fit(gates, model, macs, params, min_channels=2, **conditions)
    assert again == found


@pytest.mark.parametrize('quantity', ['macs', 'params'])
@pytest.mark.parametrize('round_to', [1, 4])
@pytest.mark.parametrize('name', ['vgg16', 'mobilenet_v2'])
def test_raising_one_of_two_ceilings(name, round_to, quantity):
  """Never lowers the quantity that it bounds, the other ceiling kept."""
  model = cost_model(name)
  budget = prune.Budget(round_to=round_to)
  most, least = budget.most(model), budget.least(model)
  other = 'params' if quantity == 'macs' else 'macs'
  cost, fixed = getattr(model, quantity), getattr(model, other)
  ceiling = int(0.6 * fixed(most)) + fixed(least)
  gates, reached = tied_gates(model, 7), []
  for limit in np.linspace(cost(least), cost(most), 25).astype(int):
    given = {f'max_{quantity}': int(limit), f'max_{other}': ceiling}
    found = prune.fit(gates, model, round_to=round_to, **given)
    assert cost(found.counts) <= limit and fixed(found.counts) <= ceiling
    reached.append(cost(found.counts))
  assert reached == sorted(reached)


def test_rounding_against_brute_force():
  """On a small net: prefix of blocks by mean gate, then the rest that fits."""
  model = models.cost_model('resnet20', 4, 8, 1, 4)
  for seed in range(5):
    rng = np.random.default_rng(seed)
    gates = {
      layer: rng.random(n)
      for layer, n in zip(model.layers, model.widths, strict=True)
    }
    budget = int(0.6 * model.macs(model.widths))
    found = prune.fit(gates, model, budget, round_to=2)
    blocks = []  # (mean gate, layer), each layer's best two channels first.
    for i, g in enumerate(gates.values()):
      ranked = sorted(g, reverse=True)
      blocks += (
        [(-(a + b) / 2, i) for a, b in itertools.batched(ranked, 2)]
        if hasattr(itertools, 'batched')
        else [
          (-(ranked[k] + ranked[k + 1]) / 2, i)
          for k in range(0, len(ranked), 2)
        ]
      )
    order = [i for _, i in sorted(blocks)]

    def counts_of(prefix, order=order):
      taken = np.bincount(order[:prefix], minlength=9) * 2
      return np.maximum(taken, 2)

    best = max(
      k for k in range(len(order) + 1) if model.macs(counts_of(k)) <= budget
    )
    counts, stuck = counts_of(best), set()
    seen = np.bincount(order[:best], minlength=9)
    for i in order[best:]:
      seen[i] += 1
      wider = counts.copy()
      wider[i] += 2
      if i in stuck or 2 * seen[i] <= counts[i]:
        continue
      if model.macs(wider) <= budget:
        counts = wider
      else:
        stuck.add(i)
    assert found.counts == tuple(counts)


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
  """A workdir with a short search on digits."""
  workdir = tmp_path_factory.mktemp('budgets')
  stages.execute('search', job(workdir))
  return workdir


def job(workdir, **overrides):
  c = digits.get_config('smoke')
  c.model.base_width = 4
  c.model.width = 5
  c.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in overrides.items()}
  )
  return stages.Job(c, workdir)


def structure(workdir, name=None):
  path = workdir / (name or '') / 'structure.json'
  return prune.Structure.from_json(path.read_text())


def test_several_budgets_from_one_search(searched, capsys):
  gates = (searched / 'search' / 'gates.npz').stat().st_mtime
  many = job(
    searched,
    budget__keep=(0.4, 0.5, 0.7),
    budget__params=(6000,),
    budget__max_params=7000,
  )
  stages.execute('prune', many)
  assert (searched / 'search' / 'gates.npz').stat().st_mtime == gates
  out = capsys.readouterr().out
  assert 'of reference' in out and 'of searched' in out and 'binding' in out
  found = [
    structure(searched, f'{name}-maxparams7000')
    for name in ('keep0.4', 'keep0.5', 'keep0.7', 'params6000')
  ]
  macs = [s.macs for s in found]
  assert macs[0] < macs[1] < macs[2]
  assert found[2].binding == 'params' and found[2].params <= 7000
  assert found[3].params <= 6000
  checksums = {s.source['gates_sha256'] for s in found}
  assert checksums == {structure(searched).source['gates_sha256']}
  assert models.build_from(found[0]).counts == found[0].counts


@pytest.mark.parametrize(
  'fields, name, expected',
  [
    (
      {'ranking': 'layer_mean'},
      'keep0.5-layermean',
      lambda gates, _: scores.over_layer_mean(gates),
    ),
    (
      {'ranking': 'cost', 'power': 0.5},
      'keep0.5-cost0.5',
      lambda gates, model: scores.over_cost(gates, model, 0.5),
    ),
  ],
)
def test_rankings(searched, tmp_path, fields, name, expected):
  workdir = shutil.copytree(searched, tmp_path / 'copy')
  path = workdir / 'search' / 'gates.npz'
  rng = np.random.default_rng(0)  # Of so short a search they hardly differ.
  gates = {k: rng.random(len(v)) for k, v in storage.read_arrays(path).items()}
  storage.write_arrays(path, gates)
  fields = {f'budget__{k}': v for k, v in fields.items()}
  one = job(workdir, budget__keep=(0.5,), **fields)
  stages.execute('prune', one)
  model = one.network.cost_model
  macs = one.budgets[0].max_macs
  wanted = prune.fit(expected(gates, model), model, macs)
  assert structure(workdir, name).counts == wanted.counts
  assert wanted.counts != prune.fit(gates, model, macs).counts


def test_train_takes_a_budget_by_name(searched):
  stages.execute('prune', job(searched, budget__keep=(0.45,)))
  one = job(searched, train__structure='keep0.45', train__epochs=0.1)
  stages.execute('train', one)
  result = json.loads((searched / 'keep0.45' / 'result.json').read_text())
  assert result['macs'] == structure(searched, 'keep0.45').macs


def test_an_unreachable_budget_says_what_is_reachable(searched):
  with pytest.raises(errors.UserError) as e:
    stages.execute('prune', job(searched, budget__round_to=4))
  text = str(e.value)
  assert len(text.splitlines()) <= 3
  for part in ('(the floor)', 'of the reference network', 'multiples of 2'):
    assert part in text


def test_a_plain_list_of_counts(searched, tmp_path):
  counts = structure(searched).to_list()
  path = tmp_path / 'counts.json'
  path.write_text(json.dumps(counts))
  workdir = tmp_path / 'w'
  given = {'train__structure': str(path), 'train__epochs': 0.1}
  stages.execute('train', job(workdir, **given))
  (found,) = workdir.glob('result*.json')
  assert list(json.loads(found.read_text())['counts'].values()) == counts
  for bad, message in (
    (counts[:-1], 'must have 9 entries'),
    ([99, *counts[1:]], r'must be an integer in \[1, 5\]; got 99'),
  ):
    path.write_text(json.dumps(bad))
    with pytest.raises(errors.UserError, match=message):
      stages.execute('train', job(tmp_path / 'v', **given))


@pytest.mark.parametrize('init', ['inherit', 'rewind'])
def test_weights_come_along(searched, tmp_path, init, monkeypatch):
  """At step 0 the narrow network holds the kept channels of the wide one."""
  workdir = tmp_path / 'w'
  workdir.mkdir()
  for name in ('structure.json', 'kept.json'):
    (workdir / name).write_text((searched / name).read_text())
  one = job(workdir, train__init=init, train__epochs=0.2)
  firsts = {}
  original = stages.training._initial

  def spy(job, module, total, label, *rest):
    state = original(job, module, total, label, *rest)
    firsts[label] = jax.device_get(state.params)
    return state

  monkeypatch.setattr(stages.training, '_initial', spy)
  stages.execute('train', one)
  kept = json.loads((workdir / 'kept.json').read_text())['stage1_block0/conv1']
  if init == 'inherit':
    with checkpointing.Checkpoints(workdir / 'wide') as checkpoints:
      target = original(
        one, one.network.narrow(one.network.cost_model.widths), 1, 'wide'
      )
      _, state, _ = checkpoints.restore(target)
    wide = state.params
    assert set(firsts) == {'wide', 'train'}
    np.testing.assert_array_equal(
      firsts['wide']['stem']['conv']['kernel'],
      one.first_weights['params']['stem']['conv']['kernel'],
    )
  else:
    wide = one.first_weights['params']
    assert set(firsts) == {'train'}
  block = 'stage1_block0'
  np.testing.assert_array_equal(
    firsts['train'][block]['conv1']['conv']['kernel'],
    np.asarray(wide[block]['conv1']['conv']['kernel'])[..., kept],
  )
  np.testing.assert_array_equal(
    firsts['train'][block]['conv2']['conv']['kernel'],
    np.asarray(wide[block]['conv2']['conv']['kernel'])[:, :, kept],
  )


def test_kept_of_another_structure_is_refused(searched, tmp_path):
  for name in ('structure.json', 'kept.json'):
    (tmp_path / name).write_text((searched / name).read_text())
  kept = json.loads((tmp_path / 'kept.json').read_text())
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
    padded = -(-outputs // 8) * 8  # As units that take 8 channels at a time.
    return 1e-6 * op.positions * inputs * padded * (0.9 if padded == 16 else 1)


def test_latency_is_a_ceiling_and_cached(monkeypatch, tmp_path):
  clock = Clock(monkeypatch)
  model = models.cost_model('vgg16', 10, 8, 1, 8)
  times = latency.LatencyModel(model, 4, tmp_path / 'l.json')
  measured = clock.calls
  assert measured > 13
  latency.LatencyModel(model, 4, tmp_path / 'l.json')
  assert clock.calls == measured  # All from the file.
  latency.LatencyModel(model, 8, tmp_path / 'l.json')
  assert clock.calls > measured  # Another batch size is another time.
  gates = tied_gates(model, 1)
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
  model = models.cost_model('resnet20', 10, 8, 1, 16)
  times = latency.LatencyModel(model, 1, tmp_path / 'l.json')
  rng = np.random.default_rng(0)
  for _ in range(50):
    counts = np.array([rng.integers(1, n + 1) for n in model.widths])
    for i in range(len(counts)):
      if counts[i] < model.widths[i]:
        wider = counts.copy()
        wider[i] += 1
        assert times(wider) >= times(counts)


def test_latency_on_this_device(searched, capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  c = job(searched, budget__keep=(), budget__latency_ms=(50.0,))
  stages.execute('prune', c)
  out = capsys.readouterr().out
  assert 'the whole network: least' in out and 'of 128' in out
  found = structure(searched, 'latency50ms')
  assert 0 < found.latency_ms <= 50.0
  cached = json.loads((tmp_path / 'pfs_jax' / 'latency.json').read_text())
  assert min(cached.values()) > 0
  with pytest.raises(errors.UserError, match='cannot be met'):
    stages.execute(
      'prune', job(searched, budget__keep=(), budget__latency_ms=(1e-6,))
    )


def test_padding_use():
  model = models.cost_model('vgg16', 10, 8, 1, 8)
  shares = latency.padding_use(model, (5,) * 13, 8)
  assert shares['conv1/conv'] == pytest.approx(25 / 64)
  assert shares['conv0/conv'] == pytest.approx(5 / 64)
  assert shares['classifier'] == pytest.approx(50 / (8 * 16))


# Info.


@pytest.mark.parametrize('name', list(models.REGISTRY))
def test_fit_takes_less_than_a_second(name):
  """At the default width; the widest rows of golden/macs.json are alike."""
  imagenet = name.startswith('mobilenet') or name == 'resnet50'
  shape = (1000, 224, 3) if imagenet else (10, 32, 3)
  model = models.cost_model(name, *shape)
  gates = tied_gates(model, 0)
  _, seconds = timed(prune.fit, gates, model, model.macs(model.widths) // 2)
  assert seconds < 1


def timed(function, *args):
  import time

  start = time.process_time()
  result = function(*args)
  return result, time.process_time() - start


def test_an_edited_structure_is_kept(searched, tmp_path, capsys):
  folder = tmp_path / 'w'
  shutil.copytree(searched, folder)
  path = folder / 'structure.json'
  fresh = structure(folder)
  model = job(folder).network.cost_model
  counts = (fresh.counts[0] % model.widths[0] + 1, *fresh.counts[1:])
  edited = dataclasses.replace(
    fresh, counts=counts, macs=model.macs(counts), params=model.params(counts)
  )
  path.write_text(edited.to_json())
  stages.execute('search', job(folder))
  assert structure(folder).counts == counts
  assert f'{path} was edited and is kept' in capsys.readouterr().out
  # Costs that do not fit are refused, not kept and not overwritten.
  path.write_text(dataclasses.replace(edited, macs=1).to_json())
  with pytest.raises(errors.UserError, match='the file says 1 and'):
    stages.execute('prune', job(folder))
  path.unlink()
  stages.execute('prune', job(folder))
  assert structure(folder).counts == fresh.counts


def test_info_measures_nothing(tmp_path, capsys):
  stages.execute('info', job(tmp_path, budget__latency_ms=(2.5,)))
  assert 'measured when cut' in capsys.readouterr().out


def test_budgets_of_a_config():
  c = config.default()
  with c.unlocked():
    c.budget.keep, c.budget.latency_ms = (0.5,), (2.5,)
    c.budget.latency_batch = 4
  first, second = budgets.from_section(c.budget, 1001)
  assert (first.name, first.max_macs) == ('keep0.5-latencybatch4', 500)
  assert second.max_latency_ms == 2.5 and second.max_macs is None


def test_cuts_are_the_same_in_another_process(searched, tmp_path):
  before = structure(searched)
  args = ['main.py', '--config=configs/digits.py:smoke', '--mode=prune']
  args += ['--config.model.base_width=4', '--config.model.width=5']
  args += [f'--workdir={searched}']
  processes.output(args, env={'PYTHONHASHSEED': '3'}, fresh=True)
  assert structure(searched) == before
