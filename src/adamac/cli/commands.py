"""The command line: a dataclass and a function for each command.

Nothing heavy is imported before it is needed, so that ``adamac --help`` answers at once. What the user can mend is one line on
standard error and exit code 2; a run that was broken off exits with 130, one in which videos failed with 1.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import subcommand

import adamac
from adamac.bakeoff.errors import BadInput
from adamac.cli.advise import Advise, advise
from adamac.cli.bakeoff import Bakeoff, Report, bakeoff, report
from adamac.cli.bench import Bench, bench
from adamac.cli.doctor import Doctor, doctor
from adamac.cli.lines import complain
from adamac.cli.moe import Moe, moe
from adamac.extras import remedy


@dataclass(frozen=True)
class Version:
    """Print the version; adamac --version does, too."""


Command = (
    Annotated[Bakeoff, subcommand("bakeoff")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Moe, subcommand("moe")]
    | Annotated[Advise, subcommand("advise")]
    | Annotated[Version, subcommand("version")]
)


def version(options: Version, console: Console) -> int:
    """Print the version."""
    console.print(adamac.__version__, highlight=False)
    return 0


# Each command's function, and the extra of the package that has what it needs.
_RUN: dict[type, tuple[Callable[[Any, Console], int], str]] = {
    Bakeoff: (bakeoff, "bakeoff"),
    Report: (report, "bakeoff"),
    Doctor: (doctor, "diffusers"),
    Bench: (bench, "bakeoff"),
    Moe: (moe, "moe"),
    Advise: (advise, "moe"),
    Version: (version, "bakeoff"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; ``None`` means those of the process.

    Returns:
        Exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        options = tyro.cli(Command, prog="adamac", args=["version"] if given == ["--version"] else given)
    except SystemExit as stop:  # tyro, after help or a usage error
        return stop.code if isinstance(stop.code, int) else 2
    run, extra = _RUN[type(options)]
    try:
        return run(options, Console())
    except ModuleNotFoundError as error:
        if (line := remedy(error, extra)) is None:
            raise
        complain(line)
        return 2
    except (BadInput, OSError) as error:  # OSError: a full disk, a directory that went away
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """Run as a program."""
    # torch warns where there is no numpy; commands that need it say so in a line, the others do not need it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        code = main()
    except Exception:
        if not _among_ranks():
            raise
        traceback.print_exc()
        code = 1
    if _among_ranks():
        # Not left in order, since another rank is gone: torch's threads wait for it, and would abort the program as it ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _among_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
