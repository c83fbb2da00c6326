"""What in a model will be sparse, what will not, and why."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.table import Table

from adamac.attention import Schedule, crossover
from adamac.bakeoff.config import Config
from adamac.bakeoff.errors import BadInput, one_line
from adamac.bakeoff.pipelines import Pipeline, call_arguments, load_pipeline

if TYPE_CHECKING:
    from adamac.integrations.diffusers import Family, Finding


# Major compute capability.
_HOPPER = 9


@dataclass(frozen=True)
class Examination:
    """What was found in a model.

    Attributes:
        pipeline: Name of its class.
        findings: One for each attention module.
        size: Frames, height and width of the video in question; ``None`` where the model has no default.
        asked_frames: Frames that were asked for, which the pipeline may round.
        tokens: Video tokens that such a video has; ``None`` if the size is not known.
        too_small: Why all of it would stay dense on this device; ``None`` if it would not, or if the size is not known.
        too_small_on_hopper: The same on an H100 or H200, where the device is none.
        schedule: Which steps would stay dense.
    """

    pipeline: str
    findings: list[Finding]
    size: tuple[int | None, int | None, int | None]
    asked_frames: int | None
    tokens: int | None
    too_small: str | None
    too_small_on_hopper: str | None
    schedule: Schedule

    def table(self) -> Table:
        """A line for each kind of attention."""
        table = Table(title=self.pipeline)
        for heading in ("modules", "attention", "why"):
            table.add_column(heading, justify="right" if heading == "modules" else "left")
        for (sparse, reason), count in Counter((item.sparse, item.reason) for item in self.findings).items():
            table.add_row(str(count), "sparse" if sparse else "dense", reason)
        return table

    def remark(self) -> str:
        """What the size of the video and the schedule keep dense."""
        first = (
            f"{self.schedule.first:.0%}"
            if isinstance(self.schedule.first, float)
            else str(self.schedule.first)
        )
        steps = f"The first {first} of the steps stay dense by default."
        if self.tokens is None:
            return f"{steps} Give --height, --width and --frames to learn how many tokens a video has."
        frames, height, width = self.size
        asked = f" ({self.asked_frames} are rounded to that)" if self.asked_frames != frames else ""
        size = f"A video of {frames} frames{asked} of {height} x {width} pixels has {self.tokens:,} tokens"
        verdict = _verdict(self.too_small)
        if self.too_small_on_hopper != self.too_small:
            verdict += f". On an H100 or H200 {_verdict(self.too_small_on_hopper)}"
        return f"{size}: {verdict}. {steps}"


def _verdict(too_small: str | None) -> str:
    return "enough to be sparse" if too_small is None else f"all of it stays dense ({too_small})"


def examine(config: Config) -> Examination:
    """Load a pipeline and look at its attention.

    Args:
        config: Its model, device and size; the rest plays no part.

    Raises:
        BadInput: If the model cannot be loaded, is of a family that cannot be made sparse, or refuses the size.
    """
    from adamac.integrations.diffusers import UnsupportedModelError
    from adamac.integrations.diffusers import inspect as find
    from adamac.integrations.diffusers.families import family_of, transformers_of

    pipe = load_pipeline(config.model, config.device, config.dtype)
    try:
        findings = find(pipe)
    except UnsupportedModelError as error:
        raise BadInput(f"model: {error}") from None
    asked_frames, height, width = _size(pipe, call_arguments(pipe, config))
    _check_sides(pipe, height, width)
    transformer: Any = transformers_of(pipe)[0]  # the two of Wan 2.2 are alike
    family = family_of(transformer)
    size = _frames_made(pipe, family, asked_frames), height, width
    tokens, schedule, shape = _tokens(pipe, family, transformer, *size), Schedule(), transformer.config
    branches = 2 if family.guidance_in_batch else 1  # as by default, with guidance
    heads, head_dim = branches * shape.num_attention_heads, shape.attention_head_dim
    small = on_hopper = None
    if tokens is not None:
        small = on_hopper = schedule.too_small(tokens, heads, head_dim, torch.device(config.device))
        if not config.device.startswith("cuda"):
            on_hopper = small or crossover.too_little_work(tokens, heads, head_dim, _HOPPER)
    return Examination(type(pipe).__name__, findings, size, asked_frames, tokens, small, on_hopper, schedule)


def _size(pipe: Pipeline, arguments: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Frames, height and width that a call would have."""
    defaults = inspect.signature(pipe.__call__).parameters
    known = {name: parameter.default for name, parameter in defaults.items()} | arguments
    sides = [known.get(name) for name in ("num_frames", "height", "width")]
    frames, height, width = (side if isinstance(side, int) else None for side in sides)
    return frames, height, width


def _check_sides(pipe: Pipeline, height: int | None, width: int | None) -> None:
    """Refuse sides that the pipeline refuses when it is called, in its own words."""
    check = getattr(pipe, "check_inputs", None)
    if check is None or height is None or width is None:
        return
    known = {"prompt": "a video", "image": Image.new("RGB", (16, 16)), "height": height, "width": width}
    names = inspect.signature(check).parameters
    try:
        check(**{name: known.get(name) for name in names})
    except Exception as error:  # what else a call wants says nothing of the sides
        if "`height`" in str(error):
            raise BadInput(f"the model refuses these settings ({one_line(error)})") from None


def _frames_made(pipe: Pipeline, family: Family, frames: int | None) -> int | None:
    """Frames that a video has when so many are asked for."""
    if frames is None or not family.rounds_frames:
        return frames
    factor = pipe.vae_scale_factor_temporal
    return frames if frames % factor == 1 else frames // factor * factor + 1


def _tokens(
    pipe: Pipeline,
    family: Family,
    transformer: Any,
    frames: int | None,
    height: int | None,
    width: int | None,
) -> int | None:
    """Video tokens of a video, by the model's own arithmetic on latents that take no memory."""
    if frames is None or height is None or width is None:
        return None
    latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
    sides = (height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial)
    shape = (1, latent_frames, 1, *sides) if family.frames_first else (1, 1, latent_frames, *sides)
    grid = family.grid(transformer, torch.empty(shape, device="meta"))
    return None if grid is None else grid[0] * grid[1] * grid[2]
