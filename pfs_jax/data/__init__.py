"""Data sets: `spec`, `configured`, `open_set`; as arrays: `load`.

This package imports neither TFDS nor scikit-learn; a data set that needs one of
them imports it when it is read.
"""

import pathlib
from typing import Any

from pfs_jax.data import specs
from pfs_jax.data.arrays import Dataset, load
from pfs_jax.data.specs import Spec, is_own, spec

__all__ = [
  'Dataset',
  'Spec',
  'configured',
  'is_own',
  'load',
  'open_set',
  'spec',
]


def configured(fields: Any) -> Spec:
  """The facts of the data set of `config.data`.

  Reads files only where the data are the user's own: class folders are listed,
  a .npz file is read, `config.data.factory` is called.

  Raises:
    errors.UserError: There is no such data set, or it cannot have a value.
  """
  if is_own(fields):
    from pfs_jax.data import own

    return own.configured(fields)
  return specs.configured(fields)


def open_set(config: Any, workdir: pathlib.Path) -> Any:
  """Reads the data set of a config, into memory or as a stream of files.

  Gives `opened.Arrays` or `opened.Streamed`, which have the same methods. Files
  made from the data may be kept in the workdir of the run.

  Raises:
    errors.UserError: The data are missing or wrong.
  """
  from pfs_jax.data import opened

  facts = configured(config.data)
  kind = opened.Arrays if facts.in_memory else opened.Streamed
  return kind(config, facts, workdir)
