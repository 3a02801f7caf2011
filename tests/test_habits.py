"""Models in the habits of Flax users that the other tests do not show."""

import functools
import json
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from configs import digits
from pfs_jax import (
  costs,
  described,
  errors,
  models,
  search,
  stages,
  surgery,
  train,
)
from pfs_jax.export import bundle
from pfs_jax.surgery import factory as factories
from tests import own_models, test_export

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
LABELS = np.array([0, 1])


class ResNetBlock(nn.Module):
  """A block of flax/examples/imagenet: partials, last scales start at 0."""

  filters: int
  conv: Any
  norm: Any
  strides: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, x):
    residual = x
    y = self.conv(self.filters, (3, 3), self.strides)(x)
    y = nn.relu(self.norm()(y))
    y = self.conv(self.filters, (3, 3))(y)
    y = self.norm(scale_init=nn.initializers.zeros_init())(y)
    if residual.shape != y.shape:
      residual = self.conv(
        self.filters, (1, 1), self.strides, name='conv_proj'
      )(residual)
      residual = self.norm(name='norm_proj')(residual)
    return nn.relu(residual + y)


class ImageNetResNet(nn.Module):
  """ResNet18 of flax/examples/imagenet, with fewer filters and stages."""

  num_classes: int = 3
  stage_sizes: tuple[int, ...] = (1, 1)
  num_filters: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = True):
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name='batch',
    )
    pad = [(3, 3), (3, 3)]
    x = conv(self.num_filters, (7, 7), (2, 2), padding=pad, name='conv_init')(x)
    x = nn.relu(norm(name='bn_init')(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    for i, block_size in enumerate(self.stage_sizes):
      for j in range(block_size):
        strides = (2, 2) if i > 0 and j == 0 else (1, 1)
        x = ResNetBlock(self.num_filters * 2**i, conv, norm, strides)(x)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
    return jnp.asarray(x, self.dtype)


def resnet(num_classes):
  """Blocks of all kinds of the example's ResNet-18, in a narrower network."""
  return ImageNetResNet(num_classes, (1, 2), 8)


class OwnNorm(nn.Module):
  """A look-alike: one scale and two statistics for each channel."""

  use_running_average: bool

  @nn.compact
  def __call__(self, x):
    c = x.shape[-1]
    mean = self.variable('batch_stats', 'mu', jnp.zeros, (c,))
    var = self.variable('batch_stats', 'sigma2', jnp.ones, (c,))
    gain = self.param('gain', nn.initializers.ones, (c,))
    if not self.use_running_average and not self.is_initializing():
      mean.value = x.mean((0, 1, 2))
      var.value = x.var((0, 1, 2))
    shape = (1, 1, 1, -1)
    x = (x - mean.value.reshape(shape)) / jnp.sqrt(
      var.value.reshape(shape) + 1e-3
    )
    return x * gain.reshape(shape)


class OwnConv(nn.Module):
  """A look-alike without `nn.Conv` inside."""

  features: int
  kernel_size: tuple[int, int] = (3, 3)
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    size = np.broadcast_to(self.kernel_size, 2)
    shape = (*size, x.shape[-1], self.features)
    kernel = self.param('w', nn.initializers.lecun_normal(), shape)
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def own_layers():
  return own_models.Plain(
    conv=OwnConv, norm=lambda train: OwnNorm(use_running_average=not train)
  )


def test_axis_name_is_left_out(capsys):
  factories._say_left_out.cache_clear()
  model, name = ImageNetResNet(), 'ImageNetResNet'
  for _ in range(2):  # It is said once.
    network = surgery.network_from_factory(f'{__name__}:{name}', 3, 8, 3)
  assert capsys.readouterr().err.count("axis_name='batch'") == 1
  variables = models.init(network.gated, jax.random.key(0), (8, 8, 3))

  # Scales that start at 0 would hide the gates of their block from the loss.
  @jax.jit
  def gradients(variables):
    state = search.init(
      network.gated, variables, sparsity=0.5, balance=0.0, learning_rate=0.1
    )
    trained = {'params': state.params, 'gates': state.gates}
    found, _ = jax.grad(search.loss, has_aux=True)(trained, state, X, LABELS)
    return found['gates']

  def largest(variables):
    by_layer = network.gated.by_layer(gradients(variables))
    return [float(abs(g).max()) for g in by_layer.values()]

  assert max(largest(variables)) == 0
  assert min(largest(network.table.awake(variables))) > 1e-6
  halved = [2] * len(network.table.groups)
  surgery.narrow(model, network.table, halved, verify=True, x=X)
  # Where the axis exists, the statistics are averaged over it as before.
  apply = functools.partial(
    network.gated.apply, train=True, mutable=['batch_stats']
  )
  two = np.stack([X, 2 * X])
  over_two = jax.vmap(apply, (None, 0), axis_name='batch')
  _, apart = jax.jit(over_two)(variables, two)
  _, joint = jax.jit(apply)(variables, two.reshape(-1, 8, 8, 3))
  for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(joint), strict=True):
    np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5)


