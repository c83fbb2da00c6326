"""``adamac doctor``: what in a model would be sparse, and what not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from adamac.cli.lines import quiet_loaders


@dataclass(frozen=True)
class Doctor:
    """Say what in a model will be sparse and what will not, and why.

    Attributes:
        model: Directory or hub id of a diffusers pipeline; the embedded one if not given.
        height: Pixels; the model's default if not given, as for the following ones.
        width: Pixels.
        frames: Frames of a video.
        device: Where to load it.
    """

    model: Positional[str | None] = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    device: str = "cpu"


def doctor(options: Doctor, console: Console) -> int:
    """Say what will be sparse."""
    from adamac.bakeoff.config import Config
    from adamac.bakeoff.device import find_device
    from adamac.bakeoff.doctor import examine

    device = str(find_device(options.device))
    quiet_loaders()
    size: dict[str, Any] = {"height": options.height, "width": options.width, "frames": options.frames}
    config = Config(model=options.model, prompts=(), arms=(), device=device, **size)
    found = examine(config)
    console.print(found.table())
    console.print(found.remark(), highlight=False)
    return 0
