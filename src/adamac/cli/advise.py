"""``adamac advise``: will it pay here? Stage by stage, from constants that are measured, given or assumed."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from adamac.bakeoff.errors import BadInput
from adamac.cli.lines import refusals_are_input, say

if TYPE_CHECKING:
    from adamac.advise.check import Check
    from adamac.advise.moe import Comparison
    from adamac.moe.cost.constants import Kind
    from adamac.moe.cost.machine import Machine
    from adamac.moe.cost.predict import Network
    from adamac.moe.presets import MoEConfig

_GIGA, _TERA = 1e9, 1e12
_DEFAULT_RANKS = 8
# As adamac.moe.cost.machine has them; repeated so that help answers without torch.
_COLLECTIVES: tuple[Kind, ...] = ("all_to_all", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Advise:
    """Predict what a mixture-of-experts layer takes, with narrow rows and without, and say whether that pays.

    The layer's shape is that of fine-grained experts, hidden → latent → hidden, that send rows at full width; BigMac has the
    same parameters as latent → hidden → latent and sends rows at latent width. Constants come from --measure, from
    --machine, or from the options; those that nobody gave are assumed, a data-centre GPU's in one node, and said to be.

    Attributes:
        what: The kind of layer.
        hidden: Width of the model.
        experts: Experts of the fine-grained layer, on all ranks together.
        top_k: Experts per token.
        latent: Width of the rows that the compared layer sends.
        ffn: Inner width of a fine-grained expert; latent if not given.
        preset: What is compared with the fine-grained layer: bigmac, bigmac_stable, latent_eff or latent_acc.
        gated: Experts of three matrices (SwiGLU).
        shared_ffn: Inner width of an expert that all tokens take, on both sides.
        tokens: Tokens on each rank.
        ranks: Ranks that the experts are spread over; if not given, with --measure those that take part, with --machine those
            that the file was measured on, else 8.
        backward: Predict forward and backward, as in training; forward alone if not given.
        bandwidth: GB/s that a rank sends in a collective, one way, within a node.
        latency: Latency of a collective in microseconds.
        flops: TFLOP/s of a large matrix product.
        grouped_flops: TFLOP/s of the experts' products.
        memory_bandwidth: GB/s of the device's memory, read and written together.
        machine: File that --measure --out wrote.
        measure: Measure this machine first (with torchrun: its ranks and what is between them), then compare predictions
            with the layer itself.
        out: File to write the machine to.
        nodes: Number of nodes, with equally many ranks each; more than one makes the answer a projection.
        node_bandwidth: GB/s that a rank sends to other nodes, one way, while its neighbours send too.
        device: What to measure: "auto", "cpu", "cuda" or "cuda:1".
    """

    what: Positional[Literal["moe"]]
    hidden: int = 2048
    experts: int = 64
    top_k: int = 8
    latent: int = 512
    ffn: int | None = None
    preset: Literal["bigmac", "bigmac_stable", "latent_eff", "latent_acc"] = "bigmac"
    gated: bool = False
    shared_ffn: int = 0
    tokens: int = 16384
    ranks: int | None = None
    backward: bool = False
    bandwidth: float | None = None
    latency: float | None = None
    flops: float | None = None
    grouped_flops: float | None = None
    memory_bandwidth: float | None = None
    machine: Path | None = None
    measure: bool = False
    out: Path | None = None
    nodes: int = 1
    node_bandwidth: float | None = None
    device: str = "auto"


def advise(options: Advise, console: Console) -> int:
    """Compare two layers and print the verdict."""
    with refusals_are_input():
        _check(options)
        sides = _sides(options)
        if options.measure:
            return _measured(options, sides, console)
        machine = _machine(options)
        ranks = options.ranks or _own_ranks(options, machine)
        if options.machine is not None and options.ranks is None:
            whose = "assumed" if machine.ranks is None and ranks > 1 else "as the file has it"
            console.print(f"ranks: {ranks}, {whose}; --ranks says otherwise", highlight=False)
        _tell(options, sides, _linked(machine, options), ranks, console)
    return 0


def _measured(options: Advise, sides: tuple[MoEConfig, MoEConfig], console: Console) -> int:
    """Measure first; on several ranks the first one speaks."""
    import torch.distributed as dist

    from adamac.advise.check import check, checked
    from adamac.advise.measure import measure
    from adamac.moe.cost.predict import predict
    from adamac.moe.lm.world import World

    world = World.join(options.device)
    console = console if world.first else Console(quiet=True)
    try:
        group = dist.group.WORLD if world.size > 1 else None
        ranks = options.ranks or world.size
        name = "local" if ranks == 1 else "all_to_all"
        for side in sides:  # refused before anything is measured
            predict(side, options.tokens, ranks, name, _given(options), network=_network(options))
        with console.status("") as status:
            machine = measure(world.device, group=group, told=lambda what: status.update(f"measuring {what}"))
            checks = check(
                machine, world.device, group=group, told=lambda what: status.update(f"checking {what}")
            )
        machine = checked(machine, checks)
        if options.out is not None and world.first:
            machine.save(options.out)
        console.print(_checks(checks))
        console.print(
            f"off in the median: times {machine.layer_error:.0%}, ratios of the two sides {machine.ratio_error:.0%}",
            highlight=False,
        )
        _tell(options, sides, _linked(machine, options), ranks, console)
    finally:
        world.leave()
    return 0


def _tell(
    options: Advise, sides: tuple[MoEConfig, MoEConfig], machine: Machine, ranks: int, console: Console
) -> None:
    """Print both sides by stage, and what follows."""
    from adamac.advise.moe import compare

    found = compare(
        *sides,
        options.tokens,
        ranks,
        machine,
        backward=options.backward,
        itemsize=machine.itemsize,
        network=_network(options),
    )
    name = {"bigmac": "BigMac"}.get(options.preset, options.preset)
    console.print(_constants(machine, ranks))
    console.print(_stages(found, name, options.backward))
    if ranks > 1:
        console.print(_dispatchers(found, name))
    for line in _lines(found, machine, ranks, name):
        say(console, line)


def _lines(found: Comparison, machine: Machine, ranks: int, name: str) -> Generator[str]:
    """What a table does not say."""
    if assumed := [kind for kind in machine.assumed() if ranks > 1 or kind not in _COLLECTIVES]:
        yield f"assumed, not measured: {', '.join(assumed)}; for this machine's own constants use --measure"
    measured = all(cost.source == "measured" for kind, cost in machine.costs.items() if kind in _COLLECTIVES)
    if measured and ranks > 1 and machine.ranks not in (None, ranks):
        yield f"collectives were measured on {machine.ranks} ranks and are taken to be the same on {ranks}"
    if machine.whole != 1:
        yield f"a layer's own work takes {machine.whole:.2f} times the sum of its parts: they were timed alone, on warm caches"
    if found.rho is not None:
        yield (
            f"rho {found.rho:.3g}: what narrow rows save in sending, divided by what the two projections take, a copy "
            "per expert on both sides"
        )
    if ranks > 1:
        yield found.break_even(name)
    yield found.verdict(name)
    yield found.if_replayed(name)


def _constants(machine: Machine, ranks: int) -> Table:
    drawn = _table(
        f"{machine.name}", "operation", "overhead", "FLOPs", "bytes", "from", "off by", left=(0, 4)
    )
    for row in machine.describe():
        if ranks > 1 or row[0] not in _COLLECTIVES:
            drawn.add_row(*row)
    return drawn


def _stages(found: Comparison, name: str, backward: bool) -> Table:
    baseline, candidate = found.best
    projection = "projection: " if candidate.projection else ""
    drawn = _table(
        f"{projection}{'forward and backward' if backward else 'forward'}, ms, each by its best dispatcher",
        "stage",
        f"CDAC\n{baseline.dispatcher}",
        f"{name}\n{candidate.dispatcher}",
        "saved",
    )
    for stage, ms in baseline.stages_ms.items():
        other = candidate.stages_ms[stage]
        if ms or other:
            drawn.add_row(stage, f"{ms:.3f}", f"{other:.3f}", f"{ms - other:+.3f}")
    if baseline.host_ms or candidate.host_ms:
        wait = baseline.host_ms, candidate.host_ms
        drawn.add_row("host", *(f"{ms:.3f}" for ms in wait), f"{wait[0] - wait[1]:+.3f}")
    drawn.add_section()
    total = baseline.time_ms, candidate.time_ms
    drawn.add_row("sum", *(f"{ms:.3f}" for ms in total), f"{total[0] - total[1]:+.3f}")
    drawn.add_row(
        "MiB sent", *(f"{side.bytes_sent / 2**20:.0f}" for side in found.best), f"{found.ratio:.2f}x in time"
    )
    return drawn


def _dispatchers(found: Comparison, name: str) -> Table:
    drawn = _table("by dispatcher, ms", "", "CDAC", name, "ratio")
    labels = {"all_to_all": "all_to_all (copy per expert)"}
    for dispatcher, one in found.baseline.items():
        other = found.candidate[dispatcher]
        drawn.add_row(
            labels.get(dispatcher, dispatcher),
            f"{one.time_ms:.3f}",
            f"{other.time_ms:.3f}",
            f"{one.time_ms / other.time_ms:.2f}",
        )
    return drawn


def _checks(checks: list[Check]) -> Table:
    drawn = _table(
        "the model against the layer itself, ms",
        *("layer", "hidden x tokens", "dispatcher", "passes", "model", "layer", "error"),
        left=(0, 2, 3),
    )
    names = {"fine_grained": "CDAC", "bigmac": "BigMac"}
    for each in checks:
        case = each.case
        drawn.add_row(
            names[case.name],
            f"{case.config.hidden} x {case.tokens}",
            case.dispatcher,
            "both" if case.backward else "forward",
            f"{each.predicted.time_ms:.2f}",
            f"{each.measured_ms:.2f}",
            f"{each.error:+.0%}",
        )
    return drawn


def _table(title: str, *columns: str, left: tuple[int, ...] = (0,)) -> Table:
    drawn = Table(title=title)
    for place, column in enumerate(columns):
        drawn.add_column(column, justify="left" if place in left else "right")
    return drawn


def _sides(options: Advise) -> tuple[MoEConfig, MoEConfig]:
    """The baseline and what is compared with it."""
    from adamac.moe.presets import preset

    # A fraction, so that its product with hidden is latent to the last bit.
    ratio: Any = Fraction(options.latent, options.hidden)
    inner = options.latent if options.ffn is None else options.ffn
    both = {"gated": options.gated, "shared_ffn": options.shared_ffn}
    if options.gated:
        both["activation"] = "silu"
    baseline = preset(
        "fine_grained", options.hidden, options.experts, options.top_k, ratio, ffn=inner, **both
    )
    wide = inner / ratio if options.preset.startswith("bigmac") else Fraction(inner)
    if wide.denominator != 1:
        raise BadInput(
            f"ffn x hidden / latent must be a whole number, got {inner} x {options.hidden} / {options.latent} = {float(wide):g}"
        )
    candidate = preset(
        options.preset, options.hidden, options.experts, options.top_k, ratio, ffn=int(wide), **both
    )
    return baseline, candidate


def _machine(options: Advise) -> Machine:
    from adamac.moe.cost.machine import Machine

    return _given(options) if options.machine is None else Machine.load(options.machine)


def _own_ranks(options: Advise, machine: Machine) -> int:
    """On how many ranks a machine was measured; of one that was not, how many are assumed.

    Raises:
        BadInput: If it was measured on one, and what is between several is given.
    """
    if machine.ranks is not None or "all_to_all" in machine.costs:
        return machine.ranks or _DEFAULT_RANKS
    asked = {name: getattr(options, name) is not None for name in ("bandwidth", "latency")}
    for name, given in (asked | {"nodes": options.nodes > 1}).items():
        if given:
            raise BadInput(
                f"--{name} needs --ranks: {options.machine} was measured on one rank, which sends nothing"
            )
    return 1


def _given(options: Advise) -> Machine:
    from adamac.moe.cost.machine import machine_of

    return machine_of(
        flops_per_s=_times(options.flops, _TERA),
        grouped_flops_per_s=_times(options.grouped_flops, _TERA),
        bytes_per_s=_times(options.memory_bandwidth, _GIGA),
        link_bytes_per_s=_times(options.bandwidth, _GIGA),
        latency_ms=_times(options.latency, 1e-3),
    )


def _linked(machine: Machine, options: Advise) -> Machine:
    """A measured machine on the fabric that was asked for, or on an assumed one if it has none."""
    from adamac.moe.cost.machine import LINK_BYTES_PER_S

    latency = _times(options.latency, 1e-3)
    if options.bandwidth is not None:
        return machine.linked(options.bandwidth * _GIGA, latency)
    if "all_to_all" not in machine.costs:
        return machine.linked(LINK_BYTES_PER_S, latency, "assumed")
    if latency is None:
        return machine
    return machine.changed(
        **{kind: replace(machine.cost(kind), overhead_ms=latency) for kind in _COLLECTIVES}
    )


def _network(options: Advise) -> Network | None:
    from adamac.moe.cost.predict import Network

    if options.nodes == 1 or options.node_bandwidth is None:
        return None
    return Network(options.nodes, options.node_bandwidth * _GIGA)


def _check(options: Advise) -> None:
    """Refuse what makes no sense, in the words of the command line."""
    for name in ("hidden", "experts", "top_k", "latent", "ffn", "tokens", "ranks", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("bandwidth", "latency", "flops", "grouped_flops", "memory_bandwidth", "node_bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} must be a number above 0, got {value:g}")
    if options.latent > options.hidden:
        raise BadInput(f"--latent must be at most hidden ({options.hidden}), got {options.latent}")
    if options.nodes > 1 and options.node_bandwidth is None:
        raise BadInput("--nodes needs --node-bandwidth, the GB/s that a rank sends at to other nodes")
    if options.nodes == 1 and options.node_bandwidth is not None:
        raise BadInput("--node-bandwidth needs --nodes, at least 2")
    if options.machine is not None and options.measure:
        raise BadInput(
            "--machine and --measure exclude each other: one reads constants, the other finds them"
        )
    if options.out is not None and not options.measure:
        raise BadInput("--out is where --measure writes; add --measure")
    known = options.machine is not None or options.measure
    for name in ("flops", "grouped_flops", "memory_bandwidth"):
        if known and getattr(options, name) is not None:
            raise BadInput(
                f"--{name.replace('_', '-')} is known from the machine; leave it out, or --machine and --measure"
            )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
