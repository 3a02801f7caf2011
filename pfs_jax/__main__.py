"""The command line: `python -m pfs_jax --config digits --mode=run`."""

from absl import flags

from pfs_jax import command

flags.adopt_module_key_flags(command)  # So that --help shows them.

if __name__ == '__main__':
  command.start()
