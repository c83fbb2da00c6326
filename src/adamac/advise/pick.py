"""Which dispatcher a layer should use on a machine whose constants are known.

``MoE(..., dispatcher="auto")`` knows the layer and its ranks alone, and goes by bytes sent. Where bytes cost little, what a
dispatcher asks of the host and how often it moves rows decide, and that is in a :class:`adamac.advise.Machine`.
"""

from __future__ import annotations

from adamac.advise.machine import Machine
from adamac.advise.moe import Network, predict
from adamac.moe.dispatch import DISPATCHERS
from adamac.moe.presets import MoEConfig


def fastest_dispatcher(
    config: MoEConfig,
    tokens: int,
    ranks: int,
    machine: Machine,
    *,
    backward: bool = True,
    itemsize: int = 2,
    network: Network | None = None,
) -> str:
    """Name the dispatcher that is predicted to be fastest, for ``MoE(config, dispatcher, group)``.

    Args:
        config: The layer.
        tokens: On each rank.
        ranks: Over which its experts are spread.
        machine: Its constants; measured ones, or the answer is about another machine.
        backward: Whether the layer is trained.
        itemsize: Bytes of a value.
        network: What joins the nodes that the ranks are on; ``None`` means that they are on one.

    Returns:
        ``"local"`` on one rank; of equal ones the simplest.

    Raises:
        ValueError: As :func:`adamac.advise.predict`.
    """
    if ranks == 1:
        return "local"

    def time_ms(name: str) -> float:
        return predict(
            config, tokens, ranks, name, machine, backward=backward, itemsize=itemsize, network=network
        ).time_ms

    return min(DISPATCHERS, key=time_ms)
