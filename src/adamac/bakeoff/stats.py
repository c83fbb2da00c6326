"""Percentiles, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Below this many cases an interval says nothing.
_LEAST_FOR_INTERVAL = 4
_RESAMPLES = 2000


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which a share (0 to 1) of the values lies, between neighbours by proportion; none of none."""
    return float(np.quantile(values, share)) if len(values) else None


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; none of none."""
    return float(np.mean(values)) if len(values) else None


def median(values: Sequence[float]) -> float | None:
    """The middle value; none of none."""
    return percentile(values, 0.5)


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of ``median(over) / median(under)``, for pairs that belong together.

    Args:
        over: One value a case.
        under: The same cases, in the same order.

    Returns:
        Low and high, or ``None`` for fewer than four pairs.
    """
    if len(over) < _LEAST_FOR_INTERVAL:
        return None
    pairs = np.array([over, under])
    draws = np.random.default_rng(0).integers(0, len(over), size=(_RESAMPLES, len(over)))
    medians = np.median(pairs[:, draws], axis=-1)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(low), float(high)
