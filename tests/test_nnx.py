"""Models of flax.nnx: found, gated, narrowed, the same as Linen's twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pfs_jax import costs, errors, groups, surgery
from pfs_jax.surgery import nnx_models
from tests import own_models, processes

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Block(nnx.Module):
  """A residual block; the shortcut is a convolution where widths differ."""

  def __init__(self, inputs, hidden, outputs, rngs, stride=1, **kwargs):
    def conv(i, o, size=(3, 3), strides=1):
      return nnx.Conv(i, o, size, strides=strides, rngs=rngs, **kwargs)

    def norm(n):
      return nnx.BatchNorm(n, momentum=0.9, rngs=rngs, **kwargs)

    self.Conv_0 = conv(inputs, hidden, strides=stride)
    self.BatchNorm_0 = norm(hidden)
    self.Conv_1, self.BatchNorm_1 = conv(hidden, outputs), norm(outputs)
    self.project = inputs != outputs
    if self.project:
      self.proj = conv(inputs, outputs, (1, 1), stride)
      self.bn_proj = norm(outputs)

  def __call__(self, x):
    y = nnx.relu(self.BatchNorm_0(self.Conv_0(x)))
    y = self.BatchNorm_1(self.Conv_1(y))
    if self.project:
      x = self.bn_proj(self.proj(x))
    return nnx.relu(x + y)


class Residual(nnx.Module):
  """The twin of `own_models.Residual`, with layers of the same names."""

  def __init__(self, num_classes=3, *, inputs=3, rngs, dtype=jnp.float32):
    kwargs = {'param_dtype': jnp.promote_types(dtype, jnp.float32)}
    self.Conv_0 = nnx.Conv(inputs, 6, (3, 3), rngs=rngs, **kwargs)
    self.BatchNorm_0 = nnx.BatchNorm(6, momentum=0.9, rngs=rngs, **kwargs)
    self.a = Block(6, 4, 6, rngs, **kwargs)
    self.b = Block(6, 5, 8, rngs, 2, **kwargs)
    self.Dense_0 = nnx.Linear(8, num_classes, rngs=rngs, **kwargs)

  def __call__(self, x):
    x = nnx.relu(self.BatchNorm_0(self.Conv_0(x)))
    return self.Dense_0(self.b(self.a(x)).mean((1, 2)))


class MnistCnn(nnx.Module):
  """The network of flax's NNX tutorial for MNIST, with fewer channels."""

  def __init__(self, *, rngs):
    self.conv1 = nnx.Conv(3, 5, kernel_size=(3, 3), rngs=rngs)
    self.batch_norm1 = nnx.BatchNorm(5, rngs=rngs)
    self.dropout1 = nnx.Dropout(rate=0.25, rngs=rngs)
    self.conv2 = nnx.Conv(5, 6, kernel_size=(3, 3), rngs=rngs)
    self.batch_norm2 = nnx.BatchNorm(6, rngs=rngs)
    self.linear1 = nnx.Linear(24, 7, rngs=rngs)
    self.dropout2 = nnx.Dropout(rate=0.25, rngs=rngs)
    self.linear2 = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    def pool(x):
      return nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))

    x = pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
    x = pool(nnx.relu(self.batch_norm2(self.conv2(x))))
    x = x.reshape(x.shape[0], -1)
    return self.linear2(nnx.relu(self.dropout2(self.linear1(x))))


class Unit(nnx.Module):
  def __init__(self, inputs, outputs, rngs, norm=nnx.BatchNorm, **options):
    self.conv = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
    self.norm = norm(outputs, rngs=rngs, **options)

  def __call__(self, x):
    return nnx.relu(self.norm(self.conv(x)))


class Upward(nnx.Module):
  def __init__(self, *, rngs, transpose_kernel=False):
    self.units = nnx.List([Unit(3, 6, rngs), Unit(4, 5, rngs)])
    self.up = nnx.ConvTranspose(
      6, 4, (2, 2), (2, 2), transpose_kernel=transpose_kernel, rngs=rngs
    )
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.up(self.units[0](x))))
    return self.head(self.units[1](x).mean((1, 2)))


