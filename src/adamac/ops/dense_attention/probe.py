"""Find the fastest implementation that is right, by trying.

Which dense kernel is fastest depends on card, driver, dtype and head_dim, and an optional package may be broken on a machine:
a table would be wrong somewhere. So each candidate is first held to the reference, within the error budget of
:mod:`adamac.ops.error_budget`, at an odd shape and at the shape that is timed; those that agree are timed in turns, so that
a change of the clock hits all alike; and the smallest median wins. That costs some milliseconds once, not counting what a
package compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from adamac.ops.dense_attention.candidate import Candidate, first_line
from adamac.ops.dense_attention.reference import reference
from adamac.ops.error_budget import over_budget
from adamac.ops.launch import is_out_of_memory

# Times runs by name, in milliseconds.
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, float]]


@dataclass(frozen=True)
class Shape:
    """A problem to try candidates on."""

    batch: int
    heads: int
    q_tokens: int
    k_tokens: int


# Ends in the middle of every tile, and queries and keys differ in number.
ODD = Shape(2, 3, 333, 1000)
# Long enough to fill a large card, short enough to take half a millisecond on it.
LONG = Shape(1, 8, 8192, 8192)

_ROUNDS = 5
# Not the default, so that a kernel that ignores it is found out, and enough to make the softmax rescale.
_SHARPNESS = 2.0
# Rows of the output that are held to the reference, at most: all of the odd shape, some of the timed one.
_CHECKED_ROWS = 512


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        impl: Name of the implementation.
        time_ms: Median time of each candidate that agrees with the reference, for 8 heads of 8192 tokens.
        refused: Why each other candidate is not considered, in one line.
        note: Why nothing was measured, or what else a reader should know.
        final: Whether the choice stays; one made while a CUDA graph is captured is made anew afterwards.
    """

    impl: str
    time_ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    note: str | None = None
    final: bool = True

    def __str__(self) -> str:
        lines = [f"{self.impl}{'' if self.note is None else f' ({self.note})'}"]
        by_time = sorted(self.time_ms.items(), key=lambda entry: entry[1])
        lines += [f"  {name}: {time_ms:.3f} ms" for name, time_ms in by_time]
        lines += [f"  {name}: refused: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def interleaved_median_ms(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Time runs in turns on a CUDA device and return each one's median, in milliseconds. Waits for the device."""
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    with torch.cuda.device(device):
        for _ in range(_ROUNDS + 1):
            for name, run in runs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                pairs[name].append((begin, end))
        torch.cuda.synchronize(device)
    # The first round finds an idle device, which then waits for the host.
    return {
        name: median(begin.elapsed_time(end) for begin, end in timed[1:]) for name, timed in pairs.items()
    }


@torch.no_grad()
def check(
    candidate: Candidate,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    shapes: Sequence[Shape] = (ODD, LONG),
) -> str | None:
    """Hold one candidate to the reference. Waits for the device.

    Returns:
        In one line, why it is refused, or ``None`` if it is fit and agrees at every shape.

    Raises:
        torch.OutOfMemoryError: If there is no room to try it, which says nothing about the candidate.
    """
    for shape in shapes:
        query, key, value = _inputs(shape, device, dtype, head_dim)
        scale = _SHARPNESS * head_dim**-0.5
        reason = candidate.unfit(query, key, value)
        if reason is not None:
            return reason
        try:
            output = candidate.run(query, key, value, scale)
        except Exception as error:  # whatever a package raises, it is out
            if is_out_of_memory(error):
                raise
            return f"it raised {first_line(error)}"
        if not isinstance(output, Tensor):
            return f"it returned no tensor but {type(output).__name__}"
        if output.shape != query.shape or output.dtype != dtype:
            return f"it returned {tuple(output.shape)} {output.dtype} for {tuple(query.shape)} {dtype}"
        if output.device != query.device:
            return f"it returned a tensor on {output.device} for one on {query.device}"
        # The last heads and every so many rows: a sample that any error of indices shows in.
        rows = slice(None, None, -(-shape.batch * shape.q_tokens // _CHECKED_ROWS))
        parts = [query[:, -2:, rows], key[:, -2:], value[:, -2:]]
        oracle = reference(*(part.double() for part in parts), scale=scale)
        problem = over_budget(output[:, -2:, rows], oracle, reference(*parts, scale=scale))
        if problem is not None:
            return f"it disagrees with the reference at {shape.q_tokens} x {shape.k_tokens} tokens: {problem}"
    return None


@torch.no_grad()
def choose(
    candidates: Sequence[Candidate],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    timed: Shape = LONG,
    timer: Timer = interleaved_median_ms,
) -> Choice:
    """Choose the fastest candidate that agrees with the reference. Waits for the device.

    Args:
        candidates: In order of preference should two take the same time.
        device: Where to try them.
        dtype: Of the tensors.
        head_dim: Width of a head.
        timed: The shape to time them at.
        timer: Times them.

    Raises:
        RuntimeError: If no candidate agrees, with the reason for each.
        torch.OutOfMemoryError: If there is no room to try them.
    """
    verdicts = {
        candidate.name: check(candidate, device, dtype, head_dim, (ODD, timed)) for candidate in candidates
    }
    refused = {name: reason for name, reason in verdicts.items() if reason is not None}
    if len(refused) == len(verdicts):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(
            f"no dense attention is right on {device} for {dtype}, head_dim {head_dim}: {reasons}"
        )
    query, key, value = _inputs(timed, device, dtype, head_dim)
    scale = _SHARPNESS * head_dim**-0.5

    def bind(candidate: Candidate) -> Callable[[], Tensor]:
        return lambda: candidate.run(query, key, value, scale)

    runs = {candidate.name: bind(candidate) for candidate in candidates if candidate.name not in refused}
    time_ms = timer(runs, device)
    return Choice(min(runs, key=lambda name: time_ms[name]), time_ms, refused)


def _inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value as pipelines have them: tokens before heads in memory, cut from a longer sequence."""
    generator = torch.Generator(device).manual_seed(0)  # the user's own random numbers stay as they are

    def draw(tokens: int) -> Tensor:
        size = (shape.batch, tokens + 5, shape.heads, head_dim)
        points = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return points[:, :tokens].transpose(1, 2)

    return draw(shape.q_tokens), draw(shape.k_tokens), draw(shape.k_tokens)
