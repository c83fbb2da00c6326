"""Claims about sparse attention on a GPU: nobody waits for the device, and a graph can hold a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamac.attention import AdaCluster, Layout, Tokens, TopK, TopP, attend
from adamac.testing import attention_like

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHOD = AdaCluster(budget=Tokens(0.2))
LAYOUTS = {
    "video": Layout.video_only(1500),
    "text after": Layout(1500, 0, 1440),
    "text before": Layout(1500, 60, 1500),
}


@pytest.fixture
def tensors():
    return attention_like(1, 3, 1500, 64, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_first_step_never_waits_for_the_device_once_there_was_one_like_it(tensors, layout):
    METHOD(*tensors[:2], layout=layout)  # compiles, and brings the random numbers of its seed
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = METHOD(*tensors[:2], layout=layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plan.check()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("budget", [Tokens(0.2), TopK(0.25), TopP(0.8)], ids=["tokens", "top-k", "top-p"])
def test_a_later_step_never_waits_for_the_device(tensors, layout, budget):
    method = replace(METHOD, budget=budget)

    def step(previous):
        plan = method(*tensors[:2], layout=layout, previous=previous)
        return attend(*tensors, plan), plan.carried()

    _, former = step(None)
    step(former)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = step(former)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all()


def test_a_step_without_room_says_so_and_the_next_one_with_room_gives_the_same_bits():
    tensors = attention_like(1, 16, 8192, 64, dtype=torch.bfloat16, device="cuda")
    former = METHOD(*tensors[:2]).carried()

    def step():
        return attend(*tensors, METHOD(*tensors[:2], previous=former))

    expected = step()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(held)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(step(), expected)


def test_a_graph_of_a_step_replays_to_the_same_bits_on_other_tensors(tensors):
    query, key, value = (tensor.clone() for tensor in tensors)
    former = METHOD(query, key).carried()

    def step():
        return attend(query, key, value, METHOD(query, key, previous=former))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        for mine, other in zip(
            (query, key, value), attention_like(1, 3, 1500, 64, seed=seed, device="cuda"), strict=True
        ):
            mine.copy_(other)
        graph.replay()
        assert torch.equal(captured, step())


def test_other_numbers_of_clusters_compile_nothing(tensors):
    from adamac.ops.cluster_attention import hopper_kernels, kernels
    from adamac.ops.fill import triton as fill
    from adamac.ops.kmeans import triton as kmeans
    from adamac.ops.segment import triton as segment

    jitted = (kernels.attend_kernel, kernels.list_kernel, kernels.pack_kernel, hopper_kernels.attend_kernel)
    jitted += (fill._fill, kmeans._nearest, kmeans._directions, segment._moments)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in jitted for cache in kernel.device_caches.values())

    def run(clusters):
        method = replace(
            METHOD, query_clusters=clusters // 4, key_clusters=clusters, outlier_factor=float("inf")
        )
        attend(*tensors, method(*tensors[:2], previous=method(*tensors[:2]).carried()))

    run(140)
    before = compiled()
    for clusters in (129, 144, 150, 191):
        run(clusters)
    assert compiled() == before
