"""What is asked: fabrics, shapes and plans, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from adamac.ops.grouped_mlp import MlpImpl

Routing = Literal["balanced", "trained_like"]
ROUTINGS: tuple[Routing, ...] = ("balanced", "trained_like")
PRESETS = ("fine_grained", "bigmac")
BASELINE = "fine_grained"
COPY_PER_EXPERT = "all_to_all"

# A multicast of NVLink must stay off where GPUs are shared with others; InfiniBand is no fabric of one machine.
_ALWAYS = {"NCCL_NVLS_ENABLE": "0", "NCCL_IB_DISABLE": "1"}


@dataclass(frozen=True)
class Fabric:
    """What ranks talk over.

    Attributes:
        name: On the command line and in rows.
        backend: Of torch.distributed; ``None`` is one rank alone.
        environment: Set before the backend starts.
        transport: What NCCL's name of its way between two ranks begins with.
        tokens: On each rank, in a case of a plan; less where sending takes long.
        largest_mib: Of the collectives that are timed.
    """

    name: str
    backend: Literal["nccl", "gloo"] | None
    environment: dict[str, str] = field(default_factory=dict)
    transport: str = ""
    tokens: int = 4096
    largest_mib: int = 256


FABRICS = {
    fabric.name: fabric
    for fabric in (
        Fabric("none", None, tokens=16384),
        Fabric("nvlink", "nccl", _ALWAYS, "P2P", tokens=16384, largest_mib=512),
        Fabric("shm", "nccl", _ALWAYS | {"NCCL_P2P_DISABLE": "1"}, "SHM"),
        Fabric(
            "sockets",
            "nccl",
            _ALWAYS | {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
            "NET/Socket",
            largest_mib=64,
        ),
        Fabric("gloo", "gloo", tokens=256, largest_mib=1),
    )
}


@dataclass(frozen=True)
class LayerCase:
    """One layer, all arms.

    Attributes:
        hidden: Width of the model.
        top_k: Experts that a token takes.
        ratio: r, the narrow width as a share of hidden.
        tokens: On each rank.
        routing: How tokens are routed.
        num_experts: On all ranks together.
        experts: How both sides' experts are computed, as ``adamac.ops.grouped_mlp`` has it.
        rivals: Other packages' layers that take part.
        budget_s: Seconds that timing may take.
    """

    hidden: int = 2048
    top_k: int = 8
    ratio: float = 0.25
    tokens: int = 4096
    routing: Routing = "balanced"
    num_experts: int = 64
    experts: MlpImpl = "auto"
    rivals: tuple[str, ...] = ()
    budget_s: float = 8.0

    @property
    def title(self) -> str:
        """In a line of progress."""
        special = " ".join([self.experts if self.experts != "auto" else "", *self.rivals])
        return f"layer h{self.hidden} top-{self.top_k} r{self.ratio:g} {self.tokens} tokens {self.routing} {special}".rstrip()


@dataclass(frozen=True)
class CapturedCase(LayerCase):
    """One layer, its arms once more in shapes that do not depend on the routing, and those replayed from a CUDA graph."""

    @property
    def title(self) -> str:
        """In a line of progress."""
        return f"captured {super().title}"


@dataclass(frozen=True)
class CollectivesCase:
    """The raw collectives, from 64 KiB up in steps of 4.

    Attributes:
        largest_mib: Bytes that a rank holds before the exchange, at most.
        budget_s: Seconds that timing may take.
    """

    largest_mib: int
    budget_s: float = 8.0

    @property
    def title(self) -> str:
        """In a line of progress."""
        return f"collectives up to {self.largest_mib} MiB"


@dataclass(frozen=True)
class KernelsCase:
    """What one rank computes, piece by piece, or the fused kernels by tile; fields as in :class:`LayerCase`."""

    hidden: int = 2048
    top_k: int = 8
    ratio: float = 0.25
    tokens: int = 4096
    num_experts: int = 64
    experts: MlpImpl = "auto"
    budget_s: float = 2.0

    @property
    def title(self) -> str:
        """In a line of progress."""
        special = " fused" if self.experts == "fused" else ""
        return f"kernels h{self.hidden} top-{self.top_k} r{self.ratio:g} {self.tokens} tokens{special}"


@dataclass(frozen=True)
class ModelCase:
    """A whole model with random weights.

    Attributes:
        model: One of ``adamac.moe.PAPER_MODELS``, or ``"tiny"``.
        top_k: Experts that a token takes.
        dispatchers: That are compared, where there are several ranks.
        work: ``"train"``, or ``"serve"``: prefill and decode.
        budget_s: Seconds that timing may take.
    """

    model: str = "xl"
    top_k: int = 8
    dispatchers: tuple[str, ...] = ("all_to_all", "per_rank", "all_gather")
    work: Literal["train", "serve"] = "train"
    budget_s: float = 30.0

    @property
    def title(self) -> str:
        """In a line of progress."""
        return f"model {self.model} top-{self.top_k} {self.work}"


@dataclass(frozen=True)
class CostCase:
    """The constants of the cost model, and its predictions before and after the layers themselves are timed.

    Attributes:
        tokens: Of the layers that are predicted, on each rank.
        largest_mib: Of the messages that constants are fitted from.
    """

    tokens: int
    largest_mib: int

    @property
    def title(self) -> str:
        """In a line of progress."""
        return f"cost model, layers of {self.tokens} tokens"


@dataclass(frozen=True)
class LaunchesCase:
    """What runs on the device, kernel by kernel; fields as in :class:`LayerCase`."""

    hidden: int = 2048
    top_k: int = 8
    ratio: float = 0.25
    tokens: int = 16384
    num_experts: int = 64
    experts: MlpImpl = "auto"

    @property
    def title(self) -> str:
        """In a line of progress."""
        return f"launches h{self.hidden} top-{self.top_k} r{self.ratio:g} {self.tokens} tokens"


Case = LayerCase | CollectivesCase | KernelsCase | ModelCase | CostCase | LaunchesCase

PARTS = (
    "cost",
    "collectives",
    "kernels",
    "launches",
    "layer",
    "captured",
    "fused",
    "rivals",
    "train",
    "serve",
)
# Seconds of timing that a shape of the grid gets: there are 54, and its forward pass takes some milliseconds.
_GRID_S = 1.0
# DeepSpeed's layer multiplies with a matrix of tokens x experts x capacity: its work grows with the square of the tokens.
_FEW_TOKENS = 1024
_HIDDEN, _TOP_K, _RATIO = (2048, 1024, 4096), (8, 4, 16), (0.25, 0.5, 0.125)
_TOKENS = (1024, 4096, 16384)


def cases(
    plan: str,
    fabric: Fabric,
    parts: tuple[str, ...],
    *,
    hidden: tuple[int, ...] = (),
    top_k: tuple[int, ...] = (),
    ratio: tuple[float, ...] = (),
    routing: tuple[str, ...] = (),
) -> list[Case]:
    """List what a plan asks of a fabric, the most important first.

    Args:
        plan: ``"quick"`` is what the targets need, ``"grid"`` is every shape of a layer in few samples, ``"full"`` is everything,
            ``"tiny"`` a rehearsal of it.
        fabric: Where.
        parts: Which of :data:`PARTS`.
        hidden: Only these of the plan's widths; empty means all. Likewise the others.
        top_k: Experts a token takes.
        ratio: Narrow widths.
        routing: Kinds of routing.
    """
    found: list[Case] = []
    if "cost" in parts:
        found.append(CostCase(64 if plan == "tiny" else 4096, fabric.largest_mib))
    if "collectives" in parts and fabric.backend is not None:
        found.append(CollectivesCase(fabric.largest_mib, budget_s=4 if plan == "quick" else 8))
    alone = fabric.backend is None
    pieces: list[Case] = [*(_kernels(plan) if alone and "kernels" in parts else [])]
    if "launches" in parts and fabric.name in ("none", "nvlink", "gloo"):
        launches = LaunchesCase(64, 2, tokens=64, num_experts=8) if plan == "tiny" else LaunchesCase()
        pieces.append(launches)
        if alone and "fused" in parts:
            pieces += [replace(case, experts="fused") for case in (*pieces[-2:-1], launches)]
    captured = _captured(plan, fabric) if "captured" in parts else []
    models = _models(plan, fabric, parts)
    early, late = (models, []) if plan == "quick" else ([], models)

    def asked(case: LayerCase) -> bool:
        return (
            (not hidden or case.hidden in hidden)
            and (not top_k or case.top_k in top_k)
            and (not ratio or case.ratio in ratio)
            and (not routing or case.routing in routing)
        )

    pieces += filter(asked, captured)
    wanted = list(filter(asked, _layers(plan, fabric, rivals="rivals" in parts)))
    if "layer" not in parts:
        wanted = [case for case in wanted if case.rivals]
    # Those of the targets first: as many as the quick plan has without rivals.
    first = [case for case in wanted if not case.rivals][: 2 if plan == "quick" else 1]
    rest = [case for case in wanted if case not in first]
    fused = [replace(case, experts="fused") for case in first] if "fused" in parts else []
    return [*found, *first, *fused, *pieces, *early, *rest, *late]


def _layers(plan: str, fabric: Fabric, *, rivals: bool) -> list[LayerCase]:
    """Layers with our arms alone, and some again with rivals: those may take a whole set of processes with them."""
    rivals = rivals and fabric.backend is not None
    first = LayerCase(tokens=fabric.tokens, budget_s=16 if fabric.name == "sockets" else 10)
    if plan == "tiny":
        first = replace(first, hidden=64, top_k=2, num_experts=8, tokens=256, budget_s=0.2)
    skewed, fewer = replace(first, routing="trained_like"), replace(first, top_k=first.top_k // 2)
    transformers = replace(first, rivals=("transformers",))
    both = replace(first, tokens=min(first.tokens, _FEW_TOKENS), rivals=("deepspeed", "transformers"))
    compared = [transformers, both] if rivals else []
    if plan == "tiny":
        return [first, skewed, *compared]
    if plan == "quick":
        # DeepSpeed last: what goes wrong in another package may take these processes with it.
        return [first, fewer, *compared[:1], skewed, *compared[1:]]
    if compared:
        compared += [
            replace(transformers, routing="trained_like"),
            replace(transformers, top_k=4),
            replace(transformers, hidden=1024),
        ]
    lengths = [replace(first, tokens=tokens) for tokens in _TOKENS]
    grid = [
        replace(first, hidden=hidden, top_k=top_k, ratio=ratio, routing=routing)
        for routing, ratio, top_k, hidden in product(ROUTINGS, _RATIO, _TOP_K, _HIDDEN)
    ]
    if plan == "grid":
        return [replace(case, budget_s=_GRID_S) for case in grid]
    rest = [replace(case, budget_s=5) for case in (*lengths, *grid) if case != first]
    return [first, *compared, *rest]


def _captured(plan: str, fabric: Fabric) -> list[CapturedCase]:
    """The layer of the targets, routed evenly and not, and other widths; of the grid every shape, routed evenly."""
    if plan == "tiny":
        return [CapturedCase(64, 2, tokens=256, num_experts=8, budget_s=0.2)]
    first = CapturedCase(tokens=fabric.tokens, budget_s=12 if fabric.name == "sockets" else 6)
    if plan == "grid":
        shapes = product(_RATIO, _TOP_K, _HIDDEN)
        return [
            replace(first, hidden=hidden, top_k=top_k, ratio=ratio, budget_s=_GRID_S)
            for ratio, top_k, hidden in shapes
        ]
    wider, narrower = replace(first, hidden=4096), replace(first, hidden=1024)
    return [first, replace(first, routing="trained_like"), wider, narrower]


def _kernels(plan: str) -> list[KernelsCase]:
    if plan == "tiny":
        return [KernelsCase(64, 2, tokens=64, num_experts=8, budget_s=0.0)]
    if plan == "quick":
        return [KernelsCase(tokens=tokens) for tokens in _TOKENS]
    grid = product(_HIDDEN, _TOP_K, _RATIO, _TOKENS[1:])
    return [KernelsCase(hidden, top_k, ratio, tokens, budget_s=1) for hidden, top_k, ratio, tokens in grid]


def _models(plan: str, fabric: Fabric, parts: tuple[str, ...]) -> list[ModelCase]:
    works = [work for work in ("train", "serve") if work in parts]
    if plan == "tiny":
        return [ModelCase("tiny", 2, work=work, budget_s=0.2) for work in works]
    if plan == "quick":
        quick = {"shm": "train", "none": "serve"}
        two = ("all_to_all", "per_rank")
        return [
            ModelCase(work=work, dispatchers=two, budget_s=30 if work == "train" else 10)
            for work in works
            if quick.get(fabric.name) == work
        ]
    if fabric.name == "sockets":  # a training step would take the better part of a minute
        works = [work for work in works if work != "train"]
    return [ModelCase(model, work=work) for model in ("xl", "medium") for work in works]
