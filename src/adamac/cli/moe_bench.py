"""``adamac moe bench``: layers of several shapes and dispatchers, timed in turns on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from adamac.bakeoff.errors import BadInput

if TYPE_CHECKING:
    from adamac.advise.race import Timed

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MoeBench:
    """Time layers of several shapes by every dispatcher, alone or on several ranks under torchrun.

    Ratios are of the first shape's fastest dispatcher to each layer: above 1 is faster than it.

    Attributes:
        preset: Shapes, the first of which the others are compared with.
        hidden: Width of the model.
        experts: Experts of the fine-grained baseline, on all ranks together.
        top_k: Experts per token, likewise.
        ratio: Latent width as a share of the hidden width.
        tokens: Tokens on each rank.
        dispatcher: all_to_all, per_rank, all_gather, static_gather; all of them if not given. On one rank there is only local.
        rounds: Timed rounds, in which all layers take turns.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "bfloat16", "float16" or "float32".
        out: File that rows are added to, one JSON object a layer and pass.
    """

    preset: tuple[str, ...] = ("fine_grained", "bigmac")
    hidden: int = 256
    experts: int = 16
    top_k: int = 4
    ratio: float = 0.25
    tokens: int = 1024
    dispatcher: tuple[str, ...] = ()
    rounds: int = 15
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None


def moe_bench(options: MoeBench, console: Console) -> int:
    """Check, time and print; the exit code is 1 if a layer computed something wrong."""
    from adamac.bench.rows_file import check_can_append
    from adamac.moe.lm.world import World

    _check(options)
    if options.out is not None and os.environ.get("RANK", "0") == "0":  # who writes
        check_can_append(options.out)
    world = World.join(options.device)
    console = console if world.first else Console(quiet=True)
    try:
        timed = _timed(options, world, console)
    finally:
        world.leave()
    console.print(_table(options, world.size, timed))
    for each in timed:
        if each.problem is not None:
            console.print(f"{_name(each)} is wrong and was not timed: {each.problem}", markup=False)
    if options.out is not None and world.first:
        _write(options, world.size, world.device.type, timed)
    return 1 if any(each.problem for each in timed) else 0


def _timed(options: MoeBench, world: Any, console: Console) -> list[Timed]:
    import torch
    import torch.distributed as dist

    from adamac.advise.bench import CPU, Bench, Case
    from adamac.advise.race import race
    from adamac.moe.dispatch import SENDERS
    from adamac.moe.presets import preset

    default = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    dtype = default if options.dtype == "auto" else getattr(torch, options.dtype)
    bench = Bench(world.device, dtype, dist.group.WORLD if world.size > 1 else None, CPU)
    known = bench.senders()
    if unknown := [name for name in options.dispatcher if name not in known]:
        where = "on one rank" if world.size == 1 else f"on {world.size} ranks"
        others = "" if unknown[0] in SENDERS else ", which does not exist"
        raise BadInput(f"dispatcher: expected {', '.join(known)} {where}, got {unknown[0]!r}{others}")
    cases = [
        Case(
            name,
            preset(name, options.hidden, options.experts, options.top_k, options.ratio),
            options.tokens,
            way,
            both,
        )
        for name in options.preset
        for way in (options.dispatcher or known)
        for both in (False, True)
    ]
    with console.status("") as status:
        return race(cases, bench, options.rounds, told=status.update)


def _check(options: MoeBench) -> None:
    for name in ("tokens", "rounds"):
        if (value := getattr(options, name)) < (2 if name == "rounds" else 1):
            raise BadInput(f"{name} must be at least {2 if name == 'rounds' else 1}, got {value}")
    if not options.preset:
        raise BadInput("preset: expected one or more shapes, got none")
    if options.dtype not in ("auto", *_DTYPES):
        raise BadInput(f"dtype must be auto, {', '.join(_DTYPES)}, got {options.dtype!r}")


def _table(options: MoeBench, ranks: int, timed: list[Timed]) -> Table:
    title = f"{options.tokens} tokens on {'one rank' if ranks == 1 else f'each of {ranks} ranks'}, ms"
    drawn = Table(title=title)
    for place, column in enumerate(("layer", "pass", "p20", "p50", "p80", "MiB sent", "ratio")):
        # Where a terminal is narrow, names give way: a figure that is cut is none.
        drawn.add_column(column, justify="left" if place < 2 else "right", no_wrap=place > 0, overflow="fold")
    for each in (each for each in timed if each.problem is None):
        drawn.add_row(
            _name(each),
            "both" if each.case.backward else "forward",
            *(f"{each.percentile_ms(percent):.3f}" for percent in (20, 50, 80)),
            f"{each.bytes_sent / 2**20:.2f}",
            f"{_ratio(options, each, timed):.2f}x",
        )
    return drawn


def _name(each: Timed) -> str:
    return f"{each.case.name}/{each.case.dispatcher}"


def _ratio(options: MoeBench, each: Timed, timed: list[Timed]) -> float:
    """Of the fastest dispatcher of the first shape to this layer, in the same pass; not a number if none was timed."""
    first = [
        other.percentile_ms(50)
        for other in timed
        if other.case.name == options.preset[0]
        and other.case.backward == each.case.backward
        and not other.problem
    ]
    return min(first) / each.percentile_ms(50) if first else float("nan")


def _write(options: MoeBench, ranks: int, device: str, timed: list[Timed]) -> None:
    from adamac.bakeoff.machine import machine_stamp
    from adamac.bench.rows_file import append_rows

    assert options.out is not None
    stamp = {"benchmark": "moe_bench", "ranks": ranks, **machine_stamp(device)}
    shape = {
        name: getattr(options, name) for name in ("hidden", "experts", "top_k", "ratio", "tokens", "dtype")
    }
    append_rows(options.out, (stamp | shape | _row(each) for each in timed))


def _row(each: Timed) -> dict[str, Any]:
    """What was found of one layer and pass; times only if it was timed."""
    times = {f"p{p}_ms": round(each.percentile_ms(p), 6) for p in (20, 50, 80)} if each.samples_ms else {}
    return {
        "preset": each.case.name,
        "dispatcher": each.case.dispatcher,
        "backward": each.case.backward,
        **times,
        "n": len(each.samples_ms),
        "bytes_sent": each.bytes_sent,
        "problem": each.problem,
    }
