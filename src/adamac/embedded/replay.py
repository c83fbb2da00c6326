"""Training steps recorded once as a CUDA graph and replayed.

Our networks are so small that starting their kernels takes longer than running them: an eager
step leaves half of the device idle. A replayed step starts all of its kernels at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

WARMUP = 3
"""Plain calls before recording, in which kernels are compiled and chosen."""


class Replayed:
    """A function from tensors to a tuple of tensors; on a CUDA device it is recorded once for each shape.

    What it returns is overwritten by the next call of the same shapes. The function must not wait for
    the device, and whatever else it reads must stay where it is in memory. One that cannot be recorded
    is called plainly from then on: a slow run is better than none.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self._function = function
        self._recorded: dict[tuple, tuple] = {}
        self._plain = False

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The function's value."""
        if self._plain or not inputs[0].is_cuda:
            return self._function(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recorded:
            stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
            try:
                self._recorded[shapes] = self._record(inputs, pool)
            except RuntimeError:
                logger.warning("recording failed for %s; going on unrecorded", shapes, exc_info=True)
                self._give_up(stream, pool)
        if self._plain:
            return self._function(*inputs)
        graph, places, outputs = self._recorded[shapes]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return outputs

    def _record(self, inputs: tuple[torch.Tensor, ...], pool: torch.cuda._POOL_HANDLE) -> tuple:
        places = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()  # gradients must not be bound to the stream that others wait for
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                self._function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = self._function(*places)
        return graph, places, outputs

    def _give_up(self, stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE) -> None:
        """Undo what a broken recording leaves behind: its stream, its memory and its random numbers."""
        self._plain = True
        self._recorded.clear()  # they draw from the generator that is replaced here
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # raised if the recording has ended after all
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
