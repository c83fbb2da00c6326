"""What a rank computes, piece by piece: with ``collectives`` all that a cost model of a layer is fitted from.

``project`` is the plain product that descends, ``experts`` the two grouped products with the activation between, ``spread`` the
copy of rows to their experts' places, ``gathered`` the weighted sum back. ``up``, ``activation`` and ``down`` are the parts of
``experts``; ``fused_up`` is the first two in one kernel and ``fused_gradient`` what they take back in one, for each way to cut
a product into tiles: how a default is chosen. Forward passes but for the last; routing is balanced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from adamac.moe import preset
from adamac.moe.experts import Experts
from adamac.moe.rows import by_expert, gathered, spread
from adamac.ops.activation import activate
from adamac.ops.grouped_mlp import check_fused
from adamac.ops.grouped_mm import grouped_mm

from .arms import make_layer
from .cases import PRESETS, KernelsCase, LayerCase
from .crew import Crew
from .inputs import make
from .turns import figures, turns

_INNER = 8


def run(case: KernelsCase, crew: Crew) -> None:
    """Time the pieces of both presets at a shape, and hand out a row for each."""
    common = {"benchmark": "moe_kernels", **asdict(case), "dtype": str(crew.dtype).removeprefix("torch.")}
    for name in PRESETS:
        made, problem = crew.attempt(lambda name=name: _pieces(case, name, crew))
        if problem is not None:
            crew.row(common | {"preset": name, "status": "error", "reason": problem})
            continue
        steps, costs = made
        with torch.no_grad():
            for step in steps.values():
                step()
            times = turns(steps, crew, case.budget_s / len(PRESETS), inner=_INNER)
        for kernel, times_ms in times.items():
            found = figures(times_ms)
            rates = {"tflop_per_s": costs[kernel]["flops"] / found["p50_ms"] / 1e9}
            rates["gb_per_s"] = costs[kernel]["bytes"] / found["p50_ms"] / 1e6
            crew.row(
                common | {"preset": name, "kernel": kernel, "status": "ok", **costs[kernel], **found, **rates}
            )


def _pieces(
    case: KernelsCase, preset_name: str, crew: Crew
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """The steps, and what each must at least compute and move."""
    config = preset(preset_name, case.hidden, case.num_experts, case.top_k, case.ratio)
    layer_case = LayerCase(case.hidden, case.top_k, case.ratio, case.tokens, num_experts=case.num_experts)
    inputs = make(layer_case, crew.rank, crew.device, crew.dtype)
    layer = make_layer(layer_case, preset_name, inputs.router, None, crew.dtype)
    experts: Experts = layer.experts
    with torch.no_grad():
        routing, _ = layer.router(inputs.x)
        narrow = layer.descend(inputs.x).contiguous()
        order, counts = by_expert(routing)
        rows = spread(narrow, order)
    size, width, copies = crew.dtype.itemsize, config.width, len(rows)
    weights = sum(weight.nbytes for weight in experts.parameters())
    with torch.no_grad():
        inner = grouped_mm(rows, experts.up, counts)
        active = activate(inner, config.activation)
    one_product = {
        "flops": 2 * copies * width * config.ffn,
        "bytes": copies * (width + config.ffn) * size + weights // 2,
    }
    if case.experts == "fused":
        fused = _fused(rows, experts, counts, inner)
        more = {name: inner.nbytes if "gradient" in name else 0 for name in fused}
        return fused, {name: one_product | {"bytes": one_product["bytes"] + more[name]} for name in fused}
    steps: dict[str, Callable[[], Any]] = {
        "experts": lambda: experts(rows, counts),
        "up": lambda: grouped_mm(rows, experts.up, counts),
        "activation": lambda: activate(inner, config.activation),
        "down": lambda: grouped_mm(active, experts.down, counts),
        "spread": lambda: spread(narrow, order),
        "gathered": lambda: gathered(rows, order, routing.weights),
    }
    costs = {
        "experts": {
            "flops": 2 * one_product["flops"],
            "bytes": 2 * copies * (width + config.ffn) * size + weights,
        },
        "up": one_product,
        "activation": {"flops": 0, "bytes": 2 * inner.nbytes},
        "down": one_product,
        "spread": {"flops": 0, "bytes": (len(narrow) + copies) * width * size},
        "gathered": {"flops": 2 * copies * width, "bytes": (len(narrow) + copies) * width * size},
    }
    if config.latent is not None:
        steps["project"] = lambda: layer.descend(inputs.x)
        costs["project"] = {
            "flops": 2 * case.tokens * case.hidden * width,
            "bytes": (case.tokens * (case.hidden + width) + case.hidden * width) * size,
        }
    return steps, costs


def _fused(rows: Tensor, experts: Experts, counts: Tensor, inner: Tensor) -> dict[str, Callable[[], Any]]:
    """The fused kernels for each way to cut a product; a way that does not fit the GPU is left out."""
    from adamac.ops.grouped_mlp import triton as kernels

    check_fused(rows, experts.up)
    activation, found = experts.config.activation, {}
    for tiles in _TILES:

        def up(tiles: Any = tiles) -> Any:
            return kernels.up_activated(
                rows, experts.up, counts, activation, keep_inner=False, tiles=kernels.Tiles(*tiles)
            )

        def gradient(tiles: Any = tiles) -> Any:
            return kernels.down_gradient(
                rows, experts.down, counts, inner, activation, tiles=kernels.Tiles(*tiles)
            )

        for name, step in (("fused_up", up), ("fused_gradient", gradient)):
            try:
                step()
            except Exception:  # too much shared memory, above all
                continue
            found[f"{name} {'x'.join(map(str, tiles))}"] = step
    return found


# Rows, columns, step, warps and stages of a tile.
_TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4))
