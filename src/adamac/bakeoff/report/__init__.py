"""The report: one HTML file that opens by double click and needs no network.

Nothing is measured here: the page lays out the summary and the rows. Videos are embedded, so that the file can be sent to
somebody; beyond :data:`EMBED_BYTES` the remaining ones are linked, and the page says so.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamac.bakeoff.config import RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.report.words import FILTERS, TOO_FEW, has_tail, verdict, warnings
from adamac.bakeoff.rows import Row, read_rows
from adamac.bakeoff.summary import summarise
from adamac.files import write_json, write_text

EMBED_BYTES = 150 * 2**20
"""Videos are embedded up to this many bytes; a browser is slow to open much more."""

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shown:
    """One video on the page.

    Attributes:
        row: Its row.
        source: What the video element plays: a data URI, a relative path, or nothing if there is no video.
    """

    row: Row
    source: str


@dataclass(frozen=True)
class ShownCase:
    """The videos of one prompt and seed, side by side.

    Attributes:
        prompt: Its text.
        asked: What it had besides: a negative prompt, the name of a first image.
        prompt_id: Its id.
        category: Its category.
        seed: The seed.
        videos: By arm.
    """

    prompt: str
    asked: list[str]
    prompt_id: str
    category: str
    seed: int
    videos: list[Shown]


def draw(directory: RunDirectory) -> dict[str, Any]:
    """Write ``summary.json`` and ``report/index.html`` from the rows, and return the summary.

    Raises:
        BadInput: If the directory holds no run, one without a finished video, or damaged files.
    """
    run = directory.read_run()
    rows = read_rows(directory.rows)
    if not rows:
        raise BadInput(f"{directory.path} holds a run without any finished video yet")
    summary = summarise(run, rows, directory)
    write_json(directory.summary, summary)
    write_text(directory.report, render(summary, rows, directory))
    return summary


def render(summary: dict[str, Any], rows: list[Row], directory: RunDirectory) -> str:
    """Lay the page out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from adamac.bakeoff.report import charts

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    colours = charts.arm_colours(list(summary["arms"]))
    return environment.get_template("page.html.j2").render(
        summary=summary,
        run=summary["run"],
        arms=summary["arms"],
        verdict=verdict(summary),
        has_tail=has_tail(summary),
        too_few=TOO_FEW,
        warnings=warnings(summary, rows),
        cases=_cases(rows, summary, directory),
        charts=charts.draw_all(summary, rows, colours),
        colours=colours,
        style=(_HERE / "style.css").read_text(encoding="utf-8"),
        script=(_HERE / "players.js").read_text(encoding="utf-8"),
    )


def _cases(rows: list[Row], summary: dict[str, Any], directory: RunDirectory) -> list[ShownCase]:
    """Group rows by case; within a case the arms have the order of the summary, whatever order they ran in."""
    arms, asked = list(summary["arms"]), _asked(summary["run"]["config"]["prompts"])
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.prompt_id, row.seed), []).append(row)
    room = EMBED_BYTES
    cases = []
    for of_case in grouped.values():
        shown = []
        for row in sorted(of_case, key=lambda row: arms.index(row.arm)):
            source, room = _source(row, directory, room)
            shown.append(Shown(row, source))
        first = of_case[0]
        more = asked.get(first.prompt_id, [])
        cases.append(ShownCase(first.prompt, more, first.prompt_id, first.category, first.seed, shown))
    return cases


def _asked(prompts: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By prompt, what it had besides its text."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        negative, image = prompt["negative"], prompt["image"]
        lines = [f"not: {negative}"] if negative else []
        found[prompt["id"]] = lines + ([f"from {Path(image['file']).name}"] if image else [])
    return found


def _source(row: Row, directory: RunDirectory, room: int) -> tuple[str, int]:
    """What the page plays for a row, and how many bytes may still be embedded after it."""
    path = directory.path / row.video if row.video else None
    if path is None or not path.is_file():
        return "", room
    size = path.stat().st_size
    if size > room:
        return f"../{row.video}", room
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii"), room - size
