"""Bytes that a layer must have sent by its formula, put into the routing that it had, next to what it counted.

The formulas of ``adamac.moe.traffic`` hold for an even load. With any routing, what a rank sends depends on how many choices
and rows its tokens have on each other rank, and on how many the others have here, since answers go back. That is counted
here from the routing alone, without the dispatchers' code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adamac.moe import MoE, Routing
from adamac.moe.traffic import bytes_sent, metadata_bytes

from .crew import Crew

_WEIGHT = _EXPERT = 4  # bytes of a weight and of an expert's number
_COUNT = 8


def entry(layer: MoE, dispatcher: str, crew: Crew, itemsize: int, *, backward: bool) -> dict[str, Any]:
    """Compare after a pass; on all ranks, and alike if it holds on all of them."""
    counted = [layer.traffic.bytes_sent(kind=kind) for kind in ("payload", "metadata")]
    assert layer.routing is not None
    expected = _expected(layer.routing, layer.config.width * itemsize, dispatcher, crew, backward=backward)
    config, tokens, ranks = layer.config, layer.routing.tokens, crew.ranks
    even = [
        bytes_sent(config, tokens, ranks, dispatcher, itemsize, backward=backward),
        metadata_bytes(config, tokens, ranks, dispatcher, backward=backward),
    ]
    return {
        "payload": counted[0],
        "payload_formula": expected[0],
        "payload_even": even[0],
        "metadata": counted[1],
        "metadata_formula": expected[1],
        "metadata_even": even[1],
        "equal": all(crew.agree(counted == expected)),
    }


def _expected(routing: Routing, row_bytes: int, dispatcher: str, crew: Crew, *, backward: bool) -> list[int]:
    if crew.ranks == 1:
        return [0, 0]
    trips, others = 2 if backward else 1, crew.ranks - 1
    local = routing.num_experts // crew.ranks
    owner = (routing.experts // local).cpu().numpy()
    choices = np.array([(owner == rank).sum() for rank in range(crew.ranks)])
    rows = np.array([(owner == rank).any(1).sum() for rank in range(crew.ranks)])
    choices, rows = (_there_and_here(counts, crew) for counts in (choices, rows))
    weights = _EXPERT + _WEIGHT
    if dispatcher == "all_to_all":
        return [trips * sum(choices) * row_bytes, others * (local + 1) * _COUNT]
    if dispatcher == "per_rank":
        aside = choices[0] * weights + (choices[1] * _WEIGHT if backward else 0)
        return [trips * sum(rows) * row_bytes, others * 3 * _COUNT + aside]
    tokens = routing.tokens * others
    aside = tokens * routing.top_k * (weights + (_WEIGHT if backward else 0))
    announced = 0 if dispatcher == "static_gather" else others * (crew.ranks + 2) * _COUNT
    return [trips * 2 * tokens * row_bytes, announced + aside]


def _there_and_here(counts: np.ndarray, crew: Crew) -> tuple[int, int]:
    """From this rank to others, and from others to this one."""
    matrix = np.array(crew.agree(counts))
    matrix[np.arange(crew.ranks), np.arange(crew.ranks)] = 0
    return int(matrix[crew.rank].sum()), int(matrix[:, crew.rank].sum())
