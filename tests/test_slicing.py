"""The weights of the kept channels give what gates of 0 give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfs_jax import errors, groups, models
from tests import own_models

# {family: (base width, side of images)}.
CASES = {
  'resnet8': (2, 8),
  'vgg16': (2, 8),
  'mobilenet_v1': (2, 32),
  'mobilenet_v2': (4, 32),
  'resnet50': (2, 32),
}


@functools.partial(jax.jit, static_argnums=0)
def evaluated(module, variables, x):
  return module.apply(variables, x, train=False)


@pytest.mark.parametrize('name', CASES)
def test_sliced_weights_equal_zero_gates(name, shallow_mobilenets):
  width, size = CASES[name]
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
