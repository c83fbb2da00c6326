"""The experts' activation with a program for a tile of a few rows.

A Hopper GPU that moves 4.3 TB/s has 28 instructions for each bfloat16 value that it reads and writes, and 42 for one that it reads
twice. A GELU with the library's ``erf`` takes 38, its gradient 49: they, not memory, are what one waits for. Here the tail
of the normal distribution is the density, which the gradient needs anyway, times a polynomial in ``1 / (1 + 0.27 x)`` (the form
is Abramowitz and Stegun's 7.1.26): 26 and 31. Its coefficients were fitted to the least largest *relative* error, 2.5e-8
from 0 to 16, so that, unlike with ``1 + erf``, a value far below zero has digits too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.launch import power_of_two

# Bytes of inner values that a program reads, 64 for each thread, and the most columns of its tile.
_BYTES, _COLUMNS, _WARPS = 16384, 1024, 8


def activate(inner: Tensor, activation: str, gated: bool, rows: Tensor | None) -> Tensor:
    """Compute :func:`adamac.ops.activation.activate`."""
    width = inner.shape[-1] // 2 if gated else inner.shape[-1]
    out = inner.new_empty(*inner.shape[:-1], width)
    if out.numel():
        tile = tile_of(inner, gated)
        with torch.cuda.device_of(inner):  # Triton launches on the current device
            _activation[_grid(out, tile)](
                inner.contiguous(),
                out,
                out if rows is None else rows,
                out.numel() // width,
                width,
                ACTIVATION=activation,
                GATED=gated,
                COUNTED=rows is not None,
                **tile,
            )
    return out


def gradient(inner: Tensor, wanted: Tensor, activation: str, gated: bool, rows: Tensor | None) -> Tensor:
    """Gradient of :func:`activate` in ``inner``, given that of its answers: of both halves in one pass."""
    found = torch.empty_like(inner, memory_format=torch.contiguous_format)
    if found.numel():
        width, tile = wanted.shape[-1], tile_of(inner, gated)
        with torch.cuda.device_of(inner):
            _activation_gradient[_grid(wanted, tile)](
                inner.contiguous(),
                wanted.contiguous(),
                found,
                found if rows is None else rows,
                wanted.numel() // width,
                width,
                ACTIVATION=activation,
                GATED=gated,
                COUNTED=rows is not None,
                **tile,
            )
    return found


def tile_of(inner: Tensor, gated: bool) -> dict[str, Any]:
    """How many rows and columns of answers a program computes, and with how many warps."""
    width = inner.shape[-1] // 2 if gated else inner.shape[-1]
    columns = min(_COLUMNS, power_of_two(width))
    answers = _BYTES // inner.itemsize // (2 if gated else 1)
    return {"ROWS": answers // columns, "COLUMNS": columns, "num_warps": _WARPS}


def _grid(answers: Tensor, tile: dict[str, Any]) -> tuple[int]:
    width = answers.shape[-1]
    rows = triton.cdiv(answers.numel() // width, tile["ROWS"])
    return (rows * triton.cdiv(width, tile["COLUMNS"]),)


@triton.jit(do_not_specialize=["total"])
def _activation(
    inner,
    out,
    rows,
    total,
    width,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first, left, column = _place(rows, total, width, COUNTED, ROWS, COLUMNS)
    if left > 0:
        row, inside = _inside(left, column, width, ROWS, COLUMNS)
        read = inner + first * (2 * width if GATED else width) + column
        place = row * (2 * width if GATED else width) + tl.arange(0, COLUMNS)[None, :]
        x = activated(tl.load(read + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        if GATED:
            x *= tl.load(read + width + place, mask=inside, other=0.0).to(tl.float32)
        there = out + first * width + column
        tl.store(there + row * width + tl.arange(0, COLUMNS)[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["total"])
def _activation_gradient(
    inner,
    wanted,
    found,
    rows,
    total,
    width,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first, left, column = _place(rows, total, width, COUNTED, ROWS, COLUMNS)
    if left > 0:
        row, inside = _inside(left, column, width, ROWS, COLUMNS)
        corner = first * (2 * width if GATED else width) + column
        place = row * (2 * width if GATED else width) + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(inner + corner + place, mask=inside, other=0.0).to(tl.float32)
        there = wanted + first * width + column
        given = tl.load(there + row * width + tl.arange(0, COLUMNS)[None, :], mask=inside, other=0.0)
        given = given.to(tl.float32)
        if GATED:
            up = tl.load(inner + corner + width + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(found + corner + width + place, given * activated(x, ACTIVATION), mask=inside)
            given *= up
        tl.store(found + corner + place, given * slope(x, ACTIVATION), mask=inside)


@triton.jit
def _place(rows, total, width, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row of this program, how many there are from it on, and its first column."""
    blocks = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS  # rows times width may be over 32 bits
    left = total - first
    if COUNTED:
        left = tl.minimum(left, tl.load(rows).to(tl.int64) - first)
    return first, left, tl.program_id(0) % blocks * COLUMNS


@triton.jit
def _inside(left, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of the tile, and which of its values are there."""
    row = tl.arange(0, ROWS)[:, None]
    return row, (row < left) & (tl.arange(0, COLUMNS)[None, :] < width - column)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """What experts make of a float32 value."""
    if ACTIVATION == "gelu":
        tail, _, size = _tail(x)
        x = _positive(x) - size * tail
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    else:
        x = _positive(x)
        if ACTIVATION == "relu2":
            x = x * x
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activated`."""
    if ACTIVATION == "gelu":
        tail, density, size = _tail(x)
        x = tl.where(x > 0, 1.0 - tail + size * density, tail - size * density)
    elif ACTIVATION == "silu":
        share = tl.sigmoid(x)
        x = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "relu2":
        x = 2.0 * _positive(x)
    else:
        x = tl.where(x <= 0.0, 0.0, 1.0)
    return x


@triton.jit
def _positive(x):
    return tl.where(x < 0.0, 0.0, x)  # a maximum would take what is no number for 0


@triton.jit
def _tail(x):
    """Of a normal distribution: what lies beyond ``|x|``, the density there, and ``|x|``, where it is more than 16 that."""
    size = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
    bell = tl.exp2(size * size * -0.7213475204444817)
    root = tl.rsqrt(1.0 + 0.27 * size)
    t = root * root
    tail = 0.02903861266 * t - 0.1268747561
    tail = tail * t + 0.1706176857
    tail = tail * t - 0.07019801588
    tail = tail * t + 0.1085356338
    tail = tail * t + 0.07173376936
    tail = tail * t + 0.1018952356
    tail = tail * t + 0.1075304218
    tail = tail * t + 0.1077214251
    return tail * t * bell, 0.3989422804014327 * bell, size
