"""What a user can mend."""


class UserError(ValueError):
  """Bad input. The message is one sentence: what, where, what to do; the command line prints it without a traceback."""


class DataError(UserError):
  """Text that cannot be used; the message names file and line and says what to do."""
