"""BatchNorm's statistics in short runs, with models as users write them."""

import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from pfs_jax import data, norms, runs, stages, train
from pfs_jax.data import pipeline


class Habit(nn.Module):
  """Flax's own default: BatchNorm without a momentum is one of 0.99."""

  num_classes: int = 10
  momentum: float = 0.99
  frozen: bool = False
  drop: bool = False  # Images, by a random stream of its own.

  @nn.compact
  def __call__(self, x, train=False):
    for features in (8, 16):
      x = nn.Conv(features, (3, 3), use_bias=False)(x)
      if train and self.drop:
        key = self.make_rng('path')
        x *= jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1))
      x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
      x = nn.relu(x)
    if self.frozen:
      x = nn.BatchNorm(use_running_average=True, name='frozen')(x)
    return nn.Dense(self.num_classes)(x.mean((1, 2)))


AUGMENTATION = pipeline.Augmentation((0.3,), (0.38,))


@pytest.fixture(scope='module')
def digits():
  found = data.load('digits')
  source = pipeline.ArraySource(
    found.train_images,
    found.train_labels,
    batch_size=100,
    key=jax.random.key(0),
    augmentation=AUGMENTATION,
  )
  test = pipeline.ArrayEvaluation(
    found.test_images,
    found.test_labels,
    batch_size=297,
    augmentation=AUGMENTATION,
  )
  return found, source, test


def _state(module):
  variables = module.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
  return train.init(module, variables, optax.adam(0.01))


def _trained(module, source, steps):
  state, call = _state(module), train.compiled_call(train.step, source.draw)
  for i in range(steps):
    state, metrics = call(state, source.resident, source.chunk(i, 1))
  return state, float(metrics['accuracy'][0])


def test_a_short_run_with_slow_statistics_is_worth_what_it_learnt(digits):
  _, source, test = digits
  state, accuracy = _trained(Habit(), source, 60)
  running = train.evaluate(Habit(), state.variables, test)['accuracy']
  settled = norms.estimated(state, source, 60)
  found = train.evaluate(Habit(), settled.variables, test)['accuracy']
  assert accuracy > 0.8
  assert running < accuracy - 0.2  # What users saw.
  assert found > accuracy - 0.1
  # Nothing but the statistics has changed.
  assert settled.params is state.params and settled.step is state.step


class Brighter:
  """Batches that differ much: the i-th has pixels of brightness i."""

  resident, steps_per_epoch = (), 4

  def chunk(self, step, k):
    return np.arange(step, step + k, dtype=np.float32)

  @staticmethod
  def draw(resident, item):
    return item * jnp.ones((2, 8, 8, 1)), jnp.zeros(2, int)


