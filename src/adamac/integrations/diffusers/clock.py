"""Which step of which video a call of the transformer belongs to.

Pipelines tell little: some name the guidance branch, one tells the step. What they all do is call ``set_timesteps`` on
their scheduler at the start of a video, which makes a new tensor of time steps, and then call the transformer once a step
and branch. So a new tensor is a new video, however the last one ended, and so is what comes after a pipeline said that it is
done (another pipeline with the same transformer may have a scheduler that is not seen here); and the n-th call of a branch is
its n-th evaluation. A scheduler of order 2 evaluates the model twice a step. Wan 2.2 hands over from one transformer to the other in
the middle of a video: both share one clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The branch of a pipeline that does not name its branches.
UNNAMED = "default"

_LOST = (
    "the transformer was called more often than the video has steps, so which step this is cannot be told; call each guidance "
    'branch within transformer.cache_context("cond") or another name of its own'
)


@dataclass(frozen=True)
class Moment:
    """Where in a video a call of the transformer is.

    Attributes:
        branch: Guidance branch.
        step: Index of the denoising step, from 0.
        num_steps: Steps of this video; ``None`` if unknown.
    """

    branch: str = UNNAMED
    step: int = 0
    num_steps: int | None = None

    @property
    def problem(self) -> str | None:
        """Why the step cannot be right, or ``None``."""
        return _LOST if self.num_steps is not None and self.step >= self.num_steps else None


@dataclass
class Clock:
    """Counts evaluations by branch.

    Attributes:
        scheduler: Returns the pipeline's current scheduler (a user may replace it at any time), or ``None`` if only a
            transformer is known.
        num_steps: Steps of a video where no scheduler tells.
    """

    scheduler: Callable[[], Any]
    num_steps: int | None = None
    _timesteps: Any = None
    _evaluations: dict[str, int] = field(default_factory=dict)
    _begin: int = 0  # index of the video's first time step among the scheduler's
    _last_timestep: Any = None  # held, so that no other comes to lie in its place
    _last_mark: Any = None
    _calls_of_timestep: int = 0

    def starts_video(self, timestep: Any) -> bool:
        """Whether the call about to run is the first of a new video; remembers the video if so.

        Args:
            timestep: What the transformer is given.
        """
        scheduler = self.scheduler()
        if scheduler is not None:
            started = scheduler.timesteps is not self._timesteps or not self._evaluations
            self._timesteps = scheduler.timesteps
        elif not self._evaluations:
            started = True
        else:
            all_done = self.num_steps is not None and min(self._evaluations.values()) >= self.num_steps
            started = all_done and not self._same_timestep(timestep)
        if started:
            self.restart()
            self._begin = 0 if scheduler is None else _first_step(scheduler, timestep)
        return started

    def restart(self) -> None:
        """Begin to count anew."""
        self._evaluations.clear()
        self._last_timestep = self._last_mark = None

    def tick(self, branch: str, timestep: Any) -> Moment:
        """Count one evaluation.

        Args:
            branch: Name of the guidance branch. Unnamed branches are told apart by being called with the very same
                time step one after another: one tensor, or views of one.
            timestep: What the transformer is given.
        """
        self._calls_of_timestep = self._calls_of_timestep + 1 if self._same_timestep(timestep) else 0
        self._last_timestep, self._last_mark = timestep, _mark(timestep)
        if branch == UNNAMED and self._calls_of_timestep:
            branch = f"{UNNAMED} {self._calls_of_timestep + 1}"
        evaluation = self._evaluations.get(branch, 0)
        self._evaluations[branch] = evaluation + 1
        return Moment(branch, *self._step(evaluation))

    def _same_timestep(self, timestep: Any) -> bool:
        # By where it lies: reading a value back would wait for the device.
        return timestep is not None and _mark(timestep) == self._last_mark

    def _step(self, evaluation: int) -> tuple[int, int | None]:
        scheduler = self.scheduler()
        if scheduler is None:
            return evaluation, self.num_steps
        order = getattr(scheduler, "order", 1)
        evaluations = len(scheduler.timesteps) - self._begin
        return evaluation // order, -(-evaluations // order)


def _mark(timestep: Any) -> tuple[int, ...] | None:
    """What is equal for a time step that is given twice, and differs for another; one that is changed in place is another."""
    if not isinstance(timestep, Tensor):
        return None if timestep is None else (id(timestep),)
    # Changes of a tensor made in inference mode are not counted.
    return (timestep.data_ptr(), *(() if timestep.is_inference() else (timestep._version,)))


def _first_step(scheduler: Any, timestep: Any) -> int:
    """Where a video begins among the scheduler's time steps: video-to-video pipelines start in the middle.

    Few tell the scheduler so, but all of them give the transformer views of its time steps.
    """
    if begin := getattr(scheduler, "begin_index", None):
        return begin
    steps = scheduler.timesteps
    if not (isinstance(steps, Tensor) and isinstance(timestep, Tensor)):
        return 0
    if timestep.untyped_storage().data_ptr() != steps.untyped_storage().data_ptr():
        return 0
    begin = timestep.storage_offset() - steps.storage_offset()
    return begin if 0 <= begin < len(steps) else 0
