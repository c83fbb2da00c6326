"""The arms: the ways of computing attention that take turns on one pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from adamac.attention import SVG2, AdaCluster, Dense, Method, Tokens

COMPILED = "+compile"
# What stock and best dense attention are called where others are compared with them.
STOCK, BEST_DENSE = "stock", "best_dense"


@dataclass(frozen=True)
class Arm:
    """One way of computing attention.

    Attributes:
        name: On the command line and in rows.
        note: What it is, in a line.
        method: Makes the method; ``None`` leaves the pipeline as it is.
        is_dense: Whether every step is dense.
        compiled: Whether the transformer's blocks are compiled.
    """

    name: str
    note: str
    method: Callable[[], Method] | None = None
    is_dense: bool = False
    compiled: bool = False

    def with_compile(self) -> Arm:
        """The same with compiled blocks."""
        return replace(
            self,
            name=self.name + COMPILED,
            note=f"{self.note}; blocks compiled in full graphs",
            compiled=True,
        )


_ALL = (
    Arm(STOCK, "diffusers as it comes, torch's choice of kernel", is_dense=True),
    Arm(BEST_DENSE, "adamac's dense path: fastest dense kernel present, padded text dropped", Dense, True),
    Arm("svg2", "SVG2 with its published settings", SVG2),
    Arm(
        "svg2_30",
        "SVG2's clusters, reading 30 % of the tokens, about as its authors report",
        lambda: SVG2(budget=Tokens(0.3)),
    ),
    Arm("paper", "AdaCluster as the paper has it", AdaCluster.paper),
    Arm("default", "AdaCluster, this library's settings", AdaCluster),
    Arm("default_15", "the same, reading 15 % of the tokens", lambda: AdaCluster(budget=Tokens(0.15))),
    Arm("default_8", "the same, reading 8 % of the tokens", lambda: AdaCluster(budget=Tokens(0.08))),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
"""Every arm by its name."""


def choose(names: tuple[str, ...], *, compiled: bool) -> list[Arm]:
    """Look arms up, each followed by its compiled variant if wanted; a name may ask for that variant alone, "stock+compile".

    Raises:
        ValueError: If a name is unknown.
    """
    if unknown := [name for name in names if name.removesuffix(COMPILED) not in ARMS]:
        raise ValueError(
            f"unknown arm {unknown[0]!r}; there are {', '.join(ARMS)}, each with or without {COMPILED}"
        )
    asked = list(dict.fromkeys(names))
    if compiled:
        asked = list(dict.fromkeys(name for each in asked for name in (each, _compiled(each))))
    return [_arm(name) for name in asked]


def _compiled(name: str) -> str:
    return name.removesuffix(COMPILED) + COMPILED


def _arm(name: str) -> Arm:
    arm = ARMS[name.removesuffix(COMPILED)]
    return arm.with_compile() if name.endswith(COMPILED) else arm
