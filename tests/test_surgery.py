"""A user's own Linen model: found, gated, narrowed, counted, searched."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

from pfs_jax import costs, errors, models, surgery, train
from tests import own_models

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
# Cases that another one contains; what is found in them is checked, too.
CONTAINED = ('plain', 'shared', 'depthwise')
GATED = [
  name
  for name, case in own_models.CASES.items()
  if case.groups and name not in CONTAINED
]
# Gates at several norms, shared, behind remat, in 16 bits, told by a field.
KINDS = ('bfloat16', 'field', 'remat', 'depthwise', 'dense', 'shared', 'halves')


@functools.cache
def found(name):
  case = own_models.CASES[name]
  sites = surgery.discover(case.model, X, *case.further, **case.options)
  return case, sites


def some_counts(sites, seed):
  random = np.random.default_rng(seed)
  return tuple(int(random.integers(1, n + 1)) for n in sites.sizes.values())


def in_evaluation(model):
  """The untouched model; only `Field` trains unless told otherwise."""
  return model.clone(training=False) if hasattr(model, 'training') else model


@pytest.mark.parametrize('name', own_models.CASES)
def test_finds_the_groups_and_says_why_the_rest_is_left(name):
  case, sites = found(name)
  groups = {'+'.join(g.producers): g.size for g in sites.groups}
  assert groups == case.groups
  fixed = {g.producers[0] for g in sites.groups if not g.removable}
  assert fixed == set(case.constant)
  for path, reason in case.alone.items():
    assert reason in sites.left_alone[path]
  accounted = {
    path
    for g in sites.groups
    for path in (*g.producers, *g.norms, *g.depthwise)
  } | set(sites.left_alone)
  layers = {
    path
    for path, layer in sites.layers.items()
    if layer.kind != 'pool' or (sites.reads(layer) < 0).any()
  }
  assert accounted >= layers, 'a layer was lost without a word'
  said = [g.replace('+', ' + ') for g in groups]
  said += [f': {reason}' for reason in sites.left_alone.values()]
  assert not [text for text in said if text not in str(sites)]


@pytest.mark.parametrize('name', KINDS)
def test_unit_gates_change_nothing(name):
  case, sites = found(name)
  gated, model = surgery.gate(case.model, sites), in_evaluation(case.model)
  variables = own_models.drawn(gated, X)
  plain = {k: v for k, v in variables.items() if k != 'gates'}
  assert gated.by_layer(variables['gates']).keys() == sites.sizes.keys()
  apply = jax.jit(gated.apply)
  logits, expected = apply(variables, X), jax.jit(model.apply)(plain, X)
  # Fused with what follows, a product by 1 may round in another place.
  atol = 1e-5 if name == 'halves' else 0
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
  half = jax.tree.map(lambda g: g / 2, variables['gates'])
  changed = apply({**variables, 'gates': half}, X)
  assert not np.allclose(changed, expected), 'the gates do nothing'


def test_gradients_of_gates_are_summed_in_float32():
  """Over all pixels, of a model that computes in 16 bits."""
  case, sites = found('bfloat16')
  gated, low = surgery.gate(case.model, sites), case.model
  high = surgery.gate(low.clone(dtype=jnp.float32), sites)
  x = np.random.default_rng(1).normal(1, 1, (64, 8, 8, 3)).astype(np.float32)
  variables = own_models.drawn(gated, X)

  def gradient(module):
    def loss(gates):
      found = module.apply({**variables, 'gates': gates}, x)
      return jnp.float32(found).sum()

    return jax.grad(loss)(variables['gates'])

  for a, b in zip(
    *map(jax.tree.leaves, map(gradient, (gated, high))), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=0.015 * np.abs(b).max())


class Told(nn.Module):
  """Two arguments say that it trains: one for dropout, one for statistics."""

  @nn.compact
  def __call__(self, x, deterministic=True, use_running_average=True):
    x = nn.BatchNorm(use_running_average=use_running_average)(
      nn.Conv(4, (3, 3))(x)
    )
    x = nn.Dropout(0.5, deterministic=deterministic)(nn.relu(x).mean((1, 2)))
    return nn.Dense(3)(x)


def test_all_arguments_that_say_it_trains_are_set():
  gated = surgery.gate(Told(), surgery.discover(Told(), X))
  variables = own_models.drawn(gated, X)
  (first, stats), (second, _) = (
    gated.apply(
      variables,
      X,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(i)},
    )
    for i in (0, 1)
  )
  assert not np.array_equal(first, second)
  old = variables['batch_stats']['BatchNorm_0']['mean']
  assert not np.array_equal(old, stats['batch_stats']['BatchNorm_0']['mean'])


def test_weights_are_drawn_as_without_gates():
  case, sites = found('plain')
  gated, key = surgery.gate(case.model, sites), jax.random.key(1)
  variables = jax.jit(gated.init)(key, X)
  plain = jax.jit(case.model.init)(key, X)
  assert all((g == 1).all() for g in jax.tree.leaves(variables.pop('gates')))
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, plain))


@pytest.mark.parametrize('name', GATED)
def test_gate_zero_is_a_removed_channel(name):
  case, sites = found(name)
  counts = [(n + 1) // 2 for n in sites.sizes.values()]
  error = surgery.check(case.model, sites, counts, X, case.further)
  assert error <= (5e-2 if name == 'bfloat16' else 1e-12)  # In float64.


@pytest.mark.parametrize('name', GATED)
def test_costs_and_shapes_are_those_of_the_narrow_model(name):
  case, sites = found(name)
  model, counts = sites.cost_model(), some_counts(sites, 5)
  further = [t[:1] if np.ndim(t) else t for t in case.further]
  key, args = jax.random.key(0), (X[:1], *further)
  wide = jax.eval_shape(surgery.gate(case.model, sites).init, key, *args)
  assert model.params(model.widths) == own_models.size(wide['params'])
  narrow = surgery.narrow(case.model, sites, counts)
  fixed = sum(op.fixed_macs for op in model.ops)
  calls = costs.record(narrow.init, key, *args)
  assert model.macs(counts) == fixed + sum(c.macs() for c in calls)
  new = jax.eval_shape(narrow.init, key, *args)
  assert model.params(counts) == own_models.size(new['params'])
  again = surgery.cost_model(case.model, sites, *args)
  assert again.macs(counts) == model.macs(counts)
  arrays = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), wide)
  kept = {g.name: range(n) for g, n in zip(sites.groups, counts, strict=True)}
  sliced = sites.taken(arrays, kept)
  assert jax.tree.map(jnp.shape, sliced) == jax.tree.map(jnp.shape, new)


def test_the_gate_stands_where_it_acts():
  """Behind the depthwise convolution's BatchNorm, which would cancel it."""
  _, sites = found('depthwise')
  (expand,) = (g for g in sites.groups if g.name == 'expand')
  assert (expand.norms, expand.depthwise) == (('bn2',), ('depthwise',))
  assert expand.consumers == ('project',)
  _, sites = found('bare depthwise')
  assert sites.groups[0].norms == ('bn1',)


