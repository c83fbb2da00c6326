"""What a layer does, stage by stage, in amounts: the products of its shapes, the rows it moves, the messages it sends.

This follows :class:`adamac.moe.layer.MoE` and its dispatchers step by step. Bytes sent come from :mod:`adamac.moe.traffic`; FLOPs are
2 m k n of each product, and tests hold their sum equal to the formula there. The load is even and nothing is dropped.

A backward pass does each step's gradients in the same stage: a product becomes two of the same size, a spread a gather and the
other way round, and what was sent travels again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from adamac.moe.cost.constants import Kind, Work
from adamac.moe.cost.machine import RowsImpl
from adamac.moe.presets import MoEConfig
from adamac.moe.timing import STAGES, Stage
from adamac.moe.traffic import bytes_sent, copies_sent, metadata_bytes

# Passes of the router over its float32 scores: softmax, choice, losses.
_SCORE_PASSES = 8
# Bytes of a label and a place that are sorted.
_SORTED_BYTES = 8
# Reads and writes of an inner value by the activation, forward and backward: by a kernel, which computes any of them at once; and
# of plain torch the one that it takes two steps for, and what a gate adds.
_ONE_PASS, _TWO_STEPS = (2, 3), (4, 6)
_GATED = {"torch": (3, 6), "triton": (1, 2)}


def product(rows: int, width_in: int, width_out: int, itemsize: int) -> Work:
    """A dense matrix product ``[rows, width_in] @ [width_in, width_out]``."""
    values = rows * width_in + width_in * width_out + rows * width_out
    return Work("dense", 2.0 * rows * width_in * width_out, float(values * itemsize))


def grouped_product(rows: int, groups: int, width_in: int, width_out: int, itemsize: int) -> Work:
    """A product of all experts' rows, each group with a matrix of its own."""
    values = rows * width_in + groups * width_in * width_out + rows * width_out
    return Work("grouped", 2.0 * rows * width_in * width_out, float(values * itemsize))


def gating(tokens: int, hidden: int, num_experts: int, itemsize: int) -> Work:
    """The router: a product in float32, and what is made of its scores."""
    cast = itemsize + 8 if itemsize < 4 else itemsize
    scores = _SCORE_PASSES * 4 * tokens * num_experts
    return Work("gate", 2.0 * tokens * hidden * num_experts, float(tokens * hidden * cast + scores))


def sorting(choices: float) -> Work:
    """Sort choices by expert."""
    return Work("sort", nbytes=_SORTED_BYTES * choices)


def activation(
    inner: float, config: MoEConfig, itemsize: int, impl: RowsImpl, *, backward: bool = False
) -> Work:
    """The activation of ``inner`` values, and for gated experts the product with as many others.

    Where kernels move rows, one computes this too.
    """
    two_steps = impl == "torch" and config.activation == "relu2"
    passes = (_TWO_STEPS if two_steps else _ONE_PASS)[backward]
    if config.gated:
        passes += _GATED[impl][backward]
    return Work("elementwise", nbytes=passes * inner * itemsize)


@dataclass(frozen=True)
class Rows:
    """How rows of a width are moved on a machine.

    Attributes:
        nbytes: Of a row.
        impl: What moves them.
    """

    nbytes: int
    impl: RowsImpl

    def spread(self, number: float, sources: float) -> Work:
        """Copy so many rows to ``number`` places; a kernel reads each of them once."""
        read = sources if self.impl == "triton" else number
        return Work("spread", nbytes=(read + number) * self.nbytes)

    def gather(self, number: float, sums: float, *, weighted: bool = True, backward: bool = False) -> Work:
        """Add up rows, the same number in each sum; backward, the gradients of rows and weights."""
        if backward and not weighted:
            return self.spread(number, sums)
        once = sums if self.impl == "triton" else sums + (2 * number if weighted else 0)
        return Work("gather", nbytes=(number + once + (2 * number if backward else 0)) * self.nbytes)

    def gather_partial(
        self, number: float, sums: float, slots: int, *, weighted: bool = True, backward: bool = False
    ) -> Work:
        """Add up rows, up to ``slots`` in each sum; plain torch visits the empty slots too."""
        if backward and not weighted:
            return self.spread(number, sums)
        visited = number + sums if self.impl == "triton" else slots * sums
        return Work("gather_partial", nbytes=(visited + (2 * number if backward else 0)) * self.nbytes)


