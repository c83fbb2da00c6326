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

# The branch of a pipeline that does not name its branches.
UNNAMED = "default"


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
    _last_timestep: Any = None
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
        return started

    def restart(self) -> None:
        """Begin to count anew."""
        self._evaluations.clear()
        self._last_timestep = None

    def tick(self, branch: str, timestep: Any) -> Moment:
        """Count one evaluation.

        Args:
            branch: Name of the guidance branch. Unnamed branches are told apart by being called with the very same
                time step one after another.
            timestep: What the transformer is given.
        """
        self._calls_of_timestep = self._calls_of_timestep + 1 if self._same_timestep(timestep) else 0
        self._last_timestep = timestep
        if branch == UNNAMED and self._calls_of_timestep:
            branch = f"{UNNAMED} {self._calls_of_timestep + 1}"
        evaluation = self._evaluations.get(branch, 0)
        self._evaluations[branch] = evaluation + 1
        return Moment(branch, *self._step(evaluation))

    def _same_timestep(self, timestep: Any) -> bool:
        # By identity: reading a value back would wait for the device.
        return timestep is not None and timestep is self._last_timestep

    def _step(self, evaluation: int) -> tuple[int, int | None]:
        scheduler = self.scheduler()
        if scheduler is None:
            return evaluation, self.num_steps
        order = getattr(scheduler, "order", 1)
        # Video-to-video pipelines start in the middle of the time steps.
        begin = getattr(scheduler, "begin_index", None) or 0
        evaluations = len(scheduler.timesteps) - begin
        return evaluation // order, -(-evaluations // order)
