"""CIFAR ResNets and VGG: sizes, costs, collections, initialisation."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import costs, cpu, errors, models
from pfs_jax.models import registry

# (family, sides of images, channels, multiplier of block outputs).
CASES = [
  ('resnet20', 32, 3, 1.0),
  ('vgg16', 28, 1, 1.0),
  ('mobilenet_v1', 32, 3, 1.0),
  ('mobilenet_v2', 64, 3, 0.25),
  ('resnet50', 224, 3, 1 / 16),
]


def shapes(module, size=32, channels=3):
  x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  return jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)


def paths(tree):
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize('rows', ['cifar', 'imagenet'])
def test_macs_and_parameters_are_the_published_ones(golden, rows):
  found = json.loads((golden / 'macs.json').read_text())[rows]
  assert len(found) >= {'cifar': 11, 'imagenet': 6}[rows]
  shape = {'cifar': (10, 32), 'imagenet': (1000, 224)}[rows]
  for row, published in found.items():
    name, width = row.replace('_bn', '').split('/')
    model = models.cost_model(name, *shape, width=int(width))
    full = model.widths
    assert [model.macs(full), model.params(full)] == published, row


@pytest.mark.parametrize('name, size, channels, multiplier', CASES)
def test_cost_model_is_the_narrow_networks_own_count(
  name, size, channels, multiplier, shallow_mobilenets
):
  shape = (7, size, channels, 12, multiplier)
  model = models.cost_model(name, *shape)
  rng = np.random.default_rng(size)
  counts = [int(rng.integers(1, n + 1)) for n in model.widths]
  counts[rng.integers(len(counts))] = 1
  narrow = models.build(name, 7, 12, counts, multiplier=multiplier)
  traced = costs.count(narrow, (size, size, channels))
  assert (model.macs(counts), model.params(counts)) == traced
  leaves = jax.tree.leaves(shapes(narrow, size, channels)['params'])
  assert model.params(counts) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('name', [name for name, *_ in CASES])
def test_gates_carry_the_names_of_their_groups(name, shallow_mobilenets):
  """Wherever they stand; params is the same tree without them."""
  sizes = models.gate_sizes(name, 8)
  counts = tuple(range(3, 3 + len(sizes)))  # Told apart by their number.
  plain = shapes(models.build(name, 10, 8, counts))
  assert set(plain) == {'params', 'batch_stats'}
  mobile = name.startswith('mobilenet')
  modules = []
  for site in models.GATE_SITES:
    gated = models.build(name, 10, 8, counts, gated=True, gate_site=site)
    by_layer = models.gates_by_layer(name, gated.unit_gates())
    assert list(by_layer) == list(sizes)
    assert [g.shape for g in by_layer.values()] == [(c,) for c in counts]
    table = models.table(name, 10, 32, gate_site=site)
    depthwise = ['depthwise' in g.norms[0] for g in table.groups]
    acting = site == 'acting' and mobile
    assert sum(depthwise) == (len(sizes) - 1 if acting else 0)
    modules.append(gated)
  assert (modules[0] == modules[1]) != mobile
  variables = shapes(gated)
  assert paths(variables['gates']) == paths(gated.unit_gates())
  assert paths(variables['params']) == paths(plain['params'])


def drawn(name, width, channels=3, seed=0):
  module = models.build(name, 10, width)
  size = 32 if name.startswith('mobilenet') else 8
  variables = models.init(module, jax.random.key(seed), (size, size, channels))
  return flax.traverse_util.flatten_dict(variables['params'], sep='/')


def test_init_within_a_callers_program(monkeypatch):
  """There JAX allows no compiler options."""
  options = {'xla_backend_optimization_level': 1}
  monkeypatch.setattr(cpu, 'options_to_run_once', lambda: options)
  registry._compiled_init.cache_clear()

  def drawn(key=None):
    key = jax.random.key(0) if key is None else key
    return models.init(flax.linen.Dense(2), key, (2, 2, 3))

  given = jax.random.key(0)
  for inside in (jax.jit(drawn)(), jax.jit(lambda: drawn(given))()):
    jax.tree.map(np.testing.assert_allclose, inside, drawn())
  registry._compiled_init.cache_clear()


@pytest.mark.parametrize('name', ['resnet8', 'vgg16', 'mobilenet_v1'])
def test_initial_weights(name, shallow_mobilenets):
  """Conv N(0, sqrt(2/(k k C_out))), scale 1 or 0.5, linear as published."""
  params = drawn(name, 4)
  for path, value in params.items():
    if path.endswith('conv/kernel') and value.size > 500:
      fan_out = value.shape[0] * value.shape[1] * value.shape[3]
      assert value.std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.15)
    if path.endswith('bn/scale'):
      assert (value == (0.5 if name == 'vgg16' else 1)).all()
    if path.endswith('bias'):
      assert (value == 0).all()
  kernel = params['classifier/kernel']
  if name == 'resnet8':
    limit = 1 / np.sqrt(len(kernel))
    assert abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.15)
  else:
    assert kernel.std() == pytest.approx(0.01, rel=0.1)


def test_the_seed_changes_every_weight():
  a, b = (drawn('vgg16', 4, seed=seed) for seed in (0, 1))
  for path, value in a.items():
    if path.endswith('kernel'):
      assert not np.isclose(value, b[path]).any(), path


@pytest.mark.parametrize(
  'change,message',
  [
    ({'name': 'resnet21'}, 'config.model.name must be one of resnet20'),
    ({'width': 0}, r'config.model.width must be >= 1; got 0'),
    ({'counts': (1, 2)}, 'must be 9 integers >= 1'),
    ({'counts': (1,) * 8 + (0,)}, 'must be 9 integers >= 1'),
    ({'multiplier': 1.5}, 'config.model.multiplier must be 1.0 for resnet20'),
    ({'gate_site': 'both'}, 'gate_site must be one of acting'),
  ],
)
def test_refusals(change, message):
  with pytest.raises(errors.UserError, match=message):
    models.build(**{'name': 'resnet20', 'num_classes': 10, **change})


@pytest.mark.parametrize(
  ('name', 'counts'), [('vgg16', (24,) * 13), ('mobilenet_v2', (20,) * 18)]
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


def test_widths_besides_a_wider_network_are_refused():
  with pytest.raises(errors.UserError, match='config.model.counts must be ()'):
    models.network('vgg16', 10, 28, 1, width=80, counts=(24,) * 13)
