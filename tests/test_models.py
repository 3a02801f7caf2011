"""Our families: costs, gates, initial weights, slices, recipes, programs."""

import functools
import importlib
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pfs_jax import costs, cpu, errors, groups, models, search, train
from pfs_jax.models import registry
from tests import own_models

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
def test_only_mobilenets_have_two_gate_sites(name, shallow_mobilenets):
  """The published one is nowhere behind a depthwise convolution."""
  acting, published = (
    models.build(name, 10, 8, gated=True, gate_site=site)
    for site in models.GATE_SITES
  )
  assert (acting == published) != name.startswith('mobilenet')
  table = models.table(name, 10, 32, gate_site='published')
  assert not any('depthwise' in group.norms[0] for group in table.groups)


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


# Families for ImageNet.

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


@pytest.mark.parametrize('site', models.GATE_SITES)
def test_only_an_acting_gate_of_0_removes_its_channel(site, shallow_mobilenets):
  """Then what the consumer makes of that channel is of no consequence."""
  x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  module = models.build('mobilenet_v1', 10, 2, gated=True, gate_site=site)
  variables = models.init(module, jax.random.key(0), (16, 16, 3))
  flat = flax.traverse_util.flatten_dict(variables, sep='/')
  gate, consumer = 'gates/block0/pointwise/gate', 'block1/pointwise/conv/kernel'
  flat[gate] = flat[gate].at[1].set(0.0)
  flat['params/block1/depthwise/bn/bias'] += 0.5
  kernel = flat[f'params/{consumer}']

  @jax.jit
  def logits(kernel):
    changed = {**flat, f'params/{consumer}': kernel}
    return module.apply(flax.traverse_util.unflatten_dict(changed, sep='/'), x)

  removed, other = (kernel.at[:, :, i].add(1.0) for i in (1, 0))
  same = np.array_equal(logits(kernel), logits(removed))
  assert same == (site == 'acting')
  assert not np.array_equal(logits(kernel), logits(other))


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
@pytest.mark.parametrize('name, layers', [('mobilenet_v1', 4), ('vgg16', 12)])
def test_the_scale_of_gates_is_free(name, layers, gate_sites):
  """sum_k g_k dCE/dg_k = 0 where a convolution with BatchNorm consumes them."""
  rng = np.random.default_rng(1)
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
  assert max(scales) < 1e-9 and len(scales) == layers


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


# Slices: the weights of the kept channels give what gates of 0 give.

# {family: (base width, multiplier of block outputs, side of images)}.
FAMILIES = {
  'resnet8': (4, 1.0, 8),
  'vgg16': (4, 1.0, 8),
  'mobilenet_v1': (4, 1.0, 32),
  'mobilenet_v2': (8, 0.25, 32),
  'resnet50': (4, 1 / 16, 32),
}


@functools.partial(jax.jit, static_argnums=0)
def evaluated(module, variables, x):
  return module.apply(variables, x, train=False)


@pytest.mark.parametrize('name', FAMILIES)
def test_sliced_weights_equal_zero_gates(name, shallow_mobilenets):
  width, _, size = FAMILIES[name]
  module = models.build(name, 5, width, gated=True)
  x = jax.random.normal(jax.random.key(1), (3, size, size, 3))
  variables = own_models.drawn(module, x)
  sizes = models.gate_sizes(name, width)
  rng = np.random.default_rng(1)
  kept = {
    layer: np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False))
    for layer, n in sizes.items()
  }
  gates = groups.tree(
    {
      k: np.isin(np.arange(n), kept[k]) * np.float32(1)
      for k, n in sizes.items()
    }
  )
  wide = evaluated(module, {**variables, 'gates': gates}, x)
  counts = tuple(len(indices) for indices in kept.values())
  narrow = models.build(name, 5, width, counts)
  # Flax refuses variables of other shapes than the module's.
  sliced = models.slice_variables(name, variables, kept, width=width)
  assert set(sliced) == {'params', 'batch_stats'}
  found = evaluated(narrow, sliced, x)
  scale = float(jnp.abs(wide).max())
  np.testing.assert_allclose(found / scale, wide / scale, atol=1e-5)
  # Not because nothing mattered: other channels give other logits.
  full = evaluated(module, variables, x)
  assert float(jnp.abs(full - wide).max()) > 1e-3 * scale
  # All channels are the network itself.
  whole = {layer: np.arange(n) for layer, n in sizes.items()}
  same = models.slice_variables(name, variables, whole, width=width)
  del variables['gates']
  assert jax.tree.all(jax.tree.map(np.array_equal, same, variables))


