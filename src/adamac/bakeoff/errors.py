"""The one error of this package that is the user's to mend."""

from __future__ import annotations


class BadInput(ValueError):
    """Something asked for cannot be done as asked.

    The message is one line that names what came, what was expected and, where there is one, the remedy. The command line
    prints it and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
