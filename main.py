"""The command line of a checkout: flags and modes; see README.md.

python main.py --config configs/digits.py --mode=run
"""

from absl import flags

from pfs_jax import command

flags.adopt_module_key_flags(command)  # So that --help shows them.

if __name__ == '__main__':
  command.start()
