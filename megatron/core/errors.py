"""Exceptions that end a program with one line instead of a traceback, and their exit statuses."""


class UserError(ValueError):
    """A flag, file or value the user gave is wrong.

    The message is a single line that names the flag or file, what was found and what to do.
    Command-line programs print it without a traceback and exit with its status; anything else that
    escapes is a bug of ours and keeps its traceback.
    """

    exit_status = 1


class RunError(RuntimeError):
    """A run cannot go on, through no mistake in its flags; the message is a single line.

    Attributes:
        exit_status: Status of the process; launchers tell the cases apart by it.
    """

    exit_status: int


class CommunicationError(RunError):
    """A collective failed or timed out: another process died, hangs or is cut off."""

    exit_status = 3


class NumericalError(RunError):
    """Numbers that cannot be trusted.

    Too many steps in a row that are not finite, a step that is not repeatable, scores that are no numbers.
    """

    exit_status = 4


class SaveError(RunError):
    """A checkpoint could not be saved, and `--on-save-error` is `stop`."""

    exit_status = 5


def one_line(message: object) -> str:
    """A message, or an error's, without its line breaks."""
    return " ".join(str(message).split())
