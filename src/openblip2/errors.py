"""The exceptions that are part of the interface."""


class UserError(ValueError):
    """What the user handed in cannot be used.

    The message is one line: what was wrong, where, and what would be right. The command line prints it
    without a traceback and ends with exit code 2; from Python it is an ordinary `ValueError`.
    """


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal, and has: what it needs to go on is on disk.

    Attributes:
        code: what the process should exit with, as shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, kind: int) -> None:
        super().__init__(f"stopped by signal {kind}")
        self.code = 128 + kind


def one_line(error: Exception) -> str:
    """The first line of what another library says went wrong, or the kind of error where it says nothing."""
    if "trust_remote_code" in str(error):
        return "it needs the Python code of its own repository, which openblip2 never runs"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
