"""MobileNetV1, MobileNetV2 and ResNet-50: costs, gate sites, gradients."""

import importlib
import json

import flax
import jax
import numpy as np
import pytest

from pfs_jax import config, models, prune, train
from tests import processes
from tests.test_models import paths, shapes

MOBILENETS = ['mobilenet_v1', 'mobilenet_v2']
NAMES = [*MOBILENETS, 'resnet50']
# Block outputs of these are narrow in the tests too.
NARROW = {'mobilenet_v2': 0.25, 'resnet50': 1 / 16}


def test_published_cuts_count_for_count(golden):
  cases = json.loads((golden / 'bisection.json').read_text())
  cases = [(i, c) for i, c in enumerate(cases) if c['arch'] in NAMES]
  arrays = np.load(golden / 'bisection.npz')
  assert {case['arch'] for _, case in cases} == set(NAMES)
  for i, case in cases:
    name, width = case['arch'], case['expanded_inchannel']
    sizes = models.gate_sizes(name, width)
    assert list(sizes.values()) == case['gate_sizes']
    ends = np.cumsum(case['gate_sizes'])[:-1]
    vectors = np.split(arrays[f'gates_{i:02d}'], ends)
    gates = dict(zip(sizes, vectors, strict=True))
    model = models.cost_model(name, 1000, 224, width=width)
    found = prune.published(gates, model, case['ratio'], case['full_macs'])
    assert list(found.counts) == case['counts'], name
    assert (found.macs, found.params) == (case['macs'], case['params'])


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


def test_gate_site_is_without_effect_on_other_families():
  for name in ('resnet20', 'vgg16', 'resnet50'):
    published = models.build(name, 10, gated=True, gate_site='published')
    assert published == models.build(name, 10, gated=True)


@pytest.fixture(scope='module')
def small():
  """(weights of MobileNetV1 at base width 2, images)."""
  x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  plain = models.build('mobilenet_v1', 10, 2)
  return models.init(plain, jax.random.key(0), (16, 16, 3)), x


def leaf(tree, path):
  return flax.traverse_util.flatten_dict(tree, sep='/')[path]


def with_leaf(tree, path, value):
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return flax.traverse_util.unflatten_dict({**flat, path: value}, sep='/')


@pytest.mark.parametrize('site', models.GATE_SITES)
def test_only_an_acting_gate_of_0_removes_its_channel(small, site):
  """Then what the consumer makes of that channel is of no consequence."""
  variables, x = small
  module = models.build('mobilenet_v1', 10, 2, gated=True, gate_site=site)
  gates, at = module.unit_gates(), 'block0/pointwise/gate'
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


GRADIENTS = """
import json, sys
import jax, jax.numpy as jnp
sys.path.insert(0, 'benchmarks')
import gate_sites
gate_sites.BATCH = 16
from pfs_jax import models

def random_gates(name):
  gates = gate_sites.build(name).unit_gates()
  leaves, tree = jax.tree.flatten(gates)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [
    jax.random.uniform(k, g.shape, jnp.float64, 0.3, 1.0)
    for k, g in zip(keys, leaves)])

def scale(name):
  gates, found = gate_sites.gradients(
    name, 'acting', 'float64', 1e-30, random_gates(name))
  by_layer = [models.gates_by_layer(name, g) for g in (gates, found)]
  return {
    layer: float(abs((g * d).sum()) / abs(g * d).sum())
    for (layer, g), d in zip(by_layer[0].items(), by_layer[1].values())}

means = {
  f'{name} {site} {epsilon}':
    gate_sites.means(name, site, 'float64', epsilon)
  for name in gate_sites.NAMES for site in models.GATE_SITES
  for epsilon in (1e-5, 1e-30)
  if (name, site, epsilon) != ('mobilenet_v2', 'acting', 1e-30)}
print(json.dumps([means, scale('mobilenet_v1')]))
"""