@pytest.mark.parametrize(
  ('name', 'counts', 'macs'),
  [
    # 8x8x3 -> 6, 4x4x6 -> 8, 2x2x8 -> 12, 12 -> 3.
    ('no norm', (6, 8, 12), 64 * 27 * 6 + 16 * 54 * 8 + 32 * 12 + 36),
    # Transposed: for each input position. At the end 9 channels -> 7.
    (
      'upward',
      (5, 6, 4),
      64 * 27 * 5 + 16 * 45 * 6 + 16 * 4 * 6 * 4 + 64 * 9 * 7 + 7 * 3,
    ),
    # Three rounds of a loop and an einsum, 4x4 each.
    ('attending', (6,), 64 * 27 * 6 + 64 * 6 * 4 + (3 + 1) * 16 + 4 * 3),
    # Twice in scan and in vmap, once in jit.
    (
      'layered',
      (4,),
      (3 * 4 + 4 * 5 + 4 * 6 + 4 * 4 + 2 * 4 * 4 + 2 * 5 * 4 + 6 * 4) * 9 * 64
      + 4 * 3,
    ),
    ('folded', (2, 4, 3), 64 * (9 * 3 * 2 + 9 * 2 * 4 + 4 * 3) + 3 * 3),
  ],
)
def test_macs_calculated_by_hand(name, counts, macs):
  assert found(name)[1].cost_model().macs(counts) == macs


