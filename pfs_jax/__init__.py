"""Pruning from Scratch in JAX and Flax: narrower networks from random weights.

docs/api.md lists the modules and functions that keep their meaning within a
minor version. Importing the package imports none of them, so it is quick.
"""

import importlib
from typing import Any

__version__ = '0.2.0'

__all__ = [
  'config',
  'export',
  'interop',
  'load',
  'models',
  'prune',
  'search',
  'surgery',
  'train',
]


def __getattr__(name: str) -> Any:
  """Imports a module of the API, or `load`, when it is first used."""
  if name == 'load':
    return importlib.import_module('pfs_jax.loading').load
  if name in __all__:
    return importlib.import_module(f'pfs_jax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """What `dir(pfs_jax)` lists."""
  return sorted([*globals(), *__all__])
