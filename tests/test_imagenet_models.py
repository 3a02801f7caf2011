"""MobileNetV1, MobileNetV2 and ResNet-50: costs, gate sites, gradients."""

import importlib

import flax
import jax
import numpy as np
import pytest

from pfs_jax import models, train
from tests.test_models import paths, shapes

MOBILENETS = ['mobilenet_v1', 'mobilenet_v2']
NAMES = [*MOBILENETS, 'resnet50']


@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnet50'])
def test_multiplier_widens_block_outputs_and_nothing_else(name):
  plain, wide = (
    paths(shapes(models.build(name, 10, multiplier=m))['params'])
    for m in (1.0, 1.25)
  )
  outputs = ('project/conv/kernel', 'conv3/conv/kernel', 'shortcut/conv/kernel')
  convs = [path for path in plain if path.endswith('conv/kernel')]
  for path in convs:
    times = 1.25 if path.endswith(outputs) else 1
    assert wide[path][-1] == times * plain[path][-1], path
  assert sum(path.endswith(outputs) for path in convs) in (17, 16 + 4)


def test_expansion_stays_where_hidden_width_equals_the_inputs():
  sizes = models.gate_sizes('mobilenet_v2')
  inputs = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160]
  counts = [16, *inputs, sizes['last']]
  built = models.build('mobilenet_v2', 10, counts=counts)
  params = shapes(built)['params']
  for block, width in enumerate(inputs, 1):
    kernel = params[f'block{block}']['expand']['conv']['kernel']
    assert kernel.shape == (1, 1, width, width)
  assert 'expand' not in params['block0']
  model = models.cost_model('mobilenet_v2', 10, 32)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert model.params(counts) == total


# Gates and their sites.


def leaf(tree, path):
  return flax.traverse_util.flatten_dict(tree, sep='/')[path]


def with_leaf(tree, path, value):
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return flax.traverse_util.unflatten_dict({**flat, path: value}, sep='/')


@pytest.mark.parametrize('site', models.GATE_SITES)
def test_only_an_acting_gate_of_0_removes_its_channel(site, shallow_mobilenets):
  """Then what the consumer makes of that channel is of no consequence."""
  x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  module = models.build('mobilenet_v1', 10, 2, gated=True, gate_site=site)
  variables = models.init(module, jax.random.key(0), (16, 16, 3))
  gates, at = variables['gates'], 'block0/pointwise/gate'
  gates = with_leaf(gates, at, leaf(gates, at).at[1].set(0.0))
  params = variables['params']
  bias = 'block1/depthwise/bn/bias'
  params = with_leaf(params, bias, leaf(params, bias) + 0.5)
  consumer = 'block1/pointwise/conv/kernel'
  kernel = leaf(params, consumer)
  apply = jax.jit(module.apply)
  logits = [
    apply(
      {**variables, 'params': with_leaf(params, consumer, k), 'gates': gates}, x
    )
    for k in (kernel, kernel.at[:, :, 1].add(1.0), kernel.at[:, :, 0].add(1.0))
  ]
  assert np.array_equal(logits[0], logits[1]) == (site == 'acting')
  assert not np.array_equal(logits[0], logits[2])


@pytest.fixture
def gate_sites(monkeypatch, shallow_mobilenets):
  """The benchmark on shallow networks and few images, in float64."""
  module = importlib.import_module('benchmarks.gate_sites')
  monkeypatch.setattr(module, 'BATCH', 16)
  with jax.enable_x64(True):
    yield module


@pytest.mark.slow  # Compiles seven networks in float64, with the next test.
@pytest.mark.parametrize('name', MOBILENETS)
def test_published_gates_are_cancelled_and_acting_ones_are_not(
  name, gate_sites
):
  """Mean |dCE/dg| of each layer, with BatchNorm's epsilon and without."""
  acting, published, exact = (
    gate_sites.means(name, site, 'float64', epsilon)
    for site, epsilon in (
      ('acting', 1e-5),
      ('published', 1e-5),
      ('published', 1e-30),
    )
  )
  assert list(acting) == list(models.gate_sizes(name))
  # The last group has no depthwise convolution behind it: one site for both.
  last = [means.popitem()[1] for means in (acting, published, exact)]
  assert min(last) > 3e-4
  for layer in acting:
    assert acting[layer] > max(3e-4, 50 * published[layer]), layer
    if (name, layer) != ('mobilenet_v2', 'stem'):  # Some reach 6 in ReLU6.
      assert exact[layer] < 1e-13, layer


@pytest.mark.slow
def test_scale_of_mobilenet_v1s_gates_is_free(gate_sites):
  """sum_k g_k dCE/dg_k = 0 where a convolution with BatchNorm consumes them."""
  name, rng = 'mobilenet_v1', np.random.default_rng(1)
  gates = jax.tree.map(
    lambda g: rng.uniform(0.3, 1.0, g.shape),
    gate_sites.build(name).unit_gates(),
  )
  found = gate_sites.gradients(name, 'acting', 'float64', 1e-30, gates)
  by_layer = [models.gates_by_layer(name, tree).values() for tree in found]
  *scales, last = (
    float(abs((g * d).sum()) / abs(g * d).sum())
    for g, d in zip(*by_layer, strict=True)
  )
  assert last > 1e-3  # The classifier consumes the last layer.
  assert max(scales) < 1e-9 and len(scales) == 4


# Configs.


# Not by their names, for which conftest.py would mark them as slow.
@pytest.mark.parametrize('name', NAMES, ids=range(len(NAMES)))
def test_configs_hold_the_papers_recipe(name):
  module = importlib.import_module(f'configs.{name}')
  c = module.get_config()
  mobile = name in MOBILENETS
  assert c.model.name == name
  assert (c.search.balance, c.search.sparsity) == (0.05, 0.5)
  assert (c.search.epochs, c.search.batch_size) == (1.0, 100)
  recipe = c.train
  assert recipe.decay_rule == ('dense' if mobile else 'all')
  assert recipe.weight_decay == (4e-5 if mobile else 1e-4)
  assert (recipe.nesterov, recipe.momentum) == (True, 0.9)
  assert (recipe.epochs, recipe.label_smoothing) == (150.0, 0.1)
  recipe.batch_size = 1024  # Four devices: four times the rate.
  schedule = train.schedule(recipe, 1000)
  rate = 0.2 if mobile else 0.4
  shares = {0: 1, 500: 0.5, 999: 0.0} if mobile else {0: 1, 299: 1, 301: 0.1}
  for step, share in shares.items():
    assert float(schedule(step)) == pytest.approx(rate * share, abs=1e-5)
  expanded = module.get_config('expanded')
  assert expanded.model.width == 1.25 * expanded.model.base_width