def test_without_batchnorm_gates_stand_at_the_convolutions():
  _, sites = found('no norm')
  assert [g.norms for g in sites.groups] == [(name,) for name in sites.sizes]
  assert 'counted, but not narrowed' in str(found('attending')[1])


def test_concatenated_channels_are_gated_at_each_later_norm():
  _, sites = found('dense')
  by_name = {g.name: g for g in sites.groups}
  assert len(by_name['stem'].norms) == 4
  assert len(by_name['c2'].norms) == 1
  last = sites.gated[by_name['c2'].norms[0]]
  assert list(last[13:]) == [13, 14, 15, 16]  # Behind 5 + 4 + 4 others.


def test_weights_behind_a_constant_are_not_sliced():
  case, sites = found('constant')
  wide = own_models.drawn(surgery.gate(case.model, sites), X)
  kept = {'Conv_0': range(3), 'Conv_1': range(7)}
  with pytest.raises(errors.UserError, match='of Conv_0 cannot be sliced'):
    surgery.slice_variables(case.model, sites, wide, kept)
  assert 'gate 0 is not a removed channel' in str(sites)


class Standardised(nn.Conv):
  """Weight standardisation: its kernel depends on how many inputs there are."""

  @nn.compact
  def __call__(self, x):
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.normal(), shape)
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def test_the_check_finds_what_the_trace_cannot(refused):
  liar = own_models.Plain(conv=Standardised)
  sites = surgery.discover(liar, X)
  with pytest.raises(errors.UserError, match='differs from the gated one by'):
    surgery.narrow(liar, sites, (3, 3), verify=True, x=X)
  with pytest.raises(errors.UserError, match='from the gated one by nan'):
    surgery.check(liar, sites, (6, 7), X * np.nan)
  refused('needs images', surgery.narrow, liar, sites, (3, 3), verify=True)


class Particular(nn.Module):
  """Takes float32 alone, names axes of a mesh, draws from its own stream."""

  @nn.compact
  def __call__(self, x, train=False):
    assert x.dtype == np.float32
    axes = nn.with_partitioning(
      nn.initializers.lecun_normal(), (None, None, None, 'model')
    )
    x = own_models.unit(train, x, 6, kernel_init=axes)
    if train:
      x *= jax.random.bernoulli(self.make_rng('path'), 0.5, x.shape)
    return nn.Dense(3)(x.mean((1, 2)))


def test_any_random_stream_and_a_fixed_dtype():
  sites = surgery.discover(Particular(), X)
  thin = surgery.narrow(Particular(), sites, (3,), verify=True, x=X)
  variables = models.init(thin, jax.random.key(0), X.shape[1:])
  assert variables['params']['Conv_0']['kernel'].shape == (3, 3, 3, 3)
  state = train.init(thin, variables, optax.sgd(0.1))
  jax.eval_shape(train.step, state, X, np.arange(2))


class Wrapping(nn.Module):
  """Calls a module that is handed in from outside."""

  first: nn.Module

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(own_models.norm(train)(self.first(x)))
    return nn.Dense(3)(own_models.unit(train, x, 5, 'second').mean((1, 2)))


