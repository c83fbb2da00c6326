"""Charts as SVG: drawn by matplotlib, coloured by the page.

Text stays text. Colours are written as stand-ins and replaced with CSS variables, so that one drawing serves light and dark.
Figures are narrow, since they scale with the page: what is readable here is readable on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from adamac.bakeoff.rows import IDENTICAL_DB, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN = 5.2
_ARM_COLOURS = 8
_STAGES = {
    "text": "text encoding",
    "plan": "planning",
    "attend": "sparse attention",
    "dense": "dense attention",
    "rest": "rest of denoising",
    "denoise": "denoising, not split",
    "decode": "decoding",
}


def _stand_in(place: int) -> str:
    """A colour that no drawing has by chance."""
    return f"#0b0c{place:02x}"


_INK, _LINE = _stand_in(0), _stand_in(1)
_ARMS = [_stand_in(16 + place) for place in range(_ARM_COLOURS)]
_STAGE_COLOURS = {stage: _stand_in(32 + place) for place, stage in enumerate(_STAGES)}
_CSS = {
    _INK: "currentColor",
    _LINE: "var(--line)",
    **{colour: f"var(--arm-{place})" for place, colour in enumerate(_ARMS)},
    **{colour: f"var(--stage-{stage})" for stage, colour in _STAGE_COLOURS.items()},
}
_RC = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# From the page's blue to its orange: sparse is cool, dense is warm, on light and dark alike.
_DENSITY = LinearSegmentedColormap.from_list(
    "density", ["#1f4e9c", "#5b8fd6", "#b9c7d9", "#f0b46a", "#d9622b"]
)


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        kind: ``quality``, ``latency``, ``stages`` or ``density``.
        svg: An ``svg`` element.
        arm: Whose it is, if it is of one arm.
    """

    kind: str
    svg: str
    arm: str | None = None


def arm_colours(arms: list[str]) -> dict[str, int]:
    """The place of each arm's colour in the page's palette."""
    return {arm: place % _ARM_COLOURS for place, arm in enumerate(arms)}


def draw_all(summary: dict[str, Any], rows: list[Row], colours: dict[str, int]) -> list[Chart]:
    """Draw every chart that the figures allow: none of a run in which nothing was made."""
    made = [row for row in rows if row.ok and row.latency_s is not None]
    arms = summary["arms"]
    charts = []
    if any(arm["psnr_db"] is not None for arm in arms.values()):
        charts.append(_chart("quality", "PSNR against latency", lambda: _quality(summary, made, colours)))
    if made:
        charts.append(_chart("latency", "Latency of every video", lambda: _latency(summary, made, colours)))
        charts.append(_chart("stages", "Where the time goes", lambda: _stages(summary)))
    for name, arm in arms.items():
        if table := arm.get("density_by_step_layer"):
            label = f"Density by layer and step, {name}"
            charts.append(_chart("density", label, partial(_density, table), arm=name))
    return charts


def _latency(summary: dict[str, Any], rows: list[Row], colours: dict[str, int]) -> Figure:
    arms = [name for name, arm in summary["arms"].items() if arm["videos"]]
    figure, axes = _figure(0.7 + 0.32 * len(arms))
    for line, name in enumerate(arms):
        colour = _ARMS[colours[name]]
        seconds = [row.latency_s for row in rows if row.arm == name and row.latency_s is not None]
        axes.plot(
            seconds, [line] * len(seconds), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0
        )
        middle = summary["arms"][name]["latency_p50_s"]
        axes.plot([middle, middle], [line - 0.32, line + 0.32], color=colour, linewidth=2)
    _lines_of_arms(axes, arms)
    axes.set_xlabel("seconds a video")
    return figure


