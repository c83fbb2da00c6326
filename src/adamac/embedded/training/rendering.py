"""Clips painted by all processor cores at once, handed over through shared memory.

Workers paint into numbered slots of one block of memory that they inherit, so only captions travel
between processes. While the device encodes one half of the slots, the workers fill the other.
"""

from __future__ import annotations

import dataclasses
import mmap
import multiprocessing
import multiprocessing.pool
from collections.abc import Iterator

import cv2
import numpy as np

from adamac.embedded.training import scenes

SLOTS = 256
_memory: np.ndarray | None = None
"""The shared block ``(SLOTS, bytes of the longest clip)``; set before the workers are forked."""


@dataclasses.dataclass(frozen=True)
class Order:
    """One clip to be painted."""

    category: str
    seed: int
    frames: int
    height: int
    width: int
    held_out: bool = False


def _paint(job: tuple[int, Order]) -> str:
    slot, order = job
    clip = scenes.scene(order.category, order.seed, order.frames, order.height, order.width, order.held_out)
    flat = clip.frames.reshape(-1)
    assert _memory is not None, "the pool forks after its memory is made"
    _memory[slot, : flat.size] = flat
    return clip.caption


class Renderer:
    """A pool of painting processes; create it before the device is first used (it forks).

    Args:
        workers: Number of processes.
        largest: Bytes of the largest clip that will be ordered.
    """

    def __init__(self, workers: int, largest: int) -> None:
        global _memory
        _memory = np.frombuffer(mmap.mmap(-1, SLOTS * largest), np.uint8).reshape(SLOTS, largest)
        self._block = _memory
        context = multiprocessing.get_context("fork")
        self._pool = context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,))

    def clips(self, orders: list[Order]) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Paint clips of one size.

        Yields:
            Frames ``(n, frames, height, width, 3)``, valid until the next ones are asked for, and
            their captions.
        """
        half = SLOTS // 2
        pending = None
        try:
            for number, start in enumerate(range(0, len(orders), half)):
                chunk, first = orders[start : start + half], (number % 2) * half
                jobs = [(first + i, order) for i, order in enumerate(chunk)]
                ready, pending = pending, (first, chunk, self._pool.map_async(_paint, jobs, 2))
                if ready is not None:
                    yield self._collect(*ready)
            if pending is not None:
                yield self._collect(*pending)
        finally:
            if pending is not None:  # a reader that stopped early must not leave painters behind
                pending[2].wait()

    def _collect(
        self, first: int, chunk: list[Order], result: multiprocessing.pool.AsyncResult
    ) -> tuple[np.ndarray, list[str]]:
        """Wait for a chunk and view its slots as clips."""
        captions = result.get()
        shape = (chunk[0].frames, chunk[0].height, chunk[0].width, 3)
        block = self._block[first : first + len(chunk), : int(np.prod(shape))]
        return block.reshape(len(chunk), *shape), captions

    def close(self) -> None:
        """End the processes."""
        self._pool.terminate()
        self._pool.join()


MIX = {
    "plain": 0.12,
    "cut": 0.25,
    "interaction": 0.15,
    "thin": 0.12,
    "small_fast": 0.05,
    "text": 0.16,
    "low_light": 0.05,
    "reflection": 0.1,
}
"""Share of each category among the procedural training clips."""


def mixed_orders(count: int, first_seed: int, frames: int, height: int, width: int) -> list[Order]:
    """Training orders in the proportions of :data:`MIX`, in a random but reproducible order."""
    rng = np.random.default_rng(first_seed)
    names = rng.choice(list(MIX), count, p=list(MIX.values()))
    return [Order(str(name), first_seed + i, frames, height, width) for i, name in enumerate(names)]
