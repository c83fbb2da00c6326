"""Where videos are made: a pipeline on this rank, and on the others if a video is spread over several GPUs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from adamac.bakeoff.arms import Arm
from adamac.bakeoff.compiled import compile_blocks, uncompiled
from adamac.bakeoff.config import Case, Config
from adamac.bakeoff.errors import BadInput, one_line
from adamac.bakeoff.generate import OnStep, Video, generate
from adamac.bakeoff.pipelines import Pipeline, load_pipeline
from adamac.bakeoff.ranks import Ranks


@dataclass(frozen=True)
class Take:
    """What is to be made.

    Attributes:
        arm: How attention is computed.
        case: Prompt and seed.
        arguments: Further arguments of the pipeline call.
        plain: Whether to leave compiled code aside.
    """

    arm: Arm
    case: Case
    arguments: dict[str, Any]
    plain: bool = False


_OPEN = "open"  # the first word to the other ranks; each later one is a take, and None is the end


class Studio:
    """Makes videos on all ranks: the first one calls these methods, the others :meth:`follow`.

    Attributes:
        pipe: The pipeline, once opened, with nothing installed.
    """

    pipe: Pipeline

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """Remember what for; nothing is loaded yet."""
        self._config, self._ranks = config, ranks

    def open(self) -> Pipeline:
        """Load the pipeline on every rank.

        Raises:
            BadInput: If it cannot be loaded, made ready, spread or compiled, on this rank or another.
            RuntimeError: If another rank failed in any other way; what this one raises is passed on.
        """
        self._ranks.say(_OPEN)
        self._open()
        return self.pipe

    def make(self, take: Take, on_step: OnStep | None = None) -> Video:
        """Make a video on all ranks together.

        Args:
            take: Which.
            on_step: Called with the number of finished steps.

        Returns:
            The first rank's, whose time is everyone's, with the memory of the rank that took most.

        Raises:
            RuntimeError: If another rank failed; what this one raises is passed on.
        """
        self._ranks.say(take)
        return self._make(take, on_step)

    def follow(self) -> None:
        """Make what the first rank says until it lets go."""
        while (word := self._ranks.say()) is not None:
            try:
                self._open() if word == _OPEN else self._make(word)
            except Exception:  # the first rank knows, says it and decides
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _open(self) -> None:
        spread = self._ranks.size > 1
        with self._ranks.agreed():
            self.pipe = _ready(self._config)
            if spread:
                _check_card(self.pipe)
        # Ranks meet where they are spread: none may begin before it is known that all have come so far.
        with self._ranks.agreed():
            if spread:
                _spread(self.pipe, self._ranks.size)
            if self._config.compile:
                compile_blocks(self.pipe)

    def _make(self, take: Take, on_step: OnStep | None = None) -> Video:
        try:
            with uncompiled(self.pipe) if take.plain else nullcontext():
                video = generate(
                    self.pipe, take.arm, self._config.schedule, take.case, take.arguments, on_step
                )
        except Exception as error:
            self._ranks.all((one_line(error), None))
            raise
        words = self._ranks.all((None, video.peak_gib))
        for rank, (problem, _) in enumerate(words):
            if problem is not None:
                raise RuntimeError(f"rank {rank}: {problem}")
        return replace(video, peak_gib=max((peak for _, peak in words if peak is not None), default=None))


def _ready(config: Config) -> Pipeline:
    asked = (config.model, config.device, config.dtype)
    if config.setup is None:
        return load_pipeline(*asked)

    def load() -> Pipeline:
        pipe = load_pipeline(*asked, place=False)
        if config.ranks > 1 and torch.device(config.device).type == "cuda":
            # Where diffusers' offloading goes if it is not told, which is the first GPU on every rank else.
            pipe._offload_gpu_id = torch.cuda.current_device()
        return pipe

    return config.setup.make_ready(load)


def _check_card(pipe: Pipeline) -> None:
    """Refuse a pipeline that was put on another rank's GPU."""
    where = torch.device(pipe._execution_device)
    if where.type == "cuda" and where.index not in (None, own := torch.cuda.current_device()):
        raise BadInput(
            f"setup: the pipeline was put on {where}, expected cuda:{own} on this rank; say cuda, or "
            "torch.cuda.current_device()"
        )


def _spread(pipe: Pipeline, ranks: int) -> None:
    from diffusers.models._modeling_parallel import ContextParallelConfig

    from adamac.integrations.diffusers import UnsupportedModelError, parallelize

    try:
        parallelize(pipe, ContextParallelConfig(ulysses_degree=ranks))
    except (UnsupportedModelError, ValueError, RuntimeError) as error:
        raise BadInput(f"torchrun: {error}") from None
