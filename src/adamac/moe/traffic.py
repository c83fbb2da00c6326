"""What a layer costs, in formulas, and what it sent, counted.

The formulas are those of the paper's Table 3 in general form (any width, gated or not, shared experts, any dispatcher); bytes are
those that one rank sends to *other* ranks. A :class:`Traffic` is fed by the collectives themselves with what they were really
handed, rows (``payload``) apart from what says where they belong (``metadata``), so that formula and count check each other.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from adamac.moe.presets import MoEConfig, PaperModel

Kind = Literal["payload", "metadata"]
Direction = Literal["forward", "backward"]
# Dispatchers that send, the simplest first.
SENDING = ("all_gather", "all_to_all", "per_rank")


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks, by collective, kind and direction.

    An all-gather counts its rows once for each other rank, and a reduce-scatter likewise: what leaves a rank when each rank
    sends straight to each, and on a ring too.
    """

    sent: Counter[tuple[str, Kind, Direction]] = field(default_factory=Counter)

    def add(self, collective: str, kind: Kind, direction: Direction, bytes_sent: int) -> None:
        """Count bytes."""
        self.sent[collective, kind, direction] += bytes_sent

    def bytes_sent(
        self,
        *,
        collective: str | None = None,
        kind: Kind | None = None,
        direction: Direction | None = None,
    ) -> int:
        """Add up what fits, everything by default."""
        asked = (collective, kind, direction)
        return sum(
            number
            for entry, number in self.sent.items()
            if all(want is None or want == has for want, has in zip(asked, entry, strict=True))
        )


def parameters(config: MoEConfig) -> int:
    """Parameters of a layer, on all ranks together."""
    router = config.hidden * config.num_experts
    routed = config.matrices * config.num_experts * config.width * config.ffn
    shared = config.matrices * config.hidden * config.shared_ffn
    projections = 0 if config.latent is None else 2 * config.hidden * config.latent
    norm = config.width if config.latent_norm else 0
    return router + routed + shared + projections + norm


def active_parameters(config: MoEConfig) -> int:
    """Parameters that one token is multiplied with."""
    return parameters(config) - config.matrices * config.width * config.ffn * (
        config.num_experts - config.top_k
    )


def flops_per_token(config: MoEConfig) -> int:
    """FLOPs of a forward pass in matrix products, 2 for each multiply-add; a backward pass takes twice as many."""
    norm = config.width if config.latent_norm else 0
    return 2 * (active_parameters(config) - norm)


def distinct_ranks(config: MoEConfig, ranks: int) -> Fraction:
    """Other ranks that a token's experts live on, on average, if all sets of ``top_k`` experts are equally likely."""
    local = config.num_experts // ranks
    sets = math.comb(config.num_experts, config.top_k)
    none_there = Fraction(math.comb(config.num_experts - local, config.top_k), sets)
    return (ranks - 1) * (1 - none_there)


def copies_sent(config: MoEConfig, ranks: int, dispatcher: str) -> Fraction:
    """Rows that a token sends to other ranks, on average at an even load; as many come back."""
    if ranks == 1 or dispatcher == "local":
        return Fraction(0)
    copies = {
        "all_to_all": Fraction(config.top_k * (ranks - 1), ranks),
        "per_rank": distinct_ranks(config, ranks),
        "all_gather": Fraction(ranks - 1),
        "static_gather": Fraction(ranks - 1),
    }
    if dispatcher not in copies:
        raise ValueError(f"dispatcher must be local, {', '.join(copies)}; got {dispatcher!r}")
    return copies[dispatcher]


def bytes_sent(
    config: MoEConfig,
    tokens: int,
    ranks: int,
    dispatcher: str = "all_to_all",
    itemsize: int = 2,
    *,
    backward: bool = False,
) -> float:
    """Payload bytes that one rank sends in a layer, to and back, at an even load.

    Args:
        config: The layer.
        tokens: On this rank.
        ranks: Over which the experts are spread.
        dispatcher: ``"local"``, ``"all_to_all"``, ``"per_rank"``, ``"all_gather"`` or ``"static_gather"``.
        itemsize: Bytes of a value.
        backward: Count the backward pass too, in which as much travels again.
    """
    trips = 4 if backward else 2
    return float(trips * copies_sent(config, ranks, dispatcher) * tokens * config.width * itemsize)


def metadata_bytes(
    config: MoEConfig,
    tokens: int,
    ranks: int,
    dispatcher: str = "all_to_all",
    weight_itemsize: int = 4,
    *,
    chunks: int = 1,
    backward: bool = False,
) -> float:
    """Bytes that one rank sends beside its rows, at an even load: how many rows come, which experts, what weights.

    Args:
        config: The layer.
        tokens: On this rank, as many as on the others.
        ranks: Over which the experts are spread.
        dispatcher: As in :func:`bytes_sent`.
        weight_itemsize: Bytes of a weight; the router computes in float32.
        chunks: That the tokens are sent in.
        backward: Count the backward pass too, in which gradients of weights travel that travelled forward.
    """
    if ranks == 1 or dispatcher == "local":
        return 0.0
    # Numbers of 8 bytes that say how much is to come, for each chunk; and one that says whether all is well.
    numbers = {"all_to_all": config.num_experts // ranks, "per_rank": 2, "all_gather": 1 + ranks}
    announced = (numbers[dispatcher] * chunks + 1) * 8 if dispatcher in numbers else 0
    choices = {
        "all_to_all": Fraction(0),
        "per_rank": Fraction(config.top_k * (ranks - 1), ranks),
        "all_gather": Fraction(config.top_k * (ranks - 1)),
        "static_gather": Fraction(config.top_k * (ranks - 1)),
    }
    each = 4 + weight_itemsize * (2 if backward else 1)
    return float((ranks - 1) * announced + tokens * choices[dispatcher] * each)


def model_parameters(config: MoEConfig, model: PaperModel) -> int:
    """Parameters of a paper model as its Table 3 counts them: attention, norms, biases, experts, one gate, embedding."""
    hidden, narrow = model.hidden, min(config.width, config.ffn)
    expert = config.matrices * config.width * config.ffn + 2 * narrow
    layer = 4 * hidden**2 + 8 * hidden + expert * config.num_experts
    projections = 0 if config.latent is None else 2 * hidden * config.latent
    return (layer + projections) * model.layers + (model.vocabulary + config.num_experts + 2) * hidden


def model_flops(config: MoEConfig, model: PaperModel, tokens: int) -> int:
    """FLOPs of one training iteration of a paper model, forward and backward, as its Table 3 counts them.

    Args:
        config: Its layer.
        model: Its shape.
        tokens: In the batch, over all sequences.
    """
    hidden = model.hidden
    attention = (
        12 * tokens * model.layers * hidden**2 * 2 + 12 * tokens * model.layers * hidden * model.context
    )
    vocabulary = 6 * tokens * hidden * model.vocabulary
    experts = 6 * tokens * model.layers * config.matrices * config.top_k * config.width * config.ffn
    projections = 0 if config.latent is None else 12 * tokens * model.layers * hidden * config.latent
    return attention + vocabulary + experts + projections


def model_all_to_all_bytes(
    config: MoEConfig, model: PaperModel, tokens: int, ranks: int, itemsize: int = 2
) -> int:
    """Bytes of all all-to-alls of an iteration, forward and backward, of all ranks together, one copy per expert."""
    per_layer = bytes_sent(config, tokens, ranks, "all_to_all", itemsize, backward=True)
    return round(per_layer * model.layers)
