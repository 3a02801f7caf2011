"""The search: frozen weights, regulariser, selection, what learns nothing."""

import math
import types

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pfs_jax import config, errors, models, runs, search, stages, surgery, train
from pfs_jax.stages import searching
from tests import own_models, small_run, test_nnx


def state_of(name='resnet8', width=4, gates=None, **settings):
  defaults = {'sparsity': 0.5, 'balance': 0.5, 'learning_rate': 0.01}
  module = models.build(name, 10, width, gated=True)
  variables = models.init(module, jax.random.key(0), (8, 8, 3))
  if gates is not None:
    variables = {**variables, 'gates': gates}
  return search.init(module, variables, **defaults | settings)


def batch(n=16, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 8, 8, 3)).astype(np.float32)
  return x, rng.integers(0, 10, n).astype(np.int32)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_weights_are_bit_identical_after_a_search():
  state = state_of()
  # -0.0 is the weight that an added zero would change.
  params = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(-0.0), state.params)
  state = state.replace(params=params)
  before, gates = bits(params), bits(state.gates)
  stats = bits(state.batch_stats)
  for seed in range(5):
    state, _ = search.step(state, *batch(seed=seed))
  assert bits(state.params) == before
  assert bits(state.gates) != gates
  assert bits(state.batch_stats) != stats
  assert int(state.step) == 5
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
  assert own_models.size(moments) == 2 * own_models.size(state.gates)


def test_optimizer_freezes_weights_by_mask():
  """Both masks: masked Adam alone would pass the weights' gradients through."""
  tree = {'params': {'w': jnp.ones(3)}, 'gates': {'g': jnp.ones(2)}}
  tx = search.optimizer(0.01)
  updates, _ = tx.update(tree, tx.init(tree), tree)
  np.testing.assert_array_equal(updates['params']['w'], 0.0)
  np.testing.assert_allclose(updates['gates']['g'], -0.01, rtol=1e-5)


def test_of_the_weights_only_the_classifier_is_trained():
  state = state_of(classifier='classifier')
  after, _ = search.step(state, *batch())
  equal = jax.tree.map(np.array_equal, state.params, after.params)
  equal = flax.traverse_util.flatten_dict(equal, sep='/')
  moved = {path for path, same in equal.items() if not same}
  assert moved == {'classifier/kernel', 'classifier/bias'}
  # Adam's first step is its rate times the sign of the gradient.
  gradient = jax.jit(jax.grad(search.loss, has_aux=True))
  trained = {'params': state.params, 'gates': state.gates}
  slope = gradient(trained, state, *batch())[0]['params']['classifier']['bias']
  move = after.params['classifier']['bias'] - state.params['classifier']['bias']
  np.testing.assert_allclose(move, -0.01 * np.sign(slope), rtol=1e-3)


def test_no_gradient_of_a_weight_is_computed():
  """FLOPs of the compiled search step <= 0.70 of the full training step's."""
  search_state = state_of('resnet8', 8)
  x, y = batch(32)
  module = models.build('resnet8', 10, 8)
  optimizer = optax.sgd(0.1, momentum=0.9)
  train_state = train.init(module, search_state.variables, optimizer)

  def flops(step, state):
    return step.lower(state, x, y).compile().cost_analysis()['flops']

  ratio = flops(search.step, search_state) / flops(train.step, train_state)
  assert 0.3 < ratio <= 0.70, ratio


