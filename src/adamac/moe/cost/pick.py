"""Which dispatcher a layer should use on a machine whose constants are known.

Bytes sent follow from the layer and its ranks alone. Where they cost little, what a dispatcher asks of the host and how often it
moves rows decide, and that is in a :class:`adamac.moe.cost.Machine`.
"""

from __future__ import annotations

from adamac.moe.cost.machine import Machine
from adamac.moe.cost.predict import Network, Prediction, predict
from adamac.moe.presets import MoEConfig
from adamac.moe.traffic import SENDING


def by_dispatcher(
    config: MoEConfig,
    tokens: int,
    ranks: int,
    machine: Machine,
    *,
    backward: bool = True,
    itemsize: int = 2,
    network: Network | None = None,
) -> dict[str, Prediction]:
    """Predict a layer by every dispatcher that sends, for several ranks; arguments are those of :func:`fastest_dispatcher`."""
    return {
        name: predict(
            config, tokens, ranks, name, machine, backward=backward, itemsize=itemsize, network=network
        )
        for name in SENDING
    }


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
        ValueError: As :func:`adamac.moe.cost.predict`.
    """
    if ranks == 1:
        return "local"
    said = by_dispatcher(
        config, tokens, ranks, machine, backward=backward, itemsize=itemsize, network=network
    )
    return min(said, key=lambda name: said[name].time_ms)