@pytest.mark.slow  # Compiles nine networks in float64.
def test_gradients_of_mobilenets_gates():
  """Mean |dCE/dg| and scale sums in float64, in a process of its own."""
  fast_to_compile = {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  out = processes.output(GRADIENTS, x64=True, timeout=600, env=fast_to_compile)
  found, scale = json.loads(out)
  for name in MOBILENETS:
    published_gates_are_cancelled_and_acting_ones_are_not(found, name)
  scale_of_a_layers_gates_is_free(scale)


def published_gates_are_cancelled_and_acting_ones_are_not(gradients, name):
  found = {
    (site, float(epsilon)): means
    for key, means in gradients.items()
    for family, site, epsilon in [key.split()]
    if family == name
  }
  layer_names = list(models.gate_sizes(name))
  assert list(found['acting', 1e-5]) == layer_names
  for layer in layer_names[:-1]:
    acting, published = (found[site, 1e-5][layer] for site in models.GATE_SITES)
    assert acting > 3e-4 and acting > 4 * published, layer
    exact = found['published', 1e-30][layer]
    if (name, layer) != ('mobilenet_v2', 'stem'):  # Some reach 6 in ReLU6.
      assert exact < 1e-13, layer
  # The median layer: orders of magnitude, though the last layers come near.
  ratios = [
    found['acting', 1e-5][layer] / found['published', 1e-5][layer]
    for layer in layer_names[:-1]
  ]
  assert np.median(ratios) > 100
  last = [means[layer_names[-1]] for means in found.values()]
  assert min(last) > 3e-4  # It has no depthwise convolution behind it.


def scale_of_a_layers_gates_is_free(scale):
  """sum_k g_k dCE/dg_k = 0 where a convolution with BatchNorm consumes them."""
  assert list(scale) == list(models.gate_sizes('mobilenet_v1'))
  # The classifier consumes the last layer.
  assert scale.pop('block12/pointwise') > 1e-3
  assert max(scale.values()) < 1e-9


def test_scale_of_resnet50s_gates_is_free():
  """Then scaling the gates of a layer, each layer differently, does nothing."""
  module = models.build(
    'resnet50', 10, 4, gated=True, multiplier=NARROW['resnet50']
  ).with_fields(epsilon=1e-12)
  rng = np.random.default_rng(0)

  def drawn(path, leaf):
    if path[-1].key == 'kernel':
      value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
    else:
      value = np.full(leaf.shape, path[-1].key in ('scale', 'var'))
    return value.astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(drawn, shapes(module))
  gates = jax.tree.map(
    lambda g: rng.uniform(0.3, 1.0, g.shape).astype(np.float32),
    module.unit_gates(),
  )
  scaled = jax.tree.map(lambda g: g * np.float32(rng.uniform(0.2, 1)), gates)
  uneven = jax.tree.map(
    lambda g: g * (1 + 0.1 * (np.arange(len(g)) == 0)), gates
  )

  @jax.jit
  def logits(gates, x):
    return module.apply(
      {**variables, 'gates': gates}, x, train=True, mutable=['batch_stats']
    )[0]

  x = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
  first, second, third = (logits(g, x) for g in (gates, scaled, uneven))
  np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)
  assert np.abs(first - third).max() > 0.05


# Layers.


@pytest.mark.parametrize('name', MOBILENETS)
def test_dense_kernels_decay_even_with_one_input_channel(name):
  counts = [1] * len(models.gate_sizes(name))
  params = shapes(models.build(name, 10, counts=counts))['params']
  mask = flax.traverse_util.flatten_dict(
    train.decay_mask('dense')(params), sep='/'
  )
  kernels = {p for p in paths(params) if p.endswith('kernel')}
  assert {p for p, decays in mask.items() if decays} == {
    p for p in kernels if 'depthwise' not in p
  }
  depthwise = {'mobilenet_v1': 13, 'mobilenet_v2': 17}[name]
  assert sum('depthwise' in p for p in kernels) == depthwise


# Configs.


@pytest.mark.parametrize('name', NAMES)
def test_configs_hold_the_papers_recipe(name):
  module = importlib.import_module(f'configs.{name}')
  for variant in module.VARIANTS:
    config.validate(module.get_config(variant))
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
