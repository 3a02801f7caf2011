"""Schedule, optimiser, step, evaluation and loop, against plain NumPy."""

import functools
import os
import shutil
import signal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import special

from pfs_jax import checkpointing, config, devices, errors, models, runs, train
from pfs_jax.data import pipeline
from pfs_jax.stages import training
from tests import own_models, processes, small_run


class Tiny(nn.Module):
  """Convolution, BatchNorm, linear layer: 8x8x1 -> 3 classes."""

  features: int = 4

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(self.features, (3, 3), use_bias=False, name='conv')(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
    return nn.Dense(3, name='linear')(nn.relu(x).mean((1, 2)))


def make_recipe(**fields):
  recipe = ml_collections.ConfigDict(config.default().train)
  recipe.update({'batch_size': 8, **fields})
  return recipe


def make_examples(n=40, seed=0):
  """Images whose brightness tells the class, so that they can be learnt."""
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  images = rng.integers(0, 60, (n, 8, 8, 1)) + 90 * labels[:, None, None, None]
  return images.astype(np.uint8), labels


AUGMENTATION = pipeline.Augmentation((0.5,), (0.25,), padding=1, flip=True)


def make_source(batch_size=8):
  return pipeline.ArraySource(
    *make_examples(),
    batch_size=batch_size,
    key=jax.random.key(5),
    augmentation=AUGMENTATION,
  )


def make_state(module=None, recipe=None, total_steps=10, smoothing=0.0):
  module = module or Tiny()
  variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  optimizer = train.optimizer(recipe or make_recipe(), total_steps)
  return train.init(module, variables, optimizer, smoothing)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(8, 8, 8, 1)).astype(np.float32)
  return x, rng.integers(0, 3, 8).astype(np.int32)


def rates(total_steps, **fields):
  schedule = train.schedule(make_recipe(**fields), total_steps)
  return np.array([float(schedule(i)) for i in range(total_steps + 1)])


@pytest.mark.parametrize(
  'total, fields, expected',
  [
    (
      100,
      {'learning_rate': 0.1, 'decay_at': (0.5, 0.75)},
      [0.1] * 50 + [0.01] * 25 + [0.001] * 26,  # At the boundary step.
    ),
    (  # Equal boundaries multiply.
      10,
      {'learning_rate': 1.0, 'decay_at': (0.5, 0.52), 'decay_factor': 0.5},
      [1.0] * 5 + [0.25] * 6,
    ),
    (10, {'decay_at': ()}, [0.1] * 11),
    (4, {'scale_rate': True, 'batch_size': 64, 'decay_at': ()}, [0.025] * 5),
    (4, {'scale_rate': False, 'batch_size': 64, 'decay_at': ()}, [0.1] * 5),
  ],
)
def test_step_schedule(total, fields, expected):
  np.testing.assert_allclose(rates(total, **fields), expected, rtol=1e-6)


def test_cosine_is_the_formula_and_ends_at_zero():
  found = rates(40, schedule='cosine', learning_rate=0.2)
  expected = 0.1 * (1 + np.cos(np.pi * np.arange(41) / 40))
  np.testing.assert_allclose(found, expected, atol=1e-7)
  assert found[-1] == 0 and found[-2] > 0


@pytest.mark.parametrize('schedule', ['step', 'cosine'])
def test_warm_up_rises_linearly_to_the_rate(schedule):
  fields = {'schedule': schedule, 'learning_rate': 0.4}
  found = rates(50, warmup_share=0.2, **fields)
  np.testing.assert_allclose(np.diff(found[:11], 2), 0, atol=1e-7)
  np.testing.assert_allclose(found[[0, 10]], [0.04, 0.4], rtol=1e-6)
  assert found.argmax() == 10 and found[0] > 0


def test_warm_up_moves_no_boundary():
  found = rates(100, warmup_share=0.1, decay_at=(0.5,), learning_rate=1.0)
  np.testing.assert_allclose(found[[10, 49, 50]], [1.0, 1.0, 0.1], rtol=1e-6)
  found = rates(50, warmup_share=0.2, schedule='cosine')
  assert found[-1] == 0 and found[-2] > 0


