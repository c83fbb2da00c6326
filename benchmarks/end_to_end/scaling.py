"""What several GPUs for one video bring, as a table: steps of every arm by the number of ranks.

Efficiency is the time on one rank over ranks times the time on them: 1.00 means that twice the GPUs take half the time.
"""

from __future__ import annotations

from typing import Any

from .summary import SETTING, main_figures, ranks_of

Row = dict[str, Any]


def scaling(rows: list[Row]) -> str:
    """Draw the table; empty if no arm ran on several ranks."""
    if all(ranks_of(row) == 1 for row in rows):
        return ""
    lines = [
        "| model | arm | ranks | step ms | p95 | p99 | efficiency | slowest rank / mean, attention | peak GiB a GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:  # the latest row of a number of ranks counts
        if main_figures(row) is not None:
            key = (*(row.get(name) for name in SETTING), row["arm"])
            groups.setdefault(key, {})[ranks_of(row)] = row
    for by_ranks in groups.values():
        lines += [_line(by_ranks[ranks], by_ranks.get(1)) for ranks in sorted(by_ranks)]
    return "\n".join(lines)


def _line(row: Row, single: Row | None) -> str:
    figures, alone = main_figures(row), None if single is None else main_figures(single)
    assert figures is not None
    ranks = ranks_of(row)
    efficiency = None if alone is None else alone["p50_ms"] / (ranks * figures["p50_ms"])
    times = [f"{figures[name]:.4g}" for name in ("p50_ms", "p95_ms", "p99_ms")]
    rest = [_number(each, ".3f") for each in (efficiency, figures.get("imbalance"))]
    cells = [row["model"], row["arm"], str(ranks), *times, *rest, _number(row["peak_gib"], ".1f")]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
