"""Grouped products that apply an activation, or its gradient, to the tile that they hold before it is written.

A program computes a tile of rows of one group. Which one it is it finds out itself from the numbers of rows, so that the host need
not know them: there are as many programs as there could be tiles. Tiles of operands are fetched by the tensor memory
accelerator through descriptors; a tile over the end of its group computes rows of the next in vain and does not write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from adamac.ops.activation.triton import activated, slope
from adamac.ops.launch import interpreted, power_of_two


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: Rows of a tile.
        columns: Columns of a tile.
        step: Values of the inner axis that are fetched at once.
        warps: Warps of a program.
        stages: Steps in flight.
    """

    rows: int = 128
    columns: int = 128
    step: int = 64
    warps: int = 8
    stages: int = 3


# Two programs with these share a processor of a Hopper GPU: one computes while the other applies the activation and writes.
TILES = Tiles()
_INTERPRETED = Tiles(16, 16, 16, 4, 1)


def grouped_mlp(rows: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str) -> Tensor:
    """Compute :func:`adamac.ops.grouped_mlp.grouped_mlp`."""
    keeps = torch.is_grad_enabled() and any(given.requires_grad for given in (rows, up, down))
    return _Mlp.apply(rows, up, down, counts, activation, keeps)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str, keeps: bool
    ) -> Tensor:
        inner, active = up_activated(rows, up, counts, activation, keep_inner=keeps)
        ends = counts.cumsum(0, dtype=torch.int32)
        if keeps:
            ctx.activation = activation
            ctx.save_for_backward(rows, up, down, counts, ends, inner, active)
        return torch.nn.functional.grouped_mm(active, down, offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, counts, ends, inner, active = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        product = torch.nn.functional.grouped_mm
        of_inner = down_gradient(gradient, down, counts, inner, ctx.activation)
        of_rows, of_up, of_down = None, None, None
        if ctx.needs_input_grad[0]:
            of_rows = product(of_inner, up.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            of_up = product(rows.T, of_inner, offs=ends)
        if ctx.needs_input_grad[2]:
            of_down = product(active.T, gradient, offs=ends)
        return of_rows, of_up, of_down, None, None, None


def up_activated(
    rows: Tensor,
    up: Tensor,
    counts: Tensor,
    activation: str,
    *,
    keep_inner: bool,
    tiles: Tiles = TILES,
) -> tuple[Tensor | None, Tensor]:
    """Multiply each group's rows by its matrix and apply the activation.

    Returns:
        What the activation was applied to, if it is to be kept, and what came of it: ``[n, inner]`` each.
    """
    width, tiles = up.shape[2], _INTERPRETED if interpreted() else tiles
    active = rows.new_empty(len(rows), width)
    inner = torch.empty_like(active) if keep_inner else None
    kept = active if inner is None else inner
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _up_activated[_grid(len(rows), len(up), width, tiles)](
            TensorDescriptor.from_tensor(rows.contiguous(), [tiles.rows, tiles.step]),
            TensorDescriptor.from_tensor(up.contiguous(), [1, tiles.step, tiles.columns]),
            TensorDescriptor.from_tensor(kept, [tiles.rows, tiles.columns]),
            TensorDescriptor.from_tensor(active, [tiles.rows, tiles.columns]),
            kept,
            active,
            counts,
            rows.shape[1],
            width,
            len(up),
            ACTIVATION=activation,
            KEEP=keep_inner,
            **_shape(len(up), tiles),
        )
    return inner, active


def down_gradient(
    gradient: Tensor, down: Tensor, counts: Tensor, inner: Tensor, activation: str, *, tiles: Tiles = TILES
) -> Tensor:
    """Take the gradient of the answers back through the second product and the activation: ``[n, inner]``."""
    width, tiles = down.shape[1], _INTERPRETED if interpreted() else tiles
    found = torch.empty_like(inner)
    with torch.cuda.device_of(gradient):
        _down_gradient[_grid(len(gradient), len(down), width, tiles)](
            TensorDescriptor.from_tensor(gradient, [tiles.rows, tiles.step]),
            TensorDescriptor.from_tensor(down.contiguous(), [1, tiles.columns, tiles.step]),
            TensorDescriptor.from_tensor(inner, [tiles.rows, tiles.columns]),
            TensorDescriptor.from_tensor(found, [tiles.rows, tiles.columns]),
            found,
            counts,
            gradient.shape[1],
            width,
            len(down),
            ACTIVATION=activation,
            **_shape(len(down), tiles),
        )
    return found


def _grid(rows: int, groups: int, width: int, tiles: Tiles) -> tuple[int]:
    """As many programs as there can be tiles: each group may end in the middle of one."""
    most = min(rows, triton.cdiv(rows, tiles.rows) + groups)
    return (most * triton.cdiv(width, tiles.columns),)


def _shape(groups: int, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "GROUPS": power_of_two(groups),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "STEP": tiles.step,
        "UPCAST": interpreted(),  # numpy, which interprets, knows no bfloat16
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


@triton.jit
def _up_activated(
    rows,
    matrices,
    inner_tiles,
    active_tiles,
    inner,
    active,
    counts,
    depth,
    width,
    groups,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    group, first, end = _place(counts, groups, tl.program_id(0) // blocks, GROUPS, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS
    if group < groups:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, STEP):
            a = rows.load([first, start])
            b = matrices.load([group, start, column]).reshape(STEP, COLUMNS)
            total = _product(a, b, total, UPCAST)
        if KEEP:
            _write(total, inner_tiles, inner, first, end, column, width, ROWS, COLUMNS)
        total = activated(total, ACTIVATION)
        _write(total, active_tiles, active, first, end, column, width, ROWS, COLUMNS)


@triton.jit
def _down_gradient(
    gradient,
    matrices,
    inner_tiles,
    found_tiles,
    found,
    counts,
    depth,
    width,
    groups,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    group, first, end = _place(counts, groups, tl.program_id(0) // blocks, GROUPS, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS
    if group < groups:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, STEP):
            a = gradient.load([first, start])
            b = matrices.load([group, column, start]).reshape(COLUMNS, STEP)
            total = _product(a, b.T, total, UPCAST)
        total *= slope(inner_tiles.load([first, column]).to(tl.float32), ACTIVATION)
        _write(total, found_tiles, found, first, end, column, width, ROWS, COLUMNS)


@triton.jit
def _place(counts, groups, tile, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The group of a tile, or one beyond the last; its first row, and the end of the group."""
    lane = tl.arange(0, GROUPS)
    number = tl.load(counts + lane, mask=lane < groups, other=0).to(tl.int32)
    tiles = (number + ROWS - 1) // ROWS
    after = tl.cumsum(tiles, 0)
    group = tl.sum((after <= tile).to(tl.int32), 0)
    mine = lane == group
    end = tl.sum(tl.where(mine, tl.cumsum(number, 0), 0), 0)
    first = end - tl.sum(tl.where(mine, number, 0), 0)
    first += (tile - tl.sum(tl.where(mine, after - tiles, 0), 0)) * ROWS
    return group, first, end


@triton.jit
def _product(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _write(values, tiles, there, first, end, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile as a whole, or where its group ends within it, the rows that are the group's."""
    values = values.to(there.dtype.element_ty)
    if first + ROWS <= end:
        tiles.store([first, column], values)
    else:
        row, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        inside = (row < end - first)[:, None] & (columns < width - column)[None, :]
        corner = there + first.to(tl.int64) * width + column
        tl.store(corner + row[:, None] * width + columns[None, :], values, mask=inside)
