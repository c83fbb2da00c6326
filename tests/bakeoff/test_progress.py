"""What a run says while it goes on."""

import io

from rich.console import Console

from adamac.bakeoff.progress import ConsoleProgress
from adamac.bakeoff.rows import Row


def said(terminal: bool) -> str:
    text = io.StringIO()
    with ConsoleProgress(Console(file=text, force_terminal=terminal, width=100)) as progress:
        progress.begins(4, 1)
        progress.works_on("svg2: plain, ball")
        progress.step_done(2)
        good = Row(arm="svg2", prompt_id="ball", prompt="", category="plain", seed=3, latency_s=1.25)
        progress.finished(good)
        bad = Row(
            arm="dense",
            prompt_id="fox",
            prompt="",
            category="plain",
            seed=3,
            status="error",
            reason="[black]",
        )
        progress.finished(bad)
    return text.getvalue()


def test_without_a_terminal_every_video_is_a_line_with_the_time_left():
    lines = said(terminal=False).splitlines()
    assert lines[0] == "1 of 4 videos were there already"
    assert "2/4 svg2, ball, seed 3: 1.2 s (0 s left)" in lines
    assert "3/4 dense, fox, seed 3: failed: [black] (0 s left)" in lines
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_bar_with_the_time_left():
    text = said(terminal=True)
    assert "svg2: plain, ball" in text
    assert "s left" in text


def test_brackets_in_ids_and_categories_are_shown_as_they_are():
    text = io.StringIO()
    with ConsoleProgress(Console(file=text, force_terminal=True, width=100)) as progress:
        progress.begins(1, 0)
        progress.works_on("dense: [/red], [bold]fox")
    assert "dense: [/red], [bold]fox" in text.getvalue()
