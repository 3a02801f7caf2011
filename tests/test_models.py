"""CIFAR ResNets and VGG: sizes, costs, collections, initialisation."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import costs, errors, models

NAMES = ['resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110', 'vgg16']
NAMES += ['vgg19']


def key_shape():
  return jax.eval_shape(lambda: jax.random.key(0))


def shapes(module, size=32, channels=3):
  x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  return jax.eval_shape(module.init, key_shape(), x)


def random_counts(name, width, seed):
  rng = np.random.default_rng(seed)
  sizes = models.gate_sizes(name, width).values()
  return tuple(int(rng.integers(1, size + 1)) for size in sizes)


def test_macs_and_parameters_are_the_published_ones(golden):
  rows = json.loads((golden / 'macs.json').read_text())['cifar']
  assert len(rows) >= 11
  for row, (macs, params) in rows.items():
    name, width = row.replace('_bn', '').split('/')
    width = int(width)
    model = models.cost_model(name, 10, 32, 3, width)
    assert (model.macs(model.widths), model.params(model.widths)) == (
      macs,
      params,
    ), row
    built = models.build(name, 10, width)
    assert costs.count(built, (32, 32, 3)) == (macs, params), row


def test_macs_of_a_network_by_hand():
  """ResNet-20 at base width 1 on 4x4x1 images, two classes, summed by hand."""
  counts = (1, 1, 1, 2, 2, 2, 4, 4, 4)
  # Stem; three blocks a stage at 4x4, 2x2, 1x1; shortcuts; pool; linear.
  macs = 9 * 16
  macs += 6 * 9 * 16 * 1
  macs += 9 * 4 * (1 * 2 + 2 * 2) + 4 * 9 * 4 * 4 + 1 * 2 * 4
  macs += 9 * 1 * (2 * 4 + 4 * 4) + 4 * 9 * 16 + 2 * 4
  macs += 4 + 4 * 2
  model = models.cost_model('resnet20', 2, 4, 1, 1)
  assert model.widths == counts
  assert model.macs(counts) == macs


@pytest.mark.parametrize('name', ['resnet20', 'resnet56', 'vgg16', 'vgg19'])
@pytest.mark.parametrize('size,channels', [(32, 3), (28, 1), (8, 1)])
def test_cost_model_is_the_narrow_networks_own_count(name, size, channels):
  width = 12
  model = models.cost_model(name, 7, size, channels, width)
  for seed in range(3):
    counts = random_counts(name, width, seed)
    narrow = models.build(name, 7, width, counts)
    traced = costs.count(narrow, (size, size, channels))
    assert (model.macs(counts), model.params(counts)) == traced
    leaves = jax.tree.leaves(shapes(narrow, size, channels)['params'])
    assert model.params(counts) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('name', NAMES)
def test_gated_layers(name):
  """Gates are named as gate_sizes says; params is the same tree without."""
  plain = shapes(models.build(name, 10, 8))
  gated = shapes(models.build(name, 10, 8, gated=True))
  assert 'gates' not in plain
  assert plain['params'] == gated['params']
  by_layer = models.gates_by_layer(name, gated['gates'])
  sizes = models.gate_sizes(name, 8)
  assert list(by_layer) == list(sizes)
  assert {k: v.shape for k, v in by_layer.items()} == {
    k: (n,) for k, n in sizes.items()
  }
  unit = models.build(name, 10, 8, gated=True).unit_gates()
  assert jax.tree.map(jnp.shape, unit) == jax.tree.map(
    lambda s: s.shape, gated['gates']
  )


def test_a_unit_gate_changes_nothing_and_a_zero_gate_removes():
  module = models.build('resnet20', 10, 4, gated=True)
  variables = models.init(module, jax.random.key(0), (8, 8, 3))
  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  plain = models.build('resnet20', 10, 4)
  without = {k: v for k, v in variables.items() if k != 'gates'}
  full = module.apply(variables, x)
  np.testing.assert_array_equal(full, plain.apply(without, x))
  zero = jax.tree.map(jnp.zeros_like, variables['gates'])
  assert not np.allclose(module.apply({**variables, 'gates': zero}, x), full)


def test_initial_weights():
  """Conv N(0, sqrt(2/(k k C_out))), scale 1 or 0.5, linear as published."""
  vgg = models.init(models.build('vgg16', 10, 16), jax.random.key(0), (8, 8, 3))
  kernel = vgg['params']['conv8']['conv']['kernel']
  assert kernel.shape == (3, 3, 128, 128)
  assert abs(kernel.mean()) < 1e-3
  assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01)
  np.testing.assert_array_equal(vgg['params']['conv8']['bn']['scale'], 0.5)
  np.testing.assert_array_equal(vgg['params']['conv8']['bn']['bias'], 0.0)
  linear = vgg['params']['classifier']['kernel']
  assert linear.std() == pytest.approx(0.01, rel=0.1)
  net = models.init(models.build('resnet20', 10), jax.random.key(0), (8, 8, 3))
  linear = net['params']['classifier']['kernel']
  assert abs(linear).max() <= 1 / np.sqrt(64)
  assert linear.std() == pytest.approx(1 / np.sqrt(3 * 64), rel=0.1)
  np.testing.assert_array_equal(net['params']['stem']['bn']['scale'], 1.0)


def test_the_seed_changes_every_weight():
  module = models.build('vgg16', 10, 4)
  a, b = (
    flax.traverse_util.flatten_dict(
      models.init(module, jax.random.key(seed), (8, 8, 1))['params']
    )
    for seed in (0, 1)
  )
  for path, value in a.items():
    if path[-1] == 'kernel':
      assert not np.isclose(value, b[path]).any(), path


@pytest.mark.parametrize(
  'change,message',
  [
    ({'name': 'resnet21'}, 'config.model.name must be one of resnet20'),
    ({'width': 0}, r'config.model.width must be >= 1; got 0'),
    ({'counts': (1, 2)}, 'must be 9 integers >= 1'),
    ({'counts': (1,) * 8 + (0,)}, 'must be 9 integers >= 1'),
    ({'multiplier': 1.5}, 'config.model.multiplier must be 1.0 for resnet20'),
  ],
)
def test_refusals(change, message):
  with pytest.raises(errors.UserError, match=message):
    models.build(**{'name': 'resnet20', 'num_classes': 10, **change})


@pytest.mark.parametrize(
  ('name', 'counts'),
  [
    ('vgg16', (24,) * 13),
    ('resnet20', (24,) * 9),
    ('mobilenet_v2', (20,) * 18),
  ],
)
def test_a_network_has_the_widths_that_the_config_gives(name, counts):
  network = models.network(name, 10, 28, 1, base_width=16, counts=counts)
  shape = (28, 28, 1)
  assert network.cost_model.widths == counts
  total = costs.count(network.reference, shape)
  assert (network.reference_macs, network.reference_params) == total
  assert total == costs.count(network.module, shape)
  half = [n // 2 for n in counts]
  assert costs.count(network.narrow(half), shape) == (
    network.cost_model.macs(half),
    network.cost_model.params(half),
  )
  assert network.description['counts'] == list(counts)


def test_widths_that_a_network_cannot_have_are_refused():
  with pytest.raises(errors.UserError, match='counts of vgg16 must be 13 int'):
    models.network('vgg16', 10, 28, 1, counts=(24,) * 12)
  with pytest.raises(errors.UserError, match='config.model.counts must be ()'):
    models.network('vgg16', 10, 28, 1, width=80, counts=(24,) * 13)