def test_the_model_itself_is_not_changed():
  first = nn.Conv(6, (3, 3))
  model = Wrapping(first)
  sites = surgery.discover(model, X)
  assert sites.sizes == {'first': 6, 'second': 5}
  narrow = surgery.narrow(model, sites, (2, 3), verify=True, x=X)
  key = jax.random.key(0)
  variables = jax.eval_shape(narrow.init, key, X)
  assert variables['params']['second']['kernel'].shape == (3, 3, 2, 3)
  assert first.features == 6
  untouched = jax.eval_shape(model.init, key, X)
  assert untouched['params']['second']['kernel'].shape == (3, 3, 6, 5)
  cost_model = surgery.cost_model(model, sites, X[:1])
  assert cost_model.params((6, 5)) == own_models.size(untouched['params'])


# Transformations.


def test_the_gradient_of_a_gate_is_that_of_its_norm():
  case, sites = found('remat')
  gated = surgery.gate(case.model, sites)
  variables = own_models.drawn(gated, X)
  plain = {k: v for k, v in variables.items() if k != 'gates'}

  def loss(module, variables):
    logits, _ = module.apply(variables, X, train=True, mutable=['batch_stats'])
    return (logits**2).sum()

  by_gate = jax.jit(jax.grad(functools.partial(loss, gated)))(variables)
  by_norm = jax.jit(jax.grad(functools.partial(loss, case.model)))(plain)
  # y = g * (s * x + b): at g = 1, dL/dg = s * dL/ds + b * dL/db.
  for group in sites.groups:
    path = group.norms[0].split('/')
    norm = functools.reduce(dict.get, path, plain['params'])
    grads = functools.reduce(dict.get, path, by_norm['params'])
    expected = sum(norm[k] * grads[k] for k in ('scale', 'bias'))
    found_ = gated.by_layer(by_gate['gates'])[group.name]
    assert np.abs(found_).max() > 0
    np.testing.assert_allclose(found_, expected, rtol=1e-3, atol=1e-3)


def test_equal_wrappers_compile_once():
  case, sites = found('plain')
  calls = []

  @functools.partial(jax.jit, static_argnums=0)
  def apply(module, variables, x):
    calls.append(module)
    return module.apply(variables, x)

  for _ in range(2):
    again = surgery.discover(own_models.Plain(), X)
    narrow = surgery.narrow(own_models.Plain(), again, (3, 4))
    apply(narrow, own_models.drawn(narrow, X), X)
  assert len(calls) == 1
  assert narrow == surgery.narrow(case.model, sites, {'Conv_1': 4, 'Conv_0': 3})
  assert narrow != surgery.narrow(case.model, sites, (3, 5))
  assert surgery.gate(case.model, sites) == surgery.gate(case.model, again)
  assert surgery.gate(case.model, sites) != narrow
  called = surgery.discover(case.model, X, call=lambda m, x, train: m(x, train))
  assert surgery.gate(case.model, sites) != surgery.gate(case.model, called)


def test_dropout_and_further_arguments():
  case, sites = found('conditioned')
  gated = surgery.gate(case.model, sites)
  variables = own_models.drawn(gated, X, *case.further)

  @jax.jit
  def logits(key):
    told = {'train': True, 'mutable': ['batch_stats'], 'rngs': {'params': key}}
    out, updates = gated.apply(variables, X, *case.further, **told)
    assert set(updates) == {'batch_stats'}
    return out

  a, b = jax.random.split(jax.random.key(0))
  np.testing.assert_array_equal(logits(a), logits(a))
  assert not np.array_equal(logits(a), logits(b))
  t = jnp.zeros((2, 4))
  fixed = surgery.discover(
    case.model, X, call=lambda module, x, train: module(x, t, training=train)
  )
  gated = surgery.gate(case.model, fixed)
  assert jax.eval_shape(gated.apply, variables, X).shape == (2, 3)


def test_costs_take_the_arguments_of_the_call():
  case, sites = found('conditioned')
  time, scale = case.further[0][:1], case.further[1]
  model, half = sites.cost_model(), [3, 3]
  for args, by_name in (
    ((time, scale), {}),
    ((time,), {'scale': scale}),
    ((), {'t': time, 'scale': scale}),
    ((), {'call': lambda module, x, train: module(x, time, training=train)}),
  ):
    found_ = surgery.cost_model(case.model, sites, X[:1], *args, **by_name)
    assert found_.macs(half) == model.macs(half)
    assert found_.params(half) == model.params(half)


