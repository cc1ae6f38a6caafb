"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """A flag, file or value the user gave is wrong.

    The message is a single line that names the flag or file, what was found and what to do.
    Command-line programs print it without a traceback and exit with status 1; anything else that
    escapes is a bug of ours and keeps its traceback.
    """
