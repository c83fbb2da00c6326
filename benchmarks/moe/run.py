"""The loop: fabrics one after another, each with its own processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from adamac.moe.cost.machine import Machine

from .cases import FABRICS, PARTS, Fabric, cases
from .launch import Order, carry_out
from .rows import Row, RowFile, stamp

_DTYPES = ("bfloat16", "float16", "float32")
# In the order of importance: the first to be measured where time is short.
_ON_GPUS = ("nvlink", "shm", "none", "sockets")


@dataclass(frozen=True)
class Run:
    """Measure, and write rows.

    Attributes:
        plan: "quick" is what the targets need, "grid" is every shape of a layer in few samples, "full" is everything, "tiny" a
            rehearsal that a processor does in seconds.
        out: File of rows; rows of former runs in it stay.
        fabrics: none (one rank, no communication), nvlink, shm, sockets, gloo; all of a machine if not given.
        parts: collectives, kernels, layer, rivals, train, serve.
        hidden: Only these of the plan's widths; all if not given. Likewise the next three.
        top_k: Experts that a token takes.
        ratio: Narrow widths.
        routing: balanced, trained_like.
        ranks: Processes, one for each GPU; all GPUs of the machine if not given, two on a processor.
        minutes: No case begins after this long.
        limit_s: Processes that say nothing for so long are ended.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "bfloat16", "float16" or "float32".
        commit: Names the commit where the code is a copy without its repository.
        machine: File that adamac advise moe --measure --out wrote, on this fabric and any number of ranks: what it says of each
            layer stands beside its times, and the part "cost", which would fit constants here, is left out.
    """

    plan: str = "quick"
    out: Path = Path("out/moe.jsonl")
    fabrics: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS
    hidden: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    ratio: tuple[float, ...] = ()
    routing: tuple[str, ...] = ()
    ranks: int | None = None
    minutes: float = 9.0
    limit_s: float = 120.0
    device: str = "auto"
    dtype: str = "auto"
    commit: str | None = None
    machine: Path | None = None


def run(options: Run, say: Callable[[str], None] = print) -> list[Row]:
    """Measure everything that is asked for.

    Args:
        options: What.
        say: Takes a line of progress.

    Returns:
        The rows of this run, which are in its file too.

    Raises:
        ValueError: If a name is unknown, the machine has not what is asked for, or a file holds no constants.
        OSError: If that file cannot be read.
    """
    check(options)
    machine = None if options.machine is None else _machine(options)
    deadline_s = time.time() + 60 * options.minutes
    device, file, rows = _device(options), RowFile(options.out), []
    started = datetime.now(UTC).isoformat(timespec="seconds")
    common = {"run": started, "plan": options.plan, **stamp(device, options.commit)}

    def take(row: Row) -> None:
        rows.append(row)
        file.add(row)

    for fabric in _fabrics(options):
        ranks = 1 if fabric.backend is None else _ranks(options)
        say(f"{fabric.name}, {ranks} rank{'s' if ranks > 1 else ''}")
        wanted = cases(
            options.plan,
            fabric,
            tuple(part for part in options.parts if part != "cost" or machine is None),
            hidden=options.hidden,
            top_k=options.top_k,
            ratio=options.ratio,
            routing=options.routing,
        )
        if not wanted:
            continue
        order = Order(
            fabric,
            tuple(wanted),
            ranks,
            device,
            _dtype(options),
            deadline_s,
            options.limit_s,
            common,
            machine,
        )
        carry_out(order, take, say)
    return rows


def _machine(options: Run) -> Machine:
    """Constants from a file, for the one fabric that is measured.

    Raises:
        ValueError: If the file has none of it, or nothing that would be predicted is measured.
    """
    assert options.machine is not None, "asked for"
    machine, fabrics = Machine.load(options.machine), _fabrics(options)
    if len(fabrics) != 1:
        raise ValueError(f"constants are those of one fabric; got --machine and {len(fabrics)} fabrics")
    if fabrics[0].backend is not None and machine.ranks is None:
        raise ValueError(
            f"{options.machine} was measured on one rank and has no constants of {fabrics[0].name}; measure it under torchrun"
        )
    if not {"layer", "rivals"} & set(options.parts):
        raise ValueError("--machine predicts layers; got none in --parts")
    return machine


def check(options: Run) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: Saying what is wrong.
    """
    for what, given, known in (
        ("plan", (options.plan,), ("quick", "grid", "full", "tiny")),
        ("fabric", options.fabrics, FABRICS),
        ("part", options.parts, PARTS),
        ("device", (options.device,), ("auto", "cpu", "cuda")),
        ("dtype", (options.dtype,), ("auto", *_DTYPES)),
    ):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; there are {', '.join(known)}")
    if _device(options) == "cpu" and (wrong := [f.name for f in _fabrics(options) if f.backend == "nccl"]):
        raise ValueError(f"fabric {wrong[0]!r} needs GPUs; on a processor there are none and gloo")
    if _device(options) == "cuda" and _ranks(options) > torch.cuda.device_count():
        raise ValueError(f"ranks must be at most the {torch.cuda.device_count()} GPUs; got {options.ranks}")


def _fabrics(options: Run) -> list[Fabric]:
    if options.fabrics:
        return [FABRICS[name] for name in options.fabrics]
    if _device(options) == "cpu":
        return [FABRICS[name] for name in ("none", "gloo")]
    several = _ranks(options) > 1
    return [FABRICS[name] for name in _ON_GPUS if several or FABRICS[name].backend is None]


def _ranks(options: Run) -> int:
    if options.ranks is not None:
        return options.ranks
    return torch.cuda.device_count() if _device(options) == "cuda" else 2


def _dtype(options: Run) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if _device(options) == "cpu" else "bfloat16"


def _device(options: Run) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"