class Positions(nn.Module):
  """What depends on the size of the images: a layer, and two widths."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(3, name='first')(x) if x.shape[1] > X.shape[1] else x
    x = own_models.unit(train, own_models.unit(train, x, 5), 4)
    mixed = nn.Dense(x.shape[1])(x.mean(2).swapaxes(1, 2))
    return nn.Dense(3)(mixed.mean(2)) + nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.parametrize('model', [own_models.Plain(flatten=True), Positions()])
def test_costs_at_another_size_of_the_images(model):
  sites = surgery.discover(model, X)
  counts = [n // 2 for n in sites.sizes.values()]
  shape, narrow = (12, 12, 3), surgery.narrow(model, sites, counts)
  found_ = surgery.cost_model(model, sites, np.zeros((1, *shape), np.float32))
  if hasattr(model, 'flatten'):
    assert found_.macs(counts) == costs.count(narrow, shape)[0]
    assert found_.params(counts) == costs.count(narrow, shape)[1]
  again = surgery.discover(model, jax.ShapeDtypeStruct((1, *shape), X.dtype))
  assert again.sizes == sites.sizes
  assert found_.macs(counts) == again.cost_model().macs(counts)
  assert found_.params(counts) == again.cost_model().params(counts)


# Our own families and models written by others.


# The paper gates no block output, though nothing is added to these.
_UNGATED = {
  'mobilenet_v2': ('block0/project/conv', 'block3/project/conv'),
  'resnet50': ('stem/conv',),
}


@pytest.mark.parametrize(
  'name', ['resnet8', 'vgg16', 'mobilenet_v1', 'mobilenet_v2', 'resnet50']
)
def test_our_families_come_out_as_built_in(name, shallow_mobilenets):
  """The table that is found is the one that the registry states."""
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  leave = _UNGATED.get(name, ())
  sites = surgery.discover(models.build(name, 10, 4), x, leave=leave)
  ours = models.table(name, 10, 16, width=4)
  assert list(sites.sizes.values()) == list(ours.sizes.values())
  assert 'mixed by cond' not in str(sites)  # Forms for several platforms.
  assert list(sites.gated) == list(ours.gated)
  for path, units in ours.gated.items():
    np.testing.assert_array_equal(sites.gated[path], units)
  for call in ours.calls:
    np.testing.assert_array_equal(sites.reads(call), ours.reads(call))
    np.testing.assert_array_equal(sites.makes(call), ours.makes(call))
  counts = some_counts(sites, 0)
  mine, theirs = sites.cost_model(), ours.cost_model()
  assert mine.macs(counts) == theirs.macs(counts)
  assert mine.params(counts) == theirs.params(counts)


_OTHERS = {
  'jax_resnet': lambda m: m.ResNet(
    functools.partial(m.ResNetBottleneckBlock, expansion=2),
    stage_sizes=[1, 1],
    n_classes=3,
    hidden_sizes=[8, 12],
  ),
  'jax_models.models.conv_mixer': lambda m: m.ConvMixer(
    features=8, patch_size=4, num_mixer_layers=1, num_classes=3
  ),
}


@pytest.mark.parametrize('name', _OTHERS)
def test_models_of_other_people(name):
  package = name.partition('.')[0].replace('_', '-')
  reason = f'test-only: pip install --no-deps {package}'
  model = _OTHERS[name](pytest.importorskip(name, reason=reason))
  call = None
  if name == 'jax_resnet':  # It trains where its statistics are mutable.
    call = lambda module, x, train: module(x)  # noqa: E731
  x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  sites = surgery.discover(model, x[:1], call=call)
  assert len(sites.groups) >= 1
  cost_model = sites.cost_model()
  halves = [max(1, n // 2) for n in sites.sizes.values()]
  surgery.check(model, sites, halves, x)
  # `costs.count` knows Flax's layers; one model has a convolution of its own.
  own = sum(layer.fixed_macs for layer in cost_model.ops)
  narrow = surgery.narrow(model, sites, halves)
  assert costs.count(narrow, x.shape[1:])[0] + own == cost_model.macs(halves)


# What is refused.


def test_a_narrow_model_can_live_in_nnx():
  case, sites = found('plain')
  narrow = surgery.narrow(case.model, sites, (2, 3))
  inside = bridge.ToNNX(narrow, rngs=nnx.Rngs(0))
  inside = bridge.lazy_init(inside, X)
  assert inside(X).shape == (2, 3)
  _, state = nnx.split(inside)
  shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
  assert (3, 3, 2, 3) in shapes and (3, 3, 3, 2) in shapes


class Tokens(nn.Module):
  """A sequence [N, T, C]; convolutions under nn.vmap, in rows, of weights."""

  @nn.compact
  def __call__(self, x, train=False):
    alone = nn.vmap(nn.Conv, {'params': None}, split_rngs={'params': False})
    y = alone(5, (3, 3), name='alone')(x[..., None]).mean(2)
    y += own_models.unit(train, x, 5, kernel=(3,))
    table = self.param('table', nn.initializers.normal(), (5, 4, 1))
    y *= nn.Conv(5, (3, 3), name='position')(table).mean()
    return nn.Dense(3)(y.mean(1))


class Untold(nn.Module):
  @nn.compact
  def __call__(self, x, now=False):
    return nn.BatchNorm(use_running_average=not now)(nn.Conv(3, (1, 1))(x))


ALONE = nnx.Conv(3, 3, (3,), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ('model', 'x', 'message'),
  [
    (own_models.Plain, X, 'instance of flax.linen.Module'),
    (nnx.Linear, X, 'instance of flax.linen.Module'),
    (nn.Sequential([nn.relu]), X, 'no layer of flax.linen'),
    (bridge.to_linen(nnx.Linear, 3, 3), X, 'inside bridge.to_linen are not'),
    (Untold(), X, 'no argument or field train, '),
    (models.build('resnet20', 3, 4, gated=True), X, "'gates' of its own"),
    (own_models.Plain(), X[0], r'Conv_0 .* a batch axis.* shape \(8, 8, 3\)'),
    (own_models.Depthwise(), X[0], 'without a batch axis'),
    (ALONE, X[0, 0], 'without a batch axis'),
    (nn.Conv(3, (3, 3), padding='VALID'), X[:, :2], 'has no pixels left'),
  ],
)
def test_what_discover_refuses(model, x, message, refused):
  error = refused(message, surgery.discover, model, x)
  assert '\n' not in str(error)


def test_what_the_batch_axis_is_asked_of(refused):
  case, sites = found('plain')
  refused('without a batch axis', surgery.cost_model, case.model, sites, X[0])
  # Not of sequences, layers that nn.vmap maps over the batch, or weights.
  sites = surgery.discover(Tokens(), X[:, 0])
  assert sites.left_alone.keys() >= {'alone', 'position'}


def test_a_shortcut_that_vanishes_between_equal_widths():
  model = own_models.Residual(stride=1)
  sites = surgery.discover(model, X, residual=True)
  counts = {**sites.sizes, 'Conv_0': 4, 'b/Conv_1': 4}
  narrow = surgery.narrow(model, sites, counts)
  with pytest.raises(errors.UserError, match='does not call b/proj'):
    jax.eval_shape(narrow.init, jax.random.key(0), X)


def test_wrong_counts_and_missing_gates(refused):
  case, sites = found('plain')
  for counts in ((1,), (0, 1), (6, 8), {'Conv_0': 1}):
    refused('counts must', surgery.narrow, case.model, sites, counts)
  gated = surgery.gate(case.model, sites)
  plain = own_models.drawn(case.model, X)
  refused("must hold the collection 'gates'", gated.apply, plain, X)
  with pytest.raises(errors.UserError, match='kept must name .*Conv_1'):
    surgery.slice_variables(case.model, sites, plain, {'Conv_0': [0]})
