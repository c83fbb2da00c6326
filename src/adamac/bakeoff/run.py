"""The loop: every case by every arm, interleaved, each finished video a row on the disk.

The order of the arms turns around from case to case (A B C, C B A, ...), so that what drifts slowly, heat above all, falls on all
of them. Timing comes first and judging after: a case's videos are compared with dense only when all of them are
made, from float frames that wait on the disk, so nothing runs between two timed videos. What a kill leaves behind is
enough to go on from.
"""

from __future__ import annotations

import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from adamac.attention import Dense
from adamac.bakeoff.arms import Arm, choose_arms, noise_floor_arm
from adamac.bakeoff.compiled import graphs_compiled
from adamac.bakeoff.config import REFERENCE, Case, Config, RunDirectory
from adamac.bakeoff.device import find_device, find_dtype
from adamac.bakeoff.errors import BadInput, one_line
from adamac.bakeoff.generate import Video
from adamac.bakeoff.machine import machine_stamp
from adamac.bakeoff.metrics.video import compare
from adamac.bakeoff.pipelines import call_arguments, check_prompts, frames_per_second
from adamac.bakeoff.ranks import Ranks
from adamac.bakeoff.rows import Row, append_row, read_rows, write_rows
from adamac.bakeoff.studio import Studio, Take
from adamac.bakeoff.videos import write_video
from adamac.files import write_json, write_text

# One dense step, one that makes the first clusters, one that refines them: all that can be slow once.
_WARM_UP_STEPS = 3


class Progress(Protocol):
    """Is told how a run goes on."""

    def begins(self, videos: int, done: int) -> None:
        """A run of so many videos, of which some are done already."""

    def works_on(self, what: str) -> None:
        """The next piece of work."""

    def step_done(self, step: int) -> None:
        """So many denoising steps of the current video are done."""

    def finished(self, row: Row) -> None:
        """One video is done."""


def identity(config: Config, arms: tuple[Arm, ...]) -> dict[str, Any]:
    """What makes a run this run: rows may only be added to a run whose identity is the same."""
    return {
        "config": config.to_dict(),
        "methods": {arm.name: repr(arm.method) for arm in arms if arm.method is not None},
        "schedule": repr(config.schedule),
    }


