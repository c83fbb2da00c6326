"""What an operation costs on a machine: a fixed part, a part for each FLOP and a part for each byte.

``time = calls * overhead + flops / rate + bytes / bandwidth``. The sum rather than the larger of the two: on real devices the
transition from one bound to the other is soft, and a sum is linear in its three unknowns, so that fitting it to measured
times needs no start and no search. A product's efficiency follows from its shape: small ones are overhead, thin ones are bytes.
A collective is the same without FLOPs, its overhead being the latency.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Source = Literal["measured", "given", "assumed"]
Kind = Literal[
    "dense",
    "grouped",
    "gate",
    "elementwise",
    "sort",
    "spread",
    "gather",
    "gather_partial",
    "all_to_all",
    "all_gather",
    "reduce_scatter",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Of a constant that nobody measured here: what a prediction from it may be off by. From all that is assumed the ratios of the
# layer of the targets are 1.19 and, by copies, 1.73; two H200 over NVLink have 0.95 and 1.35.
UNMEASURED_ERROR = 0.3


@dataclass(frozen=True)
class Work:
    """Something that a device does, in amounts.

    Attributes:
        kind: Which operation.
        flops: Floating-point operations.
        nbytes: Bytes read and written; of a collective, those that a rank sends to other ranks.
        calls: How often the fixed part is paid.
    """

    kind: Kind
    flops: float = 0.0
    nbytes: float = 0.0
    calls: int = 1


@dataclass(frozen=True)
class Cost:
    """Constants of one operation, and where they come from.

    Attributes:
        overhead_ms: Of each call: launch, or latency.
        flops_per_s: Rate of FLOPs where nothing else counts; infinity if they cost nothing.
        bytes_per_s: Bandwidth, likewise.
        source: Who says so.
        residuals: Of a fit: predicted / measured - 1 of each sample.
    """

    overhead_ms: float = 0.0
    flops_per_s: float = math.inf
    bytes_per_s: float = math.inf
    source: Source = "given"
    residuals: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no cost.

        Raises:
            ValueError: If a time is negative or a rate is not above 0.
        """
        if not 0 <= self.overhead_ms < math.inf:
            raise ValueError(f"overhead_ms must be at least 0; got {self.overhead_ms}")
        for name in ("flops_per_s", "bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.source not in get_args(Source):
            raise ValueError(f"source must be one of {', '.join(get_args(Source))}; got {self.source!r}")

    def time_ms(self, work: Work) -> float:
        """Milliseconds of some work."""
        seconds = work.flops / self.flops_per_s + work.nbytes / self.bytes_per_s
        return work.calls * self.overhead_ms + 1e3 * seconds

    @property
    def error(self) -> float:
        """What a prediction is typically off by, as a share: of the fit, root mean square; else a guess."""
        if not self.residuals:
            return 0.0 if self.source == "measured" else UNMEASURED_ERROR
        return math.sqrt(sum(residual**2 for residual in self.residuals) / len(self.residuals))


@dataclass(frozen=True)
class Sample:
    """Some work, and how long it took."""

    work: Work
    time_ms: float


def fit(samples: Sequence[Sample]) -> Cost:
    """Find the constants, none negative, whose predictions have the least squared relative error.

    Args:
        samples: At least one; as many as there are constants, and more.

    Raises:
        ValueError: If there is none, or a time is not above 0.
    """
    if not samples or any(not sample.time_ms > 0 for sample in samples):
        raise ValueError("a cost is fitted to at least one sample, each with a time above 0 ms")
    # Of each sample its three amounts, divided by its time: then 1 is what their weighted sum should be.
    rows = [
        [amount / sample.time_ms for amount in (sample.work.calls, sample.work.flops, sample.work.nbytes)]
        for sample in samples
    ]
    amounts = torch.tensor(rows, dtype=torch.float64)
    slopes = _not_negative_least_squares(amounts, torch.ones(len(samples), dtype=torch.float64))
    residuals = (amounts @ slopes - 1).tolist()
    overhead, per_flop, per_byte = slopes.tolist()
    return Cost(overhead, _rate(per_flop), _rate(per_byte), "measured", tuple(residuals))


def _not_negative_least_squares(amounts: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Try every set of columns that may be above 0: of so few, that is exact and quick."""
    columns = [column for column in range(amounts.shape[1]) if amounts[:, column].any()]
    best, least = torch.zeros(amounts.shape[1], dtype=torch.float64), math.inf
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = amounts[:, chosen]
            scale = part.norm(dim=0)
            found = torch.linalg.lstsq(part / scale, target, driver="gelsd").solution / scale
            loss = float((part @ found - target).square().sum())
            # A larger set has to earn its place, lest rounding gives a constant to what costs nothing.
            if bool((found >= 0).all()) and loss < least * (1 - 1e-9) - 1e-24:
                least = loss
                best = torch.zeros_like(best)
                best[list(chosen)] = found
    return best


def _rate(ms_each: float) -> float:
    return 1e3 / ms_each if ms_each > 0 else math.inf
