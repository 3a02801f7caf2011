"""The exceptions that end the program without a traceback."""

import signal


class UserError(ValueError):
  """An error that the user can fix: one to three lines and exit code 2.

  Every other exception is our own mistake and keeps its traceback.

  >>> raise UserError('config.seed must be at least 0; got -1.')
  Traceback (most recent call last):
  ...
  pfs_jax.errors.UserError: config.seed must be at least 0; got -1.
  """


class Diverged(UserError):
  """A number of a training is not finite."""


def out_of_memory(e: Exception) -> bool:
  """Whether an exception of Python or of XLA says that the memory is full."""
  return isinstance(e, MemoryError) or 'RESOURCE_EXHAUSTED' in str(e)


class Interrupted(Exception):
  """The signal `.signal` stopped the work at `where`; the state is saved.

  >>> str(Interrupted(signal.SIGTERM, 'train step 7'))
  'stopped by SIGTERM at train step 7; saved. The same command continues.'
  """

  def __init__(self, number: int, where: str):
    self.signal = number
    super().__init__(
      f'stopped by {signal.Signals(number).name} at {where}; saved. The same '
      'command continues.'
    )
