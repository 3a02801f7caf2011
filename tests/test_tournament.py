"""The tournament: its choice on planted losses, its refusals, its resumption.

What trains here is a network of three layers on 8x8 digits: 4 s a test.
"""

import dataclasses
import importlib
import itertools
import pathlib
import re
import types

import flax.linen as nn
import numpy as np
import pytest

from pfs_jax import (
  config,
  errors,
  models,
  probe,
  prune,
  runs,
  scores,
  stages,
  storage,
)
from pfs_jax.data import pipeline
from pfs_jax.studies import products, tournament

CANDIDATES = ('tilt1', 'tilt-1', 'tilt2')


class Tiny(nn.Module):
  """Two layers of 6 and 8 channels."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    for width in (6, 8):
      x = nn.Conv(width, (3, 3), strides=(2, 2), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(self.num_classes)(x.mean((1, 2)))


def small(**fields):
  """The config of a tournament on digits."""
  c = config.default()
  c.model.factory = f'{__name__}:Tiny'
  c.data.name = 'digits'
  c.data.validation_examples = 300
  c.data.eval_batch_size = 300
  c.budget.keep = (0.5,)
  c.train.epochs = 8.0
  c.train.batch_size = 200
  c.checkpoint_steps = 2
  c.tournament.candidates = CANDIDATES
  c.tournament.epochs = 1.0
  c.tournament.seeds = 2
  c.tournament.share = 20.0
  c.update_from_flattened_dict(fields)
  return c


@pytest.fixture(autouse=True, scope='module')
def one_network(tmp_path_factory):
  """All jobs here have the same network, which takes a second to trace."""
  network = stages.Job(small(), tmp_path_factory.mktemp('none')).network
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stages.Job, '_network', lambda job: network)
    yield


# The decision.


@pytest.mark.parametrize('n', range(1, 20))
def test_every_challenger_but_the_last_goes_in_some_round(n):
  found = tournament.rounds(n, 0.5, 3)
  assert found[0][:2] == (n, 0.5) and found[-1][0] == 1
  for (n, epochs, seeds), after in itertools.pairwise(found):
    assert after[:2] == (n // 2, 2 * epochs) and seeds == 1
  assert found[-1][2] == 3


@pytest.mark.parametrize(
  ('gains', 'errors_', 'wins'),
  [
    ((0.1, 0.1, 0.1), 1.0, True),
    ((0.1, 0.2, 0.0), 1.0, True),  # Mean 0.1, error 0.058.
    ((0.1, 0.2, 0.0), 2.0, False),
    ((0.0, 0.0, 0.0), 0.0, False),  # Equal is not better.
    ((-0.1, -0.1, -0.1), 0.0, False),
    ((0.3, -0.2, 0.2), 1.0, False),  # Mean 0.1, error 0.153.
  ],
)
def test_the_incumbent_stays_unless_the_gain_is_clear(gains, errors_, wins):
  uniform = np.array([0.5, 0.6, 0.55])
  losses = {'uniform': uniform, 'tilt1': uniform - np.array(gains)}
  found = tournament.decide(losses, errors_)
  assert found['chosen'] == ('tilt1' if wins else 'uniform')
  assert found['gain'] == pytest.approx(np.mean(gains))
  assert found['error'] == pytest.approx(np.std(gains, ddof=1) / np.sqrt(3))


class Named(str):
  """The name of a candidate in place of its structure."""

  macs, counts = 1, ()


@pytest.fixture
def choose(tmp_path, monkeypatch):
  """Runs a tournament whose losses are given; (its file, its trainings).

  Losses are {candidate: f(epochs, seed number)}; trainings are (candidate,
  epochs, seed number).
  """

  def run(losses, **fields):
    made = []

    def training(job, structure, epochs, folder):
      seeds = [config.other_seed(0, i) for i in range(9)]
      made.append((str(structure), epochs, seeds.index(job.config.seed)))
      loss = losses[structure](*made[-1][1:])
      return {'name': str(made[-1]), 'loss': loss, 'seconds': 1.0}

    monkeypatch.setattr(tournament, '_training', training)
    names = tuple(name for name in losses if name != 'uniform')
    c = small(**{'tournament.candidates': names, **fields})
    return tournament.choose(stages.Job(c, tmp_path), tmp_path), made

  def scored(job, name, root):
    return products.Scored({'name': name})

  monkeypatch.setattr(tournament, 'scored', scored)
  monkeypatch.setattr(stages.Job, 'cut_plain', lambda job, s: Named(s['name']))
  monkeypatch.setattr(tournament, 'check', lambda job: None)
  return run


def test_the_choice_on_planted_losses(choose):
  """`slow` is worst in the first round, `steady` best where it counts."""
  losses = {
    'uniform': lambda epochs, seed: 1.0 - 0.01 * seed,
    'bad': lambda epochs, seed: 2.0,
    'slow': lambda epochs, seed: 3.0 if epochs < 2 else 0.1,
    'early': lambda epochs, seed: 0.5 if epochs < 2 else 2.0,
    'steady': lambda epochs, seed: 0.9 - 0.01 * seed + 0.001 * (seed % 2),
  }
  # The config's ranking names the files, and does no more.
  fields = {'tournament.seeds': 3, 'budget.ranking': 'layer_mean'}
  found, made = choose(losses, **fields)
  assert found['chosen'] == 'steady'
  assert found['gain'] == pytest.approx(0.1 - 0.001 * 2 / 3)
  assert set(made) == {
    *((name, 1, 1) for name in losses),
    *((name, 2, 1) for name in ('uniform', 'early', 'steady')),
    *((name, 4, seed) for name in ('uniform', 'steady') for seed in (1, 2, 3)),
  }
  assert 'steady beats uniform width' in found['sentence']
  assert 'keep0.5-layermean has the widths of steady.' in found['sentence']
  assert [r['epochs'] for r in found['rounds']] == [1, 2, 4]


def test_uniform_width_stays_where_nothing_is_better(choose):
  losses = dict.fromkeys(('uniform', 'same'), lambda epochs, seed: 1.0)
  losses['lucky'] = lambda epochs, seed: 1.0 + (-1) ** seed * 0.1
  found, _ = choose(losses)
  assert (found['chosen'], found['challenger']) == ('uniform', 'lucky')
  assert 'Uniform width stays' in found['sentence']
  assert 'chance' not in found['sentence']


def test_a_candidate_that_diverges_loses(choose, refused):
  losses = {
    'uniform': lambda epochs, seed: 1.0,
    'wild': lambda epochs, seed: tournament.DIVERGED,
    'good': lambda epochs, seed: 0.9 + 0.001 * seed,
  }
  found, _ = choose(losses)
  assert found['chosen'] == 'good'
  assert found['rows'][1][:2] == ['wild', 'diverged']
  losses['uniform'] = losses['wild']
  message = 'training of uniform width for 1 epochs diverged'
  refused(message, choose, losses, **{'train.learning_rate': 0.2})


def test_a_training_that_diverges_is_noted(tmp_path, monkeypatch):
  def fit(*args, **kwargs):
    raise errors.Diverged('loss is nan')

  monkeypatch.setattr(stages, 'fit', fit)
  job = stages.Job(small(), tmp_path)
  found = tournament._training(job, job.uniform(), 1.0, tmp_path)
  assert found['loss'] == tournament.DIVERGED


def test_a_workdir_keeps_to_one_tournament(tmp_path, monkeypatch, refused):
  def choose(job, folder):
    (folder / 'tournament' / 'x').touch()  # Else the claim is given back.
    raise Cut

  monkeypatch.setattr(tournament, 'choose', choose)
  with pytest.raises(Cut):
    tournament.run(small(), tmp_path)
  for field, value in (('seed', 1), ('budget.keep', (0.7,))):
    c = small(**{field: value})
    refused('tournament holds the work of', tournament.run, c, tmp_path)
  with pytest.raises(Cut):  # Other candidates may replace it.
    tournament.run(small(**{'tournament.candidates': ('tilt1',)}), tmp_path)


@pytest.mark.parametrize(('loss', 'warned'), [(2.2, True), (2.18, False)])
def test_losses_at_chance_are_told(choose, loss, warned):
  """Of ten classes: 0.95 ln 10 = 2.187."""
  names = ('uniform', 'tilt1')
  found, _ = choose(dict.fromkeys(names, lambda epochs, seed: loss))
  warning = 'Warning: the losses are at chance (2.303)'
  assert (warning in found['sentence']) == warned


# Trainings.


def without_times(found):
  """What must be the same in every run."""
  text = found['sentence'].partition(' It took')[0]
  left_out = ('seconds', 'share', 'sentence')
  return {**{k: v for k, v in found.items() if k not in left_out}, '': text}


FILES = ('tournament.json', 'structure.json')


class Cut(BaseException):
  """Ends a run as a signal would."""


@pytest.mark.slow
def test_what_was_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch):
  """Cut within the second training and within the last, then finished."""
  monkeypatch.setattr(products, 'forget_programs', lambda: None)  # For speed.
  c = small(**{'tournament.candidates': ('tilt2',)})
  tournament.run(c, tmp_path / 'whole')
  plain, steps = pipeline.ArraySource.chunk, []

  def chunk(source, step, k):
    steps.append(step)
    if len(steps) in (9, 23):  # Four trainings have 6 steps each.
      raise Cut
    return plain(source, step, k)

  monkeypatch.setattr(pipeline.ArraySource, 'chunk', chunk)
  for _ in range(2):
    with pytest.raises(Cut):
      tournament.run(c, tmp_path / 'cut')
  tournament.run(c, tmp_path / 'cut')
  (whole, first), (cut, second) = (
    [storage.read_json(tmp_path / name / file) for file in FILES]
    for name in ('whole', 'cut')
  )
  assert without_times(cut) == without_times(whole)
  assert whole['rounds'][0]['losses']['uniform'][0] > 0
  assert first['counts'] == second['counts']
  assert first['source']['tournament']['chosen'] == whole['chosen']
  counts = list(first['counts'].values())
  assert counts == whole['counts'][whole['chosen']]
  n = len(steps)
  tournament.run(c, tmp_path / 'cut')  # All is there: nothing is trained.
  assert len(steps) == n


def test_processes_share_the_candidates(tmp_path):
  """A training that another process is at is left to it."""
  made, folder = [], tmp_path / 'held'

  def task():
    products.make(folder / 'done', folder, lambda: made.append(1))

  with storage.locked(folder) as held:
    assert held
    with pytest.raises(products.Busy):
      tournament.all_of({'theirs': task, 'ours': lambda: made.append(2)})
    assert made == [2]  # What nobody is at was done all the same.
  tournament.all_of({'theirs': task})
  assert made == [2, 1]


# The probe.


def test_a_profile_keeps_half_of_uniform_width(tmp_path):
  job = stages.Job(small(), tmp_path)
  model = job.network.cost_model
  uniform = job.cut_plain(scores.equal(model)).counts
  counts = job.cut_plain(job.widened(scores.tilt(model.layers, 20.0))).counts
  assert counts[0] == -(-uniform[0] // 2) and counts[1] > uniform[1]


def probed(**fields):
  """The config of a probe of 2 steps."""
  small_probe = {'probe.epochs': 0.4, 'probe.draws': 2, 'probe.share': 1.0}
  return small(**small_probe | fields)


def test_a_probe_goes_on_and_its_profile_is_cut(tmp_path, monkeypatch, capsys):
  """Cut off before the second of two steps; then `--mode=prune` uses it."""
  c = probed(**{'probe.steps': 2, 'probe.damping': 0.5})
  job, plain, trained = stages.Job(c, tmp_path), stages.fit, []

  def fit(job, module, folder, *args, **kwargs):
    trained.append(folder.name)
    assert kwargs['hold_out']  # The probe measures on the images held out.
    if len(trained) == 2:
      raise Cut
    return plain(job, module, folder, *args, **kwargs)

  monkeypatch.setattr(stages.training, 'fit', fit)
  with pytest.raises(Cut):
    stages.probing.run(job)
  stages.probing.run(job)
  assert trained == ['step0-seed0', 'step1-seed0', 'step1-seed0']
  shown = capsys.readouterr().out
  path = job.workdir / 'probe.json'
  found = storage.read_json(path)
  assert found['sentence'] in shown and 'weight' in shown
  for seed in (c.seed, c.seed + 1):  # That of another config is not shown.
    stages.info(stages.Job(probed(**{'seed': seed}), tmp_path))
    assert (found['sentence'] in capsys.readouterr().out) == (seed == c.seed)
  layers = job.network.cost_model.layers
  assert tuple(found['layers']) == tuple(found['mean']) == layers
  assert np.shape(found['losses']) == (len(layers), 2)
  # The second step probes the widths that the first one gave.
  first, second = (
    storage.read_arrays(job.workdir / f'probe/step{i}-seed0/rises.npz')
    for i in range(2)
  )
  seconds = float(first['seconds'] + second['seconds'])
  assert found['seconds'] == pytest.approx(seconds, abs=1e-3)
  finding = probe.finding(layers, first['rises'][None])
  weights = scores.damped(finding.losses, 0.5)
  assert found['before'] == pytest.approx(weights)
  counts = job.cut_plain(job.widened(weights)).counts
  assert tuple(found['counts']) == counts
  # As a ranking: what the file says is cut.
  found['mean'] = dict(zip(layers, (1e-4, 1e4), strict=True))
  storage.write_json(path, found)
  c.budget.ranking = 'sensitivity'
  job = stages.Job(c, job.workdir)
  gates = scores.random(job.network.cost_model, 0)
  storage.write_arrays(job.workdir / 'search/gates.npz', gates)
  stages.cut(job)
  profile = job.widened(scores.probed(found), gates)
  uniform = scores.equal(job.network.cost_model)
  _, cut = stages.cutting.read(job)
  assert cut.counts == job.cut_plain(profile).counts
  assert cut.counts != job.cut_plain(uniform).counts


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('data.validation_examples', 0, 'must be >= 1 for a probe; got 0.'),
    ('probe.share', 0.01, 'must be >= 0.1, the cost .*; got 0.01.'),
    ('budget.keep', (0.0001,), 'cannot be met: the narrowest structure'),
  ],
)
def test_what_cannot_be_probed_is_refused(tmp_path, field, value, message):
  if 'must' in message:
    message = f'config.{field} {message}'
  with pytest.raises(errors.UserError, match=message):
    stages.MODES['probe'](stages.Job(probed(**{field: value}), tmp_path))


def test_the_widths_of_a_probe_are_those_of_its_budget_alone(tmp_path, refused):
  c = small(**{'budget.ranking': 'sensitivity', 'search.epochs': 0.0})
  message = 'probe.json does not exist: run --mode=probe in this'
  for stage in (stages.search, stages.cut):
    refused(message, stage, stages.Job(c, tmp_path))
  assert not (tmp_path / 'search').exists()  # Refused before it searches.

  def cut(*keep, mean):
    c.budget.keep, job = keep, stages.Job(c, tmp_path)
    found = {'before': dict.fromkeys(job.network.cost_model.layers, 1.0)}
    found |= {'mean': dict(zip(found['before'], mean, strict=True))}
    found |= {'damping': 1.0, 'sentence': ''}
    storage.write_json(tmp_path / 'probe.json', found)
    stages.cut(stages.Job(c, tmp_path))
    return stages.cutting.read(stages.Job(c, tmp_path))[1].counts

  c.train.structure = 'keep0.3-sensitivity'
  counts = cut(0.3, mean=(1e-4, 1e4))
  assert cut(0.9, 0.3, mean=(1e-4, 1e4)) == counts
  assert cut(0.3, mean=(1e4, 1e-4)) != counts  # A new probe is no edit.
  runs.claim(tmp_path / 'probe', config.identity(c))
  with pytest.raises(errors.UserError, match='probe holds .* config.seed'):
    stages.cut(stages.Job(c, tmp_path).reseeded(1))


def test_what_is_trained_is_not_cut_to_other_counts(tmp_path, refused):
  job = stages.Job(small(**{'budget.ranking': 'random'}), tmp_path)
  stages.cut(job)
  (tmp_path / 'result.json').write_text('{}')
  refused('train is gone; delete .*result', stages.train, job)
  before = [path.read_text() for path in sorted(tmp_path.glob('*.json'))]
  counts = {'structure.counts': list(stages.cutting.read(job)[1].counts)}
  runs.claim(tmp_path / 'train', config.identity(job.config) | counts)
  (tmp_path / 'train' / 'metrics.jsonl').touch()  # Else it is given back.
  with pytest.raises(errors.UserError, match='not trained yet in this workdir'):
    tournament.run(job.config, tmp_path)
  path = tmp_path / 'structure.json'
  found = prune.Structure.from_json(path.read_text())
  chosen = dataclasses.replace(found, source={'tournament': {}})
  path.write_text(chosen.to_json())
  for stage in (stages.cut, stages.search):
    refused('is the choice of a tournament', stage, job)
  path.write_text(found.to_json() + '\n')
  refused('train holds .* config.seed', stages.cut, job.reseeded(1))
  assert before == [p.read_text() for p in sorted(tmp_path.glob('*.json'))]


# Refusals.


KINDS = "must be searches, rankings, uniform or random, with #i .*; got '"
ARMS = ('filters', 'pretrained', 'searched+rewind', 'uniform+scratch_b')
SEEDS = ('first', '', '²', '9' * 5000)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    *(
      ('tournament.candidates', ('tilt1', name), f'{KINDS}{re.escape(name)}')
      for name in (*ARMS, *(f'searched#{seed}' for seed in SEEDS))
    ),
    ('tournament.candidates', ('widest',), "an arm .*tilt.X.*; got 'widest'"),
    ('tournament.candidates', ('uniform',), 'must name one besides uniform;'),
    ('budget.keep', (0.0001,), 'cannot be met: the narrowest structure'),
    ('budget.keep', (0.3, 0.5), 'config.budget must name exactly one budget'),
    ('data.validation_examples', 0, 'must be >= 1 for a tournament; got 0.'),
    ('tournament.epochs', 5.0, 'must be <= 4, so that the last round'),
    ('tournament.share', 0.25, 'must be >= 1.29, the cost of 4 candidates as'),
  ],
  ids=itertools.count(),
)
def test_what_is_refused(tmp_path, refused, field, value, message):
  if message.startswith('must'):
    message = f'config.{field} {message}'
  job = stages.Job(small(**{field: value}), tmp_path)
  refused(message, tournament.choose, job, tmp_path)


def configs():
  for path in sorted(pathlib.Path('configs').glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    for variant in module.VARIANTS:
      if variant != 'smoke':
        yield path.stem, module.get_config(variant)


@pytest.mark.parametrize(('name', 'c'), [*configs()])
def test_probes_and_tournaments_of_our_configs_may_begin(tmp_path, name, c):
  class Job(stages.Job):
    def _network(self):
      return models.network(
        self.config.model.name,
        *(10, 32, 3),
        base_width=self.config.model.base_width or None,
        width=self.config.model.width or None,
      )

  job = Job(c, tmp_path)
  size = c.data.train_examples or job.spec.train_examples
  held_out = c.data.validation_examples
  job.data = types.SimpleNamespace(
    chosen=lambda _, hold_out: range(size - held_out * hold_out),
    validation=lambda: types.SimpleNamespace(size=held_out),
  )
  stages.probe_cost(job)
  tournament.check(job)


def test_the_cost_by_hand(tmp_path):
  """4 candidates for 1 epoch, 2 for 2 epochs with 2 seeds, of 6 steps each.

  An epoch with the held-out images has 7 steps: (4 + 8) * 6 of 8 * 7 steps.
  """
  job = stages.Job(small(), tmp_path)
  assert tournament.cost(job) == pytest.approx(12 * 6 / (8 * 7))
  names = ('searched', 'layer_mean', 'searched#1')
  job = stages.Job(small(**{'tournament.candidates': names}), tmp_path)
  model, epochs = job.network.cost_model, job.config.search.epochs
  uniform = prune.cut(scores.equal(model), model, job.budgets[0])
  wide = model.macs(model.widths) / uniform.macs
  # Two searches: layer means share the gates of the first.
  searches = 2 * 2 / 3 * wide * epochs * 6
  assert tournament.cost(job) == pytest.approx((12 * 6 + searches) / (8 * 7))