class Headless(nn.Module):
  """Its last layer is a convolution."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))
    return nn.Conv(3, (1, 1))(nn.relu(x)).mean((1, 2))


def test_the_last_dense_layer_is_found(refused):
  def classifier(model):
    c, x = config.default(), batch()[0]
    c.search.train_classifier = True
    job = types.SimpleNamespace(config=c, network=surgery.network(model, x))
    path = stages.searching.classifier(job)
    variables = job.network.gated.init(jax.random.key(0), x)
    settings = {'sparsity': 0.5, 'balance': 0.5, 'learning_rate': 0.01}
    search.init(job.network.gated, variables, classifier=path, **settings)
    return path

  assert classifier(own_models.MnistCnn()) == 'Dense_1'
  assert classifier(test_nnx.Residual(rngs=nnx.Rngs(0))) == 'Dense_0'
  refused('without a dense layer', classifier, Headless())
  refused("'head'. The last ones: .*conv2/", state_of, classifier='head')


def test_the_second_step_does_not_compile_again():
  state = state_of(width=3)
  compiled = search.step._cache_size()
  for seed in range(3):
    state, _ = search.step(state, *batch(seed=seed))
  assert search.step._cache_size() == compiled + 1
  # Another r and lambda are arguments, the same module and rate are equal.
  other = state_of(width=3, sparsity=0.2, balance=0.1)
  search.step(other, *batch())
  assert search.step._cache_size() == compiled + 1


def test_metrics_are_those_of_the_gates_before_the_step():
  rng = np.random.default_rng(0)
  ones = models.build('resnet8', 10, 4, gated=True).unit_gates()
  gates = jax.tree.map(
    lambda g: jnp.asarray(np.round(rng.random(g.shape), 1), jnp.float32), ones
  )
  state = state_of(gates=gates, sparsity=0.3, balance=0.7)
  _, metrics = search.step(state, *batch())
  values = np.concatenate([np.ravel(g) for g in jax.tree.leaves(gates)])
  m = np.abs(values).mean()
  assert (values == 0).any()
  assert metrics['mean_gate'] == pytest.approx(m, rel=1e-6)
  assert metrics['density'] == pytest.approx((values != 0).mean(), rel=1e-6)
  assert metrics['reg'] == pytest.approx(0.7 * (m - 0.3) ** 2, rel=1e-5)


@pytest.mark.parametrize('sparsity', [0.0, 1.0])
def test_gates_are_clipped_and_zero_absorbs(sparsity):
  """Also where the regulariser pulls the mean up: sign(0) is 0."""
  ones = models.build('resnet8', 10, 4, gated=True).unit_gates()
  gates = jax.tree.map(lambda g: g.at[0].set(0.0).at[1].set(0.004), ones)
  state = state_of(gates=gates, sparsity=sparsity, balance=100.0)
  for seed in range(3):
    state, _ = search.step(state, *batch(seed=seed))
    for g in jax.tree.leaves(state.gates):
      assert g[0] == 0.0  # Never returns.
      assert 0.0 <= g.min() and g.max() <= 1.0
  small = [g[1] for g in jax.tree.leaves(state.gates)]
  assert all(g == 0.0 if sparsity == 0.0 else g > 0.004 for g in small)


@pytest.mark.parametrize(
  'densities,accuracies,expected',
  [
    ([1.0, 0.5, 0.4], [0.9, 0.2, 0.3], 30),  # The dense best is no candidate.
    ([0.5, 0.4, 0.3], [0.2, 0.3, 0.3], 20),  # The earliest among equals.
    ([1.0, 0.9, 0.6], [0.1, 0.2, 0.3], None),  # None is sparse enough: last.
  ],
)
def test_selection_rule(densities, accuracies, expected):
  records = [
    {'step': 10 * (i + 1), 'gates_density': d, 'validation_accuracy': a}
    for i, (d, a) in enumerate(zip(densities, accuracies, strict=True))
  ]
  records.insert(1, {'step': 15, 'ce': 2.0})
  assert search.select(records, 0.5) == expected
  # Without validation it is the last.
  assert search.select([{'step': 1, 'gates_density': 0.1}], 0.5) is None


# Searches that learn nothing.

MIXED = {'a': np.array([0.0, 0.3]), 'b': np.array([1.0])}


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_gates_that_are_all_at_one_end_are_refused(value, refused):
  gates = {k: np.full_like(g, value) for k, g in MIXED.items()}
  refused(f'all 3 gates are {value:g}', searching.check, gates, steps=1)
  searching.check(gates, steps=0)  # No step leaves them at 1.
  for others in (MIXED, {'a': np.full(3, 0.5)}):
    searching.check(others, steps=1)


@pytest.mark.parametrize(
  'changes, warning, left_chance',
  [
    ({}, '', True),
    ({'gates': {'a': np.full(3, 0.5)}}, 'All gates are 0.5', True),
    ({'gates': {'a': np.array([0, 1, 1.0])}}, 'exactly 0 or 1', True),
    (
      {'gates': {'a': np.full(3, 0.5), 'b': np.ones(2)}},
      'gates of a, so',
      True,
    ),
    ({'regulariser': 92 / 4}, '', True),  # 23 < 10 ln 10 = 23.03.
    ({'regulariser': 93 / 4}, 'starts at 23.2, more than 10 times', True),
    ({'regulariser': 93.0, 'losses': ()}, '', False),  # Nothing was searched.
    ({'losses': (2.38, 2.31)}, '', False),
    ({'losses': (2.3, 2.19)}, '', False),  # 0.95 ln 10 = 2.187.
    ({'losses': (2.3, 2.18, 2.4)}, '', True),
  ],
)
def test_the_summary_of_a_search(changes, warning, left_chance):
  given = {'losses': (2.2, 1.9), 'gates': MIXED, 'regulariser': 0.125} | changes
  found = searching.summarise(chance=math.log(10), **given)
  assert len(found['warnings']) == bool(warning)
  assert warning in ''.join(found['warnings'])
  assert found['lowest_ce'] == min(given['losses'], default=None)
  assert found['left_chance'] is left_chance


def test_a_search_that_ranks_nothing_says_so(tmp_path, monkeypatch, capsys):
  """Gates that all stay at 1 are refused; all at 0.5 are warned of."""

  def searched(value):
    def loop(state, *_, folder, **__):
      log = runs.MetricsLog(folder, 0)
      log.write(1, ce=2.0)
      log.close()
      return state.replace(gates=jax.tree.map(lambda g: value * g, state.gates))

    monkeypatch.setattr(searching.train, 'loop', loop)
    stages.execute('search', stages.Job(small_run.config(), tmp_path))
    return ' '.join(capsys.readouterr().out.split())

  with pytest.raises(errors.UserError, match='gates are 1'):
    searched(1.0)
  assert not (tmp_path / 'search' / 'gates.npz').exists()
  assert 'warning: All gates are 0.5' in searched(0.5)
