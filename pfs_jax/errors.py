"""The one exception that is the user's to mend."""


class UserError(ValueError):
  """Something the user asked for cannot be done; the message says why.

  The command line prints it as one to three lines on stderr and ends with exit
  code 2, without a traceback. Everything else that is raised is our mistake
  and keeps its traceback.
  """