def _stages(summary: dict[str, Any]) -> Figure:
    arms = [name for name, arm in summary["arms"].items() if arm["stages_s"]]
    used = [stage for stage in _STAGES if any(summary["arms"][name]["stages_s"].get(stage) for name in arms)]
    figure, axes = _figure(1.25 + 0.32 * len(arms))
    left = np.zeros(len(arms))
    for stage in used:
        widths = np.array([summary["arms"][name]["stages_s"].get(stage, 0.0) for name in arms])
        axes.barh(
            range(len(arms)),
            widths,
            left=left,
            height=0.62,
            color=_STAGE_COLOURS[stage],
            label=_STAGES[stage],
        )
        left += widths
    _lines_of_arms(axes, arms)
    axes.set_xlabel("seconds a video, mean")
    figure.legend(
        loc="outside upper center", ncols=3, frameon=False, fontsize=8, handlelength=1, handleheight=1
    )
    return figure


def _quality(summary: dict[str, Any], rows: list[Row], colours: dict[str, int]) -> Figure:
    figure, axes = _figure(2.9)
    floor = summary["noise_floor"]
    for name, arm in summary["arms"].items():
        if arm["psnr_db"] is None or (floor and name == floor["arm"]):
            continue
        colour = _ARMS[colours[name]]
        points = [(row.latency_s, row.psnr_db) for row in rows if row.arm == name and row.psnr_db is not None]
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(arm["latency_p50_s"], arm["psnr_db"], "o", color=colour, markersize=9)
        near: dict[str, Any] = {"xytext": (7, 4), "textcoords": "offset points"}
        axes.annotate(name, (arm["latency_p50_s"], arm["psnr_db"]), **near)
    dashed: dict[str, Any] = {"color": _INK, "linewidth": 1, "linestyle": (0, (4, 3))}
    if strongest := summary["strongest_dense"]:
        dense = summary["arms"][strongest]["latency_p50_s"]
        axes.axvline(dense, **dashed)
        near = {"xytext": (-4, 2), "textcoords": "offset points", "ha": "right"}
        axes.annotate(strongest, (dense, 0), xycoords=axes.get_xaxis_transform(), **near)
    if floor and floor["psnr_db"] is not None and floor["psnr_db"] >= IDENTICAL_DB:  # off the scale
        axes.set_title(f"noise floor above {IDENTICAL_DB:.0f} dB", fontsize=8, loc="left")
    elif floor and floor["psnr_db"] is not None:
        axes.axhline(floor["psnr_db"], **dashed)
        near = {"xytext": (2, -10), "textcoords": "offset points"}
        axes.annotate("noise floor", (0, floor["psnr_db"]), xycoords=axes.get_yaxis_transform(), **near)
    axes.margins(x=0.2, y=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds a video, p50")
    axes.set_ylabel("PSNR against dense, dB")
    axes.grid(color=_LINE, linewidth=0.5)
    return figure


def _density(table: list[list[float | None]]) -> Figure:
    cells = np.array(table, dtype=np.float64).T  # layers down, steps across; None is NaN and stays empty
    layers, steps = cells.shape
    figure, axes = _figure(min(4.5, max(1.5, 0.8 + 0.16 * layers)))
    image = axes.imshow(cells, cmap=_DENSITY, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(_ticks(steps))
    axes.set_yticks(_ticks(layers))
    axes.set_xlabel("denoising step")
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02)
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "dense"])
    bar.outline.set_visible(False)
    return figure


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _lines_of_arms(axes: Axes, arms: list[str]) -> None:
    axes.set_yticks(range(len(arms)), arms)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 10))))


def _chart(kind: str, label: str, draw: Callable[[], Figure], arm: str | None = None) -> Chart:
    """Draw, and make the SVG fit to stand in a page beside others: ids of its own, the width of its place."""
    name = kind if arm is None else f"{kind}-{arm}"
    text = io.StringIO()
    settings: Any = _RC | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        draw().savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', rf'<svg \1role="img" aria-label="{label}"', svg, count=1)
    for stand_in, css in _CSS.items():
        svg = svg.replace(stand_in, css)
    return Chart(kind, svg, arm)
