"""Rows as a table in Markdown, with speed-ups over stock diffusers and over the fastest dense kernel.

A speed-up compares with the same run where that has the dense arm, because ratios hold within one run. Where it has not, the
latest run of the same model, guidance, layers and machine stands in, and the figure carries a star.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .arms import BEST_DENSE, COMPILED, STOCK
from .rows import projected_s

Row = dict[str, Any]

# Rows may be compared if these are equal, and the number of ranks.
SETTING = ("model", "tiny", "guidance", "layers", "dtype", "device", "torch")


@dataclass(frozen=True)
class _Group:
    """All rows of one setting, in the order in which they were made."""

    rows: list[Row]

    def reference(self, row: Row, arm: str) -> tuple[Row | None, str]:
        """The row of a dense arm to compare with, and a star if it is from another run."""
        # Stock is diffusers as it comes, so not compiled; the best dense arm is compiled if the other is and there is such a row.
        names = [arm + COMPILED, arm] if row["compiled"] and arm == BEST_DENSE else [arm]
        for name in names:
            found = [other for other in self.rows if other["arm"] == name and other["dense"]]
            same = [other for other in found if other["run"] == row["run"]]
            if found:
                return (same or found)[-1], "" if same else "*"
        return None, ""


def table(rows: list[Row]) -> str:
    """Draw one table a setting."""
    return "\n\n".join(_table(group) for group in _groups(rows))


def ranks_of(row: Row) -> int:
    """Over how many ranks a row's videos were spread; early rows were made when there was one only, and do not say."""
    return row.get("ranks", 1)


def main_figures(row: Row) -> Row | None:
    """The figures of the steps that an arm is about: sparse ones, or dense ones if it has no others."""
    return row["sparse"] or row["dense"]


def _groups(rows: list[Row]) -> list[_Group]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row.get(name) for name in SETTING), ranks_of(row)), []).append(row)
    return [_Group(group) for group in groups.values()]


def _table(group: _Group) -> str:
    several = len({row["run"] for row in group.rows}) > 1
    columns = (("run", lambda row, group: row["run"]), *_COLUMNS) if several else _COLUMNS
    header = [name for name, _ in columns]
    lines = [_title(group.rows[0]), "", _line(header), "| --- " * len(header) + "|"]
    lines += [_line([cell(row, group) for _, cell in columns]) for row in group.rows]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(row: Row) -> str:
    layers = row["layers"], row["layers_of_model"]
    parts = [
        f"**{row['model']}**" + (" (tiny)" if row["tiny"] else ""),
        f"{row['frames']} frames of {row['height']} x {row['width']}",
        f"{row['video_tokens']:,} video and {row['text_tokens']} text tokens ({row['text_tokens_valid']} valid)",
        f"{layers[0]} layers" if layers[0] == layers[1] else f"layers {layers[0]} of {layers[1]}",
        f"guidance {row['guidance']}",
        f"{row['dtype']}, random weights",
        *([f"spread over {ranks_of(row)} ranks"] if ranks_of(row) > 1 else []),
        f"{row['device']}, torch {row['torch']}, triton {row['triton']}, diffusers {row['diffusers']}",
        f"projected videos: {row['steps_of_video']} steps, the first {row['dense_steps_of_video']} dense",
    ]
    return ", ".join(parts)


def _median_ms(row: Row, kind: str) -> float | None:
    return row[kind]["p50_ms"] if row[kind] else None


def _step_ratio(arm: str) -> Callable[[Row, _Group], str]:
    def cell(row: Row, group: _Group) -> str:
        reference, star = group.reference(row, arm)
        figures = main_figures(row)
        if reference is None or figures is None:
            return "-"
        return f"{reference['dense']['p50_ms'] / figures['p50_ms']:.2f}{star}"

    return cell


def _video_s(row: Row, group: _Group) -> float | None:
    """Projected time of a video; dense steps that were not measured are those of best dense."""
    if row["video_s_projected"] is not None or row["sparse"] is None:
        return row["video_s_projected"]
    reference, _ = group.reference(row, BEST_DENSE)
    medians = {kind: _median_ms(row, kind) for kind in ("dense", "first_sparse", "sparse")}
    if reference is not None and medians["dense"] is None:
        medians["dense"] = _median_ms(reference, "dense")
    return projected_s(row, medians, is_dense=False)


def _video_ratio(arm: str) -> Callable[[Row, _Group], str]:
    def cell(row: Row, group: _Group) -> str:
        reference, star = group.reference(row, arm)
        own = _video_s(row, group)
        theirs = None if reference is None else _video_s(reference, group)
        return "-" if own is None or theirs is None else f"{theirs / own:.2f}{star}"

    return cell


def _time(kind: str) -> Callable[[Row, _Group], str]:
    return lambda row, group: _number(_median_ms(row, kind), ".4g")


def _of_main(name: str, form: str) -> Callable[[Row, _Group], str]:
    return lambda row, group: _number((main_figures(row) or {}).get(name), form)


def _tail(row: Row, group: _Group) -> str:
    figures = main_figures(row)
    return "-" if figures is None else f"{figures['p99_ms'] / figures['p50_ms']:.3f}"


def _stages(row: Row, group: _Group) -> str:
    stages = (main_figures(row) or {}).get("stage_ms_per_step")
    return (
        "-"
        if not stages
        else ", ".join(f"{name} {time_ms:.4g}" for name, time_ms in stages.items() if time_ms)
    )


def _status(row: Row, group: _Group) -> str:
    reasons = (main_figures(row) or {}).get("dense_calls") or {}
    notes = [
        f"{count} calls dense, {reason}" for reason, count in reasons.items() if row["schedule"] != "dense"
    ]
    if row["status"] != "ok":
        notes.insert(0, f"{row['status']}: {row['reason']}")
    return "; ".join(notes)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_COLUMNS: tuple[tuple[str, Callable[[Row, _Group], str]], ...] = (
    ("arm", lambda row, group: row["arm"]),
    ("dense ms", _time("dense")),
    ("first sparse ms", _time("first_sparse")),
    ("sparse ms", _time("sparse")),
    ("n", _of_main("steps", "d")),
    ("p95", _of_main("p95_ms", ".4g")),
    ("p99", _of_main("p99_ms", ".4g")),
    ("p99/p50", _tail),
    ("step x stock", _step_ratio(STOCK)),
    ("step x best dense", _step_ratio(BEST_DENSE)),
    ("video s (projected)", lambda row, group: _number(_video_s(row, group), ".4g")),
    ("video x stock", _video_ratio(STOCK)),
    ("video x best dense", _video_ratio(BEST_DENSE)),
    ("density", _of_main("density", ".3f")),
    ("cost", _of_main("cost", ".3f")),
    ("attention, ms a step", _stages),
    ("peak GiB", lambda row, group: _number(row["peak_gib"], ".1f")),
    ("state MiB", lambda row, group: _number(row["state_bytes"] / 2**20, ".0f")),
    ("remarks", _status),
)