@dataclass(frozen=True)
class Layer:
    """A layer on one of several ranks, about to be taken to pieces.

    Attributes:
        config: Its shape.
        tokens: On this rank, as many as on the others.
        ranks: Over which the experts are spread.
        dispatcher: ``"local"``, ``"all_to_all"``, ``"per_rank"``, ``"all_gather"`` or ``"static_gather"``.
        itemsize: Bytes of a value.
        rows: What moves rows.
    """

    config: MoEConfig
    tokens: int
    ranks: int
    dispatcher: str
    itemsize: int
    rows: RowsImpl

    def work(self, *, backward: bool = False) -> dict[Stage, list[Work]]:
        """What is done in each stage; with ``backward`` both passes together."""
        forward = self._computed(backward=False)
        for stage, items in self._moved(backward=False):
            forward[stage] += items
        if backward:
            for stage, items in self._computed(backward=True).items():
                forward[stage] += items
            for stage, items in self._moved(backward=True):
                forward[stage] += items
        return forward

    def messages(self, *, backward: bool = False) -> list[Work]:
        """Rows on their way, of which ``send`` can hide behind the shared expert: there, then back."""
        there, back = _PAYLOAD[self.dispatcher]
        if backward:
            there, back = back, there
        each = bytes_sent(self.config, self.tokens, self.ranks, self.dispatcher, self.itemsize) / 2
        return [Work(kind, nbytes=each) for kind in (there, back)]

    def before_reading(self) -> list[Work]:
        """What the host waits for, forward, before it knows how many rows will come; it launches nothing meanwhile."""
        if self.dispatcher in ("local", "static_gather"):
            return []
        done = self._computed(backward=False)
        return [*done["gate"], *done["descend"], sorting(self.tokens * self.config.top_k)]

    def _computed(self, *, backward: bool) -> dict[Stage, list[Work]]:
        """Everything but moving rows."""
        config, tokens, size = self.config, self.tokens, self.itemsize
        arriving, local = tokens * config.top_k, config.num_experts // self.ranks
        wide = 2 if config.gated else 1
        stages: dict[Stage, list[Work]] = {stage: [] for stage in STAGES}
        gate = gating(tokens, config.hidden, config.num_experts, size)
        stages["gate"] = _twice([gate], backward)
        stages["experts"] = _twice(
            [
                grouped_product(arriving, local, config.width, wide * config.ffn, size),
                grouped_product(arriving, local, config.ffn, config.width, size),
            ],
            backward,
        )
        inner = activation(arriving * config.ffn, config, size, self.rows, backward=backward)
        stages["experts"].append(inner)
        if config.latent is not None:
            stages["descend"] = _twice([product(tokens, config.hidden, config.latent, size)], backward)
            stages["ascend"] = _twice([product(tokens, config.latent, config.hidden, size)], backward)
        if config.latent_norm:
            passes = 4 if backward else 2
            stages["ascend"].append(Work("elementwise", nbytes=float(passes * tokens * config.width * size)))
        if config.shared_ffn:
            stages["shared"] = _twice(
                [
                    product(tokens, config.hidden, wide * config.shared_ffn, size),
                    product(tokens, config.shared_ffn, config.hidden, size),
                ],
                backward,
            )
            inner = activation(tokens * config.shared_ffn, config, size, self.rows, backward=backward)
            stages["shared"].append(inner)
            stages["ascend"].append(Work("elementwise", nbytes=3.0 * tokens * config.hidden * size))
        return stages

    def _moved(self, *, backward: bool) -> Iterable[tuple[Stage, list[Work]]]:
        """Sorting and moving rows, and sending them."""
        steps = {
            "local": self._local,
            "all_to_all": self._all_to_all,
            "per_rank": self._per_rank,
            "all_gather": self._all_gather,
            "static_gather": self._all_gather,
        }
        if self.dispatcher not in steps:
            raise ValueError(f"dispatcher must be one of {', '.join(steps)}; got {self.dispatcher!r}")
        rows = Rows(self.config.width * self.itemsize, self.rows)
        permute, collect = steps[self.dispatcher](rows, float(self.tokens * self.config.top_k), backward)
        yield "permute", permute
        yield "collect", collect
        if self.dispatcher != "local":
            there, back = self.messages(backward=backward)
            yield "send", [there, *self._beside(backward=backward)]
            yield "collect", [back]

    def _beside(self, *, backward: bool) -> list[Work]:
        """Messages beside rows: what is announced, which experts, what weights; backward, gradients of weights."""
        kind = _PAYLOAD[self.dispatcher][0]
        number = {"all_to_all": 1, "static_gather": 2}.get(self.dispatcher, 3)

        def nbytes(both: bool) -> float:
            return metadata_bytes(self.config, self.tokens, self.ranks, self.dispatcher, backward=both)

        if not backward:
            return [Work(kind, nbytes=nbytes(False), calls=number)]
        more = nbytes(True) - nbytes(False)
        return [Work(_PAYLOAD[self.dispatcher][1], nbytes=more)] if more else []

    def _local(self, rows: Rows, arriving: float, backward: bool) -> tuple[list[Work], list[Work]]:
        gather = rows.gather(arriving, self.tokens, backward=backward)
        if backward:
            return [rows.gather(arriving, self.tokens, weighted=False)], [gather]
        return [sorting(arriving), rows.spread(arriving, self.tokens)], [gather]

    def _all_to_all(self, rows: Rows, arriving: float, backward: bool) -> tuple[list[Work], list[Work]]:
        permute, collect = self._local(rows, arriving, backward)
        if min(self.ranks, self.config.num_experts // self.ranks) > 1:  # rows come rank by rank
            regroup = rows.spread(arriving, arriving)
            ungroup = rows.gather(arriving, arriving, weighted=False)
            permute = [*permute, regroup, ungroup, *([] if backward else [sorting(arriving)])]
        return permute, collect

    def _per_rank(self, rows: Rows, arriving: float, backward: bool) -> tuple[list[Work], list[Work]]:
        config, ranks = self.config, self.ranks
        # A token's own rank is one like the others.
        other = float(copies_sent(config, ranks, "per_rank"))
        sent = self.tokens * other * ranks / max(1, ranks - 1)
        slots = min(config.num_experts // ranks, config.top_k)
        sums = rows.gather_partial(arriving, sent, slots, backward=backward)
        home = rows.gather_partial(sent, self.tokens, ranks, weighted=False, backward=backward)
        if backward:
            there = rows.gather_partial(sent, self.tokens, ranks, weighted=False)
            spread = rows.gather_partial(arriving, sent, slots, weighted=False)
            return [there, spread], [sums, home]
        sorts = [sorting(arriving), sorting(arriving)]  # by rank here, by expert over there
        return [*sorts, rows.spread(sent, self.tokens), rows.spread(arriving, sent)], [sums, home]

    def _all_gather(self, rows: Rows, arriving: float, backward: bool) -> tuple[list[Work], list[Work]]:
        everybody = self.tokens * self.ranks
        sums = rows.gather_partial(arriving, everybody, self.config.top_k, backward=backward)
        if backward:
            return [rows.gather_partial(arriving, everybody, self.config.top_k, weighted=False)], [sums]
        return [sorting(arriving * self.ranks), rows.spread(arriving, everybody)], [sums]


_PAYLOAD: dict[str, tuple[Kind, Kind]] = {
    "all_to_all": ("all_to_all", "all_to_all"),
    "per_rank": ("all_to_all", "all_to_all"),
    "all_gather": ("all_gather", "reduce_scatter"),
    "static_gather": ("all_gather", "reduce_scatter"),
}


def _twice(works: list[Work], backward: bool) -> list[Work]:
    """Backward, a product is two: the gradients of both factors."""
    if not backward:
        return works
    return [replace(work, flops=2 * work.flops, nbytes=2 * work.nbytes, calls=2) for work in works]
