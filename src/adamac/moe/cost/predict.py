"""Milliseconds of a layer by stage, on a machine whose constants are known.

Left out: uneven loads, dropped tokens, sending in chunks, and any overlap but that of rows on their way with the shared expert.
A forecast for several nodes is a *projection*: it adds the bandwidth between nodes to constants that hold within one. There,
what stays within a node and what leaves it travel at the same time, and gathers cross between nodes once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adamac.moe.cost.constants import Cost, Work
from adamac.moe.cost.machine import COLLECTIVES, Machine
from adamac.moe.cost.work import Layer
from adamac.moe.presets import MoEConfig, local_experts
from adamac.moe.timing import STAGES, Stage
from adamac.moe.traffic import bytes_sent


@dataclass(frozen=True)
class Network:
    """What joins nodes.

    Attributes:
        nodes: How many there are, of equally many ranks.
        bytes_per_s: What a rank sends at to other nodes, one way, while its neighbours do.
    """

    nodes: int
    bytes_per_s: float

    def time_ms(self, cost: Cost, work: Work, ranks: int) -> float:
        """Milliseconds of a collective over all nodes, whose bandwidth within a node is that of ``cost``."""
        within = ranks // self.nodes
        # Of what a rank sends, an all-to-all has an equal part for each other rank; a gather crosses to each node once.
        outward = (ranks - within) if work.kind == "all_to_all" else (self.nodes - 1)
        leaving = work.nbytes * outward / max(1, ranks - 1)
        inside = replace(work, nbytes=work.nbytes - leaving)
        latency = work.calls * cost.overhead_ms
        return max(cost.time_ms(inside), latency + 1e3 * leaving / self.bytes_per_s)


@dataclass(frozen=True)
class Prediction:
    """What one layer takes.

    Attributes:
        config: Its shape.
        dispatcher: What moves its rows.
        stages_ms: Milliseconds by stage; of ``send``, what does not hide behind the shared expert.
        sending_ms: Of these, what is spent in collectives.
        host_ms: What the device waits for the host, in all: a layer takes what its work takes, or what the host needs to launch
            it and to wait for the numbers that it reads, whichever is longer.
        error: What the time is typically off by, as a share: each stage's by its constants, added up.
        bytes_sent: Rows that this rank sends to others.
        projection: Whether part of the fabric was not measured but forecast.
    """

    config: MoEConfig
    dispatcher: str
    stages_ms: Mapping[Stage, float]
    sending_ms: float
    host_ms: float
    error: float
    bytes_sent: float
    projection: bool

    @property
    def time_ms(self) -> float:
        """Milliseconds of the layer."""
        return sum(self.stages_ms.values()) + self.host_ms


def predict(
    config: MoEConfig,
    tokens: int,
    ranks: int,
    dispatcher: str,
    machine: Machine,
    *,
    backward: bool = False,
    itemsize: int = 2,
    network: Network | None = None,
) -> Prediction:
    """Say what a layer takes on each rank.

    Args:
        config: The layer.
        tokens: On each rank.
        ranks: Over which its experts are spread.
        dispatcher: ``"local"``, ``"all_to_all"``, ``"per_rank"`` or ``"all_gather"``; or ``"static_gather"``, which is taken to be replayed
            from a CUDA graph, where nobody waits for the host.
        machine: Its constants.
        backward: Both passes instead of the forward pass alone.
        itemsize: Bytes of a value.
        network: What joins the nodes that the ranks are on; ``None`` means that they are on one.

    Raises:
        ValueError: If the experts cannot be spread, the dispatcher does not fit, or a constant is missing.
    """
    _check(config, tokens, ranks, dispatcher, network)
    layer = Layer(config, tokens, ranks, dispatcher, itemsize, machine.rows)

    def time_ms(work: Work) -> float:
        cost = machine.cost(work.kind)
        if work.kind not in COLLECTIVES:
            return machine.whole * cost.time_ms(work)
        return cost.time_ms(work) if network is None else network.time_ms(cost, work, ranks)

    timed = [
        (stage, work, time_ms(work))
        for stage, works in layer.work(backward=backward).items()
        for work in works
    ]
    stages: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
    for stage, _, time in timed:
        stages[stage] += time
    sending = sum(time for _, work, time in timed if work.kind in COLLECTIVES)
    errors = sum(time * machine.cost(work.kind).error for _, work, time in timed)
    error = errors / (sum(stages.values()) or 1.0)
    if dispatcher != "local":
        passes = (False, True) if backward else (False,)
        hidden = min(stages["shared"], sum(time_ms(layer.messages(backward=each)[0]) for each in passes))
        stages["send"] -= hidden
        sending -= hidden
    least = (machine.least_both_ms if backward else machine.least_ms).get(dispatcher, 0.0)
    waited = sum(time_ms(work) for work in layer.before_reading())
    host_ms = max(0.0, least + waited - sum(stages.values()))
    sent = bytes_sent(config, tokens, ranks, dispatcher, itemsize, backward=backward)
    return Prediction(config, dispatcher, stages, sending, host_ms, error, sent, network is not None)


def _check(config: MoEConfig, tokens: int, ranks: int, dispatcher: str, network: Network | None) -> None:
    if tokens < 1 or ranks < 1:
        raise ValueError(f"tokens and ranks must be at least 1; got {tokens} and {ranks}")
    local_experts(config.num_experts, ranks)
    if (dispatcher == "local") != (ranks == 1):
        raise ValueError(
            f'dispatcher "local" is for one rank, the others for several; got {dispatcher!r} on {ranks}'
        )
    if network is not None and (network.nodes < 1 or ranks % network.nodes or not network.bytes_per_s > 0):
        raise ValueError(
            f"a network joins nodes of equally many of the {ranks} ranks at a bandwidth above 0; "
            f"got {network.nodes} nodes at {network.bytes_per_s} B/s"
        )
