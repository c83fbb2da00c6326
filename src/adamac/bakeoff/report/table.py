"""The summary as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from adamac.bakeoff.report.words import decibels, number, percent, times


def arms_table(summary: dict[str, Any]) -> Table:
    """One line an arm, narrow enough for 80 columns."""
    arms = summary["arms"]
    title = f"speed-up over {summary['strongest_dense'] or 'nothing'}, quality against dense"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ["arm", "p50 s", "p95 s", "p99 s", "speed-up", "GiB", "density", "PSNR dB", "SSIM"]
    failed = any(arm["errors"] for arm in arms.values())
    for heading in headings + ["failed"] * failed:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for name, arm in arms.items():
        cells = [name + ("*" if arm["only_first_calls"] else "")]
        cells += [number(arm[f"latency_p{share}_s"], 1) for share in (50, 95, 99)]
        cells += [times(arm["speedup"]), number(arm["peak_gib"], 1), percent(arm["density"])]
        cells += [decibels(arm["psnr_db"]).removesuffix(" dB"), number(arm["ssim"], 3)]
        table.add_row(*cells, *[str(arm["errors"])] * failed)
    if any(arm["only_first_calls"] for arm in arms.values()):
        table.caption = "* only first calls were timed"
    return table
