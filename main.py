"""The command line: flags and a table of modes; see README.md.

  python main.py --config configs/digits.py --mode=run
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pfs_jax import errors, runs, stages

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A config file, with an optional :variant.', lock_config=True
)
MODE = flags.DEFINE_enum('mode', None, list(stages.MODES), 'What to do.')
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The folder of the run; default runs/<config>[-variant].'
)


def workdir() -> pathlib.Path:
  """The run's folder: as asked, or named after the config and its variant."""
  if WORKDIR.value:
    return pathlib.Path(WORKDIR.value)
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, variant = name.partition(':')
  stem = pathlib.Path(path).stem
  return pathlib.Path('runs') / (f'{stem}-{variant}' if variant else stem)


def parse(argv: list[str]) -> list[str]:
  """absl's flags; whatever is wrong with them is the user's to mend."""
  try:
    rest = flags.FLAGS(argv)
    for name in ('config', 'mode'):
      if flags.FLAGS[name].value is None:
        raise errors.UserError(f'--{name} is required; see README.md.')
  except (flags.Error, AttributeError, KeyError, IndexError, OSError) as e:
    raise errors.UserError(str(e.args[0] if e.args else e)) from e
  if len(rest) > 1:
    raise errors.UserError(f'unexpected argument {rest[1]!r}.')
  return rest


def main(argv: list[str]) -> None:
  """Runs one mode in the workdir."""
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX tells of TPUs that are not there.
  stages.MODES[MODE.value](stages.Job(CONFIG.value, workdir()))


def guarded(function):
  """User errors become one to three lines on stderr and exit code 2."""

  def run(argv):
    try:
      return function(argv)
    except errors.UserError as e:
      sys.exit(print(f'error: {e}', file=sys.stderr) or 2)
    except runs.Interrupted as e:
      sys.exit(print(e, file=sys.stderr) or 128 + e.signal)

  return run


if __name__ == '__main__':
  app.run(guarded(main), flags_parser=guarded(parse))