@pytest.fixture
def registered(monkeypatch):
  """What a test registers as layers is forgotten after it."""
  monkeypatch.setattr(described, '_RULES', dict(described._RULES))


def test_registered_classes_are_layers(registered, refused):
  blind = surgery.discover(own_layers(), X)
  assert not blind.groups  # A convolution that nobody knows fixes its channels.
  surgery.register_norm(OwnNorm)
  surgery.register_conv(OwnConv)
  table = surgery.discover(own_layers(), X)
  assert table.sizes == {'OwnConv_0': 6, 'OwnConv_1': 7}
  narrow = surgery.narrow(own_layers(), table, (2, 3), verify=True, x=X)
  shapes = jax.eval_shape(narrow.init, jax.random.key(0), X)['params']
  assert table.cost_model().params((2, 3)) == own_models.size(shapes)
  scalar = own_models.Plain(conv=lambda n, _, dtype: OwnConv(n, 3, dtype))
  refused('a number for each axis', surgery.discover, scalar, X)
  refused('no features and no kernel', surgery.register_conv, OwnNorm)
  for register in (surgery.register_conv, surgery.register_norm):
    refused('a class of flax.linen', register, nn.relu)


def test_a_narrow_model_is_a_module():
  model = own_models.MnistCnn()
  table = surgery.discover(model, X)
  narrow = surgery.narrow(model, table, (2, 3, 5))
  assert isinstance(narrow, nn.Module)
  assert 'Conv_0: 2, Conv_1: 3, Dense_0: 5' in repr(narrow)
  variables = jax.jit(narrow.init)(jax.random.key(0), X)
  logits = jax.jit(narrow.apply)(variables, X)
  bound = jax.jit(lambda variables, x: narrow.bind(variables)(x))
  np.testing.assert_array_equal(bound(variables, X), logits)
  shown = narrow.tabulate(jax.random.key(0), X, console_kwargs={'width': 200})
  assert 'Conv_1' in shown and '[3,3,2,3]' in shown

  class Twice(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
      return self.inner(x) + nn.Dense(3, name='beside')(x.mean((1, 2)))

  outer = jax.eval_shape(Twice(narrow).init, jax.random.key(0), X)['params']
  assert outer['inner']['Conv_1']['kernel'].shape == (3, 3, 2, 3)
  state = train_state.TrainState.create(
    apply_fn=narrow.apply, params=variables['params'], tx=optax.sgd(0.1)
  )
  loss = jax.jit(lambda p: (state.apply_fn({'params': p}, X) ** 2).sum())
  grads = jax.grad(loss)(state.params)
  assert state.apply_gradients(grads=grads).step == 1


def test_steps_refuse_several_outputs(refused):
  model = own_models.Plain()
  table = surgery.discover(model, X, call=lambda m, x, train: (m(x, train), x))
  gated = surgery.gate(model, table)
  plain = surgery.narrow(model, table, (6, 7))
  variables = own_models.drawn(gated, X)
  options = {'sparsity': 0.5, 'balance': 0.5, 'learning_rate': 0.1}
  for step, state in (
    (search.step, search.init(gated, variables, **options)),
    (train.step, train.init(plain, variables, optax.sgd(0.1))),
  ):
    refused('returns a tuple: .* call=', jax.eval_shape, step, state, X, LABELS)


class OwnState(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    factor = self.variable('constants', 'factor', lambda: 2.0)
    x = nn.relu(nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x)))
    return nn.Dense(3)(x.mean((1, 2))) * factor.value


