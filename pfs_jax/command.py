"""The command line, in a checkout or anywhere after an installation:

python main.py --config configs/digits.py --mode=run
pfs-jax --config digits --mode=run
"""

import importlib
import os
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pfs_jax import (
  console,
  devices,
  errors,
  peers,
  report,
  stages,
  storage,
  studies,
)

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A config file, with an optional :variant.', lock_config=True
)
MODES = [*stages.MODES, 'tournament', 'study', 'report']
MODE = flags.DEFINE_enum('mode', None, MODES, 'What to do; see README.md.')
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The folder of the run; default runs/<config>[-variant].'
)
OUT = flags.DEFINE_string(
  'out', None, 'Folder of an export or report; default: in the workdir.'
)
FORMATS = flags.DEFINE_list(
  'formats', None, 'The formats of an export, such as stablehlo,onnx.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'For several processes: host:port of the first, or auto.'
)
PROCESSES = flags.DEFINE_integer('processes', 1, 'The number of processes.')
PROCESS = flags.DEFINE_integer('process', 0, 'Which one this is, from 0.')


def workdir() -> pathlib.Path:
  """The run's folder; by default named after the config and its variant."""
  if WORKDIR.value:
    return storage.expanded(WORKDIR.value)
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, *variant = name.split(':')
  return pathlib.Path('runs') / '-'.join([pathlib.Path(path).stem, *variant])


def parse(argv: list[str]) -> list[str]:
  """Parses absl's flags, and loads the config file."""
  rest = flags.FLAGS(argv)
  for name in ('config', 'mode'):
    if flags.FLAGS[name].value is None:
      raise errors.UserError(f'--{name} is required; see README.md.')
  if len(rest) > 1:
    raise errors.UserError(f'unexpected argument {rest[1]!r}.')
  CONFIG.value.is_locked  # This reads the file.  # noqa: B018
  return rest


def main(_: list[str]) -> None:
  """Runs one mode."""
  logging.set_verbosity(logging.WARNING)  # JAX logs that it finds no TPU.
  peers.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  devices.check()
  mode, c = str(MODE.value), CONFIG.value
  out = storage.expanded(OUT.value) if OUT.value else None
  for flag, modes in ((OUT, ('export', 'report')), (FORMATS, ('export',))):
    if flag.value and mode not in modes:
      raise errors.UserError(
        f'--{flag.name} is for --mode={" and ".join(modes)}.'
      )
  if mode == 'report':
    report.write(c, workdir(), out)
  elif studies.asked(mode, c):
    studies.run(c, workdir())
  elif mode == 'tournament':
    studies.tournament.run(c, workdir())
  else:
    job = stages.Job(c, workdir())
    stages.execute(mode, job, out, FORMATS.value or ())


def configs() -> pathlib.Path:
  """The folder of the configs that come with the package.

  An installed package has them as pfs_jax.configs.
  """
  package = pathlib.Path(__file__).parent
  inside = (package / 'configs').is_dir()
  return (package if inside else package.parent) / 'configs'


def located(argv: list[str]) -> list[str]:
  """The command line, in which the path of a config replaces its name.

  Configs of an installed package import each other from `configs`, the name
  that they have in a checkout, even where the present folder has a `configs`.

  >>> located(['pfs-jax', '--config=configs/digits.py', '--mode=run'])
  ['pfs-jax', '--config=configs/digits.py', '--mode=run']
  """
  found = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.rpartition('=')
    if not equals and argv[i - 1] in ('--config', '-config'):
      flag = argv[i - 1]
    name, *variant = value.split(':')
    path = configs() / f'{name}.py'
    known = re.fullmatch(r'[\w/]+', name) and os.path.isfile(path)
    if flag in ('--config', '-config') and known:
      if path.is_relative_to(pathlib.Path(__file__).parent):
        sys.modules['configs'] = importlib.import_module('pfs_jax.configs')
      where = ':'.join([str(path), *variant])
      found[i] = f'{flag}={where}' if equals else where
  return found


def start() -> None:
  """Parses the command line and runs one mode; the console script pfs-jax."""
  sys.argv[:] = located(sys.argv)  # ml_collections reads it.
  parser = console.guarded_parser(parse)
  app.run(console.guarded(main), flags_parser=parser)