@pytest.mark.parametrize(
  'name, blocks', [('mobilenet_v1', 13), ('mobilenet_v2', 17)]
)
def test_dense_decay_goes_by_kind_not_by_shape(name, blocks):
  """With one channel in each layer, dense and depthwise kernels look alike."""
  module = models.build(name, 10, counts=(1,) * len(models.gate_sizes(name)))
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  assert all(jax.tree.leaves(train.decay_mask('all')(params)))
  mask = train.decay_mask('dense')(params)
  flat = flax.traverse_util.flatten_dict(mask, sep='/')
  for path, decays in flat.items():
    assert decays == ('kernel' in path and 'depthwise' not in path), path
  # Every block has one depthwise convolution.
  kernels = [p for p in flat if p.endswith('kernel')]
  assert sum(not flat[p] for p in kernels) == blocks


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('decay_rule', ['all', 'dense'])
def test_the_optimiser_is_that_of_pytorch(nesterov, decay_rule):
  # torch.optim.SGD: g += decay * p; buffer = momentum * buffer + g, at first g;
  # with Nesterov g += momentum * buffer, else g = buffer; p -= rate * g.
  recipe = make_recipe(
    learning_rate=0.5,
    momentum=0.8,
    weight_decay=0.1,
    nesterov=nesterov,
    decay_rule=decay_rule,
    decay_at=(0.5,),
  )
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  optimizer = train.optimizer(recipe, 4)
  ours = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
  state = optimizer.init(ours)
  buffers = {}
  for step in range(4):
    grads = {k: rng.normal(size=v.shape) for k, v in params.items()}
    rate = 0.5 if step < 2 else 0.05
    for name, g in grads.items():
      if decay_rule == 'all' or name == 'kernel':
        g = g + 0.1 * params[name]
      buffers[name] = 0.8 * buffers[name] + g if step else g
      moved = g + 0.8 * buffers[name] if nesterov else buffers[name]
      params[name] = params[name] - rate * moved
    given = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), grads)
    updates, state = optimizer.update(given, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    for name in params:
      np.testing.assert_allclose(ours[name], params[name], atol=2e-6)


def test_equal_recipes_share_an_optimiser():
  optimizer = train.optimizer(make_recipe(), 10)
  assert train.optimizer(make_recipe(), 10) is optimizer
  assert train.optimizer(make_recipe(structure='x'), 10) is optimizer
  assert train.optimizer(make_recipe(), 11) is not optimizer
  others = {
    **{'batch_size': 16, 'learning_rate': 0.2, 'scale_rate': True},
    **{'momentum': 0.5, 'nesterov': True, 'weight_decay': 0.5},
    **{'decay_rule': 'dense', 'schedule': 'cosine', 'decay_at': (0.1,)},
    **{'decay_factor': 0.5, 'warmup_share': 0.5},
  }
  for field, value in others.items():
    other = train.optimizer(make_recipe(**{field: value}), 10)
    assert other is not optimizer, field


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_metrics_are_those_before_the_step(smoothing):
  state = make_state(smoothing=smoothing)
  x, y = make_batch()
  logits, updates = state.module.apply(
    state.variables, x, train=True, mutable=['batch_stats']
  )
  logp = special.log_softmax(np.float64(logits), axis=-1)
  own = -logp[np.arange(8), y]
  # Szegedy et al.: (1 - s) of the label, s spread evenly over all classes.
  expected = ((1 - smoothing) * own + smoothing * -logp.mean(-1)).mean()
  after, metrics = train.step(state, x, y)
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  for name, value in updates['batch_stats']['bn'].items():
    found = after.batch_stats['bn'][name]
    np.testing.assert_allclose(found, value, atol=1e-6)
  hits = (np.asarray(logits).argmax(-1) == y).mean()
  assert float(metrics['accuracy']) == pytest.approx(hits)
  assert int(after.step) == 1 and int(state.step) == 0
  _, again = train.step(after, x, y)
  assert float(again['loss']) < float(metrics['loss'])


def test_the_step_is_gradient_descent_on_the_loss():
  """Of plain SGD with the rate 1 the move is the gradient."""
  recipe = make_recipe(momentum=0.0, weight_decay=0.0, learning_rate=1.0)
  state, (x, y) = make_state(recipe=recipe), make_batch()

  @jax.jit
  @jax.grad
  def gradient(params):
    variables = {**state.variables, 'params': params}
    logits, _ = state.module.apply(variables, x, True, mutable=['batch_stats'])
    own = jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - own).mean()

  after, _ = train.step(state, x, y)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    jax.tree.map(jnp.subtract, state.params, after.params),
    gradient(state.params),
  )


