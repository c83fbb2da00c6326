"""A machine as a cost model sees it: a few constants, each with its source.

They are measured (:func:`adamac.advise.measure.measure`), given by the user, or assumed; a prediction is as good as they are, so
that each says which. A machine is saved as JSON and can be printed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from adamac.moe.cost.constants import KINDS, Cost, Kind, Source

RowsImpl = Literal["torch", "triton"]
COLLECTIVES: tuple[Kind, ...] = ("all_to_all", "all_gather", "reduce_scatter")
PRODUCTS: tuple[Kind, ...] = ("dense", "grouped", "gate")

# What is said of a file that cannot be one.
_WRITTEN = "expected what adamac advise moe --measure --out FILE writes"

# What is assumed where nothing is said: a data-centre GPU of the Hopper generation in bfloat16 within one node.
FLOPS_PER_S = 650e12
BYTES_PER_S = 3.6e12
LINK_BYTES_PER_S = 233e9
LAUNCH_MS = 0.005
LATENCY_MS = 0.03
# Of other rates, as shares of these. Experts have fewer rows each than a dense product; the gate computes in float32
# without tensor cores; a radix sort passes over its keys several times.
GROUPED_SHARE = 0.7
GATE_SHARE = 1 / 16
SORT_SHARE = 1 / 50
# Kernels that these two are made of.
GATE_LAUNCHES, SORT_LAUNCHES = 15, 10


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    Attributes:
        name: For people.
        costs: Of each kind of work; without the collectives if nobody could measure them.
        itemsize: Bytes of a value that the rates hold for.
        ranks: On how many the collectives were measured; ``None`` if they were not.
        rows: What moves rows there: the kernels that read rows where they lie, or plain torch, which copies them first.
        least_ms: What a layer takes however small it is, forward, by dispatcher: what the host needs to launch it.
        least_both_ms: The same, forward and backward.
        whole: What a layer takes, collectives left out, divided by the sum of its parts: those were timed alone, one after
            another on warm caches. 1 if no layer that was timed kept the device busy.
        layer_error: What predictions of whole layers were off by when compared with measurements, as a share (median).
        ratio_error: The same of the ratio between two layers, from which much of the error cancels.
    """

    name: str
    costs: Mapping[Kind, Cost]
    itemsize: int = 2
    ranks: int | None = None
    rows: RowsImpl = "triton"
    least_ms: Mapping[str, float] = field(default_factory=dict)
    least_both_ms: Mapping[str, float] = field(default_factory=dict)
    whole: float = 1.0
    layer_error: float | None = None
    ratio_error: float | None = None

    def __post_init__(self) -> None:
        """Refuse a machine that cannot be one.

        Raises:
            ValueError: Naming what is missing or unknown.
        """
        missing = set(KINDS) - set(COLLECTIVES) - set(self.costs)
        unknown = set(self.costs) - set(KINDS)
        if missing or unknown:
            wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(unknown))}"
            raise ValueError(f"a machine has a cost for each of {', '.join(KINDS)}; this one {wrong}")
        if self.rows not in get_args(RowsImpl):
            raise ValueError(f"rows must be one of {', '.join(get_args(RowsImpl))}; got {self.rows!r}")
        for name, value in (("itemsize", self.itemsize), ("ranks", 1 if self.ranks is None else self.ranks)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        for name, value in (("whole", self.whole), *self.least_ms.items(), *self.least_both_ms.items()):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number, at least 0; got {value!r}")

    def cost(self, kind: Kind) -> Cost:
        """The constants of an operation.

        Raises:
            ValueError: If it is a collective and nobody measured or gave its bandwidth.
        """
        if kind not in self.costs:
            raise ValueError(
                f"this machine has no bandwidth of {kind}: it was measured on one rank; give one"
            )
        return self.costs[kind]

    def unwaited(self) -> Machine:
        """The same machine where nobody waits for its host, as where layers are replayed from a CUDA graph."""
        return replace(self, least_ms={}, least_both_ms={})

    def changed(self, **costs: Cost) -> Machine:
        """The same machine with some costs replaced."""
        return replace(self, costs={**self.costs, **costs})

    def linked(
        self, bytes_per_s: float, latency_ms: float | None = None, source: Source = "given"
    ) -> Machine:
        """The same machine on another fabric: all collectives at one bandwidth.

        Args:
            bytes_per_s: What a rank sends at, one way.
            latency_ms: Of a collective; ``None`` keeps what is known, or assumes one.
            source: Who says so.
        """

        def cost(kind: Kind) -> Cost:
            known = self.costs[kind].overhead_ms if kind in self.costs else LATENCY_MS
            return Cost(known if latency_ms is None else latency_ms, bytes_per_s=bytes_per_s, source=source)

        return self.changed(**{kind: cost(kind) for kind in COLLECTIVES})

    def slowed(self, factor: float) -> Machine:
        """The same machine with the bandwidth of every collective divided by a factor."""
        costs = {
            kind: replace(self.cost(kind), bytes_per_s=self.cost(kind).bytes_per_s / factor)
            for kind in COLLECTIVES
        }
        return self.changed(**costs)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold of it; infinite rates are null."""
        return asdict(self) | {"costs": {kind: _to_json(cost) for kind, cost in self.costs.items()}}

    def save(self, path: Path) -> None:
        """Write :meth:`to_json` to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is no machine.
            OSError: If it cannot be read.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise type(error)(
                f"cannot read {path}: {(error.strerror or str(error)).lower()}; {_WRITTEN}"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no machine file: {_problem(error)}; {_WRITTEN}") from error

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Machine:
        """Undo :meth:`to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: If it is something else.
        """
        rest = dict(entries)
        costs = {kind: _from_json(dict(entry)) for kind, entry in rest.pop("costs").items()}
        return cls(rest.pop("name"), costs, **rest)

    def describe(self) -> list[tuple[str, str, str, str, str, str]]:
        """Rows for a table: operation, overhead, FLOP rate, bandwidth, source, error of the fit."""
        return [
            (
                kind,
                f"{1e3 * cost.overhead_ms:.3g} µs",
                _unit(cost.flops_per_s, "FLOP/s"),
                _unit(cost.bytes_per_s, "B/s"),
                cost.source,
                f"{cost.error:.1%}" if cost.residuals else "",
            )
            for kind, cost in self.costs.items()
        ]

    def compared_on(self, ranks: int) -> bool:
        """Whether its errors are those of layers over so many ranks, on constants that were all measured."""
        used = [cost for kind, cost in self.costs.items() if ranks > 1 or kind not in COLLECTIVES]
        measured = all(cost.source == "measured" for cost in used)
        return measured and (ranks == 1 or ranks == self.ranks)

    def assumed(self) -> list[str]:
        """The operations of which nobody measured or gave the constants."""
        return [kind for kind, cost in self.costs.items() if cost.source == "assumed"]


def machine_of(
    *,
    flops_per_s: float | None = None,
    grouped_flops_per_s: float | None = None,
    bytes_per_s: float | None = None,
    link_bytes_per_s: float | None = None,
    launch_ms: float | None = None,
    latency_ms: float | None = None,
    itemsize: int = 2,
    rows: RowsImpl = "triton",
) -> Machine:
    """Make a machine from data-sheet numbers; those not given are assumed, those of a Hopper GPU in one node.

    Args:
        flops_per_s: Of a large dense product.
        grouped_flops_per_s: Of the experts' products; a share of the dense ones if not given.
        bytes_per_s: Of the device's memory, read and written together.
        link_bytes_per_s: What a rank sends at in a collective, one way.
        launch_ms: Of each operation.
        latency_ms: Of each collective.
        itemsize: Bytes of a value.
        rows: What moves rows.
    """

    def source(*given: float | None) -> Source:
        return "assumed" if all(value is None for value in given) else "given"

    launch = LAUNCH_MS if launch_ms is None else launch_ms
    flops = FLOPS_PER_S if flops_per_s is None else flops_per_s
    grouped = GROUPED_SHARE * flops if grouped_flops_per_s is None else grouped_flops_per_s
    memory = BYTES_PER_S if bytes_per_s is None else bytes_per_s
    rate, moved = source(flops_per_s), source(bytes_per_s)
    move = Cost(launch, bytes_per_s=memory, source=moved)
    # A product reads and writes while it computes; that its rate is lower for it is in the rate.
    costs: dict[Kind, Cost] = {
        "dense": Cost(launch, flops, source=rate),
        "grouped": Cost(launch, grouped, source=source(flops_per_s, grouped_flops_per_s)),
        "gate": Cost(GATE_LAUNCHES * launch, GATE_SHARE * flops, memory, source=rate),
        "elementwise": move,
        "sort": Cost(SORT_LAUNCHES * launch, bytes_per_s=SORT_SHARE * memory, source=moved),
        "spread": move,
        "gather": move,
        "gather_partial": move,
    }
    link = LINK_BYTES_PER_S if link_bytes_per_s is None else link_bytes_per_s
    latency = LATENCY_MS if latency_ms is None else latency_ms
    machine = Machine("given constants" if "given" in (rate, moved) else "assumed constants", costs, itemsize)
    return replace(machine, rows=rows).linked(link, latency, source(link_bytes_per_s))


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is no JSON"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    if isinstance(error, TypeError | AttributeError):  # worded for who wrote the code, not the file
        return "an entry is unknown or of another kind"
    return str(error)


def _to_json(cost: Cost) -> dict[str, Any]:
    return {name: None if value == math.inf else value for name, value in asdict(cost).items()}


def _from_json(entry: dict[str, Any]) -> Cost:
    residuals = tuple(entry.pop("residuals", ()))
    values: dict[str, Any] = {name: math.inf if value is None else value for name, value in entry.items()}
    return Cost(**values, residuals=residuals)


def _unit(rate: float, unit: str) -> str:
    if rate == math.inf:
        return ""
    for factor, letter in ((1e12, "T"), (1e9, "G")):
        if rate >= factor:
            return f"{rate / factor:.3g} {letter}{unit}"
    return f"{rate / 1e6:.3g} M{unit}"
