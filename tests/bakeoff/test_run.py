"""The loop, on a play pipeline: what a run writes, survives and refuses."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from play import config_of
from torch._dynamo.testing import CompileCounter

from adamac.attention import Schedule
from adamac.bakeoff.arms import ARMS, Arm, choose_arms
from adamac.bakeoff.config import RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.generate import generate
from adamac.bakeoff.report import draw
from adamac.bakeoff.rows import IDENTICAL_DB, read_rows
from adamac.bakeoff.run import run_bakeoff


def test_every_case_has_one_row_an_arm_and_its_video(play, directory, progress):
    rows = run_bakeoff(config_of("a ball", "a fox", seeds=(0, 1)), directory, progress)
    assert rows == read_rows(directory.rows) == progress.rows
    assert len({row.key for row in rows}) == len(rows) == progress.total == 8
    for row in rows:
        assert row.ok
        assert (directory.path / row.video).stat().st_size > 500
        assert row.shape == [5, 32, 48]
        assert len(row.step_s) == 4
        assert row.text_s + sum(row.step_s) + row.decode_s == pytest.approx(row.latency_s)
        assert row.peak_gib > 0


def test_arms_are_interleaved_forth_and_back(play, directory, progress):
    rows = run_bakeoff(config_of("a", "b", "c"), directory, progress)
    assert [row.arm for row in rows] == ["dense", "dense-math", "dense-math", "dense", "dense", "dense-math"]


def test_every_arm_starts_from_the_same_noise(play, directory, progress):
    rows = run_bakeoff(config_of("a ball", "a fox"), directory, progress)
    other = [row for row in rows if row.arm == "dense-math"]
    assert [row.psnr_db for row in other] == [IDENTICAL_DB] * 2
    assert all(row.motion_ratio == 1 for row in other)
    assert all(row.psnr_db is None for row in rows if row.arm == "dense")


def test_seeds_make_different_videos(play, directory, progress):
    rows = run_bakeoff(config_of("a ball", seeds=(0, 1), arms=("dense",)), directory, progress)
    first, second = ((directory.path / row.video).read_bytes() for row in rows if row.arm == "dense")
    assert first != second


def test_the_noise_floor_is_taken_on_the_first_case_alone(play, directory, progress):
    rows = run_bakeoff(config_of("a ball", "a fox", arms=("dense",)), directory, progress)
    taken = [(row.arm, row.prompt_id, row.first_call) for row in rows]
    assert taken == [("dense", "p0", False), ("dense-math", "p0", True), ("dense", "p1", False)]


def test_warm_up_is_short_and_makes_no_row(play, directory, progress):
    rows = run_bakeoff(config_of("a ball", steps=4), directory, progress)
    assert [steps for _, steps in play.calls] == [3, 3, 4, 4]
    assert not any(row.first_call for row in rows)
    assert directory.read_run()["first_calls"]["dense"]["latency_s"] > 0


def test_without_a_warm_up_the_first_call_is_marked(play, directory, progress, monkeypatch):
    monkeypatch.setattr("adamac.bakeoff.run._BakeOff._warm_up", lambda self, arm: {})
    rows = run_bakeoff(config_of("a ball", "a fox"), directory, progress)
    assert [row.first_call for row in rows] == [True, True, False, False]


def test_frames_are_let_go_when_they_were_compared(play, directory, progress):
    run_bakeoff(config_of("a ball"), directory, progress)
    assert not directory.frames.exists()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("nan latents", "latents turned NaN"),
        ("nan frames", "frames turned NaN"),
        ("black", "frames are black"),
        ("constant", "frames are constant"),
        ("raise", "RuntimeError: this prompt fails"),
    ],
)
def test_a_broken_video_is_an_error_row_and_the_others_go_on(play, directory, progress, prompt, reason):
    rows = run_bakeoff(config_of("a ball", prompt, "a fox"), directory, progress)
    broken = [row for row in rows if row.prompt == prompt]
    assert len(rows) == 6
    assert all(row.ok for row in rows if row not in broken)
    for row in broken:
        assert not row.ok
        assert reason in row.reason
        assert "\n" not in row.reason
        assert row.video is None
        assert "Traceback" in (directory.path / row.details).read_text()


def test_an_arm_that_raises_is_an_error_row_and_the_others_go_on(
    tiny_model, directory, progress, monkeypatch
):
    def broken(query, key, *, layout=None, previous=None):
        raise ArithmeticError("no plan today")

    monkeypatch.setitem(ARMS, "broken", Arm("broken", "raises", broken))
    config = config_of(
        "a red ball",
        model=str(tiny_model),
        arms=("dense", "broken", "adacluster"),
        **{"steps": 2, "height": 64, "width": 64, "frames": 7, "guidance": 1.0},
    )
    rows = {row.arm: row for row in run_bakeoff(config, directory, progress)}
    assert set(rows) == {"dense", "broken", "adacluster", "dense-math"}
    assert "ArithmeticError: no plan today" in rows["broken"].reason
    sparse = rows["adacluster"]
    assert sparse.ok
    assert sparse.sparse_calls == sparse.dense_calls["schedule: first steps"] == 2  # 2 steps, 2 layers
    assert 0 < sparse.density < 1
    assert sparse.psnr_db > 0
    details = json.loads((directory.path / sparse.details).read_text())
    assert np.shape(details["density_by_step_layer"]) == (2, 2)


def test_a_run_that_is_complete_is_not_run_again(play, directory, progress):
    config = config_of("a ball")
    rows = run_bakeoff(config, directory, progress)
    calls = len(play.calls)
    assert run_bakeoff(config, directory, progress, resume=True) == rows
    assert len(play.calls) == calls


def test_a_run_broken_off_is_completed_exactly_once(play, directory, progress):
    class Stops(type(progress)):
        def finished(self, row):
            super().finished(row)
            if len(self.rows) == 3:
                raise KeyboardInterrupt

    config = config_of("a ball", "a fox")
    with pytest.raises(KeyboardInterrupt):
        run_bakeoff(config, directory, Stops())
    kept = read_rows(directory.rows)
    assert len(kept) == 3
    with directory.rows.open("a") as file:
        file.write('{"arm": "torn')
    rows = run_bakeoff(config, directory, progress, resume=True)
    assert rows == read_rows(directory.rows)
    assert [row.key for row in rows[:3]] == [row.key for row in kept]
    assert len({row.key for row in rows}) == len(rows) == 4
    assert all(row.psnr_db is not None for row in rows if row.arm != "dense")


def test_a_directory_with_a_run_is_refused_without_resume(play, directory, progress):
    config = config_of("a ball")
    run_bakeoff(config, directory, progress)
    before = directory.rows.read_bytes()
    with pytest.raises(BadInput, match="--resume"):
        run_bakeoff(config, directory, progress)
    assert directory.rows.read_bytes() == before


def test_a_run_in_progress_keeps_a_second_one_out(play, directory, progress):
    config = config_of("a ball")

    class Second(type(progress)):
        """Starts the same run again as soon as the first video of the first one is done."""

        def finished(self, row):
            before = files()
            for resume in (True, False):
                with pytest.raises(BadInput, match="another run is writing"):
                    run_bakeoff(config, directory, progress, resume=resume)
            assert progress.total is None  # refused before it began, with loading
            assert files() == before

    def files():
        return {file: file.read_bytes() for file in directory.path.rglob("*") if file.is_file()}

    rows = run_bakeoff(config, directory, Second())
    assert [row.key for row in rows] == [row.key for row in read_rows(directory.rows)]
    assert len(rows) == 2


def test_videos_made_by_another_run_since_this_one_looked_are_not_overwritten(play, directory, progress):
    config = config_of("a ball")

    class Late(type(progress)):
        """Lets another run finish everything while this one is still loading its model."""

        def works_on(self, what):
            if what == "loading the model":
                run_bakeoff(config, directory, progress)

    with pytest.raises(BadInput, match="meanwhile"):
        run_bakeoff(config, directory, Late())
    assert len(read_rows(directory.rows)) == 2


def test_another_run_is_refused_and_what_differs_is_named(play, directory, progress):
    run_bakeoff(config_of("a ball"), directory, progress)
    with pytest.raises(BadInput, match="steps: None there, 3 here"):
        run_bakeoff(config_of("a ball", steps=3), directory, progress, resume=True)


def test_settings_that_the_model_refuses_leave_nothing_behind(play, directory, progress):
    with pytest.raises(BadInput, match="divisible by 8 but is 36"):
        run_bakeoff(config_of("a ball", height=36), directory, progress)
    with pytest.raises(BadInput, match="guidance"):
        run_bakeoff(config_of("a ball", guidance=5.0), directory, progress)
    assert not directory.path.exists()


def test_a_foreign_directory_is_left_alone(play, tmp_path, progress):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="not empty"):
        run_bakeoff(config_of("a ball"), RunDirectory(tmp_path), progress)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_run_killed_before_it_began_leaves_is_no_run(play, directory, progress):
    directory.path.mkdir()
    for name in (".lock", "run.json.part"):
        (directory.path / name).touch()
    assert len(run_bakeoff(config_of("a ball"), directory, progress)) == 2


def test_a_training_run_is_called_one_and_left_alone(play, directory, progress):
    directory.path.mkdir()
    directory.run.write_text('{"adamac": "0.1.0", "recipe": {}}')
    for use in (lambda: run_bakeoff(config_of("a ball"), directory, progress), lambda: draw(directory)):
        with pytest.raises(BadInput, match=r"holds a training run .* choose another directory"):
            use()
    assert [file.name for file in directory.path.iterdir()] == ["run.json"]


def test_layers_that_the_model_has_not_are_refused_before_the_first_video(
    tiny_model, directory, progress, monkeypatch
):
    monkeypatch.setattr("adamac.bakeoff.studio.generate", lambda *_: pytest.fail("a video was begun"))
    config = config_of(
        "a ball", model=str(tiny_model), arms=("dense", "svg2"), schedule=Schedule(layers=(0, -3))
    )
    with pytest.raises(BadInput, match=r"dense_layers: .*layer -3, but there are 2 layers .*\(-2 to 1\)"):
        run_bakeoff(config, directory, progress)
    assert not directory.path.exists()


def test_a_file_in_the_place_of_the_directory_is_refused(play, tmp_path, progress):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput, match="cannot be"):
            run_bakeoff(config_of("a ball"), RunDirectory(path), progress)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan")])
def test_a_budget_out_of_range_is_refused(keep):
    with pytest.raises(BadInput, match="keep"):
        choose_arms(("dense", "adacluster"), keep)


def test_one_budget_for_all_sparse_arms():
    arms = choose_arms(("dense", "adacluster", "svg2", "sparsed", "block-topk", "tiles", "oracle"), 0.2)
    assert {arm.method.budget.keep for arm in arms if not arm.is_dense} == {0.2}


def test_unknown_and_repeated_arms_are_refused():
    with pytest.raises(BadInput, match="unknown arm 'sage'"):
        choose_arms(("dense", "sage"))
    with pytest.raises(BadInput, match="twice"):
        choose_arms(("dense", "svg2", "svg2"))
    with pytest.raises(BadInput, match="dense must be among them"):
        choose_arms(("svg2",))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"height": 0},
        {"width": -16},
        {"frames": 0},
        {"fps": 0},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        config_of("a ball", **changes)


TINY = {"steps": 2, "height": 64, "width": 64, "frames": 7, "guidance": 1.0}


@pytest.fixture
def compiler(monkeypatch):
    """Count what is compiled, without waiting for a compiler."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_every_arm_is_compiled_before_anything_is_timed(
    tiny_model, directory, progress, compiler, monkeypatch
):
    ran: list[tuple[str, bool, int]] = []

    def watched(pipe, arm, *rest):
        video = generate(pipe, arm, *rest)
        compiled = all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
        ran.append((arm.name, compiled, compiler.frame_count))
        return video

    monkeypatch.setattr("adamac.bakeoff.studio.generate", watched)
    config = config_of(
        "a red ball",
        "a ball moves",
        model=str(tiny_model),
        arms=("dense", "adacluster", "svg2"),
        compile=True,
        **TINY,
    )
    rows = run_bakeoff(config, directory, progress)
    assert [row.reason for row in rows if not row.ok] == []
    assert {name for name, compiled, _ in ran if not compiled} == {"dense-math"}
    warm_ups = ran[: len(ran) - len(rows)]
    assert {"dense", "adacluster", "svg2"} <= {name for name, *_ in warm_ups}
    assert 0 < warm_ups[0][2] <= warm_ups[-1][2] == ran[-1][2]
    assert not any(row.first_call for row in rows if row.arm != "dense-math")
    assert all(row.sparse_calls for row in rows if row.arm in ("adacluster", "svg2"))
    draw(directory)
    assert "<dt>Compiled</dt>" in directory.report.read_text()


