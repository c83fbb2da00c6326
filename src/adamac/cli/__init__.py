"""The command line; one file a command, :mod:`adamac.cli.commands` brings them together."""

from adamac.cli.commands import entry, main

__all__ = ["entry", "main"]
