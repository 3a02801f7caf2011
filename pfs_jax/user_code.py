"""Imports code of the user that a config names, and reports its errors.

A config is code: what `config.model.factory` and `config.data.factory` name is
imported and called. What data files (manifests, structures, checkpoints) name
is never imported or called.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

from pfs_jax import errors

_PACKAGE = str(pathlib.Path(__file__).parent)
_LIBRARIES = ('site-packages', f'{os.sep}importlib{os.sep}')


def imported(field: str, spec: str) -> Any:
  """Imports what a field of the config names.

  >>> imported('data.factory', 'math:sqrt')(9.0)
  3.0

  Args:
    field: Such as 'data.factory', for messages.
    spec: 'package.module:callable'; the present folder is searched too.

  Raises:
    errors.UserError: It cannot be imported, or is not callable.
  """
  module_name, _, attribute = spec.partition(':')
  if not (module_name and attribute):
    raise errors.UserError(
      f'config.{field} must be package.module:callable; got {spec!r}.'
    )
  here = os.getcwd()  # As `python -m` does.
  if here not in sys.path:
    sys.path.append(here)
  with blamed(field, spec):
    target: Any = importlib.import_module(module_name)
    for name in attribute.split('.'):
      target = getattr(target, name)
  if not callable(target):
    raise errors.UserError(f'config.{field}={spec}: it is not callable.')
  return target


def checksum(*objects: Any) -> str:
  """A hash of the source files that define these functions and classes.

  Files of installed packages and of Python are left out.
  """
  files, installed = set(), (sysconfig.get_path('stdlib'), *_LIBRARIES)
  for x in objects:
    while isinstance(x, functools.partial):
      x = x.func
    module = sys.modules.get(getattr(x, '__module__', ''))
    file = str(getattr(module, '__file__', None) or '')
    if os.path.isfile(file) and not any(part in file for part in installed):
      files.add(file)
  texts = (pathlib.Path(file).read_bytes() for file in sorted(files))
  return hashlib.sha256(b'\0'.join(texts)).hexdigest()


@contextlib.contextmanager
def blamed(field: str, spec: str) -> Iterator[None]:
  """Turns an exception inside the user's code into an error of one line.

  The line says what was raised, and the last place in the traceback that is
  outside of this package and of installed packages.

  Raises:
    errors.UserError: In place of any other exception.
  """
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:
    where = ''
    for frame in traceback.extract_tb(e.__traceback__):
      file = frame.filename
      if not file.startswith((_PACKAGE, '<frozen', sys.prefix)):
        if not any(part in file for part in _LIBRARIES):
          where = f' ({file}:{frame.lineno} in {frame.name})'
    text = ' '.join(str(e).split())[:200]
    raise errors.UserError(
      f'config.{field}={spec}: {type(e).__name__}: {text}{where}.'
    ) from e