@pytest.mark.parametrize('name', ['digits', 'brighter'])
def test_estimates_are_the_statistics_of_all_images(name, digits):
  """Of one epoch; variances count the spread between batches, too."""
  found, source, _ = digits
  x = AUGMENTATION.test(jnp.asarray(found.train_images))
  if name == 'brighter':
    source = Brighter()
    x = jnp.concatenate([source.draw((), i)[0] for i in range(4)])
  settled = norms.estimated(_state(Habit()), source, 0)
  kernel = settled.params['Conv_0']['kernel']
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  stats = settled.batch_stats['BatchNorm_0']
  np.testing.assert_allclose(stats['mean'], y.mean((0, 1, 2)), atol=1e-4)
  np.testing.assert_allclose(stats['var'], y.var((0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize('momentum', [0.9, 0.999])
def test_no_layer_has_to_say_its_momentum(momentum, digits):
  _, source, _ = digits
  state = _state(Habit(momentum=momentum))
  found = norms.longest_momentum(state, source)
  assert abs(found - momentum) < 1e-5
  # The estimate does not depend on it.
  one = norms.estimated(state, source, 0).batch_stats['BatchNorm_1']
  other = norms.estimated(_state(Habit()), source, 0).batch_stats['BatchNorm_1']
  np.testing.assert_allclose(one['var'], other['var'], rtol=2e-3)


def test_frozen_statistics_stay(digits):
  _, source, _ = digits
  state = _state(Habit(frozen=True))
  assert abs(norms.longest_momentum(state, source) - 0.99) < 1e-5
  settled = norms.estimated(state, source, 0)
  np.testing.assert_array_equal(settled.batch_stats['frozen']['mean'], 0)
  np.testing.assert_array_equal(settled.batch_stats['frozen']['var'], 1)


class Normalised(nn.Module):
  """A BatchNorm after a frozen one, and a kernel normalised by its state."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = functools.partial(nn.BatchNorm, momentum=0.9)
    x = nn.SpectralNorm(nn.Conv(4, (3, 3)))(x, update_stats=train)
    x = norm(use_running_average=True, name='frozen')(x)
    x = norm(use_running_average=not train, name='free')(x)
    return nn.Dense(10)(x.mean((1, 2)))


def test_statistics_that_the_call_itself_uses_stay(digits):
  """They are no running averages, or are frozen at other values than 0, 1."""
  _, source, _ = digits
  state = _state(Normalised())
  stats = {
    **state.batch_stats,
    'frozen': {k: jnp.full(4, 2.0) for k in ('mean', 'var')},
  }
  state = state.replace(batch_stats=stats)
  assert norms.longest_momentum(state, source) == pytest.approx(0.9, abs=1e-4)
  settled = norms.estimated(state, source, 0).batch_stats
  for name in ('frozen', 'SpectralNorm_0'):
    assert jax.tree.all(
      jax.tree.map(np.array_equal, settled[name], stats[name])
    )
  # By hand, from the inputs of the free BatchNorm on whole batches.
  x = jnp.concatenate(
    [
      source.draw(
        source.resident, jax.tree.map(lambda v: v[0], source.chunk(i, 1))
      )[0]
      for i in range(source.steps_per_epoch)
    ]
  )
  _, found = state.module.apply(
    state.variables,
    x,
    train=True,
    mutable=['batch_stats', 'intermediates'],
    capture_intermediates=lambda module, _: module.name == 'frozen',
  )
  (y,) = found['intermediates']['frozen']['__call__']
  np.testing.assert_allclose(
    settled['free']['mean'], y.mean((0, 1, 2)), atol=1e-4
  )
  np.testing.assert_allclose(
    settled['free']['var'], y.var((0, 1, 2)), rtol=2e-3
  )


def test_a_model_without_batchnorm_has_no_memory(digits):
  _, source, _ = digits

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(10)(x.reshape(len(x), -1))

  assert norms.longest_momentum(_state(Plain()), source) == 0.0
  assert not norms.is_short(0.0, 1)


# From the command line's side.


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
  """A config with the user's model, and a workdir with its search."""
  from configs import digits

  c = digits.get_config()
  c.model.factory = 'tests.test_norms:Habit'
  c.search.epochs, c.train.epochs = 1.0, 2.0
  c.train.learning_rate = 0.2
  folder = tmp_path_factory.mktemp('searched')
  stages.search(stages.Job(c, folder))
  return c, folder


def _run(searched, tmp_path, **fields):
  c, folder = searched
  records = runs.read_metrics(folder / 'search')  # The selection reads these.
  assert any('validation_accuracy' in r for r in records if 'gates_mean' in r)
  c = ml_collections.ConfigDict(c.to_dict()).lock()
  c.train.update(fields)
  shutil.copytree(folder, tmp_path / 'run')
  job = stages.Job(c, tmp_path / 'run')
  stages.train(job)
  return job, runs.read_result(tmp_path / 'run' / 'result.json')


@pytest.mark.slow
def test_a_users_model_is_tested_as_it_was_trained(searched, tmp_path, capsys):
  job, result = _run(searched, tmp_path)
  record = runs.read_metrics(tmp_path / 'run/train')[-1]
  assert result['test_accuracy'] > record['accuracy'] - 0.15
  assert result['warnings'] == []
  capsys.readouterr()
  stages.evaluate(stages.Job(job.config, job.workdir))  # As it was saved.
  assert f'{result["test_accuracy"]:.2%}' in capsys.readouterr().out


def test_what_users_saw_is_warned_of(searched, tmp_path, capsys):
  _, result = _run(searched, tmp_path, statistics='running')
  (warning,) = result['warnings']
  assert 'config.train.statistics' in warning
  assert f'warning: {warning}' in capsys.readouterr().err


def test_built_in_models_keep_their_running_statistics(digits):
  _, source, _ = digits
  state = _state(Habit())
  for mode, own, changes in (
    ('auto', False, False),
    ('auto', True, True),
    ('running', True, False),
    ('estimated', False, True),
  ):
    refreshed = norms.refresher(mode, own, state, source)
    assert (refreshed(state, 60) is not state) == changes
  long = norms.refresher('auto', True, state, source)
  assert long(state, 1000) is state


def test_models_that_draw_from_a_stream_of_their_own(digits):
  _, source, _ = digits
  states = [_state(Habit(drop=drop)) for drop in (True, False)]
  assert norms.longest_momentum(states[0], source) == pytest.approx(0.99)
  half, whole = (
    norms.estimated(state, source, 0).batch_stats['BatchNorm_0']['mean']
    for state in states
  )
  np.testing.assert_allclose(half, whole / 2, rtol=0.2)