def late_error(num_classes):
  class Late(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(num_classes)(x.mean((1, 2))) * x.mean().item()

  return Late()


def early_error(num_classes):
  raise ValueError('early')


# The user's factory.


def plain(num_classes, dtype=jnp.float32):
  del num_classes
  return own_models.Plain(dtype=dtype)


def with_call():
  return own_models.Plain(), call_it


def scalar(num_classes):
  del num_classes
  return own_models.Plain(), lambda m, x, train: m(x, train).sum()


def broken(num_classes, depth):
  del num_classes, depth


def test_a_factory_gives_a_network_for_the_stages():
  spec = f'{__name__}:plain'
  network = surgery.network_from_factory(spec, 3, 8, 3)
  assert network.description['factory'] == spec
  assert network.reference_macs == network.cost_model.macs((6, 7))
  variables = models.init(network.gated, jax.random.key(0), (8, 8, 3))
  gates = network.gated.by_layer(variables['gates'])
  assert list(gates) == ['Conv_0', 'Conv_1']
  reference = models.init(network.reference, jax.random.key(0), (8, 8, 3))
  assert own_models.size(reference['params']) == network.reference_params
  narrow = network.narrow((2, 2))
  assert costs.count(narrow, (8, 8, 3))[0] == network.cost_model.macs((2, 2))
  low = surgery.network_from_factory(spec, 3, 8, 3, jnp.bfloat16)
  assert low.gated.model.dtype == jnp.bfloat16
  other = surgery.network_from_factory(f'{__name__}:with_call', 3, 8, 3)
  assert other.cost_model.widths == (6, 7)
  by_class = surgery.network_from_factory('tests.own_models:Setup', 3, 8, 3)
  assert by_class.cost_model.widths == (5, 7, 4)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('nothing', 'must be package.module:callable'),
    ('a.b:', 'must be package.module:callable'),
    ('no_such_module:f', "ModuleNotFoundError: No module named 'no_such"),
    ('tests.own_models:nobody', "has no attribute 'nobody'"),
    ('tests.own_models:CASES', 'is not callable'),
    (f'{__name__}:broken', 'needs depth'),
    ('collections:OrderedDict', 'of no Flax module'),
    ('math:gamma', 'returned float, no Flax module'),
    (
      f'{__name__}:late_error',
      r'ConcretizationTypeError.*test_habits.py:\d+ in __call__',
    ),
    (f'{__name__}:OwnState', 'ScopeCollectionNotFound.* in __call__'),
    (
      f'{__name__}:early_error',
      r'ValueError: early \(.*test_habits.py:\d+ in early_error',
    ),
    (f'{__name__}:scalar', r'logits \[N, 10\].* got shape \(\)'),
    # A model with three classes, which takes no dtype.
    ('tests.own_models:Setup', r'\[N, 10\].* shape \(1, 3\)'),
    ('tests.own_models:Setup bfloat16', 'config.dtype must be float32'),
  ],
)
def test_a_bad_factory_is_one_line(spec, message):
  spec, *dtype = spec.split()
  with pytest.raises(errors.UserError, match=message) as caught:
    surgery.network_from_factory(spec, 10, 8, 3, *map(jnp.dtype, dtype))
  assert '\n' not in str(caught.value)


def call_it(module, x, train):
  return module(x, train=train)


def test_leave_call_and_classes_come_from_names(registered):
  names = {'call': 'call_it', 'norm': 'OwnNorm', 'conv': 'OwnConv'}
  given = {field: f'{__name__}:{name}' for field, name in names.items()}
  network = surgery.network_from_factory(
    f'{__name__}:own_layers', 3, 8, 3, leave=('OwnConv_0',), **given
  )
  assert network.table.sizes == {'OwnConv_1': 7}
  assert network.table.left_alone['OwnConv_0'] == 'left alone on request'
  assert network.description['leave'] == ['OwnConv_0']


def test_other_code_is_refused_in_the_same_workdir(
  tmp_path, monkeypatch, refused
):
  """Weights of one model are not used in another one of the same shapes."""
  code = (
    'import flax.linen as nn\n\n\nclass Mine(nn.Module):\n'
    '  num_classes: int\n\n'
    '  @nn.compact\n  def __call__(self, x, train=False):\n'
    '    x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))\n'
    '    return nn.Dense(self.num_classes)(nn.relu(x).mean((1, 2)))\n'
  )
  file = tmp_path / 'their_model.py'
  monkeypatch.syspath_prepend(str(tmp_path))
  c = digits.get_config('smoke')
  c.model.factory, c.budget.ranking = 'their_model:Mine', 'uniform'
  file.write_text(code)
  stages.execute('prune', stages.Job(c, tmp_path / 'w'))
  stages.Job(c, tmp_path / 'w')
  file.write_text(code.replace('relu', 'gelu'))
  message = 'the code of their_model:Mine is not that with which'
  refused(message, stages.Job, c, tmp_path / 'w')
  stages.Job(c, tmp_path / 'other')


@pytest.mark.slow
@pytest.mark.parametrize(
  'factory', [f'{__name__}:resnet', 'tests.test_nnx:on_digits']
)
def test_from_search_to_export(tmp_path, monkeypatch, factory):
  """The flax example's ResNet and a residual net of NNX."""
  here = types.SimpleNamespace(run=test_export.here)  # No fresh process.
  monkeypatch.setattr(bundle, 'subprocess', here)
  c = digits.get_config('smoke')
  c.model.factory, c.budget.keep = factory, (0.8,)
  c.data.train_examples = 428
  for mode in ('run', 'export'):
    stages.execute(mode, stages.Job(c, tmp_path))
  result = json.loads((tmp_path / 'result.json').read_text())
  assert 0.7 < result['macs'] / result['reference_macs'] <= 0.8
  names = {p.name for p in (tmp_path / 'export').iterdir()}
  assert {'model.onnx', 'model.stablehlo', 'model.safetensors'} <= names
