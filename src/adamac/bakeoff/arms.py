"""Arms: the ways of computing attention that a bake-off compares.

All sparse arms follow one schedule (the same dense steps), so that they differ in their plans alone, and each keeps its
method's published settings unless a budget is given for all of them. The dense arms install nothing: they are the pipeline
as it is, with torch's own choice of kernel or with one kernel that is named.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from adamac.attention import SVG2, AdaCluster, BlockTopK, Method, Oracle, SparseD, Tokens
from adamac.bakeoff.config import REFERENCE
from adamac.bakeoff.errors import BadInput


@dataclass(frozen=True)
class Arm:
    """One way of computing attention.

    Attributes:
        name: What it is called on the command line and in rows.
        note: What it is, in a line.
        method: Makes the plans; ``None`` leaves the pipeline as it is.
        kernel: Name of the dense kernel that torch uses wherever it can (of ``SDPBackend``, whose members cannot be sent
            to other ranks); what it cannot take (in the autoencoder or the text encoder, with widths or masks of their own) goes
            to the unfused one. ``None`` leaves the choice to torch.
    """

    name: str
    note: str
    method: Method | None = None
    kernel: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is installed."""
        return self.method is None

    @contextmanager
    def dense_kernel(self) -> Generator[None]:
        """Have torch prefer this arm's dense kernel."""
        if self.kernel is None:
            yield
            return
        with sdpa_kernel([SDPBackend.__members__[self.kernel], SDPBackend.MATH], set_priority=True):
            yield


_TILE = (4, 4, 8)  # frames, height, width: 128 tokens, as many as a block of the raster-order arms

_ALL = (
    Arm(REFERENCE, "the pipeline as it is, nothing installed"),
    Arm("dense-math", "dense, torch's unfused kernel", kernel="MATH"),
    Arm("dense-efficient", "dense, torch's memory-efficient kernel", kernel="EFFICIENT_ATTENTION"),
    Arm("dense-flash", "dense, torch's flash kernel", kernel="FLASH_ATTENTION"),
    Arm("dense-cudnn", "dense, the cuDNN kernel", kernel="CUDNN_ATTENTION"),
    Arm("adacluster", "AdaCluster, this library's settings", AdaCluster()),
    Arm(
        "adacluster-paper",
        "AdaCluster as the paper has it: TensorQuest, nothing compensated",
        AdaCluster.paper(),
    ),
    Arm("svg2", "Sparse VideoGen2: Euclidean clusters, top-p", SVG2()),
    Arm("sparsed", "SparseD: patterns found once and reused", SparseD()),
    Arm("block-topk", "128-token blocks in raster order, best by mean", BlockTopK()),
    Arm("tiles", "3-D tiles of 128 tokens, best by mean", BlockTopK(tile=_TILE)),
    Arm(
        "oracle",
        "AdaCluster's clusters ranked by their true mass: a bound, not a method",
        Oracle(compensate=True),
    ),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
"""Every arm by its name."""


def choose_arms(
    names: tuple[str, ...], keep: float | None = None, *, compiled: bool = False
) -> tuple[Arm, ...]:
    """Look arms up.

    Args:
        names: Names from :data:`ARMS`.
        keep: If given, every sparse arm reads this share of the video tokens in place of its own budget.
        compiled: Whether blocks will be compiled.

    Raises:
        BadInput: If a name is unknown or given twice, the reference is not among them, ``keep`` is out of range, or an arm
            that names its kernel is to be compiled.
    """
    for name in names:
        if name not in ARMS:
            raise BadInput(f"arms: unknown arm {name!r}; there are {', '.join(ARMS)}")
    if len(set(names)) < len(names):
        raise BadInput(f"arms: {' '.join(names)} names an arm twice")
    if REFERENCE not in names:
        raise BadInput(f"arms: {REFERENCE} must be among them, since all others are compared with it")
    chosen = tuple(ARMS[name] for name in names)
    if compiled and (named := [arm.name for arm in chosen if arm.kernel is not None]):
        raise BadInput(
            f"arms: {named[0]} cannot be compiled, since compiled blocks keep the kernel that they were compiled with; "
            "leave it out, or run without --compile"
        )
    if keep is None:
        return chosen
    try:
        budget = Tokens(keep)
    except ValueError as error:
        raise BadInput(f"keep: {error}") from None
    return tuple(_with_budget(arm, budget) for arm in chosen)


def _with_budget(arm: Arm, budget: Tokens) -> Arm:
    method: Any = arm.method  # every sparse method here is a dataclass with a budget
    return arm if method is None else replace(arm, method=replace(method, budget=budget))


def noise_floor_arm(device: str) -> Arm:
    """The dense arm whose kernel is not the one that torch would choose.

    How far its videos lie from dense is what rounding alone does to a trajectory: no sparse arm can be judged finer.
    """
    return ARMS["dense-efficient" if device.startswith("cuda") else "dense-math"]
