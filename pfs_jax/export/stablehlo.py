"""StableHLO: one file with program and weights, for CPU, CUDA and TPU.

The batch size is a symbol. JAX reads the file without Flax and without this
package; jax.export keeps it readable for six months of JAX releases.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export  # Not imported with jax.
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors

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
  facts: Mapping[str, str] | None = None,
) -> None:
  """Writes the program of `module.apply(variables, x)`.

  Of the facts, the file holds 'network' alone, as the name of its function.
  """

  def program(x):
    return module.apply(variables, x)

  program.__name__ = (facts or {}).get('network', 'program')
  exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  (folder / FILE).write_bytes(exported(images(shape)).serialize())


def read(
  folder: pathlib.Path, shape: tuple[int, ...], factory: str = ''
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
  """(the function in the file, the name of its network); needs no factory.

  Raises:
    errors.UserError: The file calls something outside of StableHLO, since such
      a call could run any code of this process; or it takes other images.
  """
  del factory
  exported = jax.export.deserialize(bytearray((folder / FILE).read_bytes()))
  calls = re.findall(r'custom_call @"?([^\s"(]+)', exported.mlir_module())
  foreign = sorted(set(calls) - {'shape_assertion'})
  if foreign:
    raise errors.UserError(f'{FILE} calls {", ".join(foreign)}: not allowed.')
  if [a.shape[1:] for a in exported.in_avals] != [shape]:
    raise errors.UserError(f'{FILE} takes other images than {list(shape)}.')
  return jax.jit(exported.call), exported.fun_name
