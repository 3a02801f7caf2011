"""StableHLO: one file with program and weights, for CPU, CUDA and TPU.

The batch size is a symbol. JAX reads the file without Flax and without this
package; jax.export keeps it readable for six months of JAX releases.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export  # Not imported with jax.
import jax.numpy as jnp
import numpy as np

FILE = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
PACKAGES = ()


def images(shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
  """float32 [b, H, W, C] with a symbol b."""
  (batch,) = jax.export.symbolic_shape('b')
  return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


def write(
  folder: pathlib.Path,
  module: Any,
  variables: Mapping[str, Any],
  shape: tuple[int, int, int],
) -> None:
  """Writes the program of `module.apply(variables, x)`."""
  program = jax.jit(lambda x: module.apply(variables, x))
  exported = jax.export.export(program, platforms=PLATFORMS)(images(shape))
  (folder / FILE).write_bytes(exported.serialize())


def read(
  folder: pathlib.Path, factory: str = ''
) -> Callable[[np.ndarray], np.ndarray]:
  """The function in the file; it needs no factory."""
  del factory
  content = bytearray((folder / FILE).read_bytes())
  return jax.jit(jax.export.deserialize(content).call)
