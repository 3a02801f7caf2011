"""Models of flax.nnx: found, gated, narrowed, the same as Linen's twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from pfs_jax import costs, errors, groups, surgery
from pfs_jax.surgery import nnx_models
from tests import processes

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Block(nnx.Module):
  """A residual block; the shortcut is a convolution where widths differ."""

  def __init__(self, inputs, hidden, outputs, rngs, **kwargs):
    def conv(i, o, size):
      return nnx.Conv(i, o, size, rngs=rngs, **kwargs)

    def norm(n):
      return nnx.BatchNorm(n, momentum=0.9, rngs=rngs, **kwargs)

    self.conv1, self.norm1 = conv(inputs, hidden, (3, 3)), norm(hidden)
    self.conv2, self.norm2 = conv(hidden, outputs, (3, 3)), norm(outputs)
    self.project = inputs != outputs
    if self.project:
      self.shortcut, self.norm3 = conv(inputs, outputs, (1, 1)), norm(outputs)

  def __call__(self, x):
    y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
    if self.project:
      x = self.norm3(self.shortcut(x))
    return nnx.relu(x + y)


class ResNet(nnx.Module):
  def __init__(self, num_classes=3, *, inputs=3, rngs, dtype=jnp.float32):
    kwargs = {'param_dtype': jnp.promote_types(dtype, jnp.float32)}
    self.stem = nnx.Conv(inputs, 6, (3, 3), rngs=rngs, **kwargs)
    self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs, **kwargs)
    self.blocks = nnx.List(
      [Block(6, 4, 6, rngs, **kwargs), Block(6, 5, 8, rngs, **kwargs)]
    )
    self.head = nnx.Linear(8, num_classes, rngs=rngs, **kwargs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((1, 2)))


class LinenBlock(nn.Module):
  hidden: int
  outputs: int
  dtype: object

  @nn.compact
  def __call__(self, x, train):
    def conv(o, size, name):
      return nn.Conv(o, size, param_dtype=self.dtype, name=name)

    def norm(name):
      return nn.BatchNorm(
        not train, momentum=0.9, param_dtype=self.dtype, name=name
      )

    y = nn.relu(norm('norm1')(conv(self.hidden, (3, 3), 'conv1')(x)))
    y = norm('norm2')(conv(self.outputs, (3, 3), 'conv2')(y))
    if x.shape != y.shape:
      x = norm('norm3')(conv(self.outputs, (1, 1), 'shortcut')(x))
    return nn.relu(x + y)


class LinenBlocks(nn.Module):
  dtype: object

  @nn.compact
  def __call__(self, x, train):
    x = LinenBlock(4, 6, self.dtype, name='0')(x, train)
    return LinenBlock(5, 8, self.dtype, name='1')(x, train)


class LinenResNet(nn.Module):
  """The twin of `ResNet`, with layers of the same names."""

  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), param_dtype=self.dtype, name='stem')(x)
    x = nn.BatchNorm(
      not train, momentum=0.9, param_dtype=self.dtype, name='norm'
    )(x)
    x = LinenBlocks(self.dtype, name='blocks')(nn.relu(x), train)
    return nn.Dense(3, param_dtype=self.dtype, name='head')(x.mean((1, 2)))


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
    self.first, self.last = Unit(3, 6, rngs), Unit(4, 5, rngs)
    self.up = nnx.ConvTranspose(
      6, 4, (2, 2), (2, 2), transpose_kernel=transpose_kernel, rngs=rngs
    )
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.up(self.first(x))))
    return self.head(self.last(x).mean((1, 2)))


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


def parameters(model):
  return sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
  ('cls', 'sizes'),
  [
    (ResNet, {'blocks/0/conv1': 4, 'blocks/1/conv1': 5}),
    (MnistCnn, {'conv1': 5, 'conv2': 6}),
  ],
)
def test_found_checked_and_narrowed_to_an_ordinary_module(cls, sizes):
  model = cls(rngs=nnx.Rngs(0))
  before = parameters(model)
  table = surgery.discover(model, X)
  assert table.sizes == sizes
  counts = (2, 3)
  narrow = surgery.narrow(model, table, counts, verify=True, x=X)
  assert type(narrow) is cls
  narrow.eval()
  assert nnx.jit(lambda m, x: m(x))(narrow, X).shape == (2, 3)
  cost_model = surgery.cost_model(model, table, X[:1])
  assert cost_model.params(counts) == parameters(narrow)
  assert cost_model.params(cost_model.widths) == parameters(model) == before
  linen = surgery.network(model, X[:1]).narrow(counts)
  assert cost_model.macs(counts) == costs.count(linen, (8, 8, 3))[0]


def test_narrow_weights_are_the_kept_ones():
  model = ResNet(rngs=nnx.Rngs(0))
  table = surgery.discover(model, X)
  kept = {'blocks/0/conv1': [1, 3], 'blocks/1/conv1': [0, 2, 4]}
  variables = nnx_models.variables_of(model)
  sliced = table.slice_variables(variables, kept)
  narrow = nnx_models.narrowed(model, table, (2, 3), sliced)
  conv = narrow.blocks[0].conv1
  np.testing.assert_array_equal(
    conv.kernel[...], model.blocks[0].conv1.kernel[...][..., [1, 3]]
  )
  assert (conv.out_features, conv.kernel_shape) == (2, (3, 3, 6, 2))
  assert narrow.blocks[0].norm1.num_features == 2
  assert narrow.blocks[0].conv2.in_features == 2
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


def narrowed(model):
  """(table, its narrow module's costs checked) at about half the channels."""
  table = surgery.discover(model, X)
  cost_model = table.cost_model()
  counts = [max(1, n // 2) for n in cost_model.widths]
  narrow = surgery.narrow(model, table, counts, verify=True, x=X)
  assert cost_model.params(counts) == parameters(narrow)
  return table


@pytest.mark.parametrize('transpose_kernel', [False, True])
def test_a_transposed_convolution_is_narrowed(transpose_kernel):
  model = Upward(rngs=nnx.Rngs(0), transpose_kernel=transpose_kernel)
  assert list(narrowed(model).sizes) == ['first/conv', 'up', 'last/conv']


@pytest.mark.parametrize(
  ('options', 'names'),
  [
    ({'num_groups': 6}, ['first/conv', 'last/conv']),
    ({'num_groups': 2}, ['last/conv']),
  ],
)
def test_group_norm_is_narrowed_where_it_has_one_channel(options, names):
  model = Transformed(directly, rngs=nnx.Rngs(0), norm=nnx.GroupNorm, **options)
  table = narrowed(model)
  assert list(table.sizes) == names
  if len(names) == 1:
    reason = 'read by first/norm: it normalises 3 neighbouring channels'
    assert table.left_alone['first/conv'].startswith(reason)


@pytest.mark.parametrize('transform', [nnx.jit, nnx.remat, None])
def test_what_nnx_transforms_is_counted_and_left_alone(transform):
  rngs = nnx.Rngs(0)
  model = Transformed(transform, rngs=rngs) if transform else Scanned(rngs=rngs)
  table = narrowed(model)
  assert list(table.sizes) == ['last/conv']
  plain = surgery.discover(Transformed(directly, rngs=nnx.Rngs(0)), X)
  loop = 3 * 64 * 54 * 6 if transform is None else 0  # 3 times 3x3 on 8x8.
  whole, cost_model = plain.cost_model(), table.cost_model()
  assert cost_model.macs((5,)) == whole.macs((6, 5)) + loop


def test_a_mixer_is_left_alone_with_the_reason():
  model = Mixer(rngs=nnx.Rngs(0))
  table = surgery.discover(model, X)
  assert 'embed' in table.left_alone and 'mix' in table.left_alone
  with pytest.raises(errors.UserError, match='no channel of the model can'):
    surgery.gate(model, table)


def test_dropout_draws_from_the_steps_key():
  model = MnistCnn(rngs=nnx.Rngs(0))
  model.factor = nnx.Param(jnp.full((1, 3), 0.1))  # Is drawn as it is.
  gated = surgery.gate(model, surgery.discover(model, X))
  variables = jax.jit(gated.init)(jax.random.key(0), X)
  np.testing.assert_array_equal(variables['params']['factor'], model.factor)

  @jax.jit
  def logits(key):
    out, _ = gated.apply(
      variables, X, train=True, mutable=['batch_stats'], rngs={'dropout': key}
    )
    return out

  a, b = jax.random.split(jax.random.key(0))
  np.testing.assert_array_equal(logits(a), logits(a))
  assert not np.array_equal(logits(a), logits(b))


class Noisy(nnx.Module):
  """Draws from a stream of its own, as one key or as two."""

  def __init__(self, *, rngs, split):
    self.head = nnx.Linear(3, 3, rngs=rngs)
    key = jax.random.key(1)
    self.noise = nnx.Rngs(noise=jax.random.split(key) if split else key)

  def __call__(self, x):
    keys = jnp.atleast_1d(self.noise.noise.key[...])
    x = x.mean((1, 2))
    return self.head(x + jax.random.normal(keys[-1], x.shape))


@pytest.mark.parametrize('split', [False, True])
def test_any_stream_draws_from_the_steps_key(split):
  adapter = nnx_models.as_linen(Noisy(rngs=nnx.Rngs(0), split=split))
  keys = jax.random.split(jax.random.key(0), 3)
  variables = adapter.init(keys[0], X)
  a, b = (
    adapter.apply(variables, X, train=True, rngs={'params': key})
    for key in keys[1:]
  )
  assert not np.array_equal(a, b)


TWINS = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from pfs_jax import prune, search, surgery
from pfs_jax.surgery import nnx_models
from tests import test_nnx
x = np.random.default_rng(0).normal(size=(8, 8, 8, 3))
y = jnp.arange(8) % 3
twins = (
  test_nnx.ResNet(rngs=nnx.Rngs(0), dtype=jnp.float64),
  test_nnx.LinenResNet(jnp.float64),
)
weights = nnx_models.variables_of(twins[0])
found = []
for model in twins:
  table = surgery.discover(model, x[:1])
  gated = surgery.gate(model, table)
  state = search.init(
    gated, {**weights, 'gates': gated.unit_gates()},
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
print(error < 1e-10, one[0]['blocks/0/conv1'].dtype, one[1:] == two[1:])
"""


def test_structures_are_those_of_the_linen_twin():
  assert processes.output(TWINS, x64=True) == 'True float64 True'


def on_digits(num_classes, rngs):
  return ResNet(num_classes, inputs=1, rngs=rngs)


def test_a_factory_may_return_an_nnx_module():
  by_class = surgery.network_from_factory(f'{__name__}:ResNet', 3, 8, 3)
  network = surgery.network_from_factory(f'{__name__}:on_digits', 3, 8, 1)
  assert by_class.table.sizes == network.table.sizes
  narrow = network.narrow((2, 2))
  drawn = jax.jit(narrow.init)(jax.random.key(0), X[..., :1])
  kernel = drawn['params']['blocks']['0']['conv2']['kernel']
  assert kernel.shape == (3, 3, 2, 6)
  assert kernel.std() == pytest.approx(1 / np.sqrt(18), rel=0.3)  # LeCun.
