"""What the tests of a bake-off on several ranks run, on each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from play import Silence

from adamac.bakeoff import studio
from adamac.bakeoff.config import Config, RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.generate import BrokenVideo, generate
from adamac.bakeoff.pipelines import load_pipeline
from adamac.bakeoff.prompts import Prompt
from adamac.bakeoff.ranks import Ranks
from adamac.bakeoff.rows import Row
from adamac.bakeoff.run import run_bakeoff

PROMPTS = (Prompt("p0", "any", "a red ball"), Prompt("p1", "any", "a ball moves"))


def config_of(model: Path, ranks: int) -> Config:
    size = {"steps": 4, "height": 64, "width": 64, "frames": 7}
    return Config(model=str(model), prompts=PROMPTS, arms=("dense", "adacluster"), ranks=ranks, **size)


def bake(rank: int, model: Path, out: Path, fails: tuple[str, str] | None = None) -> list[Row] | str:
    """Take part in a bake-off on the ranks that there are.

    Args:
        rank: Number of this one.
        model: A pipeline's folder.
        out: Where to.
        fails: Arm and prompt of a video that the second rank finds fault with.

    Returns:
        Of the first rank the rows, or why nothing was made; of the others nothing.
    """
    ranks = Ranks.join("cpu")
    config = config_of(model, ranks.size)

    def watched(pipe, arm, schedule, case, arguments, on_step=None):
        video = generate(pipe, arm, schedule, case, arguments, on_step)
        # A short video to warm up is none that is found fault with.
        if rank == 1 and (arm.name, case.prompt.id) == fails and len(video.step_s) == config.steps:
            raise BrokenVideo("frames are not what they should be")
        return video

    # diffusers numbers ranks by GPUs, of which there may be none here.
    with (
        patch.object(torch.accelerator, "device_count", lambda: 1),
        patch.object(studio, "generate", watched),
    ):
        if not ranks.lead:
            studio.Studio(config, ranks).follow()
            return []
        try:
            return run_bakeoff(config, RunDirectory(out), Silence(), ranks=ranks)
        except BadInput as error:
            return str(error)


def refused(rank: int, one_head: Path, two_heads: Path, out: Path) -> list[Any]:
    """What the first of two ranks says of bake-offs of a model with fewer heads, and of one that fails to load.

    It fails on the second rank alone, as for lack of memory, and not as what is refused by name.
    """

    def load(*given: Any, **more: Any) -> Any:
        if rank == 1:
            raise RuntimeError("no room")
        return load_pipeline(*given, **more)

    spread = studio._spread

    def meet_and_spread(*given: Any) -> None:
        dist.barrier()  # as ranks do on GPUs, where a mesh is made of them
        spread(*given)

    with patch.object(studio, "_spread", meet_and_spread):
        said = [bake(rank, one_head, out)]
        with patch.object(studio, "load_pipeline", load):
            try:
                said.append(bake(rank, two_heads, out))
            except RuntimeError as error:
                said.append(str(error))
    return said
