"""safetensors: the variables by path; the network is built anew from counts."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np

from pfs_jax import errors
from pfs_jax.structures import Structure

FILE = 'model.safetensors'
STRUCTURE = 'structure.json'  # Written with every export.
PLATFORMS = ('cpu', 'cuda', 'tpu')
PACKAGES = ('safetensors',)


def write(
  folder: pathlib.Path,
  module: Any,
  variables: Mapping[str, Any],
  shape: tuple[int, int, int],
) -> None:
  """Writes the variables, named like 'params/stem/conv/kernel'."""
  import safetensors.flax

  del module, shape
  arrays = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  safetensors.flax.save_file(arrays, folder / FILE)


def read(
  folder: pathlib.Path, manifest: Mapping[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
  """The network that the structure describes, with these variables."""
  import safetensors.flax

  structure = Structure.from_json((folder / STRUCTURE).read_text())
  module = builder(manifest['build'])(structure)
  arrays = safetensors.flax.load_file(folder / FILE)
  variables = flax.traverse_util.unflatten_dict(arrays, sep='/')
  apply = jax.jit(lambda variables, x: module.apply(variables, x))
  return lambda x: apply(variables, x)


def builder(name: str) -> Callable[[Structure], Any]:
  """The function 'package.module:function', structure -> module."""
  module, colon, attribute = name.partition(':')
  if not (module and colon and attribute):
    raise errors.UserError(
      f'build must be package.module:function; got {name!r}.'
    )
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as e:
    raise errors.UserError(f'build={name}: {e}.') from e
