"""The summary for the terminal: a table, and what the page says first."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from adamac.bakeoff.report.words import decibels, has_tail, number, percent, times, verdict, warnings
from adamac.bakeoff.rows import Row


def arms_table(summary: dict[str, Any]) -> Table:
    """One line an arm, narrow enough for 80 columns."""
    arms = summary["arms"]
    compiled = ", all compiled" if summary["run"]["config"].get("compile") else ""
    title = f"speed-up over {summary['strongest_dense'] or 'nothing'}{compiled}, quality against dense"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    latencies = {"p50 s": "latency_p50_s"}
    latencies |= (
        {"p95 s": "latency_p95_s", "p99 s": "latency_p99_s"}
        if has_tail(summary)
        else {"largest s": "latency_max_s"}
    )
    headings = ["arm", *latencies, "speed-up", "GiB", "density", "PSNR dB", "SSIM"]
    failed = any(arm["errors"] for arm in arms.values())
    for heading in headings + ["failed"] * failed:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for name, arm in arms.items():
        cells = [name + ("*" if arm["only_first_calls"] else "")]
        cells += [number(arm[figure], 1) for figure in latencies.values()]
        cells += [times(arm["speedup"]), number(arm["peak_gib"], 1), percent(arm["density"])]
        cells += [decibels(arm["psnr_db"]).removesuffix(" dB"), number(arm["ssim"], 3)]
        table.add_row(*cells, *[str(arm["errors"])] * failed)
    if any(arm["only_first_calls"] for arm in arms.values()):
        table.caption = "* only first calls were timed"
    return table


def lines(summary: dict[str, Any], rows: list[Row]) -> list[str]:
    """What stands below the table: how sure the gains are, and what a reader must know before believing a figure."""
    return [*verdict(summary), *warnings(summary, rows)]
