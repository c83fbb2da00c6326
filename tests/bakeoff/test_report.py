"""The page: drawn from rows alone, whole in one file, and its videos play."""

import json
import shutil

import pytest
from browser import NAMES, Browser, find
from play import config_of

from adamac import cli
from adamac.bakeoff.config import RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.report import draw
from adamac.bakeoff.rows import Row, read_rows, write_rows
from adamac.bakeoff.run import run_bakeoff


@pytest.fixture
def finished(play, directory, progress) -> RunDirectory:
    """A run of two prompts, of which the second fails in one arm."""
    rows = run_bakeoff(config_of("a <b>ball</b>", "a fox & a \u00e4"), directory, progress)
    rows[-1].status, rows[-1].reason, rows[-1].video = "error", "frames are <black>", None
    write_rows(directory.rows, rows)
    return directory


def test_the_report_is_drawn_again_from_rows_alone(finished, tmp_path):
    draw(finished)
    first = finished.report.read_text()
    finished.report.unlink()
    finished.summary.unlink()
    moved = RunDirectory(tmp_path / "moved")
    shutil.move(finished.path, moved.path)
    draw(moved)
    assert moved.report.read_text() == first


def test_the_command_names_a_folder_with_brackets_as_it_is(finished, tmp_path, capsys):
    moved = tmp_path / "[bold]of[/red]"
    shutil.move(finished.path, moved)
    assert cli.main(["report", str(moved)]) == 0
    assert f"report: {moved}/report/index.html" in capsys.readouterr().out


def test_an_installed_package_has_no_commit_and_its_run_has_a_report(play, directory, progress, monkeypatch):
    monkeypatch.setattr("adamac.bakeoff.machine._commit", lambda: None)
    run_bakeoff(config_of("a ball"), directory, progress)
    assert directory.read_run()["machine"]["commit"] is None
    draw(directory)
    assert "commit" not in directory.report.read_text()


def test_a_run_that_was_written_without_a_commit_has_a_report(finished):
    run = finished.read_run()
    del run["machine"]["commit"]
    finished.run.write_text(json.dumps(run))
    draw(finished)
    assert "commit" not in finished.report.read_text()


def test_the_page_is_one_file_without_addresses(finished):
    draw(finished)
    page = finished.report.read_text()
    assert page.count("data:video/mp4;base64,") == 3
    assert "http-equiv" not in page
    for address in ('src="http', 'href="http', "@import", "url(http"):
        assert address not in page


def test_the_page_of_a_short_run_tells_the_largest_latency_and_no_percentile(finished):
    draw(finished)
    arms = finished.report.read_text().partition("<h2>Arms</h2>")[2].partition("</table>")[0]
    assert "<th>largest</th>" in arms
    assert "<th>p99</th>" not in arms
    assert "too few videos to tell" in arms
    columns = [line.count("<td") for line in arms.split("<tr")[3:]]
    assert columns == [11, 11]


def test_prompts_and_reasons_are_escaped(finished):
    draw(finished)
    page = finished.report.read_text()
    assert "a &lt;b&gt;ball&lt;/b&gt;" in page
    assert "frames are &lt;black&gt;" in page
    assert "<b>ball" not in page


def test_videos_that_are_gone_leave_a_place_that_says_so(finished):
    shutil.rmtree(finished.path / "videos")
    draw(finished)
    assert finished.report.read_text().count("the video file is gone") == 3


def test_videos_beyond_the_limit_are_linked(finished, monkeypatch):
    monkeypatch.setattr("adamac.bakeoff.report.EMBED_BYTES", 0)
    draw(finished)
    page = finished.report.read_text()
    assert "data:video" not in page
    assert 'src="../videos/p0-s0-dense.mp4"' in page


def test_the_summary_has_what_a_script_asks_for(finished):
    draw(finished)
    arms = json.loads(finished.summary.read_text())["arms"]
    wanted = [
        "speedup",
        "latency_p50_s",
        "latency_p95_s",
        "latency_p99_s",
        "peak_gib",
        "density",
        "psnr_db",
        "ssim",
    ]
    for arm in arms.values():
        assert set(wanted) <= set(arm)
    assert sum(arm["errors"] for arm in arms.values()) == 1


def test_a_run_in_which_everything_failed_has_a_report(play, directory, progress):
    run_bakeoff(config_of("black"), directory, progress)
    draw(directory)
    assert "No dense video was made" in directory.report.read_text()


