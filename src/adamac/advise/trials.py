"""What is tried of each operation: shapes as a layer has them, with the functions that the layer itself calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.advise.bench import Bench, Call
from adamac.moe.cost.constants import Kind, Work
from adamac.moe.cost.work import Rows, activation, gating, grouped_product, product, sorting
from adamac.moe.dispatch.exchange import Gather, Scatter, Splits, exchanged
from adamac.moe.presets import MoEConfig
from adamac.moe.routing import Router, Routing
from adamac.moe.rows import by_expert, gathered, spread
from adamac.moe.traffic import Traffic
from adamac.ops.activation import activate
from adamac.ops.grouped_mm import grouped_mm

_TOP_K = 4
# Values in a row of a collective's message.
_MESSAGE_WIDTH = 16


def shapes(bench: Bench) -> Iterator[tuple[int, int, int]]:
    """Tokens, and widths from the wide to the narrow and back; the most tokens not at the largest."""
    for tokens in bench.sizes.tokens:
        for hidden in bench.sizes.hidden:
            if tokens == bench.sizes.tokens[-1] and hidden == bench.sizes.hidden[-1]:
                continue
            yield tokens, hidden, hidden // 4
            yield tokens, hidden // 4, hidden


def try_dense(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Products of the projections' shapes."""
    for tokens, wide, narrow in shapes(bench):
        rows, matrix = bench.random(tokens, wide), bench.random(narrow, wide)
        yield (
            product(tokens, wide, narrow, bench.dtype.itemsize),
            lambda rows=rows, matrix=matrix: torch.nn.functional.linear(rows, matrix),
        )


def try_grouped(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Products of the experts' shapes."""
    for experts in bench.sizes.experts:
        for tokens, width, inner in shapes(bench):
            local = max(1, experts // bench.ranks)
            number = tokens * _TOP_K // local * local
            if not number:
                continue
            rows, matrices = bench.random(number, width), bench.random(local, width, inner)
            counts = torch.full((local,), number // local, device=bench.device)
            yield (
                grouped_product(number, local, width, inner, bench.dtype.itemsize),
                lambda rows=rows, matrices=matrices, counts=counts: grouped_mm(rows, matrices, counts),
            )


def try_gate(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Routers."""
    for experts in bench.sizes.experts:
        for tokens in bench.sizes.tokens:
            for hidden in bench.sizes.hidden[:2]:
                config = MoEConfig(hidden=hidden, num_experts=experts, top_k=_TOP_K, ffn=1)
                router = Router(config, bench.device, bench.dtype)
                torch.nn.init.normal_(router.weight)
                rows = bench.random(tokens, hidden)
                yield (
                    gating(tokens, hidden, experts, bench.dtype.itemsize),
                    lambda router=router, rows=rows: router(rows),
                )


def try_elementwise(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """The usual activation."""
    config = MoEConfig(hidden=1, num_experts=1, top_k=1, ffn=1)
    for tokens in bench.sizes.tokens:
        for hidden in bench.sizes.hidden[:2]:
            inner = bench.random(tokens * _TOP_K, hidden)
            yield (
                activation(inner.numel(), config, bench.dtype.itemsize, bench.impl),
                lambda inner=inner: activate(inner, config.activation),
            )


def routings(bench: Bench) -> Iterator[tuple[Routing, Tensor]]:
    """Random choices, and rows of some width."""
    for tokens in bench.sizes.tokens:
        for hidden in bench.sizes.hidden[:2]:
            scores = torch.rand(tokens, bench.sizes.experts[-1], device=bench.device)
            weights, experts = scores.topk(_TOP_K)
            yield Routing(experts, weights, scores.shape[1]), bench.random(tokens, hidden)


def try_sort(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Sorting choices by expert."""
    for routing, _ in routings(bench):
        yield sorting(routing.experts.numel()), lambda routing=routing: by_expert(routing)


def try_spread(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Copying rows to their experts' places."""
    for routing, rows in routings(bench):
        order, _ = by_expert(routing)
        yield (
            _rows(bench, rows).spread(len(order.flat), len(rows)),
            lambda rows=rows, order=order: spread(rows, order),
        )


def try_gather(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Adding them up again."""
    for routing, rows in routings(bench):
        order, _ = by_expert(routing)
        answers = spread(rows, order)
        yield (
            _rows(bench, rows).gather(len(answers), len(rows)),
            lambda answers=answers, order=order, weights=routing.weights: gathered(answers, order, weights),
        )


def try_gather_partial(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Adding up what is only there in part: half of it."""
    for whole, rows in routings(bench):
        dropped = torch.rand(whole.experts.shape, device=bench.device) < 0.5
        order, _ = by_expert(Routing(whole.experts, whole.weights, whole.num_experts, dropped))
        answers = spread(rows, order)
        yield (
            _rows(bench, rows).gather_partial(len(answers), len(rows), whole.top_k),
            lambda answers=answers, order=order, weights=whole.weights: gathered(answers, order, weights),
        )


def try_all_to_all(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Equal parts to all ranks."""
    for each in _parts(bench):
        splits = [each] * bench.ranks
        rows = bench.random(each * bench.ranks, _MESSAGE_WIDTH)
        exchange = Splits(_group(bench), splits, splits, "payload", Traffic())
        yield (
            _sent(bench, "all_to_all", each),
            lambda rows=rows, exchange=exchange: exchanged(rows, exchange),
        )


def try_all_gather(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Equal parts from all ranks."""
    for each in _parts(bench):
        rows, exchange = bench.random(each, _MESSAGE_WIDTH), Gather(_group(bench), "payload", Traffic())
        yield (
            _sent(bench, "all_gather", each),
            lambda rows=rows, exchange=exchange: exchanged(rows, exchange),
        )


def try_reduce_scatter(bench: Bench) -> Iterator[tuple[Work, Call]]:
    """Sums of equal parts."""
    for each in _parts(bench):
        rows = bench.random(each * bench.ranks, _MESSAGE_WIDTH)
        exchange = Scatter(_group(bench), "payload", Traffic())
        yield (
            _sent(bench, "reduce_scatter", each),
            lambda rows=rows, exchange=exchange: exchanged(rows, exchange),
        )


def _rows(bench: Bench, rows: Tensor) -> Rows:
    return Rows(rows.shape[1] * bench.dtype.itemsize, bench.impl)


def _group(bench: Bench) -> dist.ProcessGroup:
    assert bench.group is not None, "collectives are measured among several ranks"
    return bench.group


def _parts(bench: Bench) -> Iterator[int]:
    """Rows for each rank."""
    for nbytes in bench.sizes.message_bytes:
        yield max(1, nbytes // (_MESSAGE_WIDTH * bench.dtype.itemsize * (bench.ranks - 1)))


def _sent(bench: Bench, kind: Kind, each: int) -> Work:
    return Work(kind, nbytes=float(each * _MESSAGE_WIDTH * bench.dtype.itemsize * (bench.ranks - 1)))


TRIALS: dict[Kind, Callable[[Bench], Iterator[tuple[Work, Call]]]] = {
    "dense": try_dense,
    "grouped": try_grouped,
    "gate": try_gate,
    "elementwise": try_elementwise,
    "sort": try_sort,
    "spread": try_spread,
    "gather": try_gather,
    "gather_partial": try_gather_partial,
    "all_to_all": try_all_to_all,
    "all_gather": try_all_gather,
    "reduce_scatter": try_reduce_scatter,
}
