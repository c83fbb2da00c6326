"""What all commands have in common: how a line is said, what the user can mend, and quiet libraries."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console

from adamac.bakeoff.errors import BadInput


def say(console: Console, line: str) -> None:
    """Print a line as it is: paths and brackets in it are no markup, and no line break is added to it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def complain(line: str) -> None:
    """Tell standard error, with the program's name in front."""
    say(Console(stderr=True), f"adamac: {line}")


@contextmanager
def refusals_are_input(prefix: str = "") -> Generator[None]:
    """Turn a ``ValueError`` of the library into :class:`BadInput`: what it refuses is the user's to mend.

    Args:
        prefix: Put in front of the message.
    """
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{prefix}{error}") from error


def quiet_loaders() -> None:
    """Keep the libraries' own bars and advice off the terminal; they are for interactive loading."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
