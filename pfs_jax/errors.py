"""The exceptions that end the program without a traceback."""

import signal


class UserError(ValueError):
  """Something that the user asked for cannot be done; the message says why.

  The command line prints it as one to three lines on stderr and ends with exit
  code 2, without a traceback. Every other exception is a mistake of ours and
  keeps its traceback.

  >>> raise UserError('config.seed must be at least 0; got -1.')
  Traceback (most recent call last):
  ...
  pfs_jax.errors.UserError: config.seed must be at least 0; got -1.
  """


class Interrupted(Exception):
  """SIGTERM or Ctrl-C came and the state is saved; `.signal` is its number.

  Args:
    number: The signal's number.
    where: What was going on, such as 'train step 7'.

  >>> str(Interrupted(signal.SIGTERM, 'train step 7'))
  'stopped by SIGTERM at train step 7; saved. The same command continues.'
  """

  def __init__(self, number: int, where: str):
    self.signal = number
    super().__init__(
      f'stopped by {signal.Signals(number).name} at {where}; saved. The same '
      'command continues.'
    )
