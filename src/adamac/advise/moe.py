"""Will BigMac pay here? Two layers side by side as :mod:`adamac.moe.cost` predicts them, and what fabric makes them equal.

Each side gets its best dispatcher: copies per expert flatter BigMac, since they send more than a good baseline would. The
ratio at equal dispatchers (copy per expert, as in the paper) is given beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from adamac.moe.cost.constants import Cost, Work
from adamac.moe.cost.machine import Machine
from adamac.moe.cost.predict import Network, Prediction, predict
from adamac.moe.cost.work import product
from adamac.moe.dispatch import DISPATCHERS
from adamac.moe.presets import MoEConfig
from adamac.moe.timing import STAGES
from adamac.moe.traffic import bytes_sent

Answer = Literal["pays", "does not pay", "within the model's error"]

# Factors of the fabric's bandwidth between which equality is looked for, and steps in a search.
_WIDEST, _STEPS, _HALVINGS = 1e6, 121, 80
# The larger of two sides counts as equal to this share: rounding.
_EQUAL = 1e-12


@dataclass(frozen=True)
class Comparison:
    """Two layers on the same machine, each by every dispatcher.

    Attributes:
        baseline: Predictions by dispatcher.
        candidate: The same.
        replayed: Both replayed from a CUDA graph, where nobody waits for the host: by ``static_gather``, on one rank ``local``.
        break_even_bytes_per_s: The bandwidth at which both sides' best are equal; on every slower fabric the candidate is
            faster. Infinity if it is faster on every fabric, 0 if on no slow one; ``None`` if nothing is sent, or the
            fabric is infinitely fast.
        rho: Time that the candidate saves in sending, divided by that of its projections, copies per expert on both
            sides (above 1 it gains even if nothing else does); ``None`` if it has none, or nothing is sent.
        error: What the ratio may be off by, as a share.
        ranks: Over which the experts are spread.
        between_nodes: Whether the break-even is that of the links between nodes.
    """

    baseline: Mapping[str, Prediction]
    candidate: Mapping[str, Prediction]
    replayed: tuple[Prediction, Prediction]
    break_even_bytes_per_s: float | None
    rho: float | None
    error: float
    ranks: int
    between_nodes: bool

    @cached_property
    def best(self) -> tuple[Prediction, Prediction]:
        """The fastest of each side."""
        return _fastest(self.baseline), _fastest(self.candidate)

    @property
    def ratio(self) -> float:
        """Time of the baseline divided by that of the candidate, each by its best dispatcher."""
        baseline, candidate = self.best
        return baseline.time_ms / candidate.time_ms

    @property
    def ratio_by_copies(self) -> float | None:
        """The same with a copy for each expert on both sides, as in the paper; ``None`` on one rank."""
        if "all_to_all" not in self.baseline:
            return None
        return self.baseline["all_to_all"].time_ms / self.candidate["all_to_all"].time_ms

    @property
    def answer(self) -> Answer:
        """Whether the candidate pays."""
        if abs(self.ratio - 1) <= self.error:
            return "within the model's error"
        return "pays" if self.ratio > 1 else "does not pay"

    def differences_ms(self) -> dict[str, float]:
        """What the candidate saves in each stage, negative where it costs more; stages that differ, most first."""
        baseline, candidate = self.best
        saved: dict[str, float] = {
            stage: baseline.stages_ms[stage] - candidate.stages_ms[stage] for stage in STAGES
        }
        saved["host"] = baseline.host_ms - candidate.host_ms
        least = 1e-3 * max(baseline.time_ms, candidate.time_ms)
        kept = {stage: ms for stage, ms in saved.items() if abs(ms) > least}
        return dict(sorted(kept.items(), key=lambda item: -abs(item[1])))

    def verdict(self, name: str = "BigMac", baseline_name: str = "CDAC") -> str:
        """Say in plain words whether it pays, and why."""
        baseline, candidate = self.best
        answers = {
            "pays": f"{name} pays here",
            "does not pay": f"{name} does not pay here",
            "within the model's error": f"Whether {name} pays here is within the model's error",
        }
        saved = self.differences_ms()
        gains = [f"{stage} {ms:.3g}" for stage, ms in saved.items() if ms > 0]
        losses = [f"{stage} {-ms:.3g}" for stage, ms in saved.items() if ms < 0]
        why = "; ".join(
            f"{word} {', '.join(stages)} ms"
            for word, stages in (("it saves", gains), ("it adds", losses))
            if stages
        )
        said = (
            f"{answers[self.answer]}: {baseline_name} ({baseline.dispatcher}) {baseline.time_ms:.3g} ms, {name} "
            f"({candidate.dispatcher}) {candidate.time_ms:.3g} ms, {self.ratio:.2f}x with an error of about "
            f"{self.error:.0%}; {why or 'no stage differs'}."
        )
        return f"Projection: {said}" if candidate.projection else said

    def if_replayed(self, name: str = "BigMac", baseline_name: str = "CDAC") -> str:
        """Say what becomes of it where the host is not waited for."""
        baseline, candidate = self.replayed
        return (
            f"{'Projection: r' if candidate.projection else 'R'}eplayed from a CUDA graph ({candidate.dispatcher}), where nobody waits for the "
            f"host: {baseline_name} {baseline.time_ms:.3g} ms, {name} {candidate.time_ms:.3g} ms, "
            f"{baseline.time_ms / candidate.time_ms:.2f}x."
        )

    def break_even(self, name: str = "BigMac") -> str:
        """Say on which fabrics it pays."""
        limit, what = self.break_even_bytes_per_s, "between nodes" if self.between_nodes else "of the fabric"
        if limit is None:
            return "No fabric decides: nothing is sent, or sending takes no time."
        if limit == math.inf:
            return f"{name} is faster at any bandwidth {what}."
        if limit == 0:
            return f"{name} is not faster on a slow fabric either: what it sends is no less."
        return f"Both are equal at {limit / 1e9:.3g} GB/s {what}, per rank and one way; below that {name} is faster."


def compare(
    baseline: MoEConfig,
    candidate: MoEConfig,
    tokens: int,
    ranks: int,
    machine: Machine,
    *,
    backward: bool = False,
    itemsize: int = 2,
    network: Network | None = None,
) -> Comparison:
    """Set two layers side by side, each by every dispatcher; arguments as of :func:`predict`.

    Raises:
        ValueError: As :func:`predict`.
    """

    def side(config: MoEConfig, factor: float = 1.0) -> dict[str, Prediction]:
        """All dispatchers, with the slowest links slower by a factor."""
        changed, between = machine, network
        if network is not None:
            between = replace(network, bytes_per_s=network.bytes_per_s / factor)
        elif ranks > 1:
            changed = machine.slowed(factor)
        return {
            name: predict(
                config, tokens, ranks, name, changed, backward=backward, itemsize=itemsize, network=between
            )
            for name in (DISPATCHERS if ranks > 1 else ("local",))
        }

    def ahead(factor: float) -> float:
        one, other = (_fastest(side(config, factor)).time_ms for config in (baseline, candidate))
        gained = one - other
        return 0.0 if abs(gained) <= _EQUAL * max(one, other) else gained

    def replayed(config: MoEConfig) -> Prediction:
        name = "static_gather" if ranks > 1 else "local"
        unwaited = machine.unwaited()
        return predict(
            config, tokens, ranks, name, unwaited, backward=backward, itemsize=itemsize, network=network
        )

    sides = side(baseline), side(candidate)
    limit = None
    if ranks > 1:
        now = network.bytes_per_s if network is not None else machine.cost("all_to_all").bytes_per_s
        slower = _last_crossing(ahead) if now < math.inf else None
        limit = None if slower is None else now / slower if slower else math.inf
    error = max(_fastest(each).error for each in sides)
    if machine.ratio_error is not None:
        # What the machine was off by, if it was compared just so; on another fabric or number of ranks at least as much.
        just_so = network is None and machine.compared_on(ranks)
        error = machine.ratio_error if just_so else max(error, machine.ratio_error)
    rho = _rho(baseline, candidate, tokens, ranks, machine, itemsize, network)
    unwaited = replayed(baseline), replayed(candidate)
    return Comparison(*sides, unwaited, limit, rho, error, ranks, network is not None)


def project(
    baseline: MoEConfig,
    candidate: MoEConfig,
    tokens: int,
    ranks_per_node: int,
    machine: Machine,
    network: Network,
    *,
    backward: bool = False,
    itemsize: int = 2,
) -> Comparison:
    """Project a comparison to several nodes: as :func:`compare`, with ``ranks_per_node * network.nodes`` ranks."""
    ranks = ranks_per_node * network.nodes
    return compare(
        baseline, candidate, tokens, ranks, machine, backward=backward, itemsize=itemsize, network=network
    )


def _fastest(predictions: Mapping[str, Prediction]) -> Prediction:
    return min(predictions.values(), key=lambda prediction: prediction.time_ms)


def _last_crossing(ahead: Callable[[float], float]) -> float:
    """Find how much slower the fabric must be for the candidate to be ahead from there on.

    Args:
        ahead: By how much the candidate is ahead if the fabric is slower by a factor.

    Returns:
        The factor; 0 if the candidate is always ahead, infinity if it is not ahead in the end.
    """
    factors = [_WIDEST ** (2 * step / (_STEPS - 1) - 1) for step in range(_STEPS)]
    if ahead(factors[-1]) <= 0:
        return math.inf
    behind = max((place for place, factor in enumerate(factors) if ahead(factor) <= 0), default=None)
    if behind is None:
        return 0.0
    low, high = math.log(factors[behind]), math.log(factors[behind + 1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead(math.exp(middle)) > 0 else (middle, high)
    return math.exp(high)


def _rho(
    baseline: MoEConfig,
    candidate: MoEConfig,
    tokens: int,
    ranks: int,
    machine: Machine,
    itemsize: int,
    network: Network | None,
) -> float | None:
    """Time saved in sending, divided by that of the projections at the dense rate."""
    if candidate.latent is None or ranks == 1:
        return None
    saved = bytes_sent(baseline, tokens, ranks, "all_to_all", itemsize) - bytes_sent(
        candidate, tokens, ranks, "all_to_all", itemsize
    )
    projections = 2 * product(tokens, candidate.hidden, candidate.latent, itemsize).flops
    link = machine.cost("all_to_all")
    sending_ms = Cost(bytes_per_s=link.bytes_per_s).time_ms(Work("all_to_all", nbytes=saved))
    if network is not None:
        sending_ms = network.time_ms(
            Cost(bytes_per_s=link.bytes_per_s), Work("all_to_all", nbytes=saved), ranks
        )
    projecting_ms = 1e3 * projections / machine.cost("dense").flops_per_s
    return sending_ms / projecting_ms if projecting_ms else math.inf
