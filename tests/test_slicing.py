"""The weights of the kept channels give what gates of 0 give."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import errors, models, prune

CASES = {
  'resnet20': (4, 16),
  'vgg16': (4, 16),
  'mobilenet_v1': (4, 32),
  'mobilenet_v2': (4, 32),
  'resnet50': (4, 32),
}


def lively(module, size):
  """Variables with statistics, scales and biases that are not trivial."""
  variables = models.init(module, jax.random.key(0), (size, size, 3))
  rng = np.random.default_rng(0)

  def change(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    if name in ('bias', 'mean'):
      return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
    return leaf

  return jax.tree_util.tree_map_with_path(change, variables)


@functools.partial(jax.jit, static_argnums=0)
def evaluated(module, variables, x):
  return module.apply(variables, x, train=False)


def random_kept(sizes, seed):
  rng = np.random.default_rng(seed)
  return {
    layer: np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False))
    for layer, n in sizes.items()
  }


def set_gates(name, gates, kept):
  """The collection with 1 for kept channels and 0 for the others."""
  by_layer = models.gates_by_layer(name, gates)
  masks = {
    id(by_layer[layer]): np.isin(np.arange(len(by_layer[layer])), indices)
    for layer, indices in kept.items()
  }
  return jax.tree.map(lambda g: jnp.asarray(masks[id(g)], g.dtype), gates)


@pytest.mark.parametrize('name', CASES)
def test_sliced_weights_equal_zero_gates(name):
  width, size = CASES[name]
  module = models.build(name, 5, width, gated=True)
  variables = lively(module, size)
  kept = random_kept(models.gate_sizes(name, width), seed=1)
  gates = set_gates(name, variables['gates'], kept)
  x = jax.random.normal(jax.random.key(1), (3, size, size, 3))
  wide = evaluated(module, {**variables, 'gates': gates}, x)
  counts = tuple(len(indices) for indices in kept.values())
  narrow = models.build(name, 5, width, counts)
  sliced = models.slice_variables(name, variables, kept, width=width)
  shapes = jax.eval_shape(narrow.init, jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, sliced) == jax.tree.map(
    lambda s: s.shape, dict(shapes)
  )
  found = evaluated(narrow, sliced, x)
  scale = float(jnp.abs(wide).max())
  np.testing.assert_allclose(found / scale, wide / scale, atol=1e-5)
  # Not because nothing mattered: other channels give other logits.
  full = evaluated(module, variables, x)
  assert float(jnp.abs(full - wide).max()) > 1e-3 * scale


def test_all_channels_kept_is_the_network_itself():
  module = models.build('vgg16', 5, 3)
  variables = lively(module, 8)
  kept = {k: np.arange(n) for k, n in models.gate_sizes('vgg16', 3).items()}
  sliced = models.slice_variables('vgg16', variables, kept, width=3)
  for path, leaf in flax.traverse_util.flatten_dict(dict(variables)).items():
    np.testing.assert_array_equal(
      flax.traverse_util.flatten_dict(sliced)[path], leaf
    )


def test_refused_at_the_published_site():
  sizes = models.gate_sizes('mobilenet_v1', 4)
  kept = {k: np.arange(n) for k, n in sizes.items()}
  with pytest.raises(errors.UserError, match="gate_site must be 'acting'"):
    models.slice_variables(
      'mobilenet_v1', {}, kept, width=4, gate_site='published'
    )


@pytest.mark.parametrize('indices', [[], [1, 0], [0, 0], [4]])
def test_bad_indices(indices):
  kept = {k: np.arange(n) for k, n in models.gate_sizes('vgg16', 4).items()}
  kept['conv0'] = np.array(indices, int)
  with pytest.raises(ValueError, match=r"kept\['conv0'\] must be sorted"):
    models.slice_variables('vgg16', {}, kept, width=4)


def test_kept_channels_of_a_cut_can_be_sliced():
  model = models.cost_model('resnet20', 5, 16, 3, 4)
  rng = np.random.default_rng(0)
  gates = {
    layer: rng.random(n)
    for layer, n in zip(model.layers, model.widths, strict=True)
  }
  structure = prune.fit(gates, model, model.macs(model.widths) // 2)
  variables = lively(models.build('resnet20', 5, 4), 16)
  kept = prune.kept(gates, structure)
  sliced = models.slice_variables('resnet20', variables, kept, width=4)
  sizes = sum(leaf.size for leaf in jax.tree.leaves(sliced['params']))
  assert sizes == structure.params
