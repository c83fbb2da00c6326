"""Ranks on one machine, as processes: how tests try what is spread over ranks.

Processes come from a server that has imported torch already where the platform has one (Linux), so that a rank costs a fork and
not an import; the server was never threaded, so that forking it is safe.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# When one rank fails, others that waited for it fail too: this long is waited for word of who was first.
_GRACE_S = 0.5
_END_S = 5.0


@dataclass(frozen=True)
class Word:
    """What a rank said at its end."""

    at_s: float
    result: Any = None
    failure: str | None = None


def run(
    function: Callable[..., Any], ranks: int, arguments: tuple[Any, ...], time_limit_s: float
) -> list[Any]:
    """See :func:`adamac.testing.run_ranks`."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["torch.distributed.fsdp", "adamac.moe"])
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        processes, ends = [], []
        try:
            for rank in range(ranks):
                end, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank,
                    args=(function, rank, ranks, meeting, arguments, time_limit_s, theirs),
                    daemon=True,
                )
                process.start()
                theirs.close()
                processes.append(process)
                ends.append(end)
            words = _listen(processes, ends, time.monotonic() + time_limit_s)
        finally:
            _end(processes)
    silent = [rank for rank, word in enumerate(words) if word is None]
    failed = [(word.at_s, rank, word.failure) for rank, word in enumerate(words) if word and word.failure]
    if failed:
        _, rank, failure = min(failed)
        raise RuntimeError(f"rank {rank} of {ranks} failed:\n{failure}")
    if silent:
        raise TimeoutError(
            f"rank {', '.join(map(str, silent))} of {ranks} had not finished after {time_limit_s:g} s; all were ended"
        )
    return [word.result for word in words if word]


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    meeting: str,
    arguments: tuple[Any, ...],
    time_limit_s: float,
    end: Connection,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(meeting, ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=time_limit_s),
        )
        result = function(rank, *arguments)
        dist.barrier()  # nobody leaves while another still needs it
    except BaseException:
        _say(end, Word(time.monotonic(), failure=traceback.format_exc()))
        raise SystemExit(1) from None
    _say(end, Word(time.monotonic(), result))
    dist.destroy_process_group()


def _say(end: Connection, word: Word) -> None:
    # Pickled here, so that tensors are bytes of the message: sent as they are, they would be shared memory of a process
    # that is about to end.
    end.send_bytes(pickle.dumps(word))


def _listen(processes: list[BaseProcess], ends: list[Connection], deadline_s: float) -> list[Word | None]:
    """Wait until all ranks have spoken, one has failed, or time is up."""
    words: list[Word | None] = [None] * len(ends)
    open_ends = {end: rank for rank, end in enumerate(ends)}
    while open_ends and (left_s := deadline_s - time.monotonic()) > 0:
        for end in wait(list(open_ends), left_s):
            rank = open_ends.pop(end)  # ty: ignore[invalid-argument-type]
            words[rank] = _word(end, processes[rank])  # ty: ignore[invalid-argument-type]
            if words[rank].failure:
                deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
    return words


def _word(end: Connection, process: BaseProcess) -> Word:
    at_s = time.monotonic()
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:  # it closed the line without a word
        process.join(_END_S)
        # What it did not say comes before what others said of it.
        return Word(at_s - _GRACE_S, failure=f"it died without a word, exit code {process.exitcode}")


def _end(processes: list[BaseProcess]) -> None:
    """End what still runs, politely first."""
    leave_s = time.monotonic() + _END_S
    for process in processes:
        process.join(0.2)
        if process.exitcode is None:
            process.terminate()
    for process in processes:
        process.join(max(0.0, leave_s - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
