"""The command line: a dataclass and a function for each command.

Nothing heavy is imported before it is needed, so that ``adamac --help`` answers at once. What the user can mend is one line on
standard error and exit code 2; a run that was broken off exits with 130, one in which videos failed with 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, subcommand

import adamac
from adamac.bakeoff.errors import BadInput
from adamac.cli_advise import Advise, advise
from adamac.cli_moe import Moe, moe
from adamac.extras import remedy

if TYPE_CHECKING:
    from adamac.attention import Schedule


@dataclass(frozen=True)
class Bakeoff:
    """Make the same videos with several kinds of attention, and report what was gained and what it cost.

    Without options: the embedded pipeline, one prompt of each of four categories, the arms dense, adacluster and svg2.

    Attributes:
        model: Directory or hub id of a diffusers pipeline; the embedded one if not given.
        prompts: File of prompts (JSON lines with "prompt", "category" and "id", or plain lines), or "all" for every
            prompt that ships with adamac.
        arms: Which kinds of attention. dense, dense-math, dense-efficient, dense-flash, dense-cudnn, adacluster,
            adacluster-paper, svg2, sparsed, block-topk, tiles, oracle. dense is always run, since all are compared with
            it.
        steps: Denoising steps; the model's default if not given, as for the following ones.
        height: Pixels.
        width: Pixels.
        frames: Frames of a video.
        guidance: Scale of classifier-free guidance.
        fps: Frames a second of the video files.
        seeds: Every prompt is made once for each seed.
        keep: Share of the video tokens that every sparse arm reads, over 0 up to 1, in place of its own budget.
        dense_first: Dense steps at the start of every sparse arm: a number of them, or a share with a point (0.1).
        dense_last: Dense steps at the end, likewise.
        dense_layers: Layers that stay dense, by index; negative ones count from the end.
        min_tokens: Videos of fewer tokens stay dense in every arm; 0 for none. If not given, those too small for sparse
            attention to pay on this device, as it was measured: the embedded model's on a GPU, for instance.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        compile: Compile the transformer's blocks (torch.compile) for every arm, dense too. The first video of each arm,
            which is thrown away, takes longer then.
        setup: FILE.py:FUNCTION of your own that makes the loaded pipeline ready and puts it where it runs: LoRA, offload,
            quantised weights, another scheduler.
        out: Directory for rows, videos, summary and report.
        resume: Go on with the run that is in the directory.
    """

    model: str | None = None
    prompts: str | None = None
    arms: tuple[str, ...] = ("dense", "adacluster", "svg2")
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
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


@dataclass(frozen=True)
class Bench:
    """Time one operation at the shapes of real models: dense by every kernel that runs here, and sparse with planning.

    Attributes:
        what: The operation.
        shapes: tiny, cogvideox-2b, wan-1.3b, wan-14b, hunyuan-129f, hunyuan-193f.
        densities: Shares of the keys that each row reads; each is timed with and without compensation.
        key_roots: Further numbers of key clusters, as multiples of the root of the number of tokens; the default has 4.
        heads: Fewer heads than the model has, where memory or time is short.
        rounds: Timed rounds, in which all contenders take turns.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        out: File that rows are appended to.
    """

    what: Positional[Literal["attention"]]
    shapes: tuple[str, ...] = ("tiny",)
    densities: tuple[float, ...] = (0.3, 0.15, 0.08, 0.05)
    key_roots: tuple[float, ...] = ()
    heads: int | None = None
    rounds: int = 5
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    out: Path | None = None


@dataclass(frozen=True)
class Version:
    """Print the version; adamac --version does, too."""


Command = (
    Annotated[Bakeoff, subcommand("bakeoff")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Moe, subcommand("moe")]
    | Annotated[Advise, subcommand("advise")]
    | Annotated[Version, subcommand("version")]
)


def bakeoff(options: Bakeoff, console: Console) -> int:
    """Run a bake-off and draw its report."""
    from adamac.bakeoff.config import REFERENCE, Config, RunDirectory
    from adamac.bakeoff.device import find_device, find_dtype
    from adamac.bakeoff.progress import ConsoleProgress
    from adamac.bakeoff.prompts import choose_prompts
    from adamac.bakeoff.run import run_bakeoff
    from adamac.bakeoff.setup import Setup

    device = find_device(options.device)
    find_dtype(options.dtype, device)
    for drawing in ("jinja2", "matplotlib", "av"):  # missed now, not after the first video or the last one
        import_module(drawing)
    _quiet_loaders()
    arms = options.arms if REFERENCE in options.arms else (REFERENCE, *options.arms)
    config = Config(
        model=options.model,
        prompts=choose_prompts(options.prompts, options.model),
        arms=arms,
        seeds=options.seeds,
        steps=options.steps,
        height=options.height,
        width=options.width,
        frames=options.frames,
        guidance=options.guidance,
        fps=options.fps,
        keep=options.keep,
        schedule=_schedule(options),
        device=str(device),
        dtype=options.dtype,
        compile=options.compile,
        setup=None if options.setup is None else Setup.parse(options.setup),
    )
    directory = RunDirectory(options.out)
    try:
        with ConsoleProgress(console) as progress:
            rows = run_bakeoff(config, directory, progress, resume=options.resume)
    except KeyboardInterrupt:
        kept = f"finished videos are kept in {options.out}; go on with the same command and --resume"
        _complain(f"broken off; {kept if directory.rows.exists() else 'nothing was finished yet'}")
        return 130
    _draw(directory, console)
    return 0 if all(row.ok for row in rows) else 1


def _schedule(options: Bakeoff) -> Schedule:
    from adamac.attention import Schedule

    try:
        return Schedule(options.dense_first, options.dense_last, options.dense_layers, options.min_tokens)
    except ValueError as error:
        raise BadInput(str(error)) from None


def report(options: Report, console: Console) -> int:
    """Draw a report again."""
    from adamac.bakeoff.config import RunDirectory

    _draw(RunDirectory(options.directory), console)
    return 0


def doctor(options: Doctor, console: Console) -> int:
    """Say what will be sparse."""
    from adamac.bakeoff.config import Config
    from adamac.bakeoff.device import find_device
    from adamac.bakeoff.doctor import examine

    device = str(find_device(options.device))
    _quiet_loaders()
    size: dict[str, Any] = {"height": options.height, "width": options.width, "frames": options.frames}
    config = Config(model=options.model, prompts=(), arms=(), device=device, **size)
    found = examine(config)
    console.print(found.table())
    console.print(found.remark(), highlight=False)
    return 0


def bench(options: Bench, console: Console) -> int:
    """Time one operation."""
    from adamac.bakeoff.device import find_device, find_dtype
    from adamac.bench.run import bench_attention
    from adamac.bench.show import show

    device = find_device(options.device)
    rows = list(
        bench_attention(
            options.shapes,
            options.densities,
            heads=options.heads,
            rounds=options.rounds,
            device=str(device),
            dtype=find_dtype(options.dtype, device),
            out=options.out,
            key_roots=options.key_roots,
            told=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    )
    show(rows, console)
    return 0


def version(options: Version, console: Console) -> int:
    """Print the version."""
    console.print(adamac.__version__, highlight=False)
    return 0


# Each command's function, and the extra of the package that has what it needs.
_RUN: dict[type, tuple[Callable[[Any, Console], int], str]] = {
    Bakeoff: (bakeoff, "bakeoff"),
    Report: (report, "bakeoff"),
    Doctor: (doctor, "diffusers"),
    Bench: (bench, "bakeoff"),
    Moe: (moe, "moe"),
    Advise: (advise, "moe"),
    Version: (version, "bakeoff"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; ``None`` means those of the process.

    Returns:
        Exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        options = tyro.cli(Command, prog="adamac", args=["version"] if given == ["--version"] else given)
    except SystemExit as stop:  # tyro, after help or a usage error
        return stop.code if isinstance(stop.code, int) else 2
    run, extra = _RUN[type(options)]
    try:
        return run(options, Console())
    except ModuleNotFoundError as error:
        if (line := remedy(error, extra)) is None:
            raise
        _complain(line)
        return 2
    except (BadInput, OSError) as error:  # OSError: a full disk, a directory that went away
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """Run as a program."""
    # torch warns where there is no numpy; commands that need it say so in a line, the others do not need it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Not left in order, since another rank is gone: torch's threads wait for it, and would abort the program as it ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(line: str) -> None:
    Console(stderr=True).print(f"adamac: {line}", markup=False, highlight=False, soft_wrap=True)


def _quiet_loaders() -> None:
    """Keep the libraries' own bars and advice off the terminal; they are for interactive loading."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _draw(directory: Any, console: Console) -> None:
    from adamac.bakeoff.report import draw
    from adamac.bakeoff.report.table import arms_table, lines
    from adamac.bakeoff.rows import read_rows

    summary = draw(directory)
    console.print(arms_table(summary))
    for line in lines(summary, read_rows(directory.rows)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {directory.report}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    entry()