def test_a_video_in_which_something_was_compiled_is_a_first_call(play, directory, progress, monkeypatch):
    graphs = itertools.chain([0, 0, 0, 1], itertools.repeat(1))  # before and after each video
    monkeypatch.setattr("adamac.bakeoff.run.graphs_compiled", lambda: next(graphs))
    rows = run_bakeoff(config_of("a ball", "a fox"), directory, progress)
    assert [row.first_call for row in rows] == [False, True, False, False]


def test_a_compiled_run_is_another_run(play, directory, progress):
    run_bakeoff(config_of("a ball"), directory, progress)
    other = config_of("a ball", arms=("dense",), compile=True)
    with pytest.raises(BadInput, match="compile: False there, True here"):
        run_bakeoff(other, directory, progress, resume=True)


def test_a_run_from_before_compiling_goes_on(play, directory, progress):
    rows = run_bakeoff(config_of("a ball"), directory, progress)
    run = json.loads(directory.run.read_text())
    del run["config"]["compile"]
    directory.run.write_text(json.dumps(run))
    assert run_bakeoff(config_of("a ball"), directory, progress, resume=True) == rows


def test_what_cannot_be_compiled_is_refused_and_leaves_nothing_behind(play, directory, progress):
    with pytest.raises(BadInput, match="dense-math cannot be compiled"):
        run_bakeoff(config_of("a ball", compile=True), directory, progress)
    with pytest.raises(BadInput, match="compile: "):
        run_bakeoff(config_of("a ball", arms=("dense",), compile=True), directory, progress)
    assert not directory.path.exists()