def run_bakeoff(
    config: Config,
    directory: RunDirectory,
    progress: Progress,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> list[Row]:
    """Make every video that is missing, and return all rows.

    Of several ranks the first makes this call, and the others :meth:`adamac.bakeoff.studio.Studio.follow`.

    Args:
        config: What to do.
        directory: Where to; created if need be.
        progress: Is told how it goes.
        resume: Go on with a run that is there already.
        ranks: Those that each video is spread over; ``None`` is this process alone.

    Raises:
        BadInput: If something asked for cannot be done; nothing has been written then.
        RankGoneError: If another rank ended.
    """
    ranks = ranks or Ranks()
    with ranks.leading():
        return _run(config, directory, progress, resume, Studio(config, ranks))


def _run(
    config: Config, directory: RunDirectory, progress: Progress, resume: bool, studio: Studio
) -> list[Row]:
    arms = choose_arms(config.arms, config.keep, compiled=config.compile)
    find_dtype(config.dtype, find_device(config.device))  # refused now, not when the model was loaded
    who = identity(config, arms)
    directory.check(who, resume)
    bakeoff = _BakeOff(config, arms, directory, progress, studio)
    if bakeoff.missing or directory.frames.exists():
        about = bakeoff.prepare()
        with directory.held():
            bakeoff.open_rows(who | about)
            bakeoff.make_all()
    return bakeoff.rows


class _BakeOff:
    """A run in progress."""

    def __init__(
        self,
        config: Config,
        arms: tuple[Arm, ...],
        directory: RunDirectory,
        progress: Progress,
        studio: Studio,
    ) -> None:
        self.config = config
        self.studio = studio
        self.directory = directory
        self.progress = progress
        self.plan = _order(config.cases(), arms, noise_floor_arm(config.device))
        self.rows = read_rows(directory.rows)
        done = {row.key for row in self.rows}
        self.missing = {
            (arm.name, case) for case, arms in self.plan for arm in arms if _key(arm, case) not in done
        }

    def prepare(self) -> dict[str, Any]:
        """Load the model, run every arm briefly, and return what is to be written about the run.

        The directory is touched only when that went well.
        """
        self.progress.begins(sum(len(arms) for _, arms in self.plan), len(self.rows))
        self.progress.works_on("loading the model")
        self.pipe = self.studio.open()
        self.arguments = call_arguments(self.pipe, self.config)
        check_prompts(self.pipe, self.config.prompts, self.arguments)
        self.fps = frames_per_second(self.config)
        self.machine = machine_stamp(self.config.device, self.config.ranks)
        waiting = {name for name, _ in self.missing}
        if any(not arm.is_dense for arm in self._all_arms()):
            self._check_supported()
        # The noise floor's time plays no part: its arm, often the slowest, is not warmed up.
        asked = waiting & set(self.config.arms)
        first_calls = {arm.name: self._warm_up(arm) for arm in self._all_arms() if arm.name in asked}
        self.cold = {name for name in waiting if not first_calls.get(name)}
        share = None if self.directory.run.exists() else self._dense_attention_share()
        return {
            "machine": self.machine,
            "started": _now(),
            "notes": {arm.name: arm.note for arm in self._all_arms()},
            "first_calls": first_calls,
            "dense_attention_share": share,
        }

    def open_rows(self, about: dict[str, Any]) -> None:
        """Begin the files of a run, or those of one that goes on.

        Raises:
            BadInput: If another run has finished videos here since this one looked.
        """
        if [row.key for row in read_rows(self.directory.rows)] != [row.key for row in self.rows]:
            raise BadInput(
                f"out: another run has written into {self.directory.path} meanwhile; go on with --resume"
            )
        if self.directory.run.exists():
            write_rows(self.directory.rows, self.rows)  # without a line that a kill tore
        else:
            write_json(self.directory.run, about)

    def make_all(self) -> None:
        """Make what is missing, and judge each case when it is complete."""
        for case, arms in self.plan:
            for arm in arms:
                if (arm.name, case) in self.missing:
                    self._make(arm, case)
            self._judge(case)
        if self.directory.frames.exists():
            shutil.rmtree(self.directory.frames)

    def _all_arms(self) -> list[Arm]:
        return list({arm.name: arm for _, arms in self.plan for arm in arms}.values())

    def _check_supported(self) -> None:
        """Refuse what every sparse arm would fail at, video by video."""
        from adamac.integrations.diffusers import UnsupportedModelError, inspect
        from adamac.integrations.diffusers.refusals import check_layers

        try:
            sparse = [finding.module for finding in inspect(self.pipe) if finding.sparse]
        except UnsupportedModelError as error:
            raise BadInput(f"model: {one_line(error)}") from None
        layers = Counter(name.partition(".")[0] for name in sparse)  # of each transformer
        try:
            check_layers(self.config.schedule, max(layers.values(), default=0))
        except ValueError as error:
            raise BadInput(f"dense_layers: {error}") from None

    def _warm_up(self, arm: Arm) -> dict[str, Any]:
        """Make a short video that is thrown away, and say how long this first call took."""
        self.progress.works_on(f"warming up {arm.name}")
        case = self.plan[0][0]
        short = self.arguments | {"num_inference_steps": _WARM_UP_STEPS}
        try:
            video = self.studio.make(Take(arm, case, short))
        except (TypeError, ValueError) as error:
            if arm.name == REFERENCE:
                raise BadInput(f"the model refuses these settings ({one_line(error)})") from None
            return {}
        except Exception:  # the arm's first row will fail alike, and say why
            return {}
        timed = {"latency_s": video.latency_s, "text_s": video.text_s, "decode_s": video.decode_s}
        return timed | {"step_s": video.step_s}

    def _dense_attention_share(self) -> float | None:
        """Share of dense denoising that is self-attention: what sparse attention can save at most.

        Taken from a short video of its own, since the dense arm has nothing installed that could tell.
        """
        if not any(not arm.is_dense for arm in self._all_arms()):
            return None
        timed = Arm("dense, timed", "", Dense())
        short = self.arguments | {"num_inference_steps": _WARM_UP_STEPS}
        self.progress.works_on("timing dense attention")
        try:
            video = self.studio.make(Take(timed, self.plan[0][0], short))
        except Exception:  # a figure the less; the arms' own rows say what is wrong
            return None
        assert video.attention is not None
        return video.attention.seconds["dense"] / sum(video.step_s)

    def _make(self, arm: Arm, case: Case) -> None:
        self.progress.works_on(f"{arm.name}: {case.prompt.category}, {case.prompt.id}")
        row = Row(
            arm=arm.name,
            prompt_id=case.prompt.id,
            prompt=case.prompt.text,
            category=case.prompt.category,
            seed=case.seed,
            first_call=arm.name in self.cold,
            machine=self.machine,
        )
        self.cold.discard(arm.name)
        # The noise floor's kernel is named, which compiled code would not heed.
        plain = self.config.compile and arm.kernel is not None
        graphs = graphs_compiled()
        try:
            video = self.studio.make(Take(arm, case, self.arguments, plain), self.progress.step_done)
            row.first_call |= graphs_compiled() > graphs
            self._keep(row, case, video)
        except Exception as error:  # whatever an arm does, the others go on
            row.status, row.reason = "error", one_line(error)
            row.details = f"details/{self.directory.name(case, arm.name)}.txt"
            write_text(self.directory.path / row.details, traceback.format_exc())
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what ran out of memory must not fail the next arm
        row.time = _now()
        append_row(self.directory.rows, row)
        self.rows.append(row)
        self.progress.finished(row)

    def _keep(self, row: Row, case: Case, video: Video) -> None:
        """Write the files of a video, and its figures into its row."""
        name = self.directory.name(case, row.arm)
        frames = self._frames_of(case) / f"{row.arm}.npy"
        frames.parent.mkdir(parents=True, exist_ok=True)
        np.save(frames, video.frames)
        row.video = f"videos/{name}.mp4"
        write_video(self.directory.path / row.video, video.frames, self.fps)
        row.shape = list(video.frames.shape[:3])
        row.latency_s, row.text_s, row.decode_s = video.latency_s, video.text_s, video.decode_s
        row.step_s, row.denoise_s = video.step_s, sum(video.step_s)
        row.peak_gib, row.peak_kind = video.peak_gib, video.peak_kind
        if video.attention is not None:
            report = video.attention
            row.density, row.cost = report.density, report.cost
            row.calls, row.sparse_calls, row.dense_calls = (
                report.calls,
                report.sparse_calls,
                report.dense_calls,
            )
            row.attention_s, row.state_bytes = report.seconds, report.state_bytes
            row.details = f"details/{name}.json"
            write_json(self.directory.path / row.details, report.to_dict())

    def _judge(self, case: Case) -> None:
        """Compare the videos of a complete case with dense, and let go of their frames."""
        folder = self._frames_of(case)
        if not folder.exists():
            return
        dense = folder / f"{REFERENCE}.npy"
        if dense.exists():
            self.progress.works_on(f"comparing: {case.prompt.category}, {case.prompt.id}")
            reference = np.load(dense)
            for row in self._rows_of(case):
                video = folder / f"{row.arm}.npy"
                if row.ok and row.arm != REFERENCE and video.exists():
                    for name, value in asdict(compare(np.load(video), reference)).items():
                        setattr(row, name, value)
            write_rows(self.directory.rows, self.rows)
        shutil.rmtree(folder)

    def _rows_of(self, case: Case) -> Iterator[Row]:
        return (row for row in self.rows if (row.prompt_id, row.seed) == (case.prompt.id, case.seed))

    def _frames_of(self, case: Case) -> Path:
        return self.directory.frames / f"{case.prompt.slug}-s{case.seed}"


def _order(cases: list[Case], arms: tuple[Arm, ...], floor: Arm) -> list[tuple[Case, list[Arm]]]:
    """Say which arms make each case, in which order: forth and back; the noise floor is taken on the first case."""
    plan = []
    for place, case in enumerate(cases):
        extra = [floor] if place == 0 and floor.name not in {arm.name for arm in arms} else []
        line_up = [*arms, *extra]
        plan.append((case, line_up[::-1] if place % 2 else line_up))
    return plan


def _key(arm: Arm, case: Case) -> tuple[str, str, int]:
    return (arm.name, case.prompt.id, case.seed)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
