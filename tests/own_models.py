"""Linen models as users write them, for the tests of surgery.

Each entry of `CASES` says which channel groups are to be found (producers:
size) and, by a piece of the reason, what is left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import layers


def drawn(module, *args):
  """Random variables that are not trivial, without compiling `init`."""
  random = np.random.default_rng(0)

  def draw(path, leaf):
    name, shape = path[-1].key, leaf.shape
    if name == 'gate':
      value = np.ones(shape)
    elif name in ('scale', 'var'):
      value = random.uniform(0.5, 1.5, shape)
    else:
      deviation = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) > 1 else 0.3
      if len(shape) > 1 and shape[-2] == 1:  # On small maps one tap acts.
        deviation = 1.0
      value = random.normal(0, deviation, shape)
    return value.astype(leaf.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def size(tree):
  """The number of elements."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_same(a, b):
  """Asserts that structures, dtypes, shapes and bytes are the same."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def norm(train, **kwargs):
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, **kwargs)


def unit(train, x, features, name=None, kernel=(3, 3), **kwargs):
  """Convolution, BatchNorm and activation."""
  x = nn.Conv(features, kernel, name=name, **kwargs)(x)
  return nn.relu(norm(train)(x))


class Plain(nn.Module):
  """Compact, with biases in front of BatchNorm, or with other layers."""

  width: int = 6
  dtype: Any = None
  flatten: bool = False
  first_activation: Any = nn.relu
  conv: Any = nn.Conv
  norm: Any = None  # train -> module.

  @nn.compact
  def __call__(self, x, train=False):
    for i, activation in enumerate((self.first_activation, nn.relu)):
      x = self.conv(self.width + i, (3, 3), dtype=self.dtype)(x)
      made = self.norm(train) if self.norm else norm(train, dtype=self.dtype)
      x = nn.max_pool(activation(made(x)), (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1) if self.flatten else x.mean((1, 2))
    return nn.Dense(3, dtype=self.dtype)(x)


class Folded(nn.Module):
  """Windows in the batch, rows in front of an image, pixels in the batch."""

  @nn.compact
  def __call__(self, x, train=False):
    n, h, w, c = x.shape
    x = x.reshape(n, 2, h // 2, 2, w // 2, c).swapaxes(2, 3)
    x = unit(train, x.reshape(4 * n, h // 2, w // 2, c), 6)
    x = unit(train, x.reshape(n, 4, h // 2, w // 2, x.shape[-1]), 7)
    x = nn.relu(norm(train)(nn.Dense(4)(x.reshape(-1, x.shape[-1]))))
    return nn.Dense(3)(x.reshape(n, -1, x.shape[-1]).mean(1))


class Setup(nn.Module):
  """Setup style, told by `deterministic`, keyword inputs."""

  def setup(self):
    self.stem = nn.Conv(5, (3, 3), use_bias=False)
    self.bn = nn.BatchNorm(momentum=0.9)
    self.body = [nn.Conv(7, (3, 3)), nn.Conv(4, (1, 1))]
    self.norms = [nn.BatchNorm(momentum=0.9) for _ in range(2)]
    self.head = nn.Dense(3)

  def __call__(self, x, deterministic=True):
    x = nn.relu(self.bn(self.stem(inputs=x), use_running_average=deterministic))
    for conv, bn in zip(self.body, self.norms, strict=True):
      x = nn.relu(bn(conv(x), use_running_average=deterministic))
    return self.head(x.mean((1, 2)))


class Field(nn.Module):
  """Told by a field of the module, with BatchNorm after the activation."""

  training: bool = True

  @nn.compact
  def __call__(self, x):
    x = norm(self.training)(nn.relu(nn.Conv(5, (3, 3))(x)))
    return nn.Dense(3)(x.mean((1, 2)))


class Block(nn.Module):
  """Residual or bottleneck block."""

  features: int
  hidden: int
  stride: int = 1
  bottleneck: bool = False

  @nn.compact
  def __call__(self, x, train):
    strides = (self.stride,) * 2
    kernel = (1, 1) if self.bottleneck else (3, 3)
    y = unit(train, x, self.hidden, kernel=kernel, strides=strides)
    if self.bottleneck:
      y = unit(train, y, self.hidden)
    y = norm(train)(nn.Conv(self.features, kernel)(y))
    if x.shape != y.shape:
      x = nn.Conv(self.features, (1, 1), strides, name='proj')(x)
      x = norm(train, name='bn_proj')(x)
    return nn.relu(x + y)


class Residual(nn.Module):
  bottleneck: bool = False
  remat: bool = False
  stride: int = 2

  @nn.compact
  def __call__(self, x, train=False):
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    x = unit(train, x, 6)
    x = block(6, 4, bottleneck=self.bottleneck, name='a')(x, train)
    x = block(8, 5, self.stride, self.bottleneck, name='b')(x, train)
    return nn.Dense(3)(x.mean((1, 2)))


class PreAct(nn.Module):
  """BatchNorms on the residual stream."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), name='stem')(x)
    for i in range(2):
      y = nn.Conv(4, (3, 3), name=f'a{i}')(nn.relu(norm(train)(x)))
      x = x + nn.Conv(6, (3, 3), name=f'b{i}')(nn.relu(norm(train)(y)))
    return nn.Dense(3)(layers.GlobalAvgPool()(nn.relu(norm(train)(x))))


