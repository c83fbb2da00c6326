"""Rows of the benchmark on a terminal: a table a shape that fits 80 columns, plain lines where there are fewer.

Rows on the disk have more: the density that was reached, clusters, memory, stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

_LEAST_COLUMNS = 80
_PARTS = (", plan", ", attend")


def show(rows: list[Row], console: Console) -> None:
    """Print what was timed by shape, then once what could not be, with the reason."""
    timed: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "refused" not in row:
            timed[row["shape"]].append(row)
    for shape, of_shape in timed.items():
        ordered = list(_parts_below(of_shape))
        if console.width >= _LEAST_COLUMNS:
            console.print(_table(shape, ordered))
        else:
            _say(console, f"{shape}, {_TITLE}")
            for row in ordered:
                _say(console, _line(row))
        _say(console, _kernels(of_shape))
    for line in not_timed(rows):
        _say(console, line)


_TITLE = "one self-attention call, milliseconds"


def _table(shape: str, rows: list[Row]) -> Table:
    table = Table(title=f"{shape}, {_TITLE}", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm")
    apart = _host_is_apart(rows)
    for heading in ("p50", "p20 to p80", *["host"] * apart, "x dense", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [_name(row), _ms(row["time_ms"]), f"{_ms(row['time_ms_p20'])} to {_ms(row['time_ms_p80'])}"]
        cells += [_ms(row["host_ms"])] * apart
        table.add_row(*cells, _over_dense(row), f"{row['cost']:.1%}" if "cost" in row else "")
    return table


def _line(row: Row) -> str:
    over = f", {_over_dense(row)} x dense" if _over_dense(row) else ""
    cost = f", cost {row['cost']:.1%}" if "cost" in row else ""
    return f"{_name(row)}: {_ms(row['time_ms'])}{over}{cost}"


def _over_dense(row: Row) -> str:
    """Speed-up of a whole call; a part of one does not do what a dense call does."""
    return "" if row["arm"].endswith(_PARTS) else f"{row['speedup']:.2f}"


def _host_is_apart(rows: list[Row]) -> bool:
    """Whether there is a device besides the host, whose time in the queue is another figure."""
    return any(row["host_ms"] != row["time_ms"] for row in rows)


def _name(row: Row) -> str:
    """The arm, or, indented below its arm, the part of it."""
    part = next((part for part in _PARTS if row["arm"].endswith(part)), None)
    return row["arm"] if part is None else f"  of it {part.removeprefix(', ')}"


def _parts_below(rows: list[Row]) -> Iterator[Row]:
    """Each sparse arm before its parts, which were timed first."""
    waiting: list[Row] = []
    for row in rows:
        if row["arm"].endswith(_PARTS):
            waiting.append(row)
        else:
            yield row
            yield from waiting
            waiting = []


def _kernels(rows: list[Row]) -> str:
    """What speed-ups are over, and what sparse arms ran by."""
    impls = ", ".join(dict.fromkeys(row["impl"] for row in rows if "impl" in row))
    return f"x dense: over dense {rows[0]['fastest_dense']}, the fastest; sparse calls ran by {impls}"


def not_timed(rows: list[Row]) -> list[str]:
    """A line for each kernel that was not timed, with all its densities and the reason, however many shapes said so."""
    refused: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        if "refused" in row:
            name, _, density = row["arm"].rpartition(" ")
            kernel = (name, density) if density.endswith("%") else (row["arm"], "")
            refused[kernel[0], row["refused"]][kernel[1]] = None
    return [
        f"not timed: {' '.join([name, *densities]).rstrip()} ({why})"
        for (name, why), densities in refused.items()
    ]


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
