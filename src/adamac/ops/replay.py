"""Work recorded once as a CUDA graph and replayed.

Where kernels are short, starting them one by one takes longer than running them: the device waits for the host. A replay
starts all of them at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

WARMUP = 3
"""Plain calls before recording, in which kernels are compiled and chosen."""

_RECORDING = threading.RLock()  # recordings share a stream, and what else ran on it would be recorded


class Replayed:
    """A function from tensors to a tuple of tensors; on a CUDA device it is recorded once for each shape.

    What it returns is overwritten by the next call of the same shapes. The function must not wait for
    the device, and whatever else it reads must stay where it is in memory; what it writes beside its value
    it writes several times before the first recording. One that cannot be recorded is called plainly from
    then on: a slow run is better than none. One thread records at a time; others may work meanwhile, but neither draw
    from the device's own random generator nor wait for the whole device.

    Attributes:
        problem: Why calls are plain on a GPU, in a line; empty as long as nothing went wrong.
        held_bytes: Memory of the device that recordings keep for what they compute in between.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self._function = function
        self._recorded: dict[tuple, tuple] = {}
        self.problem, self.held_bytes = "", 0

    @property
    def recorded(self) -> bool:
        """Whether a call was recorded, and later ones of its shape are replayed."""
        return bool(self._recorded)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The function's value."""
        self.record(*inputs)
        if self.problem or not inputs[0].is_cuda:
            return self._function(*inputs)
        with torch.cuda.device_of(inputs[0]):  # streams are those of the current device
            graph, places, outputs = self._recorded[_shapes(inputs)]
            for place, tensor in zip(places, inputs, strict=True):
                place.copy_(tensor)
            graph.replay()
            return outputs

    def record(self, *inputs: torch.Tensor) -> None:
        """Record for inputs of these shapes now, if that is still to be done, rather than when first called with such.

        For a function that writes beside its value: once this returns, a call is one call, and what was written can be undone.
        """
        shapes = _shapes(inputs)
        if self.problem or not inputs[0].is_cuda or shapes in self._recorded:
            return
        with torch.cuda.device_of(inputs[0]), _RECORDING:
            self._try_to_record(shapes, inputs)

    def _try_to_record(self, shapes: tuple, inputs: tuple[torch.Tensor, ...]) -> None:
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            self._recorded[shapes] = self._record(inputs, pool)
        except RuntimeError as error:
            logger.warning("recording failed for %s; going on unrecorded", shapes, exc_info=True)
            self._give_up(stream, pool)
            said = str(error).splitlines() or [""]
            self.problem = f"recording failed: {type(error).__name__}: {said[0]}"

    def _record(self, inputs: tuple[torch.Tensor, ...], pool: torch.cuda._POOL_HANDLE) -> tuple:
        places = [tensor.clone() for tensor in inputs]
        # Gradients must not be bound to the stream that others wait for.
        aside = _aside(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                self._function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            outputs = self._function(*places)
            self.held_bytes += torch.cuda.memory_reserved() - before
        return graph, places, outputs

    def _give_up(self, stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE) -> None:
        """Undo what a broken recording leaves behind: its stream, its memory and its random numbers."""
        self._recorded.clear()  # they draw from the generator that is replaced here
        self.held_bytes = 0
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # raised if the recording has ended after all
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())


def _shapes(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in inputs)


@functools.cache
def _aside(device: int) -> torch.cuda.Stream:
    """What all recordings of a device are made on: libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)
