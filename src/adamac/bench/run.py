"""Run the benchmark of one operation at several shapes: rows as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adamac.attention import AdaCluster
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.machine import machine_stamp
from adamac.bench.attention import Sparse, compare
from adamac.bench.rows_file import append_rows, check_can_append
from adamac.bench.shapes import SHAPES, Shape


def bench_attention(
    shapes: tuple[str, ...],
    densities: tuple[float, ...],
    *,
    heads: int | None,
    rounds: int,
    device: str,
    dtype: torch.dtype,
    out: Path | None,
    key_roots: tuple[float, ...] = (),
    told: Callable[[str], object] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Time attention, dense and sparse, at shapes of real models.

    Args:
        shapes: Names in :data:`adamac.bench.shapes.SHAPES`.
        densities: Shares of the keys that each row reads; each with and without compensation.
        heads: Fewer heads than the model has, which rows then say; ``None`` means all.
        rounds: Timed rounds.
        device: Where.
        dtype: Of query, key and value.
        out: A file that rows are appended to, each as soon as its shape is done.
        key_roots: Further numbers of key clusters that compensated calls are timed with, as multiples of the root of the
            number of video tokens.
        told: Told in a line what is timed next.

    Yields:
        Rows, with the machine, versions and commit they were measured on.

    Raises:
        BadInput: If a shape is unknown, a number is out of range or the file cannot be written; nothing is timed then.
    """
    _check(shapes, densities, heads, rounds, key_roots)
    contenders = _contenders(densities, key_roots)
    if out is not None:
        check_can_append(out)
    stamp = machine_stamp(device)
    for name in shapes:
        shape = SHAPES[name] if heads is None else replace(SHAPES[name], heads=heads)
        told(f"timing {name}: {shape.tokens:,} tokens, {shape.heads} heads of {shape.head_dim}")
        for row in compare(
            shape, contenders, method=AdaCluster(), device=torch.device(device), dtype=dtype, rounds=rounds
        ):
            whole = _facts(name, shape, dtype) | row | stamp
            if out is not None:
                append_rows(out, [whole])
            yield whole


def _check(
    shapes: tuple[str, ...],
    densities: tuple[float, ...],
    heads: int | None,
    rounds: int,
    key_roots: tuple[float, ...],
) -> None:
    """Refuse what cannot be timed; see :func:`bench_attention`."""
    for what, given in (("shapes", shapes), ("densities", densities)):
        if not given:
            raise BadInput(f"{what}: expected one or more, got none")
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise BadInput(f"unknown shape {unknown[0]!r}; known are {', '.join(SHAPES)}")
    if rounds < 1:
        raise BadInput(f"rounds must be at least 1, got {rounds}")
    if heads is not None and heads < 1:
        raise BadInput(f"heads must be at least 1, got {heads}")
    for name in shapes:
        if heads is not None and heads > SHAPES[name].heads:
            raise BadInput(f"heads must be at most {SHAPES[name].heads} for {name}, got {heads}")
    if bad := [density for density in densities if not 0 < density <= 1]:
        raise BadInput(f"a density must be over 0 and at most 1, got {bad[0]}")
    if bad := [roots for roots in key_roots if not 0.1 <= roots <= 100]:
        raise BadInput(f"key roots must be from 0.1 to 100 (the default has 4), got {bad[0]}")


def _contenders(densities: tuple[float, ...], key_roots: tuple[float, ...]) -> list[Sparse]:
    """The sparse calls to time, each once.

    Raises:
        BadInput: If two of them would have one name.
    """
    densities, key_roots = tuple(dict.fromkeys(densities)), tuple(dict.fromkeys(key_roots))
    contenders = [Sparse(density, compensate) for density in densities for compensate in (True, False)]
    contenders += [Sparse(density, True, key_roots=roots) for density in densities for roots in key_roots]
    if len({each.name for each in contenders}) < len(contenders):
        raise BadInput(f"densities are told apart by whole per cents, got {', '.join(map(str, densities))}")
    return contenders


def _facts(name: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """What a row says of its shape; ``shape`` may have fewer heads than the model."""
    return {
        "benchmark": "attention",
        "shape": name,
        "what": shape.what,
        "video_tokens": shape.video,
        "text_tokens": shape.text,
        "heads": shape.heads,
        "all_heads": shape.heads == SHAPES[name].heads,
        "head_dim": shape.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": "clustered, drawn fresh each round; no model",
    }