def test_refused_at_the_published_site():
  sizes = models.gate_sizes('mobilenet_v1', 4)
  kept = {k: np.arange(1, n) for k, n in sizes.items()}
  with pytest.raises(errors.UserError, match='stem cannot be sliced'):
    models.slice_variables(
      'mobilenet_v1', {}, kept, width=4, gate_site='published'
    )


@pytest.mark.parametrize('indices', [[], [1, 0], [0, 0], [4]])
def test_bad_indices(indices):
  kept = {k: np.arange(n) for k, n in models.gate_sizes('vgg16', 4).items()}
  kept['conv0'] = np.array(indices, int)
  with pytest.raises(ValueError, match=r"kept\['conv0'\] must be sorted"):
    models.slice_variables('vgg16', {}, kept, width=4)


# The compiled steps lower for accelerators that we do not have.

PLATFORMS = ('tpu', 'cuda')
F32, BF16 = jnp.float32, jnp.bfloat16


def dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def traced(name, step, dtype):
  """A step of search or training, or the evaluation, before its lowering."""
  width, multiplier, size = FAMILIES[name]
  options = {'multiplier': multiplier, 'dtype': dtype}
  module = models.build(name, 10, width, gated=step == 'search', **options)
  x = jax.ShapeDtypeStruct((4, size, size, 3), dtype)
  y = jax.ShapeDtypeStruct((4,), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(module.init, key, x)
  if step == 'eval':
    return jax.jit(module.apply).trace(variables, x)

  def init(v):
    if step == 'train':
      return train.init(module, v, optax.sgd(0.1, 0.9, nesterov=True), 0.1)
    rates = {'sparsity': 0.5, 'balance': 0.5, 'learning_rate': 0.01}
    return search.init(module, v, **rates)

  function = {'search': search.step, 'train': train.step}[step]
  return function.trace(jax.eval_shape(init, variables), x, y)


def convolutions(program, platform):
  text = program.lower(lowering_platforms=(platform,)).as_text()
  return [t for t in text.splitlines() if 'stablehlo.convolution' in t]


@pytest.mark.parametrize(
  'name, step, dtype, count',
  [
    # Each family in one step, each step in both dtypes. The convolutions, and
    # their gradients: of the kernels, and of inputs that depend on what learns.
    ('resnet8', 'search', F32, 9 + 7),
    ('vgg16', 'train', BF16, 13 + 13 + 12),
    ('vgg16', 'search', BF16, 13 + 12),
    ('mobilenet_v1', 'eval', BF16, 9),
    ('mobilenet_v2', 'train', F32, 13 + 13 + 12),
    ('resnet50', 'eval', F32, 53),
  ],
)
def test_steps_lower_for_accelerators(
  name, step, dtype, count, shallow_mobilenets
):
  program = traced(name, step, dtype)
  element = {'float32': 'xf32>', 'bfloat16': 'xbf16>'}[jnp.dtype(dtype).name]
  for platform in PLATFORMS:
    lines = convolutions(program, platform)
    assert len(lines) == count, 'a convolution is not lowered as one'
    assert all(element in line.rpartition('->')[2] for line in lines)
    if name == 'mobilenet_v1':  # Depthwise is grouped.
      assert sum('feature_group_count = 1 :' not in s for s in lines) == 4
  out = program.out_info
  # Parameters, gates, statistics, moments, metrics and logits are float32.
  assert dtypes(out) - {'int32', 'uint32'} == {'float32'}  # Steps and keys.
  if step == 'search':
    assert dtypes(out[0].gates) == dtypes(out[0].params) == {'float32'}
  if step != 'eval':
    assert dtypes(out[0].batch_stats) == {'float32'}
