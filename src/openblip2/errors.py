"""The exceptions that are part of the interface, and the check for optional packages."""

import importlib.util
import os
import re
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"


class UserError(ValueError):
    """The user's input cannot be used.

    The message is one line that says what is wrong, where, and what would be right. The command line prints it
    without a traceback and ends with exit code 2; from Python it is an ordinary `ValueError`. Control characters, for
    example in file names, are escaped as in Python's strings.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after it saved everything that it needs to continue."""

    def __init__(self, kind: int) -> None:
        super().__init__(f"stopped by signal {kind}")
        self.code = 128 + kind  # exit code by the convention of shells: 130 for Ctrl-C, 143 for SIGTERM


def printable(text: str) -> str:
    """The text with line breaks and other control characters escaped as in Python's strings: "a\\nb.png"."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def number_of(number: int, noun: str, verb: str = "") -> str:
    """A number with its noun and, if given, its verb: "1 row is", "1,200 rows are"."""
    if number != 1:
        noun, verb = f"{noun}s", {"is": "are", "was": "were", "has": "have"}.get(verb, verb)
    return f"{number:,} {noun} {verb}".rstrip()


def require_unicode(text: str) -> None:
    """Refuses a text with lone surrogates (from bytes that are not UTF-8), which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text {text[:40]!r} is not Unicode text: write it in UTF-8") from error


def one_line(error: Exception) -> str:
    """The first line of another library's error message, or the type of the error if it has no message."""
    if "trust_remote_code" in str(error):
        return "it needs the Python code of its own repository, which openblip2 never runs"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def refuse_lfs_pointer(path: str | Path, start: bytes | None = None) -> None:
    """Refuses a git-LFS pointer: the small text file that git puts in place of a file stored with git-LFS.

    Args:
        path: a file, or a folder whose files are checked; any other path is accepted.
        start: the file's first bytes, if they have already been read.
    """
    for file in sorted(Path(path).iterdir()) if start is None and os.path.isdir(path) else [path]:
        if start is None and os.path.isfile(file):
            with open(file, "rb") as opened:
                begin = opened.read(len(_LFS))
        else:
            begin = start or b""
        if begin.startswith(_LFS):
            raise UserError(f"{file}: is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")


def require(what: str, extra: str, *packages: str) -> None:
    """Raises a `UserError` if an optional package is not installed; imports none of them.

    Args:
        what: the setting or command that needs them.
        extra: the extra of this package that installs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'openblip2[{extra}]'")