class Transformed(nnx.Module):
  """Calls one of its units inside of a transform."""

  def __init__(self, transform, *, rngs, **options):
    self.transform = transform
    self.first = Unit(3, 6, rngs, **options)
    self.last = Unit(6, 5, rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = self.transform(lambda m, x: m(x))(self.first, x)
    return self.head(self.last(x).mean((1, 2)))


class Scanned(nnx.Module):
  """Calls three equal units in a loop over their stacked weights."""

  def __init__(self, *, rngs):
    make = nnx.vmap(lambda r: Unit(6, 6, r), in_axes=(0,), out_axes=0)
    self.stack = nnx.split_rngs(splits=3)(make)(rngs)
    self.first, self.last = Unit(3, 6, rngs), Unit(6, 5, rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    loop = nnx.scan(
      lambda x, unit: unit(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return self.head(self.last(loop(self.first(x), self.stack)).mean((1, 2)))


def directly(function):
  return function


class Mixer(nnx.Module):
  """Mixes positions by a dense layer: channels cannot be told apart."""

  def __init__(self, *, rngs):
    self.embed = nnx.Linear(3, 6, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.mix = nnx.Linear(64, 64, rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = self.embed(x.reshape(x.shape[0], -1, 3))
    x = x + self.mix(self.norm(x).swapaxes(1, 2)).swapaxes(1, 2)
    return self.head(x.mean(1))


class Weighed(nnx.Module):
  """A unit whose kernel is normalised before each call, and a plain one."""

  def __init__(self, *, rngs, counted=False):
    self.first = nnx.WeightNorm(nnx.Conv(3, 6, (3, 3), rngs=rngs), rngs=rngs)
    self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
    self.last, self.head = Unit(6, 5, rngs), nnx.Linear(5, 3, rngs=rngs)
    self.calls = nnx.Variable(jnp.zeros(())) if counted else None

  def __call__(self, x):
    if self.calls is not None:
      self.calls[...] += 1
    x = nnx.relu(self.norm(self.first(x)))
    return self.head(self.last(x).mean((1, 2)))


# {name: (how to make the model, {group: channels})}.
BOTH, LAST = {'first/conv': 6, 'last/conv': 5}, {'last/conv': 5}
UPWARD = {'units/0/conv': 6, 'up': 4, 'units/1/conv': 5}
grouped = functools.partial(Transformed, directly, norm=nnx.GroupNorm)
CASES = {
  'residual': (Residual, {'a/Conv_0': 4, 'b/Conv_0': 5}),
  'tutorial': (MnistCnn, {'conv1': 5, 'conv2': 6}),
  'upward': (Upward, UPWARD),
  'upward transposed': (
    functools.partial(Upward, transpose_kernel=True),
    UPWARD,
  ),
  'direct': (functools.partial(Transformed, directly), BOTH),
  'group norm': (functools.partial(grouped, num_groups=6), BOTH),
  'joint norm': (functools.partial(grouped, num_groups=2), LAST),
  'jit': (functools.partial(Transformed, nnx.jit), LAST),
  'remat': (functools.partial(Transformed, nnx.remat), LAST),
  'scan': (Scanned, LAST),
  'weight norm': (Weighed, LAST),
}


@functools.cache
def found(name):
  model = CASES[name][0](rngs=nnx.Rngs(0))
  return model, surgery.discover(model, X)


def parameters(model):
  return own_models.size(nnx.state(model, nnx.Param))


@pytest.mark.parametrize('name', CASES)
def test_found_checked_and_narrowed_to_an_ordinary_module(name):
  model, table = found(name)
  before = parameters(model)
  assert table.sizes == CASES[name][1]
  counts = [n // 2 for n in table.sizes.values()]
  narrow = surgery.narrow(model, table, counts, verify=True, x=X)
  assert type(narrow) is type(model)
  narrow.eval()
  logits = nnx.eval_shape(lambda m, x: m(x), narrow, X)
  assert logits.shape == (2, 3)
  cost_model = surgery.cost_model(model, table, X[:1])
  assert cost_model.params(counts) == parameters(narrow)
  assert cost_model.params(cost_model.widths) == parameters(model) == before


def test_narrow_weights_are_the_kept_ones():
  model, table = found('residual')
  kept = {'a/Conv_0': [1, 3], 'b/Conv_0': [0, 2, 4]}
  variables = nnx_models.variables_of(model)
  sliced = table.slice_variables(variables, kept)
  narrow = nnx_models.narrowed(model, table, (2, 3), sliced)
  conv = narrow.a.Conv_0
  np.testing.assert_array_equal(
    conv.kernel[...], model.a.Conv_0.kernel[...][..., [1, 3]]
  )
  assert (conv.out_features, conv.kernel_shape) == (2, (3, 3, 6, 2))
  assert narrow.a.BatchNorm_0.num_features == 2
  assert narrow.a.Conv_1.in_features == 2
  gates = groups.tree(
    {
      name: jnp.isin(jnp.arange(size), jnp.array(kept[name])) * 1.0
      for name, size in table.sizes.items()
    }
  )
  gated = surgery.gate(model, table)
  wide = jax.jit(gated.apply)({**variables, 'gates': gates}, X)
  narrow.eval()
  logits = nnx.jit(lambda m, x: m(x))(narrow, X)
  np.testing.assert_allclose(logits, wide, atol=1e-5)
  with pytest.raises(errors.UserError, match='must hold .* with shape'):
    nnx_models.narrowed(model, table, (2, 2), sliced)


@pytest.mark.parametrize('name', ['jit', 'remat', 'scan'])
def test_what_nnx_transforms_is_counted(name):
  loop = 3 * 64 * 54 * 6 if name == 'scan' else 0  # 3 times 3x3 on 8x8.
  plain, transformed = (found(n)[1].cost_model() for n in ('direct', name))
  assert transformed.macs((5,)) == plain.macs((6, 5)) + loop


def test_a_mixer_is_left_alone_with_the_reason(refused):
  model = Mixer(rngs=nnx.Rngs(0))
  table = surgery.discover(model, X, residual=True)
  assert table.left_alone['embed'] == 'all tied together'
  refused('carry a gate: .*all tied together', surgery.gate, model, table)


def test_a_kernel_that_the_model_changes_is_changed_in_the_search():
  model, table = found('weight norm')
  gated = surgery.gate(model, table)
  variables = nnx_models.variables_of(model) | {'gates': gated.unit_gates()}
  expected = nnx.clone(model)
  expected.eval()
  np.testing.assert_allclose(gated.apply(variables, X), expected(X), atol=1e-6)


def test_variables_that_the_model_changes_are_statistics(refused):
  model = Weighed(rngs=nnx.Rngs(0), counted=True)
  message = 'changes calls, a Variable: make it an nnx.BatchStat'
  refused(message, surgery.discover, model, X)


class Noisy(nnx.Module):
  """Draws from two streams of its own, of one key or of several."""

  def __init__(self, shape, *, rngs):
    self.unit, self.head = Unit(3, 6, rngs), nnx.Linear(6, 3, rngs=rngs)
    keys = jax.random.split(jax.random.key(1), shape)
    self.streams = nnx.List([nnx.RngStream(keys, tag=t) for t in 'ab'])

  def __call__(self, x):
    x = self.unit(x).mean((1, 2))
    a, b = (
      jax.random.bernoulli(s.key[...].reshape(-1)[-1], 0.5, x.shape)
      for s in self.streams
    )
    return self.head(x * (a != b))  # Nothing if both draw the same.


@pytest.mark.parametrize(
  ('make', 'stream'),
  [
    (MnistCnn, 'dropout'),
    (functools.partial(Noisy, ()), 'params'),
    (functools.partial(Noisy, (2,)), 'params'),
  ],
)
def test_dropout_draws_from_the_steps_key(make, stream):
  model = make(rngs=nnx.Rngs(0))
  model.factor = nnx.Param(jnp.full((1, 3), 0.1))  # Is drawn as it is.
  gated = surgery.gate(model, surgery.discover(model, X))
  # As NumPy's arrays, which a BatchNorm must not change in place.
  variables = jax.device_get(jax.jit(gated.init)(jax.random.key(0), X))
  np.testing.assert_array_equal(variables['params']['factor'], model.factor)

  @jax.jit
  def logits(key):
    out, _ = gated.apply(
      variables, X, train=True, mutable=['batch_stats'], rngs={stream: key}
    )
    return out

  a, b = jax.random.split(jax.random.key(0))
  np.testing.assert_array_equal(logits(a), logits(a))
  assert not np.array_equal(logits(a), logits(b))


TWINS = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from pfs_jax import prune, search, surgery
from pfs_jax.surgery import nnx_models
from tests import own_models, test_nnx
x = np.random.default_rng(0).normal(size=(8, 8, 8, 3))
y = jnp.arange(8) % 3
twins = (
  test_nnx.Residual(rngs=nnx.Rngs(0), dtype=jnp.float64),
  own_models.Residual(),
)
weights = nnx_models.variables_of(twins[0])
dtypes = []
found = []
for model in twins:
  table = surgery.discover(model, x[:1])
  gated = surgery.gate(model, table)
  gates = gated.unit_gates()
  dtypes += {str(g.dtype) for g in jax.tree.leaves(gates)}
  gates = jax.tree.map(jnp.float64, gates)
  state = search.init(
    gated, {**weights, 'gates': gates},
    sparsity=0.5, balance=0.5, learning_rate=0.05)
  for _ in range(5):
    state, metrics = search.step(state, x, y)
  gates = gated.by_layer(jax.device_get(state.gates))
  model = table.cost_model()
  full = model.macs(model.widths)
  floor = model.macs([1] * len(model.widths))
  cut = prune.fit(gates, model, max_macs=(full + floor) // 2)
  found.append((gates, cut.counts, cut.macs, cut.params))
one, two = found
assert list(one[0]) == list(two[0])
error = max(abs(one[0][n] - two[0][n]).max() for n in one[0])
print(error < 1e-10, dtypes[0], one[1:] == two[1:])
"""


def test_structures_are_those_of_the_linen_twin():
  assert processes.output(TWINS, x64=True) == 'True float64 True'


def on_digits(num_classes, rngs):
  return Residual(num_classes, inputs=1, rngs=rngs)


def test_a_factory_may_return_an_nnx_module():
  by_class = surgery.network_from_factory(f'{__name__}:Residual', 3, 8, 3)
  network = surgery.network_from_factory(f'{__name__}:on_digits', 3, 8, 1)
  assert by_class.table.sizes == network.table.sizes
  narrow = network.narrow((2, 2))
  assert network.cost_model.macs((2, 2)) == costs.count(narrow, (8, 8, 1))[0]
  drawn = jax.jit(narrow.init)(jax.random.key(0), X[..., :1])
  kernel = drawn['params']['a']['Conv_1']['kernel']
  assert kernel.shape == (3, 3, 2, 6)
  assert kernel.std() == pytest.approx(1 / np.sqrt(18), rel=0.3)  # LeCun.
