"""Whether the Hopper kernel may be used: it has to fit the tensors, compile with the installed Triton, and agree.

Gluon, the language that it is written in, is young and changes between releases. So the kernel is tried once for each
device, dtype and head dimension, on a small case with every feature, and held to the reference by the rule of
:mod:`adamac.ops.error_budget`. If it does not compile or errs more, it is not used, and the reason can be read back.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from adamac.ops.error_budget import over_budget
from adamac.ops.launch import capability, interpreted
from adamac.ops.segment import Segments


def hopper_problem(query: Tensor) -> str | None:
    """Say why the Hopper kernel cannot be used for a query, or ``None`` if it can.

    The first call for a device, dtype and head dimension runs the check, which takes a second or two. While a CUDA graph
    is captured nothing can be checked; a kernel that was never checked is then not used.
    """
    if interpreted():
        return "Triton's interpreter does not know Gluon"
    index = query.device.index if query.device.index is not None else torch.cuda.current_device()
    if capability(index)[0] != 9:
        return f"the GPU has compute capability {'.'.join(map(str, capability(index)))}, the kernel is for 9.0 (Hopper)"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"the kernel takes head_dim 64 and 128, not {query.shape[-1]}"
    if any(stride % 8 for stride in query.stride()[:3]) or query.data_ptr() % 16:
        return "the kernel needs rows that begin at multiples of 16 bytes"
    place = (index, query.dtype, query.shape[-1])
    if torch.cuda.is_current_stream_capturing() and place not in _checked:
        return "the kernel has not been checked before the CUDA graph was captured"
    _checked.add(place)
    return _check(*place)


_checked: set[tuple[int, torch.dtype, int]] = set()


@functools.cache
def _check(index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run a small case of everything and compare."""
    from adamac.ops.cluster_attention.reference import reference
    from adamac.ops.cluster_attention.triton import triton_cluster_attention

    device = torch.device("cuda", index)
    draw = torch.Generator(device).manual_seed(0)
    shape, q_clusters, k_clusters = (2, 3, 700, head_dim), 7, 150
    query, key, value = (
        torch.randn(2, 700, 3, head_dim, device=device, generator=draw).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    queries = Segments(
        torch.randint(-1, q_clusters - 1, shape[:3], device=device, generator=draw), q_clusters
    )
    keys = Segments(torch.randint(-1, k_clusters - 1, shape[:3], device=device, generator=draw), k_clusters)
    share = torch.rand(2, 3, q_clusters, k_clusters, device=device, generator=draw) * 3 - 1
    share[:, :, 0], share[:, :, 1] = 1, 0
    reads = (share.clamp(0, 1) * keys.counts.unsqueeze(-2)).round().long()
    clusters = (queries, keys, reads)
    for compensate in (True, False):
        options = {"compensate": compensate, "scale": 2 * head_dim**-0.5}
        launch = functools.partial(
            triton_cluster_attention, query, key, value, *clusters, most=None, **options
        )
        try:
            output, lse = launch(impl="hopper")
            plain, _ = launch(impl="triton")
        except Exception as error:  # whatever a compiler may raise: the other kernel is there
            return f"it does not run with the installed Triton: {type(error).__name__}: {str(error).splitlines()[-1:]}"
        oracle, oracle_lse = reference(query.double(), key.double(), value.double(), *clusters, **options)
        problem = over_budget(output, oracle, plain)
        if problem is not None or not torch.allclose(lse.double(), oracle_lse, atol=1e-2):
            return f"it disagrees with the reference: {problem or 'log-sum-exp'}"
    return None
