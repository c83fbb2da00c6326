"""The command line of the benchmark."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand

from .rows import read
from .run import Run, run
from .summary import tables


@dataclass(frozen=True)
class Summary:
    """Print the rows of a file as tables.

    Attributes:
        rows: What was given to run as --out; several files are read as one.
    """

    rows: Positional[tuple[Path, ...]]


Command = Annotated[Run, subcommand("run")] | Annotated[Summary, subcommand("summary")]


def main() -> int:
    """Run one command; returns the exit code."""
    options = tyro.cli(Command, prog="python -m benchmarks.moe", description=__doc__)
    try:
        if isinstance(options, Summary):
            print(tables([row for path in options.rows for row in read(path)]))
            return 0
        rows = run(options, say=lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"moe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"broken off; finished rows are in {options.out}", file=sys.stderr)
        return 130
    print(tables(rows))
    return 1 if any(row["status"] in ("error", "wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
