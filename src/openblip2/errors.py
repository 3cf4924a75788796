"""The one exception that is part of the interface."""


class UserError(ValueError):
    """What the user handed in cannot be used.

    The message is one line: what was wrong, where, and what would be right. The command line prints it
    without a traceback and ends with exit code 2; from Python it is an ordinary `ValueError`.
    """
