"""Sets of processes: one rank each, on one fabric, doing cases one after another and sending rows as they come.

If a rank fails alone, hangs or dies, the whole set is ended, the case is a row with the reason, and a fresh set goes on with the
next case.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from adamac.moe.cost.machine import Machine

from .cases import (
    CapturedCase,
    Case,
    CollectivesCase,
    CostCase,
    Fabric,
    KernelsCase,
    LaunchesCase,
    LayerCase,
    ModelCase,
)

Row = dict[str, Any]

# What runs a case. Imported when it is needed, so that what is broken in one costs its own cases only.
_MODULES = {
    LayerCase: "layer",
    CapturedCase: "captured",
    CollectivesCase: "collectives",
    KernelsCase: "kernels",
    LaunchesCase: "launches",
    ModelCase: "model",
    CostCase: "cost",
}

# When one rank fails, others follow: this long is waited for the word of the first that knows why.
_GRACE_S = 1.0
# What has done its work is given so long to leave.
_LEAVE_S = 5.0
# So many sets may fail before a fabric is given up.
_MOST_SETS = 4


@dataclass(frozen=True)
class Order:
    """What a set of processes is to do.

    Attributes:
        fabric: What it talks over.
        cases: In this order.
        ranks: How many processes.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: Torch's name of the dtype that layers and models are timed in.
        deadline_s: On the clock of ``time.time``; no case begins later.
        limit_s: A set that is silent for so long is ended.
        common: Entries of all rows.
        machine: Constants that predict, if they were fitted elsewhere.
    """

    fabric: Fabric
    cases: tuple[Case, ...]
    ranks: int
    device: str
    dtype: str
    deadline_s: float
    limit_s: float
    common: Row
    machine: Machine | None = None


def carry_out(order: Order, take: Callable[[Row], None], say: Callable[[str], None]) -> None:
    """Do all cases, in as many sets of processes as it takes.

    Args:
        order: What to do.
        take: Gets every row as it comes.
        say: Gets lines of progress.
    """
    first = 0
    for _ in range(_MOST_SETS):
        done, problem = _one_set(order, first, take, say)
        if problem is None:
            return
        say(f"  {problem}")
        case = order.cases[done] if done < len(order.cases) else None
        take(order.common | _lost(order, case) | {"arm": "all", "status": "error", "reason": problem})
        first = done + 1
        if first >= len(order.cases):
            return
    for case in order.cases[first:]:
        reason = f"given up: {_MOST_SETS} sets of processes failed on this fabric"
        take(order.common | _lost(order, case) | {"arm": "all", "status": "error", "reason": reason})


def _lost(order: Order, case: Case | None) -> Row:
    """What a row says of a case that gave none."""
    entries: Row = {"fabric": order.fabric.name, "ranks": order.ranks}
    if case is not None:
        shape = {name: entry for name, entry in vars(case).items() if name != "budget_s"}
        entries |= {"benchmark": f"moe_{_MODULES[type(case)]}", **shape}
    return entries


def _one_set(
    order: Order, first: int, take: Callable[[Row], None], say: Callable[[str], None]
) -> tuple[int, str | None]:
    """Run one set from a case on; return the case it was at, and what went wrong."""
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    ends: dict[Connection, int] = {}
    leave_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(order.ranks):
                end, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank, args=(order, first, rank, folder, theirs), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
                ends[end] = rank
            at, problem = _listen(order, first, ends, take, say)
            leave_s = 0.0 if problem else _LEAVE_S
            return at, problem
        finally:
            _end(processes, leave_s)


def _listen(
    order: Order,
    first: int,
    ends: dict[Connection, int],
    take: Callable[[Row], None],
    say: Callable[[str], None],
) -> tuple[int, str | None]:
    at, problem = first, None
    open_ends = dict(ends)
    until_s = time.monotonic() + order.limit_s
    while open_ends and (left_s := until_s - time.monotonic()) > 0:
        for end in wait(list(open_ends), left_s):
            rank = open_ends[end]  # ty: ignore[invalid-argument-type]
            try:
                kind, word = end.recv()  # ty: ignore[unresolved-attribute]
            except EOFError:
                open_ends.pop(end)  # ty: ignore[invalid-argument-type]
                kind, word = "failed", f"rank {rank} of {order.ranks} died without a word"
            if kind == "row":
                take(word)
            elif kind == "case":
                at = word
                say(f"  {order.cases[at].title}")
            elif kind == "done":
                open_ends.pop(end)  # ty: ignore[invalid-argument-type]
            elif kind == "failed" and problem is None:
                problem = word
                until_s = time.monotonic() + _GRACE_S
            if problem is None:
                until_s = time.monotonic() + order.limit_s
    if problem is None and open_ends:
        problem = f"rank {', '.join(map(str, open_ends.values()))} was silent for {order.limit_s:g} s; all were ended"
    return at, problem


def _end(processes: list[BaseProcess], leave_s: float) -> None:
    for process in processes:
        process.join(leave_s)
        if process.is_alive():
            process.kill()
            process.join()


def _rank(order: Order, first: int, rank: int, folder: str, end: Connection) -> None:
    """What a process does."""
    os.environ.update(order.fabric.environment)
    if order.fabric.backend == "nccl":
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(Path(folder) / f"nccl.{rank}")}
    from .crew import reason

    try:
        _work(order, first, rank, folder, end)
        last = "done", None
    except BaseException as error:
        last = "failed", f"rank {rank} of {order.ranks}: {reason(error)}"
    end.send(last)
    end.close()
    # Leaving in order would wait for ranks that may never come.
    os._exit(0 if last[0] == "done" else 1)


def _work(order: Order, first: int, rank: int, folder: str, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    from . import check
    from .crew import Crew

    cuda = order.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = None
    if order.fabric.backend is not None:
        dist.init_process_group(
            order.fabric.backend,
            store=dist.FileStore(str(Path(folder) / "meeting"), order.ranks),
            rank=rank,
            world_size=order.ranks,
            timeout=timedelta(seconds=order.limit_s),
            device_id=device if cuda else None,
        )
        store = dist.FileStore(str(Path(folder) / "words"), order.ranks)
    crew = Crew(
        rank=rank,
        ranks=order.ranks,
        device=device,
        dtype=getattr(torch, order.dtype),
        store=store,
        deadline_s=order.deadline_s,
        common=order.common | {"fabric": order.fabric.name, "ranks": order.ranks},
        emit=lambda row: end.send(("row", row)),
        pulse=lambda: end.send(("pulse", None)),
        limit_s=order.limit_s,
        machine=order.machine,
    )
    errors = check.equality(crew)
    crew.refused |= check.refusals(errors)
    ways = crew.common["transports"] = _transports(folder, order)
    crew.row(
        {"benchmark": "moe_check", "relative_error": errors, **_verdict(crew.refused, ways, order.fabric)}
    )
    if first == 0 and order.fabric.backend is not None:
        hard = check.hard_situations(crew)
        wrong = check.problems(hard)
        reason = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
        verdict = {"status": "error", "reason": reason} if wrong else {"status": "ok"}
        crew.row({"benchmark": "moe_check_hard", "relative_error": hard, **verdict})
    for number in range(first, len(order.cases)):
        case = order.cases[number]
        if not crew.in_time():
            crew.row(_lost(order, case) | {"arm": "all", "status": "stopped", "reason": "time limit"})
            continue
        if rank == 0:
            end.send(("case", number))
        import_module(f"benchmarks.moe.{_MODULES[type(case)]}").run(case, crew)
        if cuda:
            torch.cuda.empty_cache()
    crew.agree("done")  # nobody leaves while another still needs it


def _verdict(refused: dict[str, str], ways: list[str], fabric: Fabric) -> Row:
    """Whether all arms are right, and rows travel the way that the fabric is named after."""
    problems = [f"{name}: {problem}" for name, problem in refused.items()]
    if others := [way for way in ways if not way.startswith(fabric.transport)]:
        problems.append(f"NCCL sends through {', '.join(others)}, not {fabric.transport} alone")
    return {"status": "error", "reason": "; ".join(problems)} if problems else {"status": "ok"}


def _transports(folder: str, order: Order) -> list[str]:
    """What NCCL said it sends through, between ranks."""
    if order.fabric.backend != "nccl":
        return []
    logs = [path.read_text(errors="replace") for path in Path(folder).glob("nccl.*")]
    return sorted({match for log in logs for match in re.findall(r"Channel .*? via ([\w/]+)", log)})
