"""``adamac bakeoff`` and ``adamac report``: the same videos with several kinds of attention, and what that gained and cost."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from tyro.conf import Positional

from adamac.bakeoff.errors import BadInput
from adamac.cli.lines import complain, quiet_loaders, say

if TYPE_CHECKING:
    from adamac.attention import Schedule
    from adamac.bakeoff.config import Config, RunDirectory
    from adamac.bakeoff.ranks import Ranks


@dataclass(frozen=True)
class Bakeoff:
    """Make the same videos with several kinds of attention, and report what was gained and what it cost.

    Without options: the embedded pipeline, one prompt of each of four categories, the arms dense, adacluster and svg2.
    Under torchrun each video is spread over all ranks, each with a GPU of its own.

    Attributes:
        model: Directory or hub id of a diffusers pipeline; the embedded one if not given.
        prompts: File of prompts (JSON lines with "prompt", and "category", "id", "negative_prompt" and "image" where you
            want them, or plain lines), or "all" for every prompt that ships with adamac.
        negative_prompt: Negative prompt of all prompts that have none of their own.
        arms: Which kinds of attention. dense, dense-math, dense-efficient, dense-flash, dense-cudnn, adacluster,
            adacluster-paper, svg2, sparsed, block-topk, tiles, oracle. dense is always run, since all are compared with
            it.
        steps: Denoising steps; the model's default if not given, as for the following ones.
        height: Pixels.
        width: Pixels.
        frames: Frames of a video.
        guidance: Scale of classifier-free guidance.
        call: Further arguments of the pipeline call that only some pipelines have, each NAME=VALUE, as true_cfg_scale=6 or
            guidance_scale_2=3.
        fps: Frames a second of the video files.
        seeds: Every prompt is made once for each seed.
        keep: Share of the video tokens that every sparse arm reads, over 0 up to 1, in place of its own budget.
        dense_first: Dense steps at the start of every sparse arm: an integer counts them, a decimal (0.1) is a share.
        dense_last: Dense steps at the end, likewise.
        dense_layers: Layers that stay dense, by index; negative ones count from the end.
        min_tokens: Videos of fewer tokens stay dense in every arm; 0 for none. If not given, those too small for sparse
            attention to pay on this device, as it was measured: the embedded model's on a GPU, for instance.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        compile: Compile the transformer's blocks (torch.compile) for every arm, dense too. The first video of each arm,
            which is thrown away, takes longer then.
        setup: FILE.py:FUNCTION of your own that prepares the loaded pipeline and moves it to its device: LoRA, offload,
            quantised weights, another scheduler.
        out: Directory for rows, videos, summary and report.
        resume: Continue the run that is in the directory.
    """

    model: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    arms: tuple[str, ...] = ("dense", "adacluster", "svg2")
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    call: tuple[str, ...] = ()
    fps: int | None = None
    seeds: tuple[int, ...] = (0,)
    keep: float | None = None
    dense_first: int | float = 0.1
    dense_last: int | float = 0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    setup: str | None = None
    out: Path = Path("out/demo")
    resume: bool = False


@dataclass(frozen=True)
class Report:
    """Draw summary.json and report/index.html of a run again, from its rows.

    Attributes:
        directory: What was given to bakeoff as --out.
    """

    directory: Positional[Path]


def bakeoff(options: Bakeoff, console: Console) -> int:
    """Run a bake-off and draw its report; under torchrun on all ranks, of which the first speaks."""
    from adamac.bakeoff.ranks import RankGoneError, Ranks
    from adamac.bakeoff.studio import Studio

    try:
        ranks = Ranks.join(options.device)
        with ranks.agreed():
            config = _config(options, ranks.size)
        if ranks.lead:
            return _lead(options, config, ranks, console)
        Studio(config, ranks).follow()
        ranks.leave()
    except RankGoneError as error:
        if Ranks.speaks():
            complain(f"{error}; {_kept(options)}")
        return 1
    except (BadInput, ModuleNotFoundError):  # of all ranks
        if Ranks.speaks():
            raise
    return 0


def _config(options: Bakeoff, ranks: int) -> Config:
    from adamac.bakeoff import call
    from adamac.bakeoff.config import REFERENCE, Config
    from adamac.bakeoff.device import find_device, find_dtype
    from adamac.bakeoff.prompts import choose_prompts
    from adamac.bakeoff.setup import Setup

    device = find_device(options.device)
    find_dtype(options.dtype, device)
    for drawing in ("jinja2", "matplotlib", "av"):  # missed now, not after the first video or the last one
        import_module(drawing)
    quiet_loaders()
    return Config(
        model=options.model,
        prompts=choose_prompts(options.prompts, options.model, options.negative_prompt),
        arms=options.arms if REFERENCE in options.arms else (REFERENCE, *options.arms),
        seeds=options.seeds,
        steps=options.steps,
        height=options.height,
        width=options.width,
        frames=options.frames,
        guidance=options.guidance,
        call=call.parse(options.call),
        fps=options.fps,
        keep=options.keep,
        schedule=_schedule(options),
        device=str(device),
        dtype=options.dtype,
        compile=options.compile,
        setup=None if options.setup is None else Setup.parse(options.setup),
        ranks=ranks,
    )


def _lead(options: Bakeoff, config: Config, ranks: Ranks, console: Console) -> int:
    from adamac.bakeoff.config import RunDirectory
    from adamac.bakeoff.progress import ConsoleProgress
    from adamac.bakeoff.run import run_bakeoff

    directory = RunDirectory(options.out)
    try:
        with ConsoleProgress(console) as progress:
            rows = run_bakeoff(config, directory, progress, resume=options.resume, ranks=ranks)
    except KeyboardInterrupt:
        complain(f"broken off; {_kept(options)}")
        return 130  # among ranks that were broken off as well, perhaps within a collective, and cannot leave in order
    ranks.leave()
    _draw(directory, console)
    return 0 if all(row.ok for row in rows) else 1


def _kept(options: Bakeoff) -> str:
    from adamac.bakeoff.config import RunDirectory

    if not RunDirectory(options.out).rows.exists():
        return "nothing was finished yet"
    return f"finished videos are kept in {options.out}; go on with the same command and --resume"


def report(options: Report, console: Console) -> int:
    """Draw a report again."""
    from adamac.bakeoff.config import RunDirectory

    _draw(RunDirectory(options.directory), console)
    return 0


def _schedule(options: Bakeoff) -> Schedule:
    from adamac.attention import Schedule

    try:
        return Schedule(options.dense_first, options.dense_last, options.dense_layers, options.min_tokens)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _draw(directory: RunDirectory, console: Console) -> None:
    from adamac.bakeoff.report import draw
    from adamac.bakeoff.report.table import arms_table, lines
    from adamac.bakeoff.rows import read_rows

    summary = draw(directory)
    console.print(arms_table(summary))
    for line in lines(summary, read_rows(directory.rows)):
        say(console, line)
    say(console, f"report: {directory.report}")