class Dropping(nn.Module):
  """Dropout on the pixels, as logits."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(3, name='linear')(x)


def test_each_step_draws_its_own_dropout():
  state, x = make_state(Dropping()), jnp.ones((2, 8, 8, 1))
  later = state.replace(step=state.step + 1)
  first, again, other = (
    train.logits(s, {'params': state.params}, x)[0]
    for s in (state, state, later)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).all()


def test_the_second_step_does_not_compile_again():
  # A module of its own, since other tests compiled for Tiny().
  def fresh():
    return make_state(Tiny(features=5))

  before = train.step._cache_size()
  state, _ = train.step(fresh(), *make_batch())
  assert train.step._cache_size() == before + 1
  state, _ = train.step(state, *make_batch(1))
  train.step(state, *make_batch(2))
  train.step(fresh(), *make_batch())  # Another run of the same study.
  assert train.step._cache_size() == before + 1


def make_evaluation(n, batch_size):
  return pipeline.ArrayEvaluation(
    *make_examples(n), batch_size=batch_size, augmentation=AUGMENTATION
  )


def expected_evaluation(state, n):
  images, labels = make_examples(n)
  x = (images / 255.0 - 0.5) / 0.25
  logits = state.module.apply(state.variables, jnp.asarray(x, jnp.float32))
  ce = -special.log_softmax(np.float64(logits), axis=-1)[np.arange(n), labels]
  return ce.mean(), (np.asarray(logits).argmax(-1) == labels).mean()


def trained_state():
  """Not a fresh one: its running statistics are those of data."""
  state = make_state()
  for seed in range(3):
    state, _ = train.step(state, *make_batch(seed))
  return state


def test_the_exam_counts_as_the_evaluation_does_and_keeps_mistakes():
  """A network that says 1 of everything; 6 of 16 images are padding."""
  state, test = trained_state(), make_evaluation(10, 8)
  variables = jax.tree.map(jnp.zeros_like, state.variables)
  variables['params']['linear']['bias'] = jnp.asarray([0.0, 1.0, 0.0])
  exam = training.examine(state.module, variables, test)
  expected = train.evaluate(state.module, variables, test)
  assert (exam.loss, exam.accuracy) == (expected['loss'], expected['accuracy'])
  assert (exam.images, exam.batch) == (10, 8) and exam.milliseconds > 0
  images, labels = make_examples(10)
  wrong = labels != 1
  np.testing.assert_array_equal(exam.mistakes['images'], images[wrong])
  np.testing.assert_array_equal(exam.mistakes['labels'], labels[wrong])
  assert set(exam.mistakes['predicted']) == {1}


@pytest.mark.parametrize('n, batch_size', [(23, 8), (5, 8)])
def test_evaluation_counts_every_image_once(n, batch_size):
  state = trained_state()
  loss, accuracy = expected_evaluation(state, n)
  batches = make_evaluation(n, batch_size)
  found = train.evaluate(state.module, state.variables, batches)
  assert set(found) == {'loss', 'accuracy'}
  assert found['loss'] == pytest.approx(loss, rel=1e-5)
  assert found['accuracy'] == pytest.approx(accuracy, abs=1e-9)
  assert 0 < accuracy < 1  # Neither would notice a lost image.


def test_padding_hides_what_a_model_makes_of_it():
  """A model that divides by the range of an image gives NaN for zeros."""

  class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(3)(
        (x / jnp.ptp(x, axis=(1, 2))[:, None, None]).mean((1, 2))
      )

  module = Scaled()
  variables = module.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
  losses = [
    train.evaluate(module, variables, make_evaluation(10, size))['loss']
    for size in (10, 8)
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_of_logits_of_16_bits_are_of_32():
  class Low(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(3, dtype=jnp.bfloat16)(x.mean((1, 2)))

  state = make_state(Low())
  x, y = make_batch(0)
  found, _ = train.logits(state, {'params': state.params}, x)
  _, metrics = train.step(state, x, y)
  assert found.dtype == metrics['loss'].dtype == jnp.float32


@pytest.mark.parametrize('seed', range(5))
def test_the_next_stop_is_the_first_step_with_something_to_do(seed):
  rng = np.random.default_rng(seed)
  log, evaluate, checkpoint = (int(v) for v in rng.integers(1, 30, 3))
  total, k = int(rng.integers(1, 120)), int(rng.integers(1, 20))
  plan = train.Plan(total, log, evaluate, checkpoint, k)
  step = 0
  while step < total:
    expected = next(
      s
      for s in range(step + 1, total + 1)
      if not all((s % log, s % evaluate, s % checkpoint))
      or s in (step + k, total)
    )
    assert plan.next_stop(step) == expected
    step = expected
  assert step == total


# The loop. Its step counts, so that every number can be foretold.


@jax.jit
def counting_step(state, x, y):
  """Metric: the number of this step, from 1."""
  n = state['step'] + 1
  total = state['sum'] + x.mean() + y.mean()
  return {'step': n, 'sum': total}, {'n': n.astype(jnp.float32)}


@jax.jit
def failing_step(state, x, y):
  """As `counting_step`, not finite from step 6."""
  state, metrics = counting_step(state, x, y)
  n = metrics['n']
  return state, {'n': jnp.where(n < 6, n, jnp.nan)}


def counting_state():
  return {'step': jnp.zeros((), jnp.int32), 'sum': jnp.zeros(())}


def count(folder, plan, step_fn=counting_step, evaluate=None):
  return train.loop(
    counting_state(),
    step_fn,
    make_source(),
    plan,
    folder=folder,
    label='test',
    evaluate=evaluate,
  )


def latest(folder):
  with checkpointing.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(devices.replicate(counting_state()))
    return found and found[:2]


@pytest.mark.parametrize('steps_per_call', [1, 2])
def test_records_evaluations_and_checkpoints_come_when_due(
  tmp_path, steps_per_call
):
  seen = []

  def evaluate(state, step):
    assert int(state['step']) == step
    seen.append(step)
    return {'evaluated': float(step)}

  every = {'log_steps': 4, 'evaluate_steps': 3, 'checkpoint_steps': 7}
  plan = train.Plan(10, **every, steps_per_call=steps_per_call)
  state = count(tmp_path, plan, evaluate=evaluate)
  assert int(state['step']) == 10
  assert seen == [3, 6, 9, 10]
  records = {
    r['step']: (r.get('n'), r.get('evaluated'))
    for r in runs.read_metrics(tmp_path)
  }
  # Means of 1..4, 5..8 and 9..10.
  assert records == {
    3: (None, 3),
    4: (2.5, None),
    6: (None, 6),
    8: (6.5, None),
    9: (None, 9),
    10: (9.5, 10),
  }
  kept = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert kept == [7, 10]
  assert int(latest(tmp_path)[1]['step']) == 10
  seconds = [r['seconds'] for r in runs.read_metrics(tmp_path)]
  assert seconds == sorted(seconds)  # They never fall.


def test_the_loop_takes_only_reductions_from_the_library_for_cpus():
  """Its products and convolutions are slow; XLA's defaults take them too."""
  source, state = make_source(), devices.replicate(make_state(Tiny(16)))
  call = train.compiled_call(train.step, source.draw)

  def taken(function, operation):
    """How many fused computations hold the operation."""
    lowered = function.lower(state, source.resident, source.chunk(0, 1))
    parts = lowered.compile().as_text().split('\n\n')
    fused = [p for p in parts if 'fused_computation' in p.partition('{')[0]]
    return sum(f' {operation}(' in part for part in fused)

  default = jax.jit(call.__wrapped__)
  assert taken(call, 'dot') == 0 < taken(default, 'dot')
  assert 0 < taken(call, 'reduce')


