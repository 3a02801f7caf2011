"""Gradients of the gates of the MobileNets at the start, for both gate sites.

  python -m benchmarks.gate_sites

prints the tables of docs/gate_sites.md in about a minute on two cores: networks
of base width 8 with new random weights, 64 of scikit-learn's digits enlarged to
32x32, the cross-entropy of one batch with batch statistics.
"""

import datetime
import functools
import os

import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

from pfs_jax import gating, models
from pfs_jax.models import registry

NAMES = ('mobilenet_v1', 'mobilenet_v2')
# {label: (dtype, BatchNorm's epsilon)}.
SETTINGS = {
  'float32': ('float32', 1e-5),
  'float64': ('float64', 1e-5),
  'float64, epsilon 1e-30': ('float64', 1e-30),
}
WIDTH, IMAGE_SIZE, BATCH = 8, 32, 64


def build(name, dtype=jnp.float32, gate_site='acting'):
  """The gated network; block outputs are narrow too, where they can be."""
  multiplier = WIDTH / 32 if name in registry.MULTIPLIED else 1.0
  return models.build(
    name,
    10,
    WIDTH,
    gated=True,
    multiplier=multiplier,
    dtype=dtype,
    gate_site=gate_site,
  )


def batch(dtype) -> tuple[jax.Array, jax.Array]:
  """(images [N, H, W, 3] of mean 0 and deviation 1, labels int [N])."""
  images, labels = datasets.load_digits(return_X_y=True)
  shape = (BATCH, IMAGE_SIZE, IMAGE_SIZE, 1)
  x = jax.image.resize(images[:BATCH].reshape(BATCH, 8, 8, 1), shape, 'linear')
  x = (x - x.mean()) / x.std()
  return jnp.repeat(x, 3, axis=-1).astype(dtype), jnp.asarray(labels[:BATCH])


@functools.cache
def variables(name):
  """Weights and statistics, float32; those of both gate sites are the same."""
  shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
  drawn = models.init(build(name), jax.random.key(0), shape)
  del drawn['gates']
  return jax.device_get(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(name, gate_site, epsilon, weights, gates, x, y):
  built = build(name, x.dtype, gate_site)
  model = built.model.clone(epsilon=epsilon)
  module = built.clone(source=gating.Source(model, built.source.call))

  def loss(gates):
    logits, _ = module.apply(
      {**weights, 'gates': gates}, x, train=True, mutable=['batch_stats']
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return jax.grad(loss)(gates)


def gradients(name, gate_site, dtype, epsilon, gates=None):
  """(gates, dCE/dgates) as collections; by default all gates are 1."""
  if gates is None:
    gates = build(name, jnp.dtype(dtype), gate_site).unit_gates()
  weights = jax.tree.map(lambda v: v.astype(dtype), variables(name))
  x, y = batch(dtype)
  return gates, _gradients(name, gate_site, epsilon, weights, gates, x, y)


def means(name, gate_site, dtype, epsilon) -> dict[str, float]:
  """{layer: mean over its channels of |dCE/dg|}, all gates at 1."""
  _, found = gradients(name, gate_site, dtype, epsilon)
  by_layer = models.gates_by_layer(name, found)
  return {layer: float(abs(g).mean()) for layer, g in by_layer.items()}


def markdown(name) -> str:
  """A row a layer, a column a setting and site."""
  columns = {
    f'{site}, {label}': means(name, site, *setting)
    for label, setting in SETTINGS.items()
    for site in models.GATE_SITES
  }
  lines = [f'| {name} | {" | ".join(columns)} |']
  lines.append('| --- |' + ' --- |' * len(columns))
  for layer in models.gate_sizes(name):
    cells = [f'{column[layer]:.1e}' for column in columns.values()]
    lines.append(f'| {layer} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Prints the tables."""
  jax.config.update('jax_enable_x64', True)
  cores = os.cpu_count()
  print(f'{datetime.date.today()}, {cores} CPU cores, JAX {jax.__version__}')
  for name in NAMES:
    print(f'\n{markdown(name)}')


if __name__ == '__main__':
  main()
