"""The family of layers: one configuration, and each published shape as a function that fills it in.

All shapes are one layer, ``descend → send → experts → collect → ascend``, and differ in four numbers: how many experts, how many
of them a token takes, how wide an expert is inside, and how wide the rows are that travel. Write the baseline of DeepSeekMoE as
N experts, top-K, inner width m, rows of width h, and r < 1 for the ratio of the narrow to the wide:

==============  =====  =====  ======  =====  ========  ======  ================  ==============
preset          N      K      m       rows   params    FLOPs   hidden units (Km)  bytes sent
==============  =====  =====  ======  =====  ========  ======  ================  ==============
fine_grained    N      K      r h     h      1         1       1                 1
bigmac          N      K      h       r h    1         1       1/r               r
latent_eff      N/r    K      r h     r h    1         r       1                 r
latent_acc      N/r    K/r    r h     r h    1         1       1/r               1
==============  =====  =====  ======  =====  ========  ======  ================  ==============

``vanilla`` has the same parameters in few experts of the usual 4 h. ``bigmac`` is arXiv 2502.16927 to the letter (no norm, softmax
router, balance loss 1e-3); ``bigmac_stable`` adds what later work found that four matrices in a row need. At hidden 256 the
initialisation by fan-in alone, ``bigmac`` with ``sound_init``, learned better than all of it (docs/results-moe.md). ``latent_eff`` and
``latent_acc`` are LatentMoE (arXiv 2601.18089), without its shared expert unless asked for. ``k3`` is Kimi K3's shape
(arXiv 2607.24653) with SwiGLU in place of its bounded unit, and bias balancing in place of quantile balancing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

Activation = Literal["gelu", "relu", "silu", "relu2"]
Score = Literal["softmax", "sigmoid"]
Balance = Literal["loss", "bias", "none"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer.

    Attributes:
        hidden: Width of the model.
        num_experts: Routed experts.
        top_k: Experts that a token takes.
        ffn: Inner width of one routed expert.
        latent: Width of the rows that travel and that experts read; ``None`` means ``hidden``, without projections (CDAC).
        gated: Experts of three matrices (gate, up, down) instead of two.
        activation: Between up and down, or on the gate.
        score: What the router makes of its logits.
        normalise: Whether the weights of a token's experts are scaled to add up to 1.
        balance: How load is evened out: an auxiliary loss, a bias on the choice (never on the weight), or not at all.
        balance_weight: Weight of the balance loss.
        bias_rate: Step of the bias at each :meth:`adamac.moe.layer.MoE.rebalance`.
        z_weight: Weight of the squared log-sum-exp of the logits; 0 leaves it out.
        capacity: An expert takes at most ``capacity * tokens * top_k / num_experts`` of a rank's tokens, rounded up; ``None``
            takes all.
        shared_ffn: Inner width of an expert that all tokens take, at full width; 0 means none.
        latent_norm: RMSNorm on what comes back, before ``ascend``.
        sound_init: Draw every matrix by its own fan-in, and scale only the outermost projection by the depth of the model.
    """

    hidden: int
    num_experts: int
    top_k: int
    ffn: int
    latent: int | None = None
    gated: bool = False
    activation: Activation = "gelu"
    score: Score = "softmax"
    normalise: bool = True
    balance: Balance = "loss"
    balance_weight: float = 1e-3
    bias_rate: float = 1e-3
    z_weight: float = 0.0
    capacity: float | None = None
    shared_ffn: int = 0
    latent_norm: bool = False
    sound_init: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: Naming the field, what was expected and what was given.
        """
        for name, annotation in get_type_hints(MoEConfig).items():
            _check_type(name, getattr(self, name), annotation)
        for name in ("hidden", "num_experts", "top_k", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} but there are only {self.num_experts} experts; lower top_k or add experts"
            )
        if self.latent is not None and not 1 <= self.latent <= self.hidden:
            raise ValueError(
                f"latent must lie in 1..hidden ({self.hidden}); got {self.latent}: rows wider than the model only cost"
            )
        if self.latent_norm and self.latent is None:
            raise ValueError("latent_norm needs a latent width; set latent, or leave latent_norm off")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity must be above 0, or None to take all tokens; got {self.capacity}")
        if self.shared_ffn < 0:
            raise ValueError(f"shared_ffn must be at least 0; got {self.shared_ffn}")
        for name, known in (("activation", Activation), ("score", Score), ("balance", Balance)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}"
                )

    @property
    def width(self) -> int:
        """Width of the rows that travel and that experts read."""
        return self.hidden if self.latent is None else self.latent

    @property
    def matrices(self) -> int:
        """Matrices of an expert: up and down, and the gate."""
        return 3 if self.gated else 2


def local_experts(num_experts: int, ranks: int) -> int:
    """Experts that each rank holds.

    Raises:
        ValueError: If they cannot be spread evenly.
    """
    if num_experts % ranks:
        raise ValueError(
            f"num_experts must be divisible by the ranks it is spread over; got {num_experts} experts on {ranks} ranks"
        )
    return num_experts // ranks


def vanilla(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """Few experts h -> 4h -> h with the parameters of ``fine_grained`` (GShard's shape).

    The paper does not say how many of them a token takes; here as many as keep the FLOPs, but at least one.
    """
    few = max(1, round(num_experts * ratio / 4))
    return {"num_experts": few, "top_k": min(few, max(1, round(top_k * ratio / 4))), "ffn": 4 * hidden}


def fine_grained(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """Many experts h -> rh -> h, rows travel at full width (CDAC, the baseline of the paper)."""
    return {"num_experts": num_experts, "top_k": top_k, "ffn": _part(hidden, ratio)}


def bigmac(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """Many experts rh -> h -> rh between shared projections, rows travel at rh (DCCA)."""
    return {"num_experts": num_experts, "top_k": top_k, "ffn": hidden, "latent": _part(hidden, ratio)}


def bigmac_stable(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """``bigmac`` with a norm before ``ascend``, an initialisation by fan-in, and a sigmoid router balanced by a bias."""
    return bigmac(hidden, num_experts, top_k, ratio) | {
        "score": "sigmoid",
        "balance": "bias",
        "latent_norm": True,
        "sound_init": True,
    }


def latent_eff(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """1/r times as many experts rh -> rh -> rh, as many taken as before: fewer FLOPs and fewer bytes."""
    more = round(num_experts / ratio)
    return {"num_experts": more, "top_k": top_k, "ffn": _part(hidden, ratio), "latent": _part(hidden, ratio)}


def latent_acc(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """``latent_eff`` with 1/r times as many experts taken: FLOPs and bytes of the baseline, spent on choice."""
    return latent_eff(hidden, num_experts, top_k, ratio) | {"top_k": round(top_k / ratio)}


def k3(hidden: int, num_experts: int, top_k: int, ratio: float) -> dict[str, Any]:
    """Gated latent experts of inner width 3/7 h with two shared ones (published: h 7168, r 1/2, 896 experts, top-16).

    The inner width is the nearest multiple of 8, whose rows the grouped matrix product takes in any dtype; 3/7 h is one at 7168.
    """
    ffn = 8 * max(1, round(hidden * 3 / 7 / 8))
    return bigmac_stable(hidden, num_experts, top_k, ratio) | {
        "ffn": ffn,
        "gated": True,
        "activation": "silu",
        "shared_ffn": 2 * ffn,
    }


_Shape = Callable[[int, int, int, float], dict[str, Any]]
_SHAPES: dict[str, _Shape] = {
    shape.__name__: shape
    for shape in (vanilla, fine_grained, bigmac, bigmac_stable, latent_eff, latent_acc, k3)
}
PRESETS = tuple(_SHAPES)


def preset(
    name: str,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 8,
    ratio: float = 0.25,
    *,
    changes: Any = None,
    **fields_changed: Any,
) -> MoEConfig:
    """Make a layer of a published shape.

    Args:
        name: One of :data:`PRESETS`.
        hidden: Width of the model.
        num_experts: Of the fine-grained baseline; ``vanilla`` has fewer, the latent shapes more.
        top_k: Of the fine-grained baseline; ``vanilla`` takes fewer, ``latent_acc`` more.
        ratio: r, the narrow width as a share of ``hidden``.
        changes: A mapping of the fields of :class:`MoEConfig` that differ from the preset, any of them: ``{"top_k": 3}`` is
            the layer's own number, whatever the preset makes of ``top_k``. ``None`` means none.
        **fields_changed: The same as keywords, for fields that are no parameter here.

    Raises:
        ValueError: If the name or a changed field is unknown, or the shape cannot be built.
    """
    if name not in _SHAPES:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1]; got {ratio}")
    changed = {**(changes or {}), **fields_changed}
    unknown = set(changed) - {field.name for field in fields(MoEConfig)}
    if unknown:
        raise ValueError(f"MoEConfig has no field {', '.join(sorted(unknown))}")
    shape: dict[str, Any] = {"hidden": hidden, **_SHAPES[name](hidden, num_experts, top_k, ratio)}
    return MoEConfig(**shape | changed)


# What a field may hold, by what it is annotated with; a choice of words is checked against the words.
_KINDS: dict[type, str] = {int: "a whole number", float: "a finite number", bool: "True or False"}


def _check_type(name: str, value: Any, annotation: Any) -> None:
    kinds = get_args(annotation) or (annotation,)  # of ``int | None`` both
    kind = next((kind for kind in kinds if kind in _KINDS), None)
    if kind is None or (value is None and NoneType in kinds):
        return
    # A bool is an int to Python, and a whole number is as good as a float.
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(
        value, bool
    )
    if not fits or (kind is float and not math.isfinite(value)):
        also = " or None" if NoneType in kinds else ""
        raise ValueError(f"{name} must be {_KINDS[kind]}{also}; got {value!r}")


def _part(hidden: int, ratio: float) -> int:
    part = hidden * ratio
    if part != int(part):
        raise ValueError(f"hidden x ratio must be a whole number; got {hidden} x {ratio} = {part}")
    return int(part)


@dataclass(frozen=True)
class PaperModel:
    """A base model of the paper: GPT-3's shapes, every layer with experts in place of the FFN."""

    hidden: int
    layers: int
    heads: int
    context: int = 2048
    vocabulary: int = 50304  # 50,257 padded as Megatron does; Table 4 counts it so


# Medium and XL are spelled out in the paper, the others are GPT-3's sizes by those names.
PAPER_MODELS = {
    "medium": PaperModel(1024, 24, 16),
    "xl": PaperModel(2048, 24, 16),
    "2.7b": PaperModel(2560, 32, 32),
    "6.7b": PaperModel(4096, 32, 32),
}
