"""The command line: flags and a table of modes; see README.md.

  python main.py --config configs/digits.py --mode=run
"""

import pathlib
import sys

from absl import app, flags
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


def main(argv: list[str]) -> None:
  """Runs one mode in the workdir."""
  if len(argv) > 1:
    raise errors.UserError(f'unexpected argument {argv[1]!r}.')
  job = stages.Job(CONFIG.value, workdir())
  stages.MODES[MODE.value](job)


def parse(argv: list[str]) -> list[str]:
  """absl's flags; whatever is wrong with them is the user's to mend."""
  try:
    rest = flags.FLAGS(argv)
    if MODE.value is None or CONFIG.value is None:
      missing = 'mode' if MODE.value is None else 'config'
      raise errors.UserError(f'--{missing} is required.')
    return rest
  except (flags.Error, AttributeError, KeyError, IndexError, OSError) as e:
    raise errors.UserError(str(e.args[0] if e.args else e)) from e


def guarded(argv: list[str]) -> None:
  """Parses and runs; user errors become one to three lines and exit code 2."""
  try:
    main(parse(argv))
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
  except runs.Interrupted as e:
    print(e, file=sys.stderr)
    sys.exit(128 + e.signal)
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == '__main__':
  app.run(guarded, flags_parser=lambda argv: argv)
