"""Data sets: `spec`, `configured`, `open_set`; as arrays: `load`, `split`.

Importing this package brings in NumPy only; TFDS and scikit-learn are imported
by the data sets that need them, when they need them.
"""

from __future__ import annotations

import pathlib
from typing import Any

from pfs_jax.data import specs
from pfs_jax.data.arrays import Dataset, load, split
from pfs_jax.data.specs import Spec, spec

__all__ = ['Dataset', 'Spec', 'configured', 'load', 'open_set', 'spec', 'split']


def configured(fields: Any) -> Spec:
  """The facts of the data set of `config.data`.

  Reads files only where the data are the user's own: class folders are listed,
  a .npz file is read, `config.data.factory` is called.

  Raises:
    errors.UserError: There is no such data set, or it cannot have a value.
  """
  if specs.is_own(fields):
    from pfs_jax.data import own

    return own.configured(fields)
  return specs.configured(fields)


def open_set(config: Any, workdir: pathlib.Path) -> Any:
  """Reads the data set of a config, into memory or as a stream of files.

  Args:
    config: The whole configuration.
    workdir: Where files that are made on the way may be kept.

  Returns:
    `opened.Arrays` or `opened.Streamed`, which have the same methods.

  Raises:
    errors.UserError: The data are missing or not what they should be.
  """
  from pfs_jax.data import opened

  in_memory = configured(config.data).in_memory
  kind = opened.Arrays if in_memory else opened.Streamed
  return kind(config, workdir)
