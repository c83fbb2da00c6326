"""The benchmark on a terminal: what fits, what is said once."""

import io

import pytest
from rich.console import Console

from adamac.bench.attention import Times
from adamac.bench.show import show

KEYS = ", keys 6 root N"


def row(arm: str, time_ms: float = 1234.5, shape: str = "hunyuan-129f", **changes) -> dict:
    facts = {"shape": shape, "arm": arm, "time_ms": time_ms, "time_ms_p20": time_ms, "time_ms_p80": time_ms}
    return facts | {"host_ms": 0.5, "speedup": 2.5, "fastest_dense": "flash4"} | changes


def sparse(name: str) -> list[dict]:
    """The rows of a sparse arm in the order that they are timed in."""
    return [row(f"{name}, plan", 1.0), row(f"{name}, attend", 2.0), row(name, cost=0.314, impl="hopper")]


def refused(arm: str, reason: str, shape: str) -> dict:
    return {"shape": shape, "arm": arm, "refused": reason}


ROWS = [
    row("dense flash4"),
    *sparse("adamac 15% compensated"),
    *sparse(f"adamac 15% compensated{KEYS}"),
    *(refused(f"flex blocks {share}", "no GPU", shape) for shape in ("a", "b") for share in ("15%", "5%")),
    refused("k-means of keys, flash-kmeans", "not installed", "a"),
]


def shown(rows: list[dict], width: int) -> list[str]:
    page = io.StringIO()
    show(rows, Console(file=page, width=width))
    return [line.rstrip() for line in page.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_fits_80_columns_with_an_arm_a_line(width):
    lines = shown(ROWS, width)
    assert max(map(len, lines)) <= 80
    arms = [line for line in lines if line.lstrip().startswith(("dense", "adamac"))]
    assert len(arms) == 3
    assert "31.4%" in arms[-1]


def test_parts_stand_below_their_arm_and_are_not_compared_with_dense():
    lines = shown(ROWS[:4], 80)
    place = next(place for place, line in enumerate(lines) if "adamac 15%" in line)
    assert [line.split()[:3] for line in lines[place + 1 : place + 3]] == [
        ["of", "it", "plan"],
        ["of", "it", "attend"],
    ]
    assert "2.50" in lines[place]
    assert not any("2.50" in line for line in lines[place + 1 :])


def test_what_was_not_timed_is_said_once_with_its_reason():
    lines = [line for line in shown(ROWS, 80) if "not timed" in line]
    assert lines == [
        "not timed: flex blocks 15% 5% (no GPU)",
        "not timed: k-means of keys, flash-kmeans (not installed)",
    ]


def test_a_narrow_terminal_has_plain_lines():
    lines = shown(ROWS, 60)
    assert f"adamac 15% compensated{KEYS}: 1234, 2.50 x dense, cost 31.4%" in lines
    assert "  of it plan: 1" in lines


def test_spread_lies_between_the_fastest_and_the_slowest_round():
    class Clock:
        def time(self, call):
            took = call()
            return took, took, None

    times = Times(Clock())
    for took in (9.0, 1.0, 5.0):  # the first warms up
        times.take("dense native", lambda took=took: took)
    found = times.row("dense native", "dense native")
    assert 1 <= found["time_ms_p20"] <= found["time_ms"] <= found["time_ms_p80"] <= 5
