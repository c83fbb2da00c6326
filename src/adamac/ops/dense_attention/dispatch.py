"""Which implementation runs: as asked, or the fastest that is right, found once for each device, dtype and head_dim."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adamac.ops.dense_attention.candidate import Candidate, first_line
from adamac.ops.dense_attention.flash4 import FLASH4
from adamac.ops.dense_attention.probe import Choice, check, choose
from adamac.ops.dense_attention.torch_kernels import KERNELS
from adamac.ops.launch import is_out_of_memory

CANDIDATES: dict[str, Candidate] = {candidate.name: candidate for candidate in (*KERNELS, FLASH4)}

_IN_CAPTURE = "'native' was used where a CUDA graph was captured before anything could be measured"

# Below so many tokens there is nothing to gain, and kernels have limits of their own at a token or two.
_SHORT = 128


class Place(NamedTuple):
    """What a choice holds for."""

    device_index: int
    dtype: torch.dtype
    head_dim: int


# Facts about this process's machine, found at first use. One thread finds them, others wait for it.
_choices: dict[Place, Choice] = {}
_verdicts: dict[tuple[str, Place], str | None] = {}
_finding = threading.RLock()


def choices() -> dict[Place, Choice]:
    """Read back what ``"auto"`` chose so far in this process, where, and why."""
    return dict(_choices)


def resolve(query: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> str:
    """Say which implementation attends these tensors; the first call for a device, dtype and head_dim measures.

    Args:
        query: ``[batch, heads, q_tokens, head_dim]``.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: Like ``key``.
        impl: ``"auto"``, or the name of an implementation, which is held to the reference at first use.

    Raises:
        ValueError: If the name is unknown, or the implementation is unfit or disagrees with the reference.
    """
    if impl == "auto":
        return _fastest(query, key, value)
    if impl not in CANDIDATES:
        raise ValueError(f"impl must be one of auto, {', '.join(CANDIDATES)}; got {impl!r}")
    reason = CANDIDATES[impl].unfit(query, key, value)
    if reason is None and impl != "native":
        reason = _verdict(impl, query)
    if reason is not None:
        raise ValueError(f"dense attention impl={impl!r} is refused: {reason}")
    return impl


def run(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> Tensor:
    """Attend with the implementation that :func:`resolve` names, or with the next fastest if it fails as it runs."""
    name = resolve(query, key, value, impl)
    try:
        return CANDIDATES[name].run(query, key, value, scale)
    except Exception as error:  # whatever a package raises at a shape or stride that it was not tried at
        if name == "native" or is_out_of_memory(error):
            raise
        if impl != "auto":
            raise RuntimeError(
                f"dense attention impl={impl!r} failed as it ran: {first_line(error)}; use impl='auto'"
            ) from error
        _dismiss(name, _place(query), f"it failed as it ran: {first_line(error)}")
    return run(query, key, value, scale, impl)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether gradients will be asked of the output; only forward passes are held to the reference."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fastest(query: Tensor, key: Tensor, value: Tensor) -> str:
    short = min(query.shape[2], key.shape[2]) < _SHORT
    if query.device.type != "cuda" or short or wants_gradient(query, key, value):
        return "native"
    name = _choice(_place(query)).impl
    # What is fastest need not be fit for every shape and stride; torch's own choice always is.
    return name if CANDIDATES[name].unfit(query, key, value) is None else "native"


def _dismiss(name: str, place: Place, reason: str) -> None:
    """Choose anew among those that were timed, without one of them."""
    with _finding:
        choice = _choices[place]
        time_ms = {other: taken for other, taken in choice.time_ms.items() if other != name}
        fastest = min(time_ms, key=lambda other: time_ms[other], default="native")
        refused = choice.refused | {name: reason}
        _choices[place] = replace(choice, impl=fastest, time_ms=time_ms, refused=refused)
        _verdicts[name, place] = reason


def _choice(place: Place) -> Choice:
    known = _choices.get(place)
    if known is not None and known.final:
        return known
    if place.dtype not in (torch.float16, torch.bfloat16):
        # Torch picks the only kernel that is not slow; trying the others at full precision takes gigabytes.
        found = Choice("native", note=f"not measured for {place.dtype}: fast kernels are for half precision")
    elif _capturing():
        found = Choice("native", note=_IN_CAPTURE, final=False)
    else:
        found = _find(place, None if known is None else known.note)
    _choices[place] = found
    return found


def _find(place: Place, note: str | None) -> Choice:
    with _finding:
        known = _choices.get(place)
        if known is not None and known.final:  # found by another thread meanwhile
            return known
        device = torch.device("cuda", place.device_index)
        try:
            found = choose(list(CANDIDATES.values()), device, place.dtype, place.head_dim)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Choice("native", note="not measured: out of memory when it was first needed")
        for name in CANDIDATES:
            _verdicts[name, place] = found.refused.get(name)
        return replace(found, note=note)


def _verdict(impl: str, query: Tensor) -> str | None:
    """Why a named implementation is refused, found at first use."""
    place = _place(query)
    with _finding:
        if (impl, place) not in _verdicts:
            if _capturing():
                return (
                    "it cannot be held to the reference while a CUDA graph is captured; call it once before"
                )
            candidate = CANDIDATES[impl]
            _verdicts[impl, place] = check(candidate, query.device, place.dtype, place.head_dim)
        return _verdicts[impl, place]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _place(query: Tensor) -> Place:
    return Place(query.device.index or 0, query.dtype, query.shape[-1])
