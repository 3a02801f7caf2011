"""Data parallelism over all devices of all processes.

The mesh has one axis, 'data'. Batches are split over it, and everything else is
on every device. The compiler inserts the communication; BatchNorm's statistics
are those of the global batch.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pfs_jax import errors


def check() -> None:
  """Refuses a JAX_PLATFORMS that has no device here."""
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as e:  # JAX asserts that there is one.
    asked = jax.config.values['jax_platforms']
    reason = next(iter(str(e).splitlines()), 'JAX has no support for it.')
    raise errors.UserError(f'JAX_PLATFORMS={asked}: {reason}') from e


@functools.cache
def mesh() -> Mesh:
  """All devices of all processes along the axis 'data'."""
  return Mesh(np.array(jax.devices()), ('data',))


def replicated() -> NamedSharding:
  """The sharding of arrays that are the same on every device."""
  return NamedSharding(mesh(), PartitionSpec())


def _put(x: Any, spec: PartitionSpec) -> jax.Array:
  x = np.asarray(x)
  sharding = NamedSharding(mesh(), spec)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def replicate(tree: Any) -> Any:
  """Copies arrays, which are equal on every process, to every device."""
  return jax.tree.map(lambda x: _put(x, PartitionSpec()), tree)


def split_batch(tree: Any, axis: int = 0) -> Any:
  """Splits arrays, equal on every process, over the devices along `axis`."""
  spec = PartitionSpec(*[None] * axis, 'data')
  return jax.tree.map(lambda x: _put(x, spec), tree)


def steps_per_call(asked: int) -> int:
  """Steps compiled into one call: `asked`, or a default if that is 0.

  The default is 1 on CPU, where gradient convolutions are many times slower
  in a loop, and 16 on accelerators, so that they do not wait for the host.
  """
  return asked or (1 if jax.default_backend() == 'cpu' else 16)
