"""The command line of the benchmark."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand

from .check import check_ranks
from .ranks import Ranks
from .rows import read
from .run import Run, check, device_of, run
from .scaling import scaling
from .summary import table


@dataclass(frozen=True)
class Summary:
    """Print the rows of a file as tables.

    Attributes:
        rows: What was given to run as --out; several files are read as one.
    """

    rows: Positional[tuple[Path, ...]]


@dataclass(frozen=True)
class Check:
    """Under torchrun: compare videos spread over the ranks with those of one, on small models of all families.

    Attributes:
        device: "cpu" or "cuda".
    """

    device: str = "cuda"


Command = (
    Annotated[Run, subcommand("run")]
    | Annotated[Summary, subcommand("summary")]
    | Annotated[Check, subcommand("check")]
)


def main() -> int:
    """Run one command; returns the exit code."""
    options = tyro.cli(Command, prog="python -m benchmarks.end_to_end", description=__doc__)
    try:
        if isinstance(options, Summary):
            rows = [row for path in options.rows for row in read(path)]
            print("\n\n".join(part for part in (table(rows), scaling(rows)) if part))
            return 0
        if isinstance(options, Check):
            return _check(options)
        check(options)
        ranks = Ranks.join(device_of(options))
        rows = run(options, lambda line: print(line, flush=True), ranks)
    except (ValueError, OSError) as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"broken off; finished turns are in {options.out}", file=sys.stderr)
        return 130
    if ranks.lead:
        print(table(rows))
    ranks.leave()
    return 1 if any(row["status"] == "error" for row in rows) else 0


def _check(options: Check) -> int:
    ranks = Ranks.join(options.device)
    found = check_ranks(ranks, options.device)
    if ranks.lead:
        print("\n".join(map(str, found)))
    ranks.leave()
    return 0 if all(each.passed for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