def test_a_call_takes_over_the_buffers_of_its_state_alone():
  """Those of the caller, which `replicate` may share, stay what they are."""
  own, source = make_state(), make_source()
  before = jax.tree.map(np.array, own)
  state = devices.replicate(own)
  call = train.compiled_call(train.step, source.draw)
  for step in range(3):
    given = state
    state, _ = call(given, source.resident, source.chunk(step, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  own_models.assert_same(own, before)


def test_a_finished_loop_makes_no_step_and_compiles_nothing(tmp_path):
  @jax.jit
  def own_step(state, x, y):
    return counting_step(state, x, y)

  plan = train.Plan(7, 3, 3, 3)
  first = count(tmp_path, plan, own_step)
  before = runs.read_metrics(tmp_path)

  def evaluate(state, step):
    raise AssertionError

  second = count(tmp_path, plan, own_step, evaluate)
  assert float(first['sum']) == float(second['sum'])
  assert runs.read_metrics(tmp_path) == before
  count(tmp_path / 'another', plan, own_step)
  call = train.compiled_call(own_step, make_source().draw)
  assert call._cache_size() == 1


@pytest.mark.parametrize(
  'log_steps, checkpoint_steps, found, saved',
  [(4, 5, 8, 5), (10, 5, 10, 5), (1, 5, 6, 5), (20, 1, 6, 5), (20, 7, 7, 0)],
)
def test_what_is_not_finite_is_refused_and_not_saved(
  tmp_path, log_steps, checkpoint_steps, found, saved, refused
):
  plan = train.Plan(20, log_steps, 20, checkpoint_steps)
  match = rf'^test: n is nan at step {found};'
  refused(match, count, tmp_path, plan, failing_step)
  step, state = latest(tmp_path) or (0, counting_state())
  assert step == int(state['step']) == saved
  assert all(np.isfinite(r['n']) for r in runs.read_metrics(tmp_path))


def test_a_test_loss_that_is_not_finite_leaves_no_result(finished, monkeypatch):
  shutil.rmtree(finished / 'train')
  (finished / 'result.json').unlink()
  exam = training.Exam(0.1, np.nan, 297, 297, 1.0, {})
  monkeypatch.setattr(training, 'examine', lambda *_: exam)
  monkeypatch.setattr(training, 'fit', lambda *_: make_state())
  with pytest.raises(errors.UserError, match='on the test images is nan'):
    training.run(training.Job(small_run.config(), finished))
  assert not (finished / 'result.json').exists()


def test_the_reference_is_trained_as_the_inherited_network(
  finished, monkeypatch
):
  fields = {'train.init': 'inherit', 'train.wide_epochs': 3.0}
  c = small_run.config(**fields, train__reference=True)
  c.train.wide_learning_rate = 0.3
  job, given = training.Job(c, finished), []

  def fit(job, module, folder, label, epochs):
    given.append((label, epochs, job.config.train.learning_rate))
    raise KeyboardInterrupt

  monkeypatch.setattr(training, 'fit', fit)
  with pytest.raises(KeyboardInterrupt):
    training._add_reference(job, finished / 'result.json')
  assert given == [('reference', 3.0, 0.3)]


def test_an_evaluation_that_is_not_finite_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='test: loss is inf at step 3;'):
    count(
      tmp_path, train.Plan(6, 2, 3, 2), evaluate=lambda *_: {'loss': np.inf}
    )
  assert latest(tmp_path)[0] == 2


def fit(folder, evaluate=None):
  """A training whose plan has none of its steps in common."""
  return train.loop(
    make_state(total_steps=9),
    train.step,
    make_source(),
    train.Plan(9, log_steps=4, evaluate_steps=3, checkpoint_steps=5),
    folder=folder,
    label='train',
    evaluate=evaluate,
  )


def untimed(folder):
  """The metrics without the times."""
  records = runs.read_metrics(folder)
  return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


# How a training ends in its evaluation of a step, and its last checkpoint then.
ENDS = [
  (3, signal.SIGTERM, 3),
  (6, signal.SIGINT, 6),
  (9, ZeroDivisionError, 6),  # A crash after the record of step 8.
  (9, signal.SIGTERM, 9),  # Stops what comes after.
]


def test_a_loop_that_ended_goes_on_as_if_nothing_had_been(tmp_path):
  whole = fit(tmp_path / 'whole')
  numbers = signal.SIGTERM, signal.SIGINT
  handlers = [signal.getsignal(number) for number in numbers]
  folder = tmp_path / 'cut'

  def end(at, how):
    def evaluate(state, step):
      if step == at and how is ZeroDivisionError:
        raise how
      if step == at:
        os.kill(os.getpid(), how)
      return {}

    return evaluate

  for at, how, saved in ENDS:
    with pytest.raises((errors.Interrupted, ZeroDivisionError)) as e:
      fit(folder, end(at, how))
    if how is not ZeroDivisionError:
      assert e.value.signal == how and f'at train step {at};' in str(e.value)
    assert max(int(p.name) for p in (folder / 'checkpoints').iterdir()) == saved
  continued = fit(folder)  # Nothing is left to do.
  assert int(continued.step) == 9
  own_models.assert_same(whole, continued)
  assert untimed(folder) == untimed(tmp_path / 'whole')
  assert [r['step'] for r in untimed(folder)] == [4, 8, 9]
  assert [signal.getsignal(number) for number in numbers] == handlers


def sums(folder):
  """Numbers that depend on every parameter, and the evaluation."""
  state = fit(folder)
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding.is_equivalent_to(devices.replicated(), leaf.ndim)
  if jax.device_count() > 1:  # In a process of its own.
    call = train.compiled_call(train.step, make_source().draw)
    assert call._cache_size() == 1
  state = jax.device_get(state)
  found = train.evaluate(state.module, state.variables, make_evaluation(23, 8))
  leaves = jax.tree.leaves(state.variables)
  return [float(np.abs(v).sum()) for v in leaves] + list(found.values())


def test_eight_devices_evaluate_and_train_as_one_does(tmp_path):
  shown = processes.output(
    f"""
    import pathlib
    from tests import test_pipeline, test_train
    test_pipeline.check_on_eight_devices()
    print(*test_train.sums(pathlib.Path({str(tmp_path / 'eight')!r})))
    """,
    devices=8,
  )
  eight = [float(v) for v in shown.splitlines()[-1].split()]  # After progress.
  np.testing.assert_allclose(eight, sums(tmp_path / 'one'), rtol=1e-4)
