"""Which kernels may attend a query: they have to fit it, compile with the installed Triton, and agree with the reference.

A kernel is tried once for each device, dtype and head dimension, on a small case with every feature, and held to the
reference by the rule of :mod:`adamac.ops.error_budget`. One that does not compile or errs too much is not used, and the
reason can be read back. The same becomes of one that fails later, as it runs. Gluon above all, which the Hopper kernel is written in, is young and changes between releases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.error_budget import over_budget
from adamac.ops.launch import capability, interpreted, is_out_of_memory, triton_problem
from adamac.ops.segment import Segments

KERNELS = ("hopper", "triton")
"""Kernels, the one that is preferred first."""

# Verdicts of this process, found at first use.
_verdicts: dict[tuple[str, int, torch.dtype, int], str | None] = {}


def problem(impl: str, query: Tensor) -> str | None:
    """Say why a kernel cannot attend a query, or ``None`` if it can.

    The first call for a device, dtype and head dimension runs the check, which takes some seconds of compiling and waits
    for the device. While a CUDA graph is captured nothing can be checked; what was never checked is then not used.

    Args:
        impl: ``"triton"`` or ``"hopper"``.
        query: ``[batch, heads, q_tokens, head_dim]``.
    """
    found = triton_problem(query.device, query.dtype)
    if found is None and impl == "hopper":
        found = _unfit_for_hopper(query)
    place = _place(impl, query)
    if found is not None or (interpreted() and place not in _verdicts):
        return found
    if place not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return "it has not been checked before the CUDA graph was captured"
        try:
            _verdicts[place] = _check(impl, query)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return "out of memory when it was to be checked"  # not kept: another time there may be room
    return _verdicts[place]


def dismiss(impl: str, query: Tensor, error: Exception) -> None:
    """Take down that a kernel failed as it ran although it had been found fit; it is not used again for such queries."""
    _verdicts[_place(impl, query)] = f"it failed as it ran: {in_one_line(error)}"


def in_one_line(error: Exception) -> str:
    """Name an error in one line of some 200 characters; what a compiler means stands in its last."""
    last = (str(error).strip().splitlines() or [""])[-1][:200]
    return f"{type(error).__name__}: {last}"


def _place(impl: str, query: Tensor) -> tuple[str, int, torch.dtype, int]:
    return impl, query.device.index or 0, query.dtype, query.shape[-1]


def _unfit_for_hopper(query: Tensor) -> str | None:
    if interpreted():
        return "Triton's interpreter does not know Gluon"
    found = capability(query.device.index or 0)
    if found[0] != 9:
        return f"the GPU has compute capability {found[0]}.{found[1]}, the kernel is for 9.0 (Hopper)"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"the kernel takes head_dim 64 and 128, not {query.shape[-1]}"
    if any(stride % 8 for stride in query.stride()[:3]) or query.data_ptr() % 16:
        return "the kernel needs rows that begin at multiples of 16 bytes"
    return None


def _check(impl: str, query: Tensor) -> str | None:
    """Run a small case of everything and compare: ragged and empty clusters, padding, all read, nothing read."""
    from adamac.ops.cluster_attention.reference import reference
    from adamac.ops.cluster_attention.triton import triton_cluster_attention

    device, dtype, head_dim = query.device, query.dtype, query.shape[-1]
    draw = torch.Generator(device).manual_seed(0)
    q_clusters, k_clusters = 7, 150

    def tokens() -> Tensor:
        drawn = torch.randn(2, 700, 3, head_dim, device=device, generator=draw)
        return drawn.to(dtype).transpose(1, 2)

    def clusters(number: int) -> Segments:
        labels = torch.randint(-1, number - 1, (2, 3, 700), device=device, generator=draw)
        return Segments(labels, number)

    inputs = tokens(), tokens(), tokens(), clusters(q_clusters), clusters(k_clusters)
    share = torch.rand(2, 3, q_clusters, k_clusters, device=device, generator=draw) * 3 - 1
    share[:, :, 0], share[:, :, 1] = 1, 0
    reads = (share.clamp(0, 1) * inputs[4].counts.unsqueeze(-2)).round().long()
    wide = [part.double() for part in inputs[:3]]
    for compensate in (True, False):
        options = {"compensate": compensate, "scale": 2 * head_dim**-0.5}
        try:
            output, lse = triton_cluster_attention(*inputs, reads, max_reads=None, impl=impl, **options)
        except Exception as error:  # whatever a compiler may raise: there is another implementation
            if is_out_of_memory(error):
                raise
            return f"it does not run with the installed Triton: {in_one_line(error)}"
        oracle, oracle_lse = reference(*wide, *inputs[3:], reads, **options)
        rounded, _ = reference(*inputs, reads, **options)
        wrong = over_budget(output, oracle, rounded)
        if wrong is None and not torch.allclose(lse.double(), oracle_lse, atol=1e-2):
            wrong = "the log-sum-exp is off"
        if wrong is not None:
            return f"it disagrees with the reference: {wrong}"
    return None
