"""One video, timed and checked.

Every arm goes through here with the same arguments, the same generator seed and therefore the same initial noise, and
through the pipeline's own text encoding and decoding. The frames that come back are floats, before any video codec.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from adamac.attention import Schedule
from adamac.bakeoff.arms import Arm
from adamac.bakeoff.config import Case
from adamac.bakeoff.metrics.sanity import frames_problem, latents_problem
from adamac.bakeoff.pipelines import Pipeline
from adamac.bakeoff.timing import Clock, MemoryPeak

if TYPE_CHECKING:
    from adamac.integrations.diffusers import Report

OnStep = Callable[[int], None]


class BrokenVideo(RuntimeError):
    """The pipeline returned something that is not a picture."""


@dataclass(frozen=True)
class Video:
    """What came out, and what it cost.

    Attributes:
        frames: ``[frames, height, width, 3]`` float32 from 0 to 1.
        latency_s: The whole call.
        text_s: From the call to the first run of the transformer.
        step_s: Each denoising step.
        decode_s: From the last step to the frames.
        peak_gib: Peak memory during the call.
        peak_kind: Of what.
        attention: What sparse attention did; ``None`` where nothing was installed.
    """

    frames: NDArray[np.float32]
    latency_s: float
    text_s: float
    step_s: list[float]
    decode_s: float
    peak_gib: float | None
    peak_kind: str
    attention: Report | None


def generate(
    pipe: Pipeline,
    arm: Arm,
    schedule: Schedule,
    case: Case,
    arguments: dict[str, Any],
    on_step: OnStep | None = None,
) -> Video:
    """Make one video.

    Args:
        pipe: The pipeline, with nothing installed.
        arm: How to compute attention.
        schedule: Dense steps and layers of a sparse arm.
        case: Prompt and seed.
        arguments: Further arguments of the pipeline call.
        on_step: Called with the number of finished steps.

    Raises:
        BrokenVideo: If latents or frames are NaN, infinite, black or constant.
    """
    asked = case.prompt.arguments()  # decodes an image, which is not to be timed
    device = str(pipe._execution_device)  # where offloading pipelines run, which pipe.device does not tell
    with _installed(pipe, arm, schedule) as handle, arm.dense_kernel():
        memory = MemoryPeak(device)
        watch = _Watch(Clock(device), on_step)
        with watch.first_run_of(pipe):
            result = pipe(
                **asked,
                generator=torch.Generator("cpu").manual_seed(case.seed),
                output_type="np",
                callback_on_step_end=watch.step_ended,
                **arguments,
            )
        latency_s = watch.clock.read()
        peak_gib = memory.read_gib()
        attention = handle.report() if handle is not None else None
    if problem := latents_problem(watch.latents):
        raise BrokenVideo(f"latents {problem}")
    frames = np.asarray(result.frames[0], dtype=np.float32)
    if problem := frames_problem(frames):
        raise BrokenVideo(f"frames {problem}")
    starts = [watch.denoising_from_s, *watch.step_ends_s]
    return Video(
        frames=frames,
        latency_s=latency_s,
        text_s=starts[0],
        step_s=np.diff(starts).tolist(),
        decode_s=latency_s - starts[-1],
        peak_gib=peak_gib,
        peak_kind=memory.kind,
        attention=attention,
    )


@dataclass
class _Watch:
    """Takes down when the transformer first ran and when each step ended."""

    clock: Clock
    on_step: OnStep | None
    denoising_from_s: float = 0.0
    step_ends_s: list[float] = field(default_factory=list)
    latents: torch.Tensor | None = None

    @contextmanager
    def first_run_of(self, pipe: Pipeline) -> Generator[None]:
        """Note when the first of the pipeline's transformers is first called."""
        modules = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
        hooks = [m.register_forward_pre_hook(self._called) for m in modules if isinstance(m, torch.nn.Module)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step_ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Serve as diffusers' ``callback_on_step_end``; changes nothing."""
        self.step_ends_s.append(self.clock.read())
        self.latents = tensors.get("latents")
        if self.on_step is not None:
            self.on_step(len(self.step_ends_s))
        return {}

    def _called(self, module: torch.nn.Module, inputs: Any) -> None:
        if not self.denoising_from_s:
            self.denoising_from_s = self.clock.read()


@contextmanager
def _installed(pipe: Pipeline, arm: Arm, schedule: Schedule) -> Generator[Any]:
    """Install the arm's method for one video, so that nothing of it is left for the next arm."""
    if arm.method is None:
        yield None
        return
    from adamac.integrations.diffusers import enable

    with enable(pipe, arm.method, schedule) as handle:
        yield handle