def test_density_by_layer_and_step_is_drawn_for_a_sparse_arm(finished):
    rows = read_rows(finished.rows)
    extra = Row(
        arm="svg2", prompt_id="p0", prompt="a", category="category 0", seed=0, latency_s=1.0, density=0.2
    )
    extra.calls, extra.sparse_calls, extra.details = 4, 3, "details/svg2.json"
    (finished.path / "details").mkdir(exist_ok=True)
    (finished.path / extra.details).write_text('{"density_by_step_layer": [[1.0, 1.0], [0.2, null]]}')
    write_rows(finished.rows, [*rows, extra])
    run = finished.read_run()
    run["methods"]["svg2"] = "SVG2()"
    finished.run.write_text(json.dumps(run))
    summary = draw(finished)
    assert summary["arms"]["svg2"]["density_by_step_layer"] == [[1.0, 1.0], [0.2, None]]
    assert "Density by layer and step, svg2" in finished.report.read_text()


def test_a_directory_without_a_run_has_no_report(tmp_path):
    with pytest.raises(BadInput, match="holds no run"):
        draw(RunDirectory(tmp_path))


def changed(**entries):
    """Change entries of a run; those that are None go."""
    return lambda run: json.dumps({k: v for k, v in (run | entries).items() if v is not None})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda run: "[]", "expected an object with config, methods, schedule"),
        (lambda run: "{}", "expected an object named config, found none"),
        (lambda run: "7", "got 7"),
        (changed(config=[]), "expected config to be an object, got []"),
        (changed(config={"arms": []}), "expected a list named config.prompts"),
        (
            lambda run: json.dumps(run | {"config": run["config"] | {"prompts": ["a ball"]}}),
            'expected config.prompts to be objects with an id, got "a ball"',
        ),
        (changed(methods=None), "expected an object named methods"),
        (changed(machine={}), "expected a text named machine.device"),
        (changed(first_calls="none"), 'expected first_calls to be an object, got "none"'),
    ],
)
def test_a_damaged_run_is_refused_in_a_line_that_names_the_file(finished, progress, damage, problem):
    finished.run.write_text(damage(finished.read_run()))
    before = finished.rows.read_bytes()
    for use in (
        lambda: draw(finished),
        lambda: run_bakeoff(config_of("a <b>ball</b>", "a fox & a \u00e4"), finished, progress, resume=True),
    ):
        with pytest.raises(BadInput) as refused:
            use()
        line = str(refused.value)
        assert line.startswith(f"{finished.run} is damaged: ")
        assert problem in line
        assert "restore the file" in line
        assert "\n" not in line
    assert finished.rows.read_bytes() == before


@pytest.mark.parametrize("contents", [b"garbage\n" * 3, b"[]\n{}\n", b"\xff\xfe\n\n"])
def test_damaged_rows_are_refused_by_a_run_that_goes_on(finished, progress, contents):
    finished.rows.write_bytes(contents)
    with pytest.raises(BadInput, match=r"rows\.jsonl"):
        run_bakeoff(config_of("a <b>ball</b>", "a fox & a \u00e4"), finished, progress, resume=True)
    assert finished.rows.read_bytes() == contents


@pytest.mark.parametrize(
    "contents", ["{}", "[]", "garbage", '{"density_by_step_layer": 5}', '{"density_by_step_layer": "dense"}']
)
def test_damaged_details_cost_one_chart_and_not_the_report(finished, contents):
    rows = read_rows(finished.rows)
    (finished.path / "details").mkdir(exist_ok=True)
    (finished.path / "details" / "dense.json").write_text(contents)
    rows[0].details, rows[0].calls = "details/dense.json", 1
    write_rows(finished.rows, rows)
    assert draw(finished)["arms"]["dense"]["density_by_step_layer"] is None


def test_a_file_of_rows_that_is_not_one_is_refused(finished):
    finished.rows.write_text("garbage\n" * 3)
    with pytest.raises(BadInput, match="line 1"):
        draw(finished)


@pytest.mark.skipif(find() is None, reason=f"no browser on the path (looked for {', '.join(NAMES)})")
def test_a_browser_opens_the_page_without_errors_and_plays_its_videos(finished):
    draw(finished)
    with Browser(find()) as browser:
        browser.open(finished.report)
        everywhere = "[...document.querySelectorAll('video')].every"
        assert browser.evaluate("document.querySelectorAll('video').length") == 3
        browser.wait_for(f"{everywhere}(video => video.readyState >= 2)")
        assert browser.evaluate(f"{everywhere}(video => video.videoWidth === 48 && !video.error)")
        browser.evaluate("document.getElementById('play-all').click()")
        browser.wait_for(f"{everywhere}(video => video.currentTime > 0.1)")
        browser.evaluate("document.querySelector('.difference').click()")
        browser.wait_for("document.querySelector('.over')?.readyState >= 2")
        assert browser.errors() == []
        assert browser.requests() == [finished.report.as_uri()]