class Compared(nn.Module):
  """Compares widths with the numbers in its own code."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 6, 'first')
    y = norm(train)(nn.Conv(6, (3, 3), name='same')(x))
    y += norm(train, name='identity')(x) if x.shape[-1] == 6 else 0
    x = unit(train, y, 8, 'second')
    x = x if x.shape[-1] == 8 else nn.Conv(8, (1, 1), name='extra')(x)
    return nn.Dense(3)(unit(train, x, 5, 'third').mean((1, 2)))


class Depthwise(nn.Module):
  """MobileNet-like; `bare` has no BatchNorm behind the depthwise one."""

  bare: bool = False
  bias: bool = False
  multiplier: int = 1

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), name='expand')(x)
    x = jax.nn.relu6(norm(train, name='bn1')(x))
    grouped = {'feature_group_count': 6, 'use_bias': self.bias or not self.bare}
    x = nn.Conv(6 * self.multiplier, (3, 3), name='depthwise', **grouped)(x)
    if not self.bare:
      x = jax.nn.relu6(norm(train, name='bn2')(x))
    x = norm(train, name='bn3')(nn.Conv(5, (1, 1), name='project')(x))
    return nn.Dense(3)(x.mean((1, 2)))


class Squeeze(nn.Module):
  """Squeeze-and-excite; `bn`: with a BatchNorm inside, then a spatial one."""

  bn: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.silu(norm(train)(nn.Conv(8, (3, 3), name='conv')(x)))
    s = x.mean((1, 2), keepdims=True)
    s = nn.Conv(x.shape[-1] // 2, (1, 1), name='down')(s)
    s = nn.relu(norm(train, name='bn_se')(s) if self.bn else s)
    x = x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name='up')(s))
    if self.bn:
      x = x * nn.sigmoid(nn.Conv(1, (3, 3), name='map')(x))
    x = unit(train, x, 5, 'last', (1, 1))
    return nn.Dense(3)(x.mean((1, 2)))


class Selective(nn.Module):
  """A softmax over two branches; the first row of tiles."""

  @nn.compact
  def __call__(self, x, train=False):
    both = jnp.stack([unit(train, x, 6, name) for name in 'ab'], 1)
    weights = [nn.Dense(6, name=n)(both.mean((1, 2, 3))) for n in 'cd']
    x = (both * nn.softmax(jnp.stack(weights, 1), 1)[:, :, None, None]).sum(1)
    first, *_ = jnp.unstack(jnp.tile(x, (1, 2, 1, 1)), axis=1)
    return nn.Dense(3)(first.mean(1))


class Densely(nn.Module):
  """DenseNet-like: each BatchNorm acts on all earlier outputs."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(5, (3, 3), name='stem')(x)
    for i in range(3):
      y = nn.relu(norm(train)(x))
      x = jnp.concatenate([x, nn.Conv(4, (3, 3), name=f'c{i}')(y)], -1)
    x = nn.avg_pool(nn.relu(norm(train)(x)), (2, 2), (2, 2))
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Inception(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    a = unit(train, x, 3, 'a', (1, 1), use_bias=False)
    b = unit(train, unit(train, x, 2, 'b1', (1, 1)), 4, 'b2')
    c = unit(train, nn.max_pool(x, (3, 3), padding='SAME'), 5, 'c', (1, 1))
    x = jnp.concatenate([a, b, c], axis=-1)
    x = unit(train, x, 4, 'd', (1, 1))
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return nn.Dense(3)(x.mean((1, 2)))


class Shared(nn.Module):
  """One convolution and its BatchNorm on two branches; another three times."""

  @nn.compact
  def __call__(self, x, train=False):
    conv, bn = nn.Conv(5, (3, 3), name='conv'), norm(train, name='bn')
    a, b = nn.relu(bn(conv(x))), nn.relu(bn(conv(x[:, ::-1])))
    again, bn = nn.Conv(6, (3, 3), name='again'), norm(train, name='bn_again')
    c = unit(train, a - b, 6, 'first')
    for _ in range(2):
      c = nn.relu(bn(again(c)))
    return nn.Dense(3)(c.mean((1, 2)))


class Conditioned(nn.Module):
  """Dropout and further arguments, one of them an array."""

  @nn.compact
  def __call__(self, x, t, scale=2.0, *, training=False):
    x = unit(training, x, 6, 'a')
    x = nn.Dropout(0.5, deterministic=not training)(x * scale)
    x = nn.Conv(6, (3, 3), name='b')(x)
    x = x + nn.Dense(6, name='time')(t)[:, None, None]
    x = nn.relu(norm(training)(x))
    return nn.Dense(3)(x.mean((1, 2)))


class Past(nn.Module):
  """A sum of which only one part has a BatchNorm."""

  @nn.compact
  def __call__(self, x, train=False):
    y = norm(train)(nn.Conv(6, (3, 3), name='a')(x))
    y = nn.relu(y + nn.Conv(6, (1, 1), name='b')(x))
    x = unit(train, y, 5, 'c')
    return nn.Dense(3)(x.mean((1, 2)))


class Awkward(nn.Module):
  """What must be left alone, one thing after the other."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 8, 'split')
    x = jnp.concatenate([x[..., :4], nn.tanh(x[..., 4:])], -1)
    x = unit(train, x, 8, 'shuffled')
    x = x.reshape(*x.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(x.shape)
    x = unit(train, x, 8, 'into_groups')
    x = unit(train, x, 8, 'groups', feature_group_count=2)
    x = unit(train, x, 6, 'layer_norm')
    x = nn.LayerNorm()(x)
    x = unit(train, x, 6, 'scaled')
    x = x * self.param('gamma', nn.initializers.ones, (6,)).reshape(1, 1, 1, -1)
    x = nn.relu(nn.Conv(6, (1, 1), name='no_norm')(x))
    x = unit(train, x, 6, 'attended')
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    x = nn.MultiHeadDotProductAttention(2, name='attention')(tokens, tokens)
    return nn.Dense(3)(x.mean(1))


class Halves(nn.Module):
  """A gated linear unit: two halves of one convolution, split by its width."""

  @nn.compact
  def __call__(self, x, train=False):
    x = norm(train)(nn.Conv(8, (3, 3), name='both')(x))
    a, b = jnp.split(x, 2, -1)
    x = norm(train)(nn.Conv(4, (3, 3), name='next')(a * nn.sigmoid(b)))
    return nn.Dense(3)(nn.leaky_relu(nn.elu(nn.gelu(x))).mean((1, 2)))


class Layered(nn.Module):
  """Layers inside nn.scan, nn.vmap and nn.jit."""

  @nn.compact
  def __call__(self, x, train=False):
    def step(block, x, _):
      return block(x), None

    class Unit(nn.Module):
      @nn.compact
      def __call__(self, x):
        return unit(False, x, 4)

    x = unit(train, x, 4, 'first')
    stacked = {
      'variable_axes': {'params': 0, 'batch_stats': 0},
      'split_rngs': {'params': True},
    }
    x, _ = nn.scan(step, length=2, **stacked)(Unit(name='scanned'), x, None)
    x = unit(train, x, 5, 'second')
    several = nn.vmap(Unit, in_axes=None, axis_size=2, **stacked)
    x = several(name='several')(x).sum(0)
    x = unit(train, x, 6, 'third')
    x = nn.jit(Unit)(name='jitted')(x)
    x = unit(train, x, 4, 'fourth')
    return nn.Dense(3)(x.mean((1, 2)))


class MnistCnn(nn.Module):
  """The network of flax/examples/mnist: no BatchNorm, no train argument."""

  @nn.compact
  def __call__(self, x):
    for features in (6, 8):
      x = nn.relu(nn.Conv(features=features, kernel_size=(3, 3))(x))
      x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
    x = x.reshape((x.shape[0], -1))
    x = nn.relu(nn.Dense(features=12)(x))
    return nn.Dense(features=3)(x)


class UNet(nn.Module):
  """Up again by transposed convolutions, with a connection past the middle."""

  transpose_kernel: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    a = unit(train, x, 5, 'down')
    b = unit(train, a, 6, 'middle', strides=(2, 2))
    up = nn.ConvTranspose(
      4, (2, 2), (2, 2), transpose_kernel=self.transpose_kernel, name='up'
    )
    c = jnp.concatenate([a, nn.relu(norm(train)(up(b)))], -1)
    return nn.Dense(3)(nn.Conv(7, (1, 1), name='head')(c).mean((1, 2)))


class Attending(nn.Module):
  """Matrix products outside of layers, one of them in a loop."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 6, 'conv')
    x = nn.Conv(4, (8, 8), padding='VALID', name='last')(x).reshape(len(x), 4)
    mix = self.param('mix', nn.initializers.normal(), (4, 4))
    x, _ = jax.lax.scan(lambda c, _: (c @ mix, None), x, None, length=3)
    return nn.Dense(3)(jnp.einsum('nc,cd->nd', x, mix))


class Between(nn.Module):
  """An operation of the model's own between two units."""

  operation: Any  # x -> x.

  @nn.compact
  def __call__(self, x, train=False):
    x = self.operation(unit(train, x, 8, 'first'))
    return nn.Dense(3)(unit(train, x, 5, 'second').mean((1, 2)))


class ReadInParts(nn.Module):
  """A share of the channels goes through a layer of its own."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 16)
    quarter = x.shape[-1] // 4
    first = unit(train, x[..., :quarter], 4)
    x = jnp.concatenate([first, x[..., quarter:]], axis=-1)
    return nn.Dense(3)(unit(train, x, 6, kernel=(1, 1)).mean((1, 2)))


class PaddedShortcut(nn.Module):
  """A shortcut with zeros for the missing channels, half on each side."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 8)
    y = norm(train)(nn.Conv(16, (3, 3))(x))
    more = y.shape[-1] - x.shape[-1]
    sides = (more // 2, more - more // 2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), sides))
    return nn.Dense(3)(nn.relu(x + y).mean((1, 2)))


class Swapped(nn.Module):
  """Halves that change places, at a fixed channel."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 64, 'first')
    x = jnp.concatenate([x[..., 32:], x[..., :32]], axis=-1)
    return nn.Dense(3)(unit(train, x, 5, 'second').mean((1, 2)))


class ByShape(nn.Module):
  """Blocks with a shortcut of their own where two shapes differ."""

  @nn.compact
  def __call__(self, x, train=False):
    x = unit(train, x, 32)
    for width in (32, 72):
      y = norm(train)(nn.Conv(width, (3, 3))(unit(train, x, width)))
      if x.shape != y.shape:
        x = norm(train)(nn.Conv(width, (1, 1))(x))
      x = nn.relu(x + y)
    return nn.Dense(3)(x.mean((1, 2)))


def printing(x):
  jax.debug.print('called')
  return x


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and what is to be found in it."""

  model: nn.Module
  groups: dict[str, int]
  alone: dict[str, str] = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  further: tuple[Any, ...] = ()
  constant: tuple[str, ...] = ()


class Wider(nn.BatchNorm):
  """A subclass that calls its base: one call, not two."""

  @nn.compact
  def __call__(self, x):
    return super().__call__(x)


def normalised(make, **options):
  return Plain(norm=lambda train: make(**options))


def weight_norm(*args, **kwargs):
  return nn.WeightNorm(nn.Conv(*args, **kwargs))


_TWO = {'Conv_0': 6, 'Conv_1': 7}
_BLOCKS = {'a/Conv_0': 4, 'b/Conv_0': 5}
_MOBILE = {'expand': 6, 'project': 5}

CASES = {
  'plain': Case(Plain(), _TWO, {'Dense_0': 'output'}),
  'bfloat16': Case(Plain(dtype=jnp.bfloat16), _TWO),
  'flatten': Case(Plain(flatten=True), _TWO),
  'folded': Case(Folded(), {'Conv_0': 6, 'Conv_1': 7, 'Dense_0': 4}),
  'setup': Case(Setup(), {'stem': 5, 'body_0': 7, 'body_1': 4}),
  'field': Case(Field(), {'Conv_0': 5}),
  'remat': Case(
    Residual(remat=True),
    _BLOCKS,
    {'Conv_0': 'tied by a sum: Conv_0, a/Conv_1', 'b/proj': 'tied by a sum'},
  ),
  'together': Case(
    Residual(True),
    {
      **{'Conv_0+a/Conv_2': 6, 'b/Conv_2+b/proj': 8, **_BLOCKS},
      **{'a/Conv_1': 4, 'b/Conv_1': 5},
    },
    options={'residual': True},
  ),
  'preact together': Case(
    PreAct(), {'stem+b0+b1': 6, 'a0': 4, 'a1': 4}, options={'residual': True}
  ),
  'compared': Case(
    Compared(),
    {'third': 5},
    {'first': 'does not call identity', 'second': 'code calls extra when'},
    options={'residual': True},
  ),
  'depthwise': Case(Depthwise(), _MOBILE, {'bn1': 'stand further on'}),
  'multiplier': Case(Depthwise(multiplier=2), _MOBILE),
  'bare depthwise': Case(Depthwise(bare=True), _MOBILE),
  'biased depthwise': Case(
    Depthwise(bare=True, bias=True), _MOBILE, constant=('expand',)
  ),
  'squeeze': Case(
    Squeeze(), {'conv+up': 8, 'last': 5}, {'down': 'no BatchNorm between'}
  ),
  'squeeze norm': Case(
    Squeeze(bn=True),
    {'conv+up': 8, 'down': 4, 'last': 5},
    {'map': 'a single channel'},
  ),
  'selective': Case(Selective(), {'a+b+c+d': 6}, options={'residual': True}),
  'dense': Case(Densely(), {'stem': 5, 'c0': 4, 'c1': 4, 'c2': 4}),
  'inception': Case(Inception(), {'a': 3, 'b1': 2, 'b2': 4, 'c': 5, 'd': 4}),
  'shared': Case(
    Shared(), {'conv': 5}, {'again': 'tied by a shared layer', 'first': 'tied'}
  ),
  'shared together': Case(
    Shared(), {'conv': 5, 'first+again': 6}, options={'residual': True}
  ),
  'conditioned': Case(
    Conditioned(),
    {'a': 6, 'b+time': 6},
    options={'residual': True},
    further=(jnp.linspace(-1, 1, 8).reshape(2, 4), 1.5),
  ),
  'constant': Case(
    Plain(first_activation=nn.sigmoid), _TWO, constant=('Conv_0',)
  ),
  'past': Case(
    Past(),
    {'c': 5},
    {'a': 'c also reads it past the BatchNorm', 'b': 'c also reads it past'},
    options={'residual': True},
  ),
  'awkward': Case(
    Awkward(),
    {'layer_norm': 6},
    {
      'split': "the model's code",
      'shuffled': "the model's code",
      'into_groups': 'grouped convolution',
      'groups': 'grouped convolution',
      'scaled': 'combined with the parameter gamma',
      'no_norm': 'no BatchNorm between it and attended',
      'attended': 'mixed by dot_general in Awkward/attention/query',
    },
    constant=('layer_norm',),
  ),
  'read in parts': Case(
    ReadInParts(),
    {'Conv_1': 4, 'Conv_2': 6},
    {'Conv_0': 'Conv_1 does not read all of its channels equally'},
  ),
  'padded shortcut': Case(
    PaddedShortcut(),
    {'Conv_0+Conv_1': 8},
    {'Conv_1': "the model's code sends other channels to Dense_0"},
    options={'residual': True},
  ),
  'swapped': Case(Swapped(), {'second': 5}, {'first': "the model's code"}),
  'by shape': Case(
    ByShape(),
    {
      **{'Conv_0+Conv_1': 32, 'Conv_2': 32},
      **{'Conv_3+Conv_5': 72, 'Conv_4': 72},
    },
    options={'residual': True},
  ),
  'no norm': Case(MnistCnn(), {'Conv_0': 6, 'Conv_1': 8, 'Dense_0': 12}),
  'upward': Case(UNet(), {'down': 5, 'middle': 6, 'up': 4}),
  'upward transposed': Case(UNet(True), {'down': 5, 'middle': 6, 'up': 4}),
  'group norm': Case(
    normalised(nn.GroupNorm, num_groups=None, group_size=1), _TWO
  ),
  'instance norm': Case(normalised(nn.InstanceNorm), _TWO),
  'layer norm': Case(  # A channel of zeros counts in its statistics.
    normalised(nn.LayerNorm), _TWO, constant=('Conv_0', 'Conv_1')
  ),
  'joint norm': Case(
    normalised(nn.GroupNorm, num_groups=1),
    {},
    {'Conv_0': 'read by GroupNorm_0: it normalises 6 neighbouring channels'},
  ),
  'weight norm': Case(
    Plain(conv=weight_norm), {}, {'Conv_0': 'depends on this width'}
  ),
  'transformed classes': Case(
    Plain(conv=nn.remat(nn.Conv), norm=lambda train: Wider(not train)),
    {'CheckpointConv_0': 6, 'CheckpointConv_1': 7},
  ),
  'attending': Case(Attending(), {'conv': 6}),
  'rolled': Case(
    Between(lambda x: jnp.roll(x, 1, -1)),
    {'second': 5},
    {'first': "the model's code"},
  ),
  'doubled end': Case(
    Between(lambda x: jnp.concatenate([x, x[..., -1:]], -1)),
    {'second': 5},
    {'first': 'second does not read all of its channels equally'},
  ),
  'chosen': Case(
    Between(lambda x: jnp.take(x, jnp.array([0, 3, 7]), axis=-1)),
    {'second': 5},
    {'first': "the model's code"},
  ),
  'spread': Case(
    Between(lambda x: x * x.std((1, 2), keepdims=True)),
    {'first': 8, 'second': 5},
  ),
  'printing': Case(Between(printing), {'first': 8, 'second': 5}),
  'halves': Case(Halves(), {'both': 4, 'next': 4}),
  'layered': Case(
    Layered(),
    {'fourth': 4},
    {
      'first': 'mixed by scan',
      'scanned/Conv_0': 'inside nn.jit or a loop',
      'several/Conv_0': 'inside nn.vmap',
      'jitted/Conv_0': 'inside nn.jit or a loop',
      'second': 'nn.vmap',
      'third': 'read by jitted/Conv_0: inside nn.jit',
    },
  ),
}
